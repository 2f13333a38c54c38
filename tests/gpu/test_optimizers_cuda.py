"""Optimizers on a GPU: the same training as on the CPU, and memory on the device that is what the plan counts."""

from copy import deepcopy

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from common.config import RLConfig
from common.models.pool import ModelPool
from common.update.learner import Learner
from common.update.optimizers import bytes_per_weight

pytestmark = pytest.mark.gpu

WIDTH = 4096  # 32 MiB a matrix in bfloat16
DEPTH = 6


def layers(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))).to(dtype)


def train(module: nn.Module, optimizer: str, device: str, *, offload: str = "never", steps: int = 3) -> Learner:
    """A few steps of two micro-batches each; between them the model leaves the device if it may."""
    learner, accelerator = Learner("policy", module, RLConfig(optimizer=optimizer, learning_rate=1e-3)), Accelerator()
    pool = ModelPool(torch.device(device), offload)
    pool.add("policy", module, optimizer=learner.optimizer)
    inputs = torch.linspace(-1, 1, WIDTH, device=device, dtype=next(module.parameters()).dtype)[None]
    for step in range(1, steps + 1):
        with pool.use("policy", train=True) as model:
            with learner._gradients_leave():
                for sign in (1, -2):
                    (model(sign * inputs).float() - 1).square().mean().backward()
            learner.optimizer_step(step, accelerator)
        pool.evict()
    return learner


def test_masters_on_the_host_learn_what_they_learn_without_a_gpu():
    on_cpu, on_gpu = layers(torch.bfloat16), layers(torch.bfloat16)
    train(on_cpu, "adamw_host", "cpu")
    learner = train(on_gpu, "adamw_host", "cuda")
    assert learner.optimizer._staging is not None
    for one, other in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert torch.equal(other.cpu(), learner.optimizer.masters[other].bfloat16())
        # Adam's first steps are a learning rate long, whichever way rounding tips the smallest gradients.
        assert (one.float() - other.float().cpu()).abs().mean() < 2e-4


def test_offload_gives_the_same_bits():
    weights = []
    for offload in ("always", "never"):
        module = layers(torch.bfloat16)
        train(module, "adamw_host", "cuda", offload=offload)
        weights.append([parameter.detach().cpu() for parameter in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_host", "adamw_8bit"])
def test_a_step_needs_on_the_device_what_is_said_of_a_weight(optimizer):
    dtype = torch.bfloat16 if optimizer == "adamw_host" else torch.float32
    module = layers(dtype)
    numel = sum(parameter.numel() for parameter in module.parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    learner = train(module, optimizer, "cuda", steps=1)
    torch.cuda.reset_peak_memory_stats()
    inputs = torch.ones(1, WIDTH, device="cuda", dtype=dtype)
    with learner._gradients_leave():
        module(inputs).float().mean().backward()
    learner.optimizer_step(2, Accelerator())
    said = bytes_per_weight(optimizer, dtype).device * numel
    largest = 3 * WIDTH * WIDTH * dtype.itemsize  # gradients on their way to the host
    peak = torch.cuda.max_memory_allocated() - before
    assert said <= peak + 2**20 and peak <= said + (largest if optimizer == "adamw_host" else 0) + 2**26


def test_a_fused_step_goes_on_after_its_state_was_loaded_with_the_weights_on_the_cpu():
    first = layers(torch.float32)
    learner = train(first, "adamw", "cuda", steps=1)
    second = deepcopy(first).cpu()
    resumed = Learner("policy", second, learner.config)
    resumed.load_optimizer(deepcopy(learner.optimizer.state_dict()))
    pool = ModelPool(torch.device("cuda"), "never")
    pool.add("policy", second, optimizer=resumed.optimizer)
    for each, module in ((learner, first), (resumed, second)):
        inputs = torch.ones(1, WIDTH, device="cuda")
        with pool.use("policy", train=True):
            module(inputs).square().mean().backward()
            each.optimizer_step(2, Accelerator())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
