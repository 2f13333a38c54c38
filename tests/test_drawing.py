import math

import pytest
import torch

from common.sampling.drawing import draw, uniform


@pytest.mark.parametrize("vocabulary", [5, 2**18 + 1])
def test_a_token_is_drawn_where_its_share_of_the_unit_interval_lies(vocabulary):
    # Shares 1/8, 0, 1/2, 1/4, 1/8 of the first tokens begin at 0, 1/8, 1/8, 5/8 and 7/8.
    logits = torch.full((6, vocabulary), -math.inf)
    logits[:, [0, 2, 3, 4]] = torch.tensor([0.125, 0.5, 0.25, 0.125]).log() + 7
    noise = torch.tensor([0.0, 0.124, 0.126, 0.624, 0.626, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, noise).tolist() == [0, 0, 2, 2, 3, 4]
    assert logits[:, 0].tolist() == pytest.approx([math.log(0.125)] * 6)  # they are log-probs now


def test_rows_drawn_in_parts_are_those_drawn_alone():
    logits, noise = torch.randn(20, 40_000), uniform((20,), torch.Generator().manual_seed(0))
    alone = [int(draw(row[None].clone(), number[None])) for row, number in zip(logits, noise, strict=True)]
    assert draw(logits, noise).tolist() == alone


def test_noise_is_the_same_at_once_and_one_number_at_a_time():
    generator = torch.Generator().manual_seed(3)
    one_by_one = [uniform((), generator) for _ in range(70)]
    assert torch.equal(torch.stack(one_by_one), uniform((70,), torch.Generator().manual_seed(3)))
