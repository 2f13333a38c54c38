"""ModelPool on a GPU: same bits, and memory that really falls."""

import pytest
import torch
from torch import nn

from common.models.pool import ModelPool

pytestmark = pytest.mark.gpu

WIDTH = 2048  # 16 MiB a matrix in float32, well above what the allocator rounds to


def train(offload: str, steps: int = 3) -> tuple[list[torch.Tensor], ModelPool]:
    device = torch.device("cuda")
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
    ref = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    pool = ModelPool(device, offload)
    pool.add("policy", policy, optimizer=optimizer)
    pool.add("ref", ref)
    inputs = torch.linspace(-1, 1, WIDTH, device=device)[None, :]
    for _ in range(steps):
        with torch.no_grad(), pool.use("ref") as model:
            target = model(inputs)
        with pool.use("policy", train=True) as model:
            (model(inputs) - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    pool.evict()
    state = [value for p in policy.parameters() for value in optimizer.state[p].values()]
    return [tensor.detach().cpu().clone() for tensor in [*policy.parameters(), *state]], pool


def test_offload_gives_the_same_bits():
    always, never = train("always")[0], train("never")[0]
    assert all(torch.equal(one, other) for one, other in zip(always, never, strict=True))


def test_memory_falls_to_nothing_when_everybody_is_home():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    _, pool = train("always")
    assert torch.cuda.memory_allocated() - before < 4 * WIDTH * 8  # the input and its row of gradients at most
    with pool.use("ref"):
        assert torch.cuda.memory_allocated() - before >= 4 * WIDTH * WIDTH
    pool.evict()
    assert torch.cuda.memory_allocated() - before < 4 * WIDTH * 8


def test_the_peak_is_that_of_one_tenant():
    peaks = {}
    for offload in ("always", "never"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _, pool = train(offload)
        peaks[offload] = torch.cuda.max_memory_allocated() - before
        del pool
    assert peaks["never"] - peaks["always"] >= 0.9 * 4 * WIDTH * WIDTH  # the reference is not there with the policy


def test_homes_are_pinned_and_kept():
    _, pool = train("always")
    with pool.use("ref") as model:
        pass
    pool.evict()
    home = model.weight.data_ptr()
    assert model.weight.is_pinned()
    with pool.use("ref"):
        assert model.weight.device.type == "cuda"
    pool.evict()
    assert model.weight.data_ptr() == home


def test_twenty_rounds_leak_nothing():
    _, pool = train("always")
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(20):
        with pool.use("ref"):
            pass
        with pool.use("policy", train=True):
            pass
    pool.evict()
    assert torch.cuda.memory_reserved() <= reserved
