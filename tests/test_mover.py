"""What the pool asks its mover for, seen by one that copies as late as it may; the CUDA mover is in tests/gpu."""

import logging

import pytest
import torch
from torch import nn

from common.models.mover import Mark, PinnedMemory, pinned_bytes
from common.models.pool import ModelPool
from common.models.weights import policy_weights
from tests.movers import LateMover, Uses
from tests.toy import LORA, algorithms, metrics_of, toy_trainer

CPU = torch.device("cpu")
# Every model there is: policy, reference and, in PPO, the value model.
RUNS = {name: {"algorithm": name} for name in algorithms()} | {
    "GRPO with LoRA": {"algorithm": "GRPO", **LORA},
    "PPO with a shared base": {"algorithm": "PPO", "value_backbone": "shared", **LORA},
}


# ---------------------------------------------------------------------------------------------- the pool's promises


@pytest.mark.parametrize("run", RUNS)
def test_a_run_waits_for_every_copy_frees_nothing_early_and_leaves_frozen_weights_at_home(toy_folder, tmp_path, run):
    settings = {"num_steps": 1, "kl_coef": 0.1, "num_generations": 2, "max_completion_length": 6} | RUNS[run]
    expected = toy_trainer(toy_folder, tmp_path / "never", offload="never", **settings)
    expected.train()
    trainer = toy_trainer(toy_folder, tmp_path / "always", offload="always", **settings)
    trainer.models.evict()  # PPO looks at the policy while it makes its value model
    mover = trainer.models.mover = LateMover()
    with Uses(mover):
        trainer.train()
    trainer.models.evict()
    assert mover.faults == [] and not mover.pending
    assert metrics_of(tmp_path / "always") == metrics_of(tmp_path / "never")
    assert mover.uses > 100 and mover.alive == 0
    entries = trainer.models._models.values()
    trained = {id(tensor) for entry in entries for tensor in entry.trained}
    frozen = [tensor for entry in entries for tensor in entry.tensors if id(tensor) not in trained]
    assert frozen and any(mover.arrived[tensor.untyped_storage().data_ptr()] for tensor in frozen)
    assert not any(mover.left[tensor.untyped_storage().data_ptr()] for tensor in frozen)


def make_pool(offload: str = "always") -> tuple[ModelPool, LateMover, nn.Module, torch.optim.Optimizer]:
    policy, ref = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    pool = ModelPool(CPU, offload)
    mover = pool.mover = LateMover()
    pool.add("policy", policy, optimizer=optimizer)
    pool.add("ref", ref)
    return pool, mover, policy, optimizer


def train(pool: ModelPool, optimizer: torch.optim.Optimizer) -> None:
    with pool.use("policy", train=True) as policy:
        policy(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_moments_made_on_the_device_cross_only_when_their_model_leaves_and_comes_back():
    pool, mover, _, optimizer = make_pool()
    counts = []
    for _ in range(2):
        train(pool, optimizer)
        counts.append((mover.arrived.total(), mover.left.total()))
    pool.evict()
    counts.append((mover.arrived.total(), mover.left.total()))
    train(pool, optimizer)
    counts.append((mover.arrived.total(), mover.left.total()))
    assert counts == [(2, 0), (2, 0), (2, 6), (8, 6)]  # 2 weights, 4 moments
    assert mover.faults == []


def test_a_model_that_was_only_looked_at_is_not_copied_back():
    pool, mover, _, optimizer = make_pool()
    train(pool, optimizer)
    pool.evict()
    left = mover.left.total()
    with pool.use("policy"):
        pass
    pool.evict()
    assert mover.left.total() == left and mover.alive == 0


def test_the_late_mover_sees_who_does_not_wait():
    """Else the tests above would prove nothing."""
    mover = LateMover()
    home, there = mover.home(torch.zeros(3)), torch.empty(3)
    source = torch.ones(3)
    mover.copy(source, there)
    with Uses(mover):
        assert there.sum().isnan()
    source += 1
    mover.wait(mover.record(), host=False)
    assert torch.equal(there, torch.ones(3))
    mover.copy(there, home)
    del there
    mover.wait(Mark(number=1), host=True)
    assert home.isnan().all()
    mover.wait(mover.record(), host=True)
    assert torch.equal(home, torch.ones(3))
    assert [fault.split(" before")[0].split(".")[0] for fault in mover.faults] == [
        "aten",
        "a source was changed",
        "a source was changed",
        "a source was freed",
        "a source was freed",
    ]


def test_a_model_that_takes_the_place_of_one_on_the_device_sends_that_one_home():
    pool, mover, policy, optimizer = make_pool()
    train(pool, optimizer)
    value = policy.weight.clone()
    pool.add("policy", policy, optimizer=optimizer)
    assert pool.resident == set() and mover.alive == 0 and torch.equal(policy.weight, value)
    train(pool, optimizer)
    assert mover.faults == [] and not torch.equal(policy.weight, value)


# --------------------------------------------------------------------------------------------------- pinned memory


def test_pinned_memory_is_counted_as_torch_allocates_it():
    sizes = [0, 1, 2, 3, 4096, 4097, 3 << 20]
    assert [pinned_bytes(size) for size in sizes] == [0, 1, 2, 4, 4096, 8192, 4 << 20]
    memory = PinnedMemory(budget=6000)
    assert memory.has_room(4096) and not memory.has_room(4097)


@pytest.mark.parametrize(("budget", "reason"), [(100, "the budget is 0.0 GB"), (10**9, "")])
def test_without_room_to_pin_memory_is_pageable_and_one_line_says_so(budget, reason, caplog):
    if torch.cuda.is_available() and not reason:
        pytest.skip("this machine can pin")
    memory = PinnedMemory(budget)
    with caplog.at_level(logging.WARNING, logger="nanorlhf"):
        for _ in range(3):
            copy = memory.like(torch.ones(6, 10, dtype=torch.bfloat16).t())
            assert copy.shape == (10, 6) and copy.stride() == (1, 10) and copy.dtype == torch.bfloat16
            assert not copy.is_pinned() and memory.used == 0
    [record] = caplog.records
    assert "pinned host memory ends at 0.0 GB" in record.getMessage() and reason in record.getMessage()


# ------------------------------------------------------------------------------------------------------- the push


class Engine:
    """A sampler with weights of its own, which copies what is pushed, drops it, and sees what is on the device."""

    needs_push, has_weights, resident_bytes, samples_apart = True, False, 0, False

    def __init__(self, pool: ModelPool, mover: LateMover) -> None:
        self.pool, self.mover = pool, mover
        self.weights: dict[str, torch.Tensor] = {}
        self.seen: list = []

    def push(self, weights) -> None:
        self.seen.append(("push", set(self.pool.resident), self.mover.alive))
        weights = iter(weights)
        while (pair := next(weights, None)) is not None:
            self.weights[pair[0]] = pair[1].clone()
            del pair
        self.has_weights = True

    def wake(self) -> None:
        self.seen.append(("wake", set(self.pool.resident), self.mover.alive))

    def sleep(self) -> None:
        self.has_weights = False


@pytest.mark.parametrize("settings", [{}, LORA, LORA | {"lora_target_modules": ["q_proj", "down_proj"]}], ids=str)
def test_a_push_with_offload_has_one_weight_on_the_device_at_a_time(toy_folder, tmp_path, settings):
    trainer = toy_trainer(toy_folder, tmp_path, offload="always", **settings)
    pool, sampler = trainer.models, trainer.policy_sampler
    policy = pool._models["policy"].module
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = {name: tensor.clone() for name, tensor in policy_weights(policy)}
    mover = pool.mover = LateMover()
    with pool.use("policy", train=True):
        whole = mover.alive
    mover.peak = 0
    engine = sampler.sampler = Engine(pool, mover)
    mover.arrived.clear()
    with Uses(mover):
        sampler._refresh()
    assert mover.faults == [] and not mover.pending
    assert engine.seen == [("push", set(), 0), ("wake", set(), 0)]
    assert engine.weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in engine.weights.items())
    assert set(mover.arrived.values()) == {1} and len(mover.arrived) == len(list(policy.parameters()))
    layers = dict(policy.named_modules())
    largest = max(
        sum(parameter.nbytes for parameter in module.parameters())
        for name, module in layers.items()
        if name.endswith(("_proj", "embed_tokens"))
    )
    assert mover.peak <= largest < whole / 2 and mover.alive == 0
