"""ModelPool on the CPU: with offload="always" its moves are real copies here too."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from common.models.pool import ModelPool


def make_pool(offload: str = "always") -> tuple[ModelPool, nn.Linear, nn.Linear, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy, ref = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    pool = ModelPool(torch.device("cpu"), offload)
    pool.add("policy", policy, optimizer=optimizer)
    pool.add("ref", ref)
    return pool, policy, ref, optimizer


def train(pool: ModelPool, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        with pool.use("ref") as ref:
            target = ref(torch.full((1, 4), float(step)))
        with pool.use("policy", train=True) as policy:
            (policy(torch.ones(1, 4)) - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("offload", ["never", "always"])
def test_training_gives_the_same_bits_whatever_moves(offload):
    expected = make_pool("never")
    train(expected[0], expected[3], steps=3)
    pool, policy, _, optimizer = make_pool(offload)
    train(pool, optimizer, steps=3)
    pool.evict()
    for ours, theirs in zip(policy.parameters(), expected[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, moment in optimizer.state[ours].items():
            assert torch.equal(moment, expected[3].state[theirs][key])


def test_one_tenant_at_a_time():
    pool, *_ = make_pool()
    with pool.use("policy"):
        assert pool.resident == {"policy"}
    with pool.use("ref"):
        assert pool.resident == {"ref"}
    pool.evict()
    assert pool.resident == set()


def test_without_offload_everybody_stays():
    pool, policy, *_ = make_pool("never")
    before = policy.weight.data_ptr()
    with pool.use("policy"), pool.use("ref"):
        assert pool.resident == {"policy", "ref"}
    pool.evict()
    assert pool.resident == {"policy", "ref"} and policy.weight.data_ptr() == before


def test_a_frozen_model_is_dropped_from_the_device_not_copied_back():
    pool, _, ref, _ = make_pool()
    home, value = ref.weight.data_ptr(), ref.weight.clone()
    with pool.use("ref") as model:
        assert model.weight.data_ptr() != home
        model.weight.data.zero_()
    pool.evict()
    assert ref.weight.data_ptr() == home and torch.equal(ref.weight, value)


def test_trained_weights_and_moments_come_home_to_the_same_place():
    pool, policy, _, optimizer = make_pool()
    home = policy.weight.data_ptr()
    train(pool, optimizer, steps=1)
    on_device = policy.weight.clone()
    moment = optimizer.state[policy.weight]["exp_avg"]
    on_device_moment, place = moment.clone(), moment.data_ptr()
    pool.evict()
    assert policy.weight.data_ptr() == home and torch.equal(policy.weight, on_device)
    assert moment.data_ptr() != place and torch.equal(moment, on_device_moment)
    moment_home = moment.data_ptr()
    train(pool, optimizer, steps=1)
    pool.evict()
    assert optimizer.state[policy.weight]["exp_avg"].data_ptr() == moment_home


def test_moments_stay_home_when_the_model_only_looks():
    pool, policy, _, optimizer = make_pool()
    train(pool, optimizer, steps=1)
    pool.evict()
    home = optimizer.state[policy.weight]["exp_avg"].data_ptr()
    with pool.use("policy"):
        assert optimizer.state[policy.weight]["exp_avg"].data_ptr() == home


def test_looking_first_and_training_then_brings_the_moments_too():
    pool, policy, _, optimizer = make_pool()
    train(pool, optimizer, steps=1)
    pool.evict()
    moment = optimizer.state[policy.weight]["exp_avg"]
    home = moment.data_ptr()
    with pool.use("policy"), pool.use("policy", train=True):
        assert moment.data_ptr() != home


def test_tied_weights_stay_tied():
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    pool = ModelPool(torch.device("cpu"), "always")
    pool.add("model", nn.ModuleList([embedding, head]))
    with pool.use("model"):
        assert head.weight is embedding.weight
    pool.evict()
    assert head.weight is embedding.weight


def test_a_view_is_its_owner_inside_its_context():
    inside = []

    @contextmanager
    def adapter_off():
        inside.append("off")
        try:
            yield
        finally:
            inside.append("on")

    pool, policy, *_ = make_pool()
    pool.add_view("other", of="policy", context=adapter_off)
    assert "other" in pool
    with pytest.raises(RuntimeError, match="inside"), pool.use("other") as model:
        assert model is policy and inside == ["off"]
        assert pool.resident == {"policy", "other"}
        raise RuntimeError("inside")
    assert inside == ["off", "on"]


class Beside(nn.Module):
    """A head on another model's frozen layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.head = base, nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(inputs))


def test_a_model_beside_another_brings_it_along_and_moves_only_what_is_its_own():
    pool, policy, *_ = make_pool()
    model = Beside(policy)
    homes = [model.head.weight.data_ptr(), policy.weight.data_ptr()]
    pool.add("value", model, needs="policy")
    with pool.use("policy"):
        before = policy.weight.data_ptr()
        assert pool.resident == {"policy"} and model.head.weight.data_ptr() == homes[0]
    with pool.use("value"):
        assert pool.resident == {"policy", "value"} and model.head.weight.data_ptr() != homes[0]
        assert policy.weight.data_ptr() == before != homes[1]  # there already: not moved again
    with pool.use("ref"):
        assert pool.resident == {"ref"}
        assert [model.head.weight.data_ptr(), policy.weight.data_ptr()] == homes


def test_models_that_share_weights_train_the_same_bits_whatever_moves_and_each_only_its_own():
    results = {}
    for offload in ("never", "always"):
        pool, policy, _, optimizer = make_pool(offload)
        model = Beside(policy)
        nn.init.ones_(model.head.weight), nn.init.zeros_(model.head.bias)
        own = torch.optim.AdamW(model.head.parameters(), lr=0.1)
        pool.add("value", model, optimizer=own, needs="policy")
        frozen = policy.weight.clone()
        for _ in range(2):
            with pool.use("value", train=True) as value:
                value(torch.ones(1, 4)).square().sum().backward()
                own.step()
                own.zero_grad(set_to_none=True), policy.zero_grad(set_to_none=True)
        pool.evict()
        head = model.head.weight.clone()
        assert torch.equal(policy.weight, frozen) and not torch.equal(head, torch.ones(1, 4))
        train(pool, optimizer, steps=1)
        pool.evict()
        assert torch.equal(model.head.weight, head) and not torch.equal(policy.weight, frozen)
        results[offload] = [head, policy.weight.clone()]
    assert all(torch.equal(a, b) for a, b in zip(results["never"], results["always"], strict=True))


def test_a_new_model_takes_the_place_of_one_of_its_name():
    pool, *_ = make_pool()
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    for model in (first, second):
        pool.add("value", model)
        with pool.use("value") as used:
            assert used is model
        pool.evict()
    assert pool.resident == set()


def test_what_is_on_the_device_when_models_start_to_move_comes_home_too():
    """Until a large model came everything fitted; then the first ones have no copy at home yet."""
    pool, policy, ref, optimizer = make_pool("never")
    train(pool, optimizer, steps=1)
    values = [policy.weight.clone(), ref.weight.clone(), optimizer.state[policy.weight]["exp_avg"].clone()]
    pool.offload = "always"
    with pool.use("policy"):
        assert pool.resident == {"policy"}
    pool.evict()
    assert pool.resident == set()
    now = [policy.weight, ref.weight, optimizer.state[policy.weight]["exp_avg"]]
    assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True))
