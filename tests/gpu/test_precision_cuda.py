"""Log-probs on a GPU against float64 on the CPU, in the project's own path (the fused head)."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from common.config import RLConfig
from common.logprobs import token_logprobs
from common.models.loading import load_policy, load_reference
from common.update.batches import forward_context

pytestmark = pytest.mark.gpu


@pytest.fixture
def exact(tiny_folder, rollouts):
    """(B, C) float64 log-probs from the definition."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)
    ids, prompt_lengths = rollouts.sequences()
    with torch.no_grad():
        logprobs = F.log_softmax(model(ids).logits / 0.7, dim=-1)
    found = torch.zeros(rollouts.completion_ids.shape, dtype=torch.float64)
    for row in range(len(rollouts)):
        for t in range(int(rollouts.lengths[row])):
            place = int(prompt_lengths[row]) + t
            found[row, t] = logprobs[row, place - 1, ids[row, place]]
    return found


@pytest.mark.parametrize(("dtype", "largest", "mean"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 5e-2, 5e-3)])
def test_logprobs_are_within_the_precision(tiny_folder, rollouts, exact, dtype, largest, mean):
    policy = load_policy(str(tiny_folder), RLConfig(temperature=0.7), dtype=dtype).to("cuda")
    on_device = rollouts.to(torch.device("cuda"))
    with forward_context(torch.device("cuda"), dtype):
        logprobs, _ = token_logprobs(policy, on_device, 0.7)
    error = (logprobs.detach().cpu().double() - exact)[rollouts.completion_mask]
    assert error.abs().max() < largest
    assert error.mean().abs() < mean


def test_passes_with_and_without_gradient_agree_to_the_last_bit(tiny_folder, rollouts):
    policy = load_policy(str(tiny_folder), RLConfig(), dtype=torch.bfloat16).to("cuda")
    on_device = rollouts.to(torch.device("cuda"))
    with forward_context(torch.device("cuda"), torch.bfloat16):
        trained, _ = token_logprobs(policy, on_device, 1.0)
        with torch.no_grad():
            looked, _ = token_logprobs(policy, on_device, 1.0)
    assert torch.equal(trained.detach(), looked)


@pytest.mark.parametrize("use_lora", [False, True])
def test_the_kl_is_exactly_zero_before_the_first_update(tiny_folder, rollouts, use_lora):
    config = RLConfig(use_lora=use_lora, kl_coef=0.1)
    policy = load_policy(str(tiny_folder), config, dtype=torch.bfloat16).to("cuda")
    on_device = rollouts.to(torch.device("cuda"))
    with forward_context(torch.device("cuda"), torch.bfloat16), torch.no_grad():
        ours, _ = token_logprobs(policy, on_device, 1.0)
        if use_lora:
            with policy.disable_adapter():
                theirs, _ = token_logprobs(policy, on_device, 1.0)
        else:
            theirs, _ = token_logprobs(load_reference(str(tiny_folder), config).to("cuda"), on_device, 1.0)
    assert torch.equal(ours, theirs)
