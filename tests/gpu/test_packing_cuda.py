"""Packed rows on a GPU, in flash attention of rows of unequal length, against padded rows in float32."""

import pytest
import torch

from common.config import RLConfig
from common.logprobs import token_logprobs
from common.models.loading import load_policy
from common.packed_attention import has_varlen
from common.packing import packing_of
from common.sequences import Sequences
from common.update.batches import forward_context
from tests.test_packing import SKEWED, batch, gradients, padded

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


@pytest.fixture
def policy(tiny_folder):
    if not has_varlen():
        pytest.skip("flash attention needs an Ampere GPU or a later one")
    config = RLConfig(gradient_checkpointing=True)
    return load_policy(str(tiny_folder), config, dtype=torch.float32).to(DEVICE)


def test_packed_rows_have_the_log_probs_and_the_gradient_of_padded_ones(policy):
    rows = batch(*SKEWED).to(DEVICE)
    exact, _ = padded(token_logprobs, policy, rows, 1.0)  # float32: no flash attention
    expected = gradients(policy, exact)
    with forward_context(DEVICE, torch.bfloat16):
        assert Sequences.of(rows, packing_of(policy)).packed_rows is not None
        found, _ = token_logprobs(policy, rows, 1.0)
        rounded, _ = padded(token_logprobs, policy, rows, 1.0)
    assert (found - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-2
    found, rounded = gradients(policy, found), gradients(policy, rounded)
    assert (found - expected).norm() <= 2 * (rounded - expected).norm() + 1e-3 * expected.norm()


def test_rows_are_padded_in_float32(policy):
    assert packing_of(policy) is None
