"""A base in 4 bits on a GPU: it moves with its scales, takes less memory, and trains."""

from pathlib import Path

import pytest
import torch

from common.config import RLConfig
from common.models.loading import load_policy
from common.models.pool import ModelPool
from common.models.quantization import in_floating_point, is_quantized, scales
from tests.toy import metrics_of, save_toy_policy, toy_trainer

pytestmark = pytest.mark.gpu
bitsandbytes = pytest.importorskip("bitsandbytes")
LORA = {"use_lora": True, "lora_r": 4, "lora_alpha": 8, "load_in_4bit": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_toy_policy(tmp_path_factory.mktemp("quantized") / "policy", hidden_size=256, intermediate_size=512)


def test_packed_weights_and_scales_go_to_the_device_and_home_again(folder):
    model = load_policy(str(folder), RLConfig(model=str(folder), **LORA), dtype=torch.bfloat16)
    weight = next(weight for weight in model.parameters() if is_quantized(weight))
    before = in_floating_point(weight).float().clone()
    pool = ModelPool(torch.device("cuda"), "always")
    pool.add("policy", model)
    pool.add("other", torch.nn.Linear(2, 2))
    with pool.use("policy") as module:
        assert all(tensor.is_cuda for tensor in [*module.parameters(), *scales(module)])
        torch.testing.assert_close(in_floating_point(weight).float().cpu(), before, atol=1e-2, rtol=1e-2)
        module(torch.arange(3, 40, device="cuda")[None]).logits.float().sum().backward()
    with pool.use("other"):
        assert not any(tensor.is_cuda for tensor in [*model.parameters(), *scales(model)])
        assert torch.equal(in_floating_point(weight).float(), before)


def test_offload_changes_no_number_of_a_quantized_run(folder, tmp_path):
    lines = []
    for offload in ("never", "always"):
        toy_trainer(folder, tmp_path / offload, offload=offload, kl_coef=0.1, eval_every=1, **LORA).train()
        lines.append(metrics_of(tmp_path / offload))
    assert lines[0] == lines[1] and lines[0][1]["policy/grad_norm"] > 0
