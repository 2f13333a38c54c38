"""The mover on a GPU: bits, order on two streams, and pinned memory within its budget."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from common.models.mover import CudaMover, PinnedMemory, pinned_bytes
from common.models.pool import ModelPool
from common.models.weights import policy_weights

pytestmark = pytest.mark.gpu

WIDTH = 2048  # 16 MiB a matrix in float32


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


def busy(device: torch.device) -> torch.Tensor:
    """Work that keeps the computing stream busy for longer than a copy takes."""
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(30):
        matrix = matrix @ matrix / 64
    return matrix


@pytest.mark.parametrize("budget", [1 << 40, 0], ids=["pinned", "pageable"])
def test_bits_survive_many_cycles_while_the_device_computes(device, budget):
    mover = CudaMover(device, PinnedMemory(budget))
    start = torch.randn(WIDTH, WIDTH)
    home = mover.home(start).copy_(start)
    expected = start.to(device)
    for _ in range(50):
        there = torch.empty_like(home, device=device)
        mover.copy(home, there)
        mover.wait(mover.record(), host=False)
        there.mul_(1.01)  # computed while the host goes on
        expected.mul_(1.01)
        busy(device)
        mover.copy(there, home)
        del there  # the mover keeps it; its memory must not go to the next one before it was read
        torch.randn(WIDTH, WIDTH, device=device)
        mover.wait(mover.record(), host=True)
        assert torch.equal(home, expected.cpu())


def test_a_copy_starts_after_what_was_computed_and_is_not_used_before_it_arrived(device):
    mover = CudaMover(device)
    source = mover.home(torch.empty(WIDTH, WIDTH)).fill_(1)
    busy(device)
    there = torch.empty_like(source, device=device)  # may be memory that `busy` still writes to
    mover.copy(source, there)
    mover.wait(mover.record(), host=False)
    assert float(there.sum()) == WIDTH * WIDTH
    result = busy(device)
    back = mover.home(result)
    mover.copy(result, back)
    mover.wait(mover.record(), host=True)
    assert torch.equal(back, result.cpu())


def test_what_was_dropped_without_a_wait_keeps_its_memory_until_the_copy_has_ended(device):
    mover = CudaMover(device)
    home = mover.home(torch.empty(4 * WIDTH, WIDTH)).fill_(7)
    for _ in range(20):
        there = torch.empty_like(home, device=device)
        mover.copy(home, there)
        del there
        other = torch.zeros(4 * WIDTH, WIDTH, device=device)
        assert float(other.abs().sum()) == 0
    mover.wait(mover.record(), host=True)
    assert not mover._kept and not mover._started


def test_pinned_memory_stays_within_its_budget_and_comes_back(device):
    size = pinned_bytes(WIDTH * WIDTH * 4)
    memory = PinnedMemory(budget=2 * size + 100)
    homes = [memory.like(torch.empty(WIDTH, WIDTH)) for _ in range(3)]
    assert [home.is_pinned() for home in homes] == [True, True, False]
    assert memory.used == 2 * size
    del homes
    assert memory.used == 0
    assert memory.like(torch.empty(WIDTH, WIDTH)).is_pinned()


@pytest.mark.parametrize("budget", [1 << 40, pinned_bytes(WIDTH * WIDTH * 4), 0], ids=["all", "one", "none"])
def test_a_pool_trains_the_same_bits_whatever_is_pinned(device, budget):
    results = {}
    for offload in ("never", "always"):
        torch.manual_seed(0)
        policy = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False))
        ref = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)
        pool = ModelPool(device, offload)
        pool.mover = CudaMover(device, PinnedMemory(budget))
        pool.add("policy", policy, optimizer=optimizer)
        pool.add("ref", ref)
        inputs = torch.linspace(-1, 1, WIDTH, device=device)[None, :]
        for _ in range(5):
            with torch.no_grad(), pool.use("ref") as model:
                target = model(inputs)
            with pool.use("policy", train=True) as model:
                (model(inputs) - target).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        pool.evict()
        results[offload] = [parameter.detach().cpu().clone() for parameter in policy.parameters()]
        assert pool.mover.pinned.used <= budget
    assert all(torch.equal(a, b) for a, b in zip(results["never"], results["always"], strict=True))


@pytest.mark.parametrize("lora", [False, True])
def test_a_push_holds_one_weight_on_the_device(device, lora):
    config = Qwen2Config(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    expected = {name: tensor.clone() for name, tensor in policy_weights(model)}
    pool = ModelPool(device, "always")
    pool.add("policy", model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with pool.stream("policy") as (module, on_device):
        for name, tensor in policy_weights(module, on_device):
            assert tensor.is_cuda
            torch.testing.assert_close(tensor.cpu(), expected[name], atol=1e-3, rtol=8e-3)
            del tensor
    largest = max(parameter.numel() for parameter in model.parameters())
    # Merging adds in float32: the sum, and the adapter's product before and after its scale.
    assert torch.cuda.max_memory_allocated() - before < largest * (2 + (12 if lora else 0)) * 1.1 + (8 << 20)
    assert torch.cuda.memory_allocated() - before < 1 << 20
    assert not any(parameter.is_cuda for parameter in model.parameters())
