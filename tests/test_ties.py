"""The first of equal scores: a sparse attention that does not depend on how long a row is."""

import pytest
import torch
import transformers

from common.config import RLConfig
from common.models.loading import load_policy
from common.models.ties import settle_ties
from tests.architectures import make


@pytest.mark.parametrize("architecture", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
@torch.no_grad()
def test_a_prefix_has_the_logits_that_it_has_in_a_longer_row(architecture, tmp_path):
    make(architecture, tmp_path)
    ids = torch.randint(20, 200, (2, 100), generator=torch.Generator().manual_seed(0))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert not torch.allclose(plain(ids).logits[:, :60], plain(ids[:, :60]).logits, atol=1e-3)
    model = load_policy(str(tmp_path), RLConfig(model=str(tmp_path)), dtype=torch.float32)
    whole = model(ids, use_cache=False).logits
    assert torch.allclose(whole[:, :60], model(ids[:, :60], use_cache=False).logits, atol=1e-5)
    cache = transformers.DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([60, *[1] * 40], dim=1)]
    assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-4)


class BadIndexer(torch.nn.Module):
    def forward(self, scores):
        return scores.topk(2).indices if scores.dim() == 1 else 1 / 0


def test_the_first_of_equals_is_taken_inside_an_indexer_alone_and_after_an_error_too():
    indexer = BadIndexer()
    settle_ties(indexer)
    scores = torch.tensor([0.0, 3.0] + [0.0] * 500)
    plain = scores.topk(2).indices.tolist()
    assert indexer(scores).tolist() == [1, 0]
    with pytest.raises(ZeroDivisionError):
        indexer(scores[None])
    assert scores.topk(2).indices.tolist() == plain
    assert torch.overrides._len_torch_function_stack() == 0
