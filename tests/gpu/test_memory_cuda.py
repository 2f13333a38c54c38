"""What the memory plan assumes of a GPU, measured: common/memory/constants.py. Written without one, and never run."""

import subprocess
import sys

import pytest
import torch

from common.memory import constants
from common.memory.start import plan_of
from common.models.loading import load_policy
from GRPO.grpo_trainer import GRPOConfig
from tests.imports import ROOT
from tests.toy import toy_trainer

pytestmark = pytest.mark.gpu

CONTEXT = """
import torch
free, total = torch.cuda.mem_get_info()
a = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
(a @ a).sum().backward()
torch.cuda.synchronize()
after, _ = torch.cuda.mem_get_info()
print(total - after - torch.cuda.memory_reserved(), total - free)
"""


def test_the_context_is_no_larger_than_assumed():
    done = subprocess.run([sys.executable, "-c", CONTEXT], cwd=ROOT, capture_output=True, text=True, check=True)
    outside_torch, _ = map(int, done.stdout.split())
    assert outside_torch <= constants.CUDA_CONTEXT, f"CUDA_CONTEXT: measured {outside_torch / 1e9:.2f} GB"


def test_the_peak_of_a_run_is_within_15_percent_of_the_plan(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", sampler="transformers", dtype="bfloat16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    unseen = ("CUDA context", "fragmentation")
    planned = sum(size for name, size in trainer.plan.peak.device.items() if name not in unseen)
    assert torch.cuda.max_memory_allocated() <= 1.15 * planned


def test_reserved_memory_that_no_tensor_has_is_no_more_than_assumed(tmp_path, toy_folder):
    config = GRPOConfig(model=str(toy_folder), use_lora=False, sampler="transformers")
    model = load_policy(str(toy_folder), config, dtype=torch.bfloat16).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    for length in range(64, 2048, 61):
        model(torch.zeros(8, length, dtype=torch.int64, device="cuda")).logits.sum().backward()
    reserved, taken = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    assert reserved - taken <= max(constants.FRAGMENTATION * taken, 64 * 2**20), f"measured {reserved / taken - 1:.0%}"
    assert plan_of(config, model).fits
