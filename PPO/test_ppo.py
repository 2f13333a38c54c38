"""PPO as a whole: two models that do not touch each other, and a value model that is ready when training starts."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from common.advantages import generalized_advantages
from common.rollouts import Rollouts
from common.runs.progress import LongWork
from common.tasks import Task
from common.update.learner import Learner
from PPO import value_initializer
from PPO.ppo_trainer import PPOTrainer
from PPO.test_value_model import save_classifier
from PPO.value_model import token_values
from tests.toy import (
    CLIP,
    KL_PLACE,
    LORA,
    SEVERAL,
    metrics_of,
    samples_of,
    save_toy_policy,
    toy_config,
    toy_trainer,
    updates_of,
)

BACKBONES = {
    "own": {},
    "own lora": {"use_lora": True, "lora_r": 4},
    "shared": {"use_lora": True, "lora_r": 4, "value_backbone": "shared"},
}
# A fit that takes a second.
FIT = {
    "value_init": "fit",
    "value_init_prompts": 15,
    "value_init_epochs": 3,
    "value_init_minibatches": 8,
    "value_init_learning_rate": 3e-3,
}


TOY_SETTINGS = {"value_init": "zero_head", "value_learning_rate": 1e-3}
# Runs with everything on: the value model, fitted first, beside the policy and on its base.
FITTED = {"value_init": "fit", "value_init_prompts": 10, "value_init_epochs": 1, "value_init_minibatches": 4}
VALUES = {
    "kl_estimator": [None, "k1", "k2", "k3"],
    "value_init": ["zero_head", "none", "fit"],
    "value_init_prompts": [10, 5],
    "value_init_minibatches": [4, 1],
    "value_init_epochs": [1, 2],
    "value_clip_range": [0.2, None, 1e-3],
}
VARIANTS = {"lora": LORA | FITTED, "shared": LORA | FITTED | {"value_backbone": "shared"}}
FITTED_STEP = FITTED | {"value_init_learning_rate": 1e-3, "num_steps": 1}
# For each setting of its own: with which others it shows, and changed to what.
ACTS = (
    CLIP
    | KL_PLACE
    | {
        "num_generations": ({}, 2),
        "gamma": ({}, 0.5),
        "gae_lambda": ({"value_init": "none"}, 0.5),
        "whiten_rewards": ({}, True),
        "value_learning_rate": ({}, 1e-2),
        "value_clip_range": (SEVERAL | {"value_learning_rate": 1e-1}, None),
        "value_loss_coef": ({}, 1e-4),
        "value_backbone": (LORA | {"value_init": "none"}, "shared"),
        "value_init": ({}, "none"),
        "value_init_prompts": (FITTED_STEP, 20),
        "value_init_generations": (FITTED_STEP, 2),
        "value_init_epochs": (FITTED_STEP, 2),
        "value_init_minibatches": (FITTED_STEP, 16),
        "value_init_learning_rate": (FITTED_STEP, 3e-3),
    }
)


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return BACKBONES[request.param]


def values_of(trainer, rollouts) -> torch.Tensor:
    return trainer.for_each_token("value", rollouts, token_values)


def ppo(model, folder, **settings) -> PPOTrainer:
    return toy_trainer(model, folder, algorithm="PPO", **settings)


def tensors_of(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """Every weight of policy and value model by name; a shared base is in the policy."""
    with trainer.models.use("policy") as policy, trainer.models.use("value") as value:
        own = {name: tensor for name, tensor in value.named_parameters() if name.startswith("head.")}
        if trainer.config.value_backbone == "own":
            own = dict(value.named_parameters())
        named = {f"policy {name}": tensor for name, tensor in policy.named_parameters()}
        named |= {f"value {name}": tensor for name, tensor in own.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# Two models


def test_an_update_of_one_model_leaves_the_other_and_a_frozen_base_as_they_were(toy_folder, tmp_path, backbone):
    trainer = ppo(toy_folder, tmp_path / "run", value_init="none", num_steps=2, offload="always", **backbone)
    snapshots, update = {}, trainer.update

    def watched(learner, *args, **kwargs):
        before = tensors_of(trainer)
        update(learner, *args, **kwargs)
        snapshots.setdefault(learner.name, set()).update(changed(before, tensors_of(trainer)))

    trainer.update = watched
    trainer.train()
    adapter = ".value." if backbone.get("value_backbone") == "shared" else "value "
    for name in snapshots["policy"]:
        assert name.startswith("policy ") and ".value." not in name
        assert not backbone or "lora_" in name
    for name in snapshots["value"]:
        assert name.startswith("value head") or adapter in name
        assert not backbone or "lora_" in name or "head" in name
    assert len(snapshots["policy"]) > 10 and len(snapshots["value"]) > 10


def test_values_stay_with_their_rows_through_minibatches_and_micro_batches(toy_folder, tmp_path):
    results = []
    for budget, num_minibatches in ((10_000, 1), (10_000, 4), (20, 2)):
        settings = {"max_tokens_per_microbatch": budget, "num_minibatches": num_minibatches, "value_init": "none"}
        trainer = ppo(toy_folder, tmp_path / f"{budget} {num_minibatches}", **settings)
        rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
        values = values_of(trainer, rollouts)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(values_of(trainer, rollouts[order]), values[order], atol=1e-6, rtol=1e-5)
        results.append(values)
    with trainer.models.use("value") as model:
        for row in range(16):
            alone = rollouts[row : row + 1].trimmed()
            own = token_values(model, alone).detach()[0]
            for values in results:
                torch.testing.assert_close(values[row, : len(own)], own, atol=1e-6, rtol=1e-5)


def test_what_the_loss_calls_old_values_is_what_the_value_model_says_of_the_same_tokens(toy_folder, tmp_path):
    """Without a step in between every minibatch of every epoch has them; in the first epoch to the last bit."""
    settings = {"value_init": "none", "value_learning_rate": 0.0, "num_minibatches": 4, "num_update_epochs": 2}
    trainer = ppo(toy_folder, tmp_path / "run", num_steps=1, **settings)
    differences, whole = [], trainer.value_loss

    def compared(model, minibatch):
        differences.append(float((token_values(model, minibatch) - minibatch.values).abs().max().detach()))
        return whole(model, minibatch)

    trainer.value_loss = compared
    line = trainer.train()
    assert differences[:4] == [0.0] * 4 and max(differences) < 1e-6 and len(differences) == 8
    assert line["value/clip_fraction"] == 0.0


def test_values_do_not_depend_on_the_temperature(toy_folder, tmp_path):
    values = []
    for temperature in (1.0, 0.5):
        trainer = ppo(toy_folder, tmp_path / str(temperature), temperature=temperature, value_init="none")
        rollouts = trainer.sample(trainer.training_prompts(1), greedy=True)
        values.append(values_of(trainer, rollouts))
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("rates", "expected"), [((1e-3, 0.0), {"policy"}), ((0.0, 1e-3), {"value"})], ids=["policy", "value"]
)
def test_each_model_has_a_learning_rate_of_its_own(toy_folder, tmp_path, rates, expected):
    settings = {"learning_rate": rates[0], "value_learning_rate": rates[1]}
    trainer = ppo(toy_folder, tmp_path / "run", value_init="none", **settings)
    before = tensors_of(trainer)
    trainer.train()
    assert {name.split()[0] for name in changed(before, tensors_of(trainer))} == expected
    assert metrics_of(tmp_path / "run")[0]["lr"] == rates[0]


def test_the_value_loss_is_the_mean_squared_error_times_its_factor(toy_folder, tmp_path):
    seen = {}
    for factor in (0.5, 2.0):
        trainer = ppo(toy_folder, tmp_path / str(factor), value_loss_coef=factor, num_steps=1)
        updates = updates_of(trainer)
        line = trainer.train()
        (_, rollouts), _ = updates
        seen[factor] = line
        mean_square = float(rollouts.returns[rollouts.completion_mask].square().mean())  # all values are 0
        assert line["value/loss"] == pytest.approx(factor * mean_square, rel=1e-5)
    assert seen[2.0]["value/grad_norm"] == pytest.approx(4 * seen[0.5]["value/grad_norm"], rel=1e-4)


def test_returns_come_from_the_score_the_kl_and_the_values_before_any_update(toy_folder, tmp_path):
    settings = {"kl_coef": 0.5, "gamma": 0.9, "gae_lambda": 0.7, "missing_eos_penalty": 0.25, "value_init": "none"}
    trainer = ppo(toy_folder, tmp_path / "run", learning_rate=1e-2, **settings)
    updates = updates_of(trainer)
    trainer.train()
    _, rollouts = updates[-1]
    log_ratio = (rollouts.old_logprobs - rollouts.ref_logprobs).tolist()
    assert max(map(max, log_ratio)) > 0
    for row in range(16):
        length = int(rollouts.lengths[row])
        rewards = [-0.5 * kl for kl in log_ratio[row][:length]]
        rewards[-1] += rollouts.parts["digits"][row] + 0.5 * rollouts.parts["sum"][row]
        rewards[-1] -= 0.25 * rollouts.truncated[row]
        values = rollouts.values[row : row + 1, :length]
        everything = torch.ones(1, length, dtype=torch.bool)
        expected = generalized_advantages(torch.tensor([rewards]), values, everything, gamma=0.9, gae_lambda=0.7)
        torch.testing.assert_close(rollouts.advantages[row, :length], expected[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rollouts.returns[row, :length], expected[1][0], atol=1e-5, rtol=1e-4)


def test_final_has_the_value_model_as_transformers_load_it(toy_folder, tmp_path, backbone):
    settings = {"value_init": "none", "learning_rate": 3e-2, "value_learning_rate": 3e-2}
    trainer = ppo(toy_folder, tmp_path / "run", **settings, **backbone)
    updates = updates_of(trainer)
    trainer.train()
    _, rollouts = updates[-1]
    values = values_of(trainer, rollouts)
    folder = tmp_path / "run" / "final" / "value_model"
    model = AutoModelForTokenClassification.from_pretrained(folder)
    ids, prompt_lengths = rollouts.sequences()
    for row in range(16):
        start, length = int(prompt_lengths[row]), int(rollouts.lengths[row])
        scores = model(input_ids=ids[row : row + 1]).logits[0, start - 1 : start - 1 + length, 0]
        torch.testing.assert_close(scores, values[row, :length], atol=1e-4, rtol=1e-4)
    assert {"tokenizer.json", "model.safetensors"} <= {path.name for path in folder.iterdir()}


# The value model before the first step


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_fit_aims_at_the_very_returns_that_ppo_computes_of_values_of_zero(toy_folder, tmp_path, gamma):
    settings = {"kl_coef": 0.5, "whiten_rewards": True, "missing_eos_penalty": 0.25, "gamma": gamma, "gae_lambda": 1.0}
    settings |= {"value_init_prompts": 20}
    trainer = ppo(toy_folder, tmp_path / "run", **settings)
    with torch.no_grad(), trainer.models.use("ref") as ref:  # without a distance there would be no KL to compare
        for index, parameter in enumerate(ref.parameters()):
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel()) + index).view_as(parameter))
    fitted = value_initializer._returns(trainer, 1)
    assert fitted.returns.abs().max() > 0 and (fitted.old_logprobs != fitted.ref_logprobs).any()
    unknown = {"scores": None, "parts": {}, "old_logprobs": None, "ref_logprobs": None, "returns": None}
    trainer.sample = lambda prompts, num_generations: replace(fitted, **unknown)
    updates = updates_of(trainer)
    trainer.current_step = 1
    trainer.step(trainer.training_prompts(1))
    for _, rollouts in updates:
        assert not rollouts.values.any()
        assert torch.equal(rollouts.returns, fitted.returns) and torch.equal(rollouts.advantages, fitted.returns)


def task_of(prompts: list[str], bonus: list[float]) -> Task:
    """Each prompt has a score of its own, whatever its completions."""
    return Task(
        train=[{"prompt": prompt, "bonus": score} for prompt, score in zip(prompts, bonus, strict=True)],
        eval=[],
        rewards={"bonus": lambda completions, bonus, **_: list(bonus)},
        reward_weights={"bonus": 1.0},
        accuracy=None,
    )


@pytest.mark.slow
def test_the_fit_explains_variance_of_returns_of_prompts_that_it_has_not_seen(tmp_path, backbone):
    # The prompt tells: its last token is one of two.
    task = task_of([f"{i} {word}\n" for i in range(30) for word in ("low", "high")], [0.0, 1.0] * 30)
    # Initial weights of the usual size make states of an untrained model alike, and LoRA leaves them as they are.
    model = save_toy_policy(tmp_path / "model", initializer_range=0.3)
    settings = FIT | {"prompts_per_step": 12, "value_init_prompts": 60, "value_init_learning_rate": 1e-2} | backbone
    config = toy_config(model, tmp_path / "run", algorithm="PPO", num_steps=1, **settings)
    PPOTrainer(config, task=task).train()
    (line,) = metrics_of(tmp_path / "run")
    assert line["value_init/explained_variance_before"] == pytest.approx(0.0)
    assert line["value_init/explained_variance_after"] > 0.5
    assert line["value/explained_variance"] > 0.5  # and of those of the first step


def parts_of_the_fit(monkeypatch) -> list[Rollouts]:
    """The completions of each part, the held-out one first, in a list that fills while a trainer is made."""
    seen, returns = [], value_initializer._returns
    monkeypatch.setattr(value_initializer, "_returns", lambda *args: seen.append(returns(*args)) or seen[-1])
    return seen


@pytest.mark.parametrize(("value_init_prompts", "copies"), [(13, 1), (5, 3), (60, 3)])
def test_no_held_out_prompt_is_fitted_also_if_the_data_repeat_and_as_many_are_used_as_asked(
    toy_folder, tmp_path, monkeypatch, value_init_prompts, copies
):
    """Twelve prompts; three times the same ones, with other columns; fewer and more of them than are asked for."""
    task = task_of([f"{i} make {i}\n" for i in range(12)] * copies, [float(i % 5) for i in range(12 * copies)])
    settings = {"value_init": "fit", "value_init_prompts": value_init_prompts, "value_init_epochs": 1}
    config = toy_config(toy_folder, tmp_path / "run", algorithm="PPO", value_init_minibatches=4, **settings)
    seen = parts_of_the_fit(monkeypatch)
    PPOTrainer(config, task=task)
    held_out, *fitted = seen
    of_fit = {prompt for part in fitted for prompt in part.prompts}
    assert not set(held_out.prompts) & of_fit
    assert sum(map(len, seen)) == 4 * value_init_prompts and len(held_out) == 4 * (value_init_prompts // 5)
    if value_init_prompts == 60:
        assert len(of_fit) + len(set(held_out.prompts)) == 12


def test_prompts_are_held_out_in_the_order_of_training_or_every_fifth_where_they_are_few():
    ids, order = [[7], [8], [7], [9], [5], [4], [3]], [3, 0, 2, 1, 6, 5, 4]
    assert value_initializer.held_out_and_fitted(ids, order, 1) == ([3], [0, 2, 1, 6, 5, 4])
    assert value_initializer.held_out_and_fitted(ids, order, 2) == ([3, 4], [0, 2, 1, 6, 5])
    with pytest.raises(ValueError, match=r"one distinct prompt.*--value_init zero_head"):
        value_initializer.held_out_and_fitted([[7], [7]], [0, 1], 1)


def test_a_pass_of_the_fit_makes_as_many_optimizer_steps_as_asked(toy_folder, tmp_path, monkeypatch):
    steps, step = [], Learner.optimizer_step
    monkeypatch.setattr(
        Learner, "optimizer_step", lambda self, *args, **kwargs: steps.append(self.name) or step(self, *args, **kwargs)
    )
    ppo(toy_folder, tmp_path / "run", **(FITTED | {"value_init_minibatches": 6}))
    assert steps == ["value"] * 6


@pytest.mark.parametrize("masked", [False, True])
def test_mini_batches_of_a_pass_are_as_many_as_asked_or_as_there_are_rows_to_fit(rollouts, caplog, masked):
    if masked:  # two of six completions
        rollouts.loss_mask = rollouts.completion_mask & torch.tensor([1, 0, 1, 1, 0, 1]).bool()[:, None]
        rollouts.step_lengths = rollouts.loss_mask.sum(1)
    num_rows = 16 if masked else 24
    for asked in range(1, num_rows + 1):
        parts = value_initializer._parts_of_a_pass([rollouts] * 4, asked)
        assert sum(count for _, count in parts) == asked and sum(len(part) for part, _ in parts) == num_rows
        assert all(1 <= count <= len(part) and part.loss_mask.any(1).all() for part, count in parts)
        assert len(parts) == min(asked, 4)
    assert not caplog.records
    assert sum(count for _, count in value_initializer._parts_of_a_pass([rollouts] * 4, 40)) == num_rows
    assert f"value_init_minibatches=40: there are {num_rows} completions to fit" in caplog.text


@pytest.mark.slow
def test_completions_that_are_masked_have_no_part_in_the_fit_nor_in_its_error(toy_folder, tmp_path, monkeypatch):
    """What they returned may be anything."""
    values, errors, lines, returns = [], [], [], value_initializer._returns
    for poison in (0.0, 1e3):

        def poisoned(trainer, part, poison=poison):
            rollouts = returns(trainer, part)
            assert rollouts.truncated.any() and not rollouts.truncated.all()
            rollouts.returns = rollouts.returns + poison * rollouts.spread(rollouts.truncated)
            return rollouts

        monkeypatch.setattr(value_initializer, "_returns", poisoned)
        settings = FITTED_STEP | {"mask_truncated": True, "max_completion_length": 5}
        trainer = ppo(toy_folder, tmp_path / str(poison), **settings)
        values.append(values_of(trainer, trainer.sample(trainer.training_prompts(1), num_generations=4)))
        errors.append(value_initializer._error(trainer, poisoned(trainer, 1)))
        trainer.train()
        lines += metrics_of(tmp_path / str(poison))
    assert errors[0] == errors[1] > 0
    assert torch.equal(*values) and values[0].any() and lines[0] == lines[1]


def test_a_fit_without_any_completion_to_learn_from_says_so_and_trains(tiny_folder, tmp_path, caplog):
    settings = FIT | {"mask_truncated": True, "num_steps": 1, "max_completion_length": 1}
    trainer = ppo(tiny_folder, tmp_path / "run", **settings)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cut off all completions" in message and "--max_completion_length" in message
    trainer.train()
    (line,) = metrics_of(tmp_path / "run")
    assert not any("explained_variance" in name for name in line)


def test_the_fit_is_a_part_of_the_time_of_the_first_line(toy_folder, tmp_path):
    ppo(toy_folder, tmp_path / "run", num_steps=2, **FITTED).train()
    first, second = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert "time/value_init" not in second
    for line in (first, second):
        parts = {name: value for name, value in line.items() if name.startswith("time/") and name != "time/step"}
        assert 0.5 * line["time/step"] < sum(parts.values()) <= line["time/step"]
    assert first["time/value_init"] > first["time/update"]  # the steps of the fit are not in the update's


# What the values explain


def test_explained_variance_is_that_of_what_came_and_random_values_have_none(toy_folder, tmp_path):
    """Lambda-returns contain the values, which would then explain a part of themselves."""
    settings = {"value_init": "none", "num_steps": 1, "gae_lambda": 0.5, "gamma": 0.9, "mask_truncated": True}
    trainer = ppo(toy_folder, tmp_path / "run", **settings)
    with torch.no_grad(), trainer.models.use("value") as value:
        value.head.weight.mul_(30.0)
    updates = updates_of(trainer)
    line = trainer.train()
    (_, rollouts), _ = updates
    came, values, lambda_returns = [], [], []
    for row, length in enumerate(rollouts.lengths.tolist()):
        if not rollouts.truncated[row]:
            came += [float(rollouts.scores[row]) * 0.9 ** (length - 1 - t) for t in range(length)]
            values += rollouts.values[row, :length].tolist()
            lambda_returns += rollouts.returns[row, :length].tolist()
    came, values, lambda_returns = map(np.array, (came, values, lambda_returns))
    assert line["value/explained_variance"] == pytest.approx(1 - (came - values).var() / came.var(), rel=1e-4)
    of_lambda_returns = 1 - (lambda_returns - values).var() / lambda_returns.var()
    assert line["value/explained_variance"] < 0 and line["value/explained_variance"] < of_lambda_returns - 1


def test_where_all_returns_are_equal_explained_variance_is_left_out(toy_folder, tmp_path):
    task = task_of([f"{i} make {i}\n" for i in range(12)], [1.0] * 12)
    config = toy_config(toy_folder, tmp_path / "run", algorithm="PPO", num_steps=1, **FITTED)
    PPOTrainer(config, task=task).train()
    for line in metrics_of(tmp_path / "run"):
        assert not any("explained_variance" in name for name in line)


@pytest.mark.slow
def test_the_fit_changes_neither_policy_nor_reference_nor_any_random_state_nor_what_is_sampled(
    toy_folder, tmp_path, backbone
):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainers = {
        name: ppo(toy_folder, tmp_path / name, kl_coef=0.1, num_steps=1, **settings, **backbone)
        for name, settings in {"fit": FIT, "zero": {"value_init": "zero_head"}}.items()
    }
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    fitted, untouched = (tensors_of(trainer) for trainer in trainers.values())
    names = changed(untouched, fitted)
    assert names and not any(name.startswith("policy ") and ".value." not in name for name in names)
    stored = load_file(toy_folder / "model.safetensors")
    for kind in ("policy", "ref"):
        with trainers["fit"].models.use(kind) as model:
            weights = {name.replace("base_model.model.", "").replace(".base_layer", ""): p
                       for name, p in model.named_parameters()}  # fmt: skip
            assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
    for trainer in trainers.values():
        trainer.train()
    fit, zero = (samples_of(tmp_path / name) for name in trainers)
    assert [row["completion"] for row in fit] == [row["completion"] for row in zero]


def test_the_fit_learns_from_other_completions_than_training_will(toy_folder, tmp_path):
    trainer = ppo(toy_folder, tmp_path / "run", value_init_prompts=12, value_init_generations=4)
    fitted = Rollouts.joined([value_initializer._returns(trainer, part) for part in range(1, 6)])
    trained_on = trainer.sample(trainer.training_prompts(1, 12), num_generations=4)
    pairs = [set(zip(some.prompts, some.completions, strict=True)) for some in (fitted, trained_on)]
    assert set(fitted.prompts) == set(trained_on.prompts) and len(set(fitted.prompts)) == 12
    assert len(pairs[0] & pairs[1]) < 5 < len(pairs[0]) - 30  # completions of one token may be equal


def test_what_the_fit_samples_is_counted_and_its_metrics_are_no_part_of_the_first_step(toy_folder, tmp_path):
    ppo(toy_folder, tmp_path / "run", num_steps=2, **FIT).train()
    first, second = metrics_of(tmp_path / "run")
    assert first["tokens"] > 15 * 4 + 16 and second["tokens"] - first["tokens"] == pytest.approx(16 * second["length"])
    assert first["value/tokens"] == pytest.approx(16 * first["length"])
    assert "value_init/explained_variance_after" in first and "value_init/explained_variance_after" not in second


@pytest.mark.slow
def test_a_continued_run_does_not_fit_again(toy_folder, tmp_path, monkeypatch, backbone):
    settings = FIT | backbone | {"save_every": 1}
    trainer = ppo(toy_folder, tmp_path / "run", num_steps=1, **settings)
    trainer.train()

    def fitted_again(*args):
        raise AssertionError("the fit would overwrite what has been trained")

    monkeypatch.setattr("PPO.ppo_trainer.initialize_values", fitted_again)
    continued = ppo(toy_folder, tmp_path / "run", num_steps=2, **settings)
    before, after = tensors_of(trainer), tensors_of(continued)
    assert before.keys() == after.keys() and not changed(before, after)
    states = [learner.optimizer.state_dict()["state"] for learner in (trainer.value, continued.value)]
    for ours, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
    continued.train()


def test_a_zero_head_starts_at_zero_and_none_does_not(toy_folder, tmp_path, backbone):
    for kind in ("zero_head", "none"):
        trainer = ppo(toy_folder, tmp_path / kind, value_init=kind, **backbone)
        values = values_of(trainer, trainer.sample(trainer.training_prompts(1), num_generations=2))
        assert bool(values.any()) is (kind == "none")


def test_the_weights_with_the_least_held_out_error_are_kept_and_two_passes_without_progress_end_it(
    toy_folder, tmp_path, monkeypatch
):
    """Errors before the fit and after each pass: the fourth is the best, and after the sixth nothing is tried."""
    errors, seen, measure = iter([5.0, 6.0, 4.0, 3.0, 3.5, 3.0, 0.0]), [], value_initializer._error

    def scripted(trainer, held_out):
        assert measure(trainer, held_out) > 0
        with trainer.models.use("value") as value:
            seen.append([parameter.detach().clone() for parameter in value.parameters()])
        return next(errors)

    monkeypatch.setattr(value_initializer, "_error", scripted)
    trainer = ppo(toy_folder, tmp_path / "run", **(FIT | {"value_init_epochs": 8}))
    assert len(seen) == 6
    with trainer.models.use("value") as value:
        kept = list(value.parameters())
        equal = [all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True)) for weights in seen]
    assert equal == [False, False, False, True, False, False]


def test_the_rate_of_the_fit_falls_to_zero_and_each_pass_has_mini_batches_of_its_own(
    toy_folder, tmp_path, monkeypatch
):
    rates, dealt, update = [], [], Learner.update

    def recorded(learner, rollouts, loss, *, rate, **how):
        rates.append(rate)
        deal = {name: how[name] for name in ("step", "num_minibatches")}
        dealt.append([rows.tolist() for rows, _ in how["batches"].minibatches(rollouts, epoch=0, **deal)])
        return update(learner, rollouts, loss, rate=rate, **how)

    monkeypatch.setattr(Learner, "update", recorded)
    ppo(toy_folder, tmp_path / "run", **(FIT | {"value_init_epochs": 2}))
    assert rates == pytest.approx([3e-3 * left / 8 for left in range(8, 0, -1)])  # two passes over four parts
    assert all(first != second for first, second in zip(dealt[:4], dealt[4:], strict=True))


@pytest.mark.slow
def test_a_fit_that_only_makes_it_worse_leaves_the_values_at_zero(toy_folder, tmp_path):
    trainer = ppo(toy_folder, tmp_path / "run", num_steps=1, **(FIT | {"value_init_learning_rate": 3.0}))
    values = values_of(trainer, trainer.sample(trainer.training_prompts(1), num_generations=2))
    trainer.train()
    (line,) = metrics_of(tmp_path / "run")
    assert not values.any() and line["value_init/explained_variance_after"] == pytest.approx(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["reward model", "value model", "value model lora"])
def test_a_model_with_a_score_is_scaled_and_shifted_to_the_returns(toy_folder, tmp_path, source):
    lora = {"use_lora": True, "lora_r": 4} if source.endswith("lora") else {}
    if source == "reward model":
        folder = save_classifier(tmp_path / "model")
    else:
        ppo(toy_folder, tmp_path / "first", value_init="none", value_learning_rate=1e-2, **lora).train()
        folder = tmp_path / "first" / "final" / "value_model"
    trainer = ppo(toy_folder, tmp_path / "run", value_init=str(folder), value_init_prompts=20, num_steps=1, **lora)
    raw, _ = value_initializer.make_value_model(trainer)  # the model as it was
    batches = [value_initializer._returns(trainer, part) for part in range(1, 6)]
    calibrated = [values_of(trainer, rollouts) for rollouts in batches]
    uncalibrated = [token_values(raw, rollouts).detach() for rollouts in batches]
    masks = [rollouts.completion_mask for rollouts in batches]
    flat = [
        torch.cat([tensor[mask] for tensor, mask in zip(tensors[1:], masks[1:], strict=True)]).double().numpy()
        for tensors in (calibrated, uncalibrated, [rollouts.returns for rollouts in batches])
    ]
    ours, before, returns = flat
    # The least squared error that scaling and shifting can give on the batches that are not held out.
    scale, shift = np.polyfit(before, returns, 1)
    np.testing.assert_allclose(ours, scale * before + shift, atol=1e-4)
    assert ((ours - returns) ** 2).mean() < ((before - returns) ** 2).mean()
    trainer.train()


def test_the_fit_and_evaluations_say_how_far_they_are_where_nobody_watches(toy_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LongWork, "SECONDS_BETWEEN_LINES", 1e-3)
    settings = FIT | {"eval_every": 1, "num_steps": 1, "progress": True}
    toy_trainer(toy_folder, tmp_path / "run", algorithm="PPO", **settings).train()
    said = capsys.readouterr().err
    for pattern in (
        r"completions for the value model: [1-4] of 5 parts after 00:0\d, 00:0\d left\n",
        r"fit of the value model: [12] of 3 passes after 00:0\d, 00:0\d left\n",
        r"evaluation: 0 of 4 completions after 00:0\d\n",
    ):
        assert re.search(pattern, said), pattern
