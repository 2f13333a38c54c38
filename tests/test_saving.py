"""The folder of a policy is the policy, with LoRA and without, whatever its weights are called in memory."""

import pytest
import torch

from common.embedded.policy import build_tokenizer
from common.models.saving import save_model
from tests.layouts import CONFIGS, loaded, logits, on_disk, small_model, with_lora

# Peft says so where it wraps experts, and where all layers keep (in, out).
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "kimi_linear"])  # its kernels need a GPU
@pytest.mark.parametrize("lora", [False, True])
def test_the_saved_model_computes_what_the_policy_computes(kind, lora, tmp_path):
    model = small_model(kind)
    names = set(model.state_dict())
    policy = with_lora(model) if lora else model
    save_model(policy, build_tokenizer(), tmp_path)
    torch.testing.assert_close(logits(loaded(tmp_path)), logits(policy), atol=1e-5, rtol=0)
    assert (tmp_path / "adapter").exists() is lora
    if kind in ("mixtral", "gpt_neox", "deepseek_v3"):
        assert not on_disk(tmp_path).keys() <= names  # in the layout of the checkpoint
