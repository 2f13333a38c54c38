"""AdamW with its numbers elsewhere or in fewer bits: what it learns, where it keeps what, and that a run goes on."""

import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

from common.config import OPTIMIZERS, RLConfig
from common.models.loading import load_policy, load_reference
from common.models.pool import ModelPool
from common.remarks import remarks
from common.runs.checkpoints import load_tensors, save_tensors
from common.runs.room import sizes_of
from common.update import staging
from common.update.learner import Learner
from common.update.optimizers import HostAdamW, bytes_per_weight, keep_counters_beside_weights, stay_fused
from common.update.staging import Staging
from tests.test_learner import EqualProcesses
from tests.toy import LORA, learners_of, metrics_of, toy_trainer, train_until

BF16 = torch.bfloat16
TOY = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
TOY |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
# Runs in which the KL, the ratio and several optimizer steps on a rollout can be wrong.
SEVERAL = {"num_minibatches": 2, "num_update_epochs": 2, "kl_coef": 0.1, "num_steps": 3}
# Everything that is trained, and other things that training must not take apart.
ALGORITHMS = {
    "GRPO": {"algorithm": "GRPO"},
    "PPO own": {"algorithm": "PPO", "value_init": "zero_head"},
    "PPO shared": {"algorithm": "PPO", "value_init": "zero_head", "value_backbone": "shared", **LORA},
}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def host_learner(module: nn.Module, **settings: object) -> Learner:
    return Learner("policy", module, RLConfig(optimizer="adamw_host", learning_rate=1e-2, **settings))


def set_gradients(module: nn.Module, seed: int) -> None:
    """The same gradient for all modules of these shapes, in the precision of each."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


# What is learned


def markov_batch(number: int) -> Tensor:
    """(16, 32) int64: sequences in which each of 256 tokens has four equally likely successors."""
    successors = torch.randint(256, (256, 4), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(100 + number)
    tokens = [torch.randint(256, (16,), generator=generator)]
    for _ in range(31):
        tokens.append(successors[tokens[-1], torch.randint(4, (16,), generator=generator)])
    return torch.stack(tokens, 1)


def loss_curve(base: nn.Module, optimizer: str, dtype: torch.dtype, accelerator: Accelerator) -> Tensor:
    """(150,) losses of a language model in training, with the settings that distinguish the optimizers most."""
    model = deepcopy(base).to(dtype)
    settings = {"learning_rate": 1e-3, "adam_beta2": 0.98, "max_grad_norm": 1.0}
    learner, losses = Learner("policy", model, RLConfig(optimizer=optimizer, **settings)), []
    for number in range(150):
        ids = markov_batch(number)
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 256), ids[:, 1:].reshape(-1))
        loss.backward()
        learner.optimizer_step(1, accelerator)
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.slow
def test_the_loss_stays_within_two_thousandths_of_adamw_over_150_steps(accelerator):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(Qwen2Config(**TOY), dtype=torch.float32)
    expected = loss_curve(base, "adamw", torch.float32, accelerator)
    assert expected[0] > 5.5 and expected[-1] < 2.8
    for optimizer, dtype in (("adamw_host", BF16), ("adamw_8bit", torch.float32)):
        assert (loss_curve(base, optimizer, dtype, accelerator) - expected).abs().max() < 2e-3, optimizer


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.5}, {"max_grad_norm": 0.1, "warmup_steps": 3}])
def test_masters_of_float32_weights_take_the_very_steps_of_adamw(accelerator, settings):
    """Learning rate, clipping and groups with and without weight decay are those of the setting adamw."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    theirs = deepcopy(ours)
    learner, plain = (
        host_learner(ours, **settings),
        Learner("policy", theirs, RLConfig(learning_rate=1e-2, **settings)),
    )
    for group in plain.optimizer.param_groups:
        group |= {"fused": True, "foreach": False}
    for step in range(1, 5):
        norms = []
        for each, module in ((learner, ours), (plain, theirs)):
            set_gradients(module, step)
            norms.append(each.optimizer_step(step, accelerator))
        assert norms[0] == norms[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_steps_below_the_resolution_of_the_weights_add_up(accelerator):
    """A step of 1e-3 changes no weight of 1 in bfloat16, where the next smaller number is 0.996."""
    module = nn.Linear(1, 1, bias=False).to(BF16)
    module.weight.data.fill_(1.0)
    learner = Learner("policy", module, RLConfig(optimizer="adamw_host", learning_rate=1e-3))
    seen = []
    for step in range(1, 11):
        module.weight.grad = torch.ones_like(module.weight)
        learner.optimizer_step(step, accelerator)
        seen.append(module.weight.item())
    assert seen[0] == 1.0 and seen[-1] == torch.tensor(1 - 10e-3).to(BF16).item()
    assert learner.optimizer.masters[module.weight].item() == pytest.approx(1 - 10e-3, rel=1e-5)


# Gradients


def test_gradients_of_many_micro_batches_are_added_up_in_float32(accelerator):
    """In bfloat16 a sum of ones ends at 256."""
    module = nn.Linear(1, 3, bias=False).to(BF16)
    learner = host_learner(module, max_grad_norm=0.0)
    with learner.optimizer.receiving():
        for _ in range(600):
            module(torch.ones(1, 1, dtype=BF16)).sum().backward()
    assert learner.optimizer_step(1, accelerator) == pytest.approx(600 * 3**0.5, rel=1e-6)


def test_a_gradient_leaves_the_device_before_the_next_one_is_made():
    layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    optimizer, seen = HostAdamW([{"params": [*layers.parameters()]}], lr=1e-2), []
    weights = [*layers.parameters()]

    def count(_: Tensor) -> None:
        seen.append(sum(weight.grad is not None for weight in weights))

    with optimizer.receiving():
        handles = [weight.register_post_accumulate_grad_hook(count) for weight in weights]
        layers(torch.ones(2, 4)).sum().backward()
    assert seen == [0] * 10 and all(master.grad.abs().sum() > 0 for master in optimizer.masters.values())
    for handle in handles:
        handle.remove()
    layers(torch.ones(2, 4)).sum().backward()  # outside, they stay until the step, which takes them too
    assert all(weight.grad is not None for weight in weights)
    before = optimizer.masters[layers[0].weight].grad.clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.masters[layers[0].weight].grad, 2 * before)
    assert layers[0].weight.grad is None


def test_two_optimizers_of_the_same_weights_do_not_take_each_others_gradients(accelerator):
    """As after the fit of a value model, whose optimizer is made anew."""
    module = nn.Linear(2, 2)
    first, second = host_learner(module), host_learner(module)
    with first.optimizer.receiving():
        module(torch.ones(1, 2)).sum().backward()
    first.optimizer_step(1, accelerator)
    with second.optimizer.receiving():
        module(torch.ones(1, 2)).sum().backward()
    assert second.optimizer_step(1, accelerator) > 0 and first.optimizer_step(1, accelerator) == 0


@pytest.mark.parametrize("moved", [True, False])
def test_a_dropped_gradient_leaves_nothing_behind(accelerator, moved):
    module = nn.Linear(2, 2).to(BF16)
    learner = host_learner(module)
    if moved:
        with learner.optimizer.receiving():
            module(torch.ones(1, 2, dtype=BF16)).sum().backward()
    else:
        set_gradients(module, 1)
    learner.drop_gradient()
    assert learner.optimizer_step(1, accelerator) == 0.0 and not learner.optimizer.state_dict()["state"]


def test_a_gradient_of_zero_changes_nothing(accelerator):
    module = nn.Linear(3, 3).to(BF16)
    learner = host_learner(module, weight_decay=0.5)
    set_gradients(module, 1)
    learner.optimizer_step(1, accelerator)
    before = deepcopy((learner.optimizer.state_dict(), module.state_dict()))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert learner.optimizer_step(2, accelerator) == 0.0
    assert_equal((learner.optimizer.state_dict(), module.state_dict()), before)


@pytest.mark.parametrize("max_reduced", [1, 10, 2**26])
def test_gradients_are_added_up_over_processes_in_parts_of_any_size(accelerator, monkeypatch, max_reduced):
    monkeypatch.setattr("common.update.learner.MAX_REDUCED", max_reduced)
    modules = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)).to(dtype) for dtype in (BF16, torch.float32)]
    for module, optimizer in zip(modules, ("adamw_host", "adamw"), strict=True):
        norms = []
        for processes in (accelerator, EqualProcesses(2)):
            learner = Learner("policy", module, RLConfig(optimizer=optimizer, max_grad_norm=0.0))
            set_gradients(module, 3)
            norms.append(learner.optimizer_step(1, processes))
        assert norms[1] == pytest.approx(2 * norms[0])


# Moves between a device and the host


def late(source: Tensor, target: Tensor) -> Callable[[], None]:
    """A copy that is made at the last moment at which it may be."""
    return lambda: target.copy_(source)


@pytest.mark.parametrize("buffer_bytes", [8, 24, 2**20])
def test_numbers_through_few_small_buffers_are_the_numbers(monkeypatch, buffer_bytes):
    monkeypatch.setattr(staging, "BUFFER_BYTES", buffer_bytes)
    moves = Staging(late, pinned=False)
    sources = [torch.randn(7, 3).to(BF16), torch.randn(11), torch.randn(())]
    there = [torch.ones_like(source, dtype=torch.float32) for source in sources]
    for add in (False, True):
        for source, target in zip(sources, there, strict=True):
            moves.to_host(source, target, add=add)
    moves.finish()
    assert all(torch.equal(target, 2 * source.float()) for source, target in zip(sources, there, strict=True))
    back = [torch.zeros_like(source) for source in sources]
    for source, target in zip(there, back, strict=True):
        moves.to_device(source, target)
    moves.finish()
    assert all(torch.equal(target, 2 * source) for source, target in zip(sources, back, strict=True))
    assert len(moves._free) == staging.NUM_BUFFERS


def test_late_copies_change_no_bit_of_a_training(accelerator, monkeypatch):
    monkeypatch.setattr(staging, "BUFFER_BYTES", 32)
    torch.manual_seed(0)
    results, base = [], nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)).to(BF16)
    for moves in (None, Staging(late, pinned=False)):
        module = deepcopy(base)
        learner = host_learner(module)
        learner.optimizer._staging = moves
        for step in range(1, 4):
            with learner.optimizer.receiving():
                for micro in range(3):
                    module(torch.full((1, 4), float(step - micro), dtype=BF16)).square().sum().backward()
                if step == 2:  # out of memory, for example: done again from the start
                    learner.drop_gradient()
                    module(torch.ones(1, 4, dtype=BF16)).sum().backward()
            learner.optimizer_step(step, accelerator)
        results.append((module.state_dict(), learner.optimizer.state_dict()))
    assert_equal(*results)


def test_masters_and_moments_never_move_with_their_model(accelerator):
    module, pool = nn.Linear(4, 4).to(BF16), ModelPool(torch.device("cpu"), "always")
    learner = host_learner(module)
    pool.add("policy", module, optimizer=learner.optimizer)
    pool.add("ref", nn.Linear(1, 1))

    def places() -> list[int]:
        state = learner.optimizer.state_dict()
        moments = [value for each in state["state"].values() for value in each.values()]
        return [tensor.data_ptr() for tensor in (*state["masters"], *moments)]

    seen = []
    for step in (1, 2, 3):
        with pool.use("policy", train=True) as model, learner.optimizer.receiving():
            model(torch.ones(1, 4, dtype=BF16)).sum().backward()
            learner.optimizer_step(step, accelerator)
        with pool.use("ref"):
            pass
        assert torch.equal(module.weight, learner.optimizer.masters[module.weight].to(BF16))
        seen.append(places())
    assert len(seen[0]) == 8 and all(one == other for one, other in pairwise(seen))


def test_a_checkpoint_that_knows_nothing_of_fused_steps_does_not_end_them():
    older, optimizer = (torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=fused) for fused in (None, True))
    stay_fused(optimizer)
    optimizer.load_state_dict(older.state_dict())
    assert optimizer.param_groups[0]["fused"]


def test_step_counters_follow_their_weights_to_the_device():
    weight = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"step": torch.tensor(3.0)}
    keep_counters_beside_weights(optimizer)
    assert optimizer.state[weight]["step"].device == weight.device
    keep_counters_beside_weights(torch.optim.AdamW([weight]))  # before its first step there are none


# Memory


def sizes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_bytes_of_a_weight_are_what_training_takes(accelerator, optimizer, tmp_path):
    module = nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 512, bias=False), nn.Linear(512, 256, bias=False))
    module.to(BF16 if optimizer == "adamw_host" else torch.float32)
    learner = Learner("policy", module, RLConfig(optimizer=optimizer))
    set_gradients(module, 1)
    learner.optimizer_step(1, accelerator)
    state = learner.optimizer.state_dict()
    said = [bytes_per_weight(optimizer, module[0].weight.dtype, embedding=each) for each in (True, False)]
    numbers = [module[0].weight.numel(), sum(parameter.numel() for parameter in module[1:].parameters())]

    def total(name: str) -> float:
        return sum(getattr(each, name) * count for each, count in zip(said, numbers, strict=True))

    assert total("weight") == sizes([*module.parameters()])
    moments = [v for each in learner.optimizer.state.values() for v in each.values() if torch.is_tensor(v) and v.dim()]
    tables = 2 * 256 * 4 if optimizer == "adamw_8bit" else 0  # what the 8 bits stand for, once
    assert total("state") == sizes([*{id(each): each for each in moments}.values()]) - tables
    if optimizer == "adamw_host":
        of_masters = [v for each in state["state"].values() for v in each.values() if v.dim()]
        sums = [*learner.optimizer._sums.values()]
        assert total("host") == sizes([*state["masters"], *of_masters, *sums])
    save_tensors(state, tmp_path / "state.pt")
    assert sizes_of({"policy": (learner, module)}, (), use_lora=False).largest == round(total("saved"))
    assert total("saved") <= (tmp_path / "state.pt").stat().st_size <= 1.05 * total("saved") + 8192


# Whole runs


def assert_equal(one: object, other: object) -> None:
    """Equal to the last bit, whatever contains the tensors."""
    if torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_file_bit_for_bit(accelerator, optimizer, tmp_path):
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64)).to(BF16 if optimizer == "adamw_host" else None)
    config = RLConfig(optimizer=optimizer, weight_decay=0.1, learning_rate=1e-2)
    learner = Learner("policy", whole, config)
    for step in (1, 2):
        set_gradients(whole, step)
        learner.optimizer_step(step, accelerator)
    save_tensors(learner.optimizer.state_dict(), tmp_path / "state.pt")
    resumed = deepcopy(whole)
    second = Learner("policy", resumed, config)
    second.load_optimizer(load_tensors(tmp_path / "state.pt"))
    for each, module in ((learner, whole), (second, resumed)):
        for step in (3, 4):
            set_gradients(module, step)
            each.optimizer_step(step, accelerator)
    assert_equal(whole.state_dict(), resumed.state_dict())
    assert_equal(learner.optimizer.state_dict(), second.optimizer.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw_host", "adamw_8bit"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny_folder, tmp_path, optimizer, name):
    settings = ALGORITHMS[name] | SEVERAL | {"optimizer": optimizer, "dtype": "bfloat16", "save_every": 1}
    whole = toy_trainer(tiny_folder, tmp_path / "whole", **settings)
    whole.train()
    train_until(toy_trainer(tiny_folder, tmp_path / "killed", offload="always", **settings), 2)
    resumed = toy_trainer(tiny_folder, tmp_path / "killed", max_tokens_per_microbatch=16384, **settings)
    resumed.train()
    lines = metrics_of(tmp_path / "whole")
    assert lines == metrics_of(tmp_path / "killed")
    assert lines[0]["kl"] == 0 and all(line["policy/first_ratio"] == 1 for line in lines)
    for one, other in zip(learners_of(whole), learners_of(resumed), strict=True):
        assert_equal(one.parameters, other.parameters)
        assert_equal(one.optimizer.state_dict(), other.optimizer.state_dict())


def test_what_is_saved_is_what_was_sampled_from_and_the_masters_are_in_the_checkpoint(tiny_folder, tmp_path):
    settings = {"optimizer": "adamw_host", "dtype": "bfloat16", "save_every": 1, "num_steps": 1}
    trainer = toy_trainer(tiny_folder, tmp_path, **settings)
    trainer.train()
    policy = trainer.policy
    named = dict(trainer.models._models["policy"].module.named_parameters())
    final = load_file(tmp_path / "final" / "model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {BF16}
    assert all(torch.equal(tensor, named[name]) for name, tensor in final.items())
    masters = load_tensors(tmp_path / "checkpoint-1" / "policy_optimizer.pt")["masters"]
    assert {master.dtype for master in masters} == {torch.float32}
    assert_equal([master.to(BF16) for master in masters], [p.detach() for p in policy.parameters])
    assert any(not torch.equal(m, p.float()) for m, p in zip(masters, policy.parameters, strict=True))


def test_policy_and_reference_begin_as_the_same_rounded_weights(tiny_folder):
    for optimizer, dtype, expected in (
        ("adamw_host", BF16, BF16),
        ("adamw_host", torch.float32, torch.float32),
        ("adamw", BF16, torch.float32),
        ("adamw_8bit", BF16, torch.float32),
    ):
        config = RLConfig(optimizer=optimizer)
        policy = load_policy(str(tiny_folder), config, dtype=dtype)
        reference = load_reference(str(tiny_folder), config, dtype=dtype)
        assert {parameter.dtype for parameter in policy.parameters()} == {expected}
        assert_equal(policy.state_dict(), reference.state_dict())


def test_adapters_and_the_head_of_values_are_float32_whatever_the_base_is(tiny_folder, tmp_path):
    settings = {"optimizer": "adamw_host", "dtype": "bfloat16", "algorithm": "PPO", "value_init": "zero_head"}
    full, lora = (toy_trainer(tiny_folder, tmp_path / str(len(more)), **settings, **more) for more in ({}, LORA))
    assert {p.dtype for learner in learners_of(lora) for p in learner.parameters} == {torch.float32}
    value = full.models._models["value"].module
    assert {p.dtype for p in value.backbone.parameters()} == {BF16} and value.head.weight.dtype == torch.float32


# Refusals and remarks


def test_a_run_keeps_its_optimizer(tiny_folder, tmp_path):
    toy_trainer(tiny_folder, tmp_path, num_steps=1, save_every=1).train()
    with pytest.raises(ValueError, match=r"optimizer \(stored 'adamw', now 'adamw_host'\)"):
        toy_trainer(tiny_folder, tmp_path, num_steps=2, save_every=1, optimizer="adamw_host")


def test_a_run_from_before_there_was_a_choice_goes_on_with_adamw(tiny_folder, tmp_path):
    train_until(toy_trainer(tiny_folder, tmp_path, save_every=1), 1)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("optimizer: adamw\n", ""))
    toy_trainer(tiny_folder, tmp_path, save_every=1).train()
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2]


def test_eight_bits_without_bitsandbytes_are_refused_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"optimizer=adamw_8bit.*pip install bitsandbytes.*--optimizer adamw_host"):
        toy_trainer(tmp_path / "no model", tmp_path / "run", optimizer="adamw_8bit")


def test_an_unknown_optimizer_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="optimizer='sgd': need one of adamw, adamw_host, adamw_8bit"):
        RLConfig(optimizer="sgd")


@pytest.mark.parametrize("optimizer", ["adamw_host", "adamw_8bit"])
def test_a_run_says_that_adapters_have_little_to_save(optimizer):
    said = [line for line in remarks(RLConfig(optimizer=optimizer, use_lora=True)) if "optimizer" in line]
    assert len(said) == 1 and said[0].startswith(f"optimizer={optimizer}: ") and "adapter" in said[0]
    assert not [line for line in remarks(RLConfig(optimizer="adamw", use_lora=True)) if "optimizer" in line]
