"""What holds for every algorithm, found by the rule that makes a folder one: `Name/name_trainer.py`."""

import ast
import json
import math
import re
import runpy
import sys
import warnings
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import parse_config
from common.config import ClippedConfig, PlacedKLConfig, RLConfig
from common.presets.preset import PRESETS, Preset
from common.remarks import remarks
from tests.toy import (
    LORA,
    ROOT,
    SEVERAL,
    Killed,
    algorithms,
    described_by,
    facts,
    learners_of,
    metrics_of,
    samples_of,
    save_toy_policy,
    toy_trainer,
    trained_weights,
    updates_of,
)

NAMES = list(algorithms())
# Runs with everything on.
VARIANTS = {name: (name, {}) for name in NAMES} | {"GRPO lora": ("GRPO", LORA)}
VARIANTS |= {
    f"{name} {kind}": (name, more) for name in NAMES for kind, more in facts(name).get("VARIANTS", {}).items()
}
BUSY = {"num_steps": 4, "num_minibatches": 2, "num_update_epochs": 2, "kl_coef": 0.1, "missing_eos_penalty": 0.25}
BUSY |= {"eval_every": 2, "save_every": 2, "offload": "never"}


@pytest.fixture(scope="module")
def busy_run(toy_folder, tmp_path_factory):
    """The folder and the trainer of a finished run of a variant; each is made once."""
    runs, root = {}, tmp_path_factory.mktemp("runs")

    def run(variant: str):
        if variant not in runs:
            name, settings = VARIANTS[variant]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                trainer = toy_trainer(toy_folder, root / variant, algorithm=name, **(BUSY | settings))
                trainer.train()
            # Correct use warns of nothing; what libraries deprecate among themselves when they are imported is theirs.
            assert not [str(warning.message) for warning in said if warning.category is not DeprecationWarning]
            runs[variant] = root / variant, trainer
        return runs[variant]

    return run


# The files


def test_the_algorithms_are_found():
    known = {"GRPO", "PPO", "RLOO", "ReMax", "RAFT", "Reinforce", "VinePPO", "GSPO", "CISPO", "DAPO", "Distill"}
    assert known <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_trainer_file_has_at_most_200_lines(name):
    assert len(algorithms()[name].trainer_file.read_text().splitlines()) <= 200


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_on_top_of_the_script_and_nothing_else(name):
    literal = re.search(r"^SETTINGS = \w+\((.*?)^\)", algorithms()[name].script.read_text(), re.M | re.S).group(1)
    written = re.findall(r"^    (\w+)=", literal, re.M)
    assert sorted(written) == sorted(field.name for field in fields(algorithms()[name].config))


@cache
def script_of(name: str) -> SimpleNamespace:
    """The literal of a script, what its preset cpu needs besides, and the marks of the literal's lines."""
    text = algorithms()[name].script.read_text()
    module = runpy.run_path(str(algorithms()[name].script))
    literal = re.search(r"^SETTINGS = \w+\((.*?)^\)", text, re.M | re.S).group(1)
    marks = re.findall(r"^    (\w+)=.*?  # cpu: ([^;\n]+)", literal, re.M)
    marks = {setting: ast.literal_eval(mark) for setting, mark in marks}
    return SimpleNamespace(settings=module["SETTINGS"], embedded=module.get("EMBEDDED", {}), marks=marks)


@pytest.mark.parametrize("name", NAMES)
def test_each_line_that_the_preset_cpu_replaces_says_with_what(name):
    script = script_of(name)
    pairs = Preset.read("cpu").pairs | script.embedded
    replaced = {setting: value for setting, (_, value) in pairs.items() if value != vars(script.settings)[setting]}
    assert script.marks == replaced


@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_the_bare_command_is_the_embedded_default(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    script = script_of(name)
    pairs = Preset.read("cpu").pairs | script.embedded
    for setting, (shipped, value) in pairs.items():
        assert vars(script.settings)[setting] in (shipped, value), setting  # else the line would count as edited
    config = parse_config(script.settings, embedded=script.embedded, script=str(algorithms()[name].script), args=[])
    assert {setting: vars(config)[setting] for setting in pairs} == {s: value for s, (_, value) in pairs.items()}
    assert "since you edited" not in "".join(config.notes)


@pytest.mark.parametrize("name", NAMES)
def test_a_script_as_shipped_has_no_setting_that_does_nothing(name):
    script = script_of(name)
    for preset in ["none", *(file.stem for file in PRESETS.glob("*.yaml"))]:
        config = parse_config(
            script.settings, embedded=script.embedded, script=str(algorithms()[name].script), args=["--preset", preset]
        )
        assert remarks(config) == []


def test_the_literals_of_the_scripts_agree_in_what_all_algorithms_share():
    """Those settings apart for which an algorithm has a default of its own, or says why in OWN_VALUES."""
    shared = {field.name: field.default for field in fields(RLConfig)}
    values: dict[str, dict[str, list[str]]] = {}
    for name in NAMES:
        defaults = {field.name: field.default for field in fields(algorithms()[name].config)}
        for setting in shared.keys() - facts(name).get("OWN_VALUES", {}).keys() - {"num_generations"}:
            if defaults[setting] == shared[setting]:
                written = repr(vars(script_of(name).settings)[setting])
                values.setdefault(setting, {}).setdefault(written, []).append(name)
    assert not {setting: found for setting, found in values.items() if len(found) > 1}


@pytest.mark.parametrize("name", NAMES)
def test_a_script_explains_every_setting(name, monkeypatch, capsys):
    script = algorithms()[name].script
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert not left.value.code
    for field in fields(algorithms()[name].config):
        assert f"--{field.name} " in shown


def logic_of(file: Path) -> list[str]:
    """The lines of a file without blank ones, without imports, and of a script without the literal of its settings."""
    text = re.sub(r"^SETTINGS = \w+\(.*?^\)", "", file.read_text(), flags=re.M | re.S)
    text = re.sub(r"^(from .* )?import (\(.*?^\)|.*)", "", text, flags=re.M | re.S if "import (" in text else re.M)
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_no_six_lines_are_the_same_in_two_algorithms():
    """Exempt are imports, which are no logic, and the values of settings, which a script is there to show."""
    places: dict[tuple[str, ...], str] = {}
    for name, algorithm in algorithms().items():
        for file in sorted(algorithm.script.parent.glob("*.py")):
            lines = logic_of(file)
            for start in range(len(lines) - 5):
                run = tuple(lines[start : start + 6])
                assert places.setdefault(run, name) == name, "\n".join([f"{name} and {places[run]}:", *run])


# It learns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "use_lora", "seed"),
    [(name, use_lora, 0) for name in NAMES for use_lora in (False, True)]
    + [(name, False, seed) for name in ("GRPO", "PPO") for seed in (1, 2)],
    ids=lambda value: {True: "lora", False: "full"}.get(value, value) if isinstance(value, bool) else str(value),
)
def test_it_learns_to_write_digits(toy_folder, tmp_path, name, use_lora, seed):
    # With LoRA the head is frozen: initial weights of the usual size would leave it near the uniform distribution.
    model = save_toy_policy(tmp_path / "model", initializer_range=0.3) if use_lora else toy_folder
    settings = {"lora_r": 8, "lora_alpha": 16, "num_steps": 60, "learning_rate": 3e-2}
    trainer = toy_trainer(
        model,
        tmp_path / "run",
        algorithm=name,
        seed=seed,
        prompts_per_step=8,
        rewards=["digits"],
        eval_every=100,
        eval_num_samples=8,
        use_lora=use_lora,
        **(settings if use_lora else {"num_steps": 25, "learning_rate": 2e-2}),
    )
    trainer.train()
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["eval/score"] < 0.6
    assert lines[-1]["eval/score"] > 0.8


# A run


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_ratio_is_exactly_one_and_the_kl_before_the_first_update_exactly_zero(busy_run, variant):
    folder, trainer = busy_run(variant)
    lines = metrics_of(folder)[1:]
    assert [line["kl"] == 0.0 for line in lines] == [True, False, False, False]
    assert all(line["sampler/logprob_diff"] < 1e-4 for line in lines)
    for line in lines:
        if "policy/ratio" in line:  # a likelihood has no ratio
            assert line["policy/first_ratio"] == 1.0 != line["policy/ratio"]
    assert ("policy/ratio" in lines[0]) is isinstance(trainer.config, ClippedConfig)


@pytest.mark.parametrize("place", ["reward", "loss"])
@pytest.mark.parametrize("name", [name for name in NAMES if issubclass(algorithms()[name].config, PlacedKLConfig)])
def test_the_kl_has_one_name_wherever_it_acts_and_that_of_the_loss_its_own(toy_folder, tmp_path, name, place):
    settings = {"kl_coef": 0.1, "kl_place": place, "num_steps": 3, "learning_rate": 1e-2}
    toy_trainer(toy_folder, tmp_path / "run", algorithm=name, **settings).train()
    first, *_, last = metrics_of(tmp_path / "run")
    assert first["kl"] == 0 and last["kl"] != 0
    assert [line.get("policy/kl_loss", -1) > -1 for line in (first, last)] == [place == "loss"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_score_of_a_step_has_the_penalty_once_and_that_of_the_evaluation_has_it_not(busy_run, name):
    folder, _ = busy_run(name)
    lines = metrics_of(folder)
    for line in lines[1:]:
        raw = line["reward/digits"] + 0.5 * line["reward/sum"]
        assert line["score"] == pytest.approx(raw - 0.25 * line["truncated"], abs=1e-6) and 0 < line["truncated"] < 1
    for row in samples_of(folder):
        raw = row["parts"]["digits"] + 0.5 * row["parts"]["sum"]
        penalty = 0.25 if row["truncated"] and row["split"] == "train" else 0.0
        assert row["score"] == pytest.approx(raw - penalty, abs=1e-6)
    evaluated = [row for row in samples_of(folder) if row["split"] == "eval" and row["step"] == 0]
    assert lines[0]["eval/score"] == pytest.approx(sum(row["score"] for row in evaluated) / 4, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_reports_the_same_names(busy_run, name):
    line = metrics_of(busy_run(name)[0])[2]
    expected = """step episodes tokens score reward/digits reward/sum kl entropy length truncated zero_advantage
        score_min score_max policy/loss policy/grad_norm policy/tokens lr sampler/logprob_diff
        eval/score eval/accuracy eval/length"""
    assert set(expected.split()) <= set(line)


EXPLAINED = [
    re.compile(re.sub(r"<\w+>", "[^/]+", name))
    for cell in re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", cell)
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_metric_of_a_run_is_explained_in_the_documents(busy_run, variant):
    folder, _ = busy_run(variant)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        assert not [name for name in json.loads(line) if not any(known.fullmatch(name) for known in EXPLAINED)]


def test_algorithms_of_one_seed_begin_with_the_same_completions(busy_run):
    first = {}
    for name in NAMES:
        rows = [row for row in samples_of(busy_run(name)[0]) if row["step"] == 1 and row["split"] == "train"]
        first[name] = [(row["prompt"], row["completion"]) for row in rows]
    assert all(rows == first["GRPO"] for rows in first.values()) and len(first["GRPO"]) == 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_final_model_is_the_trained_policy_in_plain_transformers(busy_run, toy_folder, variant):
    folder, trainer = busy_run(variant)
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    ids = torch.tensor([[5, 9, 14, 3, 77]])
    with torch.no_grad(), trainer.models.use("policy") as policy:
        torch.testing.assert_close(model(ids).logits, policy(ids).logits, atol=1e-5, rtol=1e-4)
    untrained = AutoModelForCausalLM.from_pretrained(toy_folder)
    assert not torch.allclose(model(ids).logits, untrained(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder / "final").decode([5]) == trainer.tokenizer.decode([5])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_was_cut_off_continues_as_if_nothing_had_happened(busy_run, toy_folder, tmp_path, variant):
    """In its fourth step, so that a line and samples of the third are written anew from the checkpoint of the second.

    That a process killed from outside leaves no more behind than this is in test_trainer.py.
    """
    whole, _ = busy_run(variant)
    name, settings = VARIANTS[variant]
    settings = BUSY | settings
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=name, **settings)
    update = trainer.update

    def cut_off(*args, **kwargs):
        update(*args, **kwargs)
        if trainer.current_step == 4:
            raise Killed

    trainer.update = cut_off
    with pytest.raises(Killed):
        trainer.train()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3]
    continued = toy_trainer(toy_folder, tmp_path / "run", algorithm=name, **settings)
    assert continued.run.first_step == 3
    continued.train()
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_offload_changes_not_a_bit(busy_run, toy_folder, tmp_path, variant):
    never, _ = busy_run(variant)
    name, settings = VARIANTS[variant]
    settings = BUSY | settings | {"offload": "always", "save_every": 0, "num_steps": 2}
    toy_trainer(toy_folder, tmp_path / "run", algorithm=name, **settings).train()
    assert metrics_of(tmp_path / "run") == metrics_of(never)[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_token_budget_changes_no_weight(toy_folder, tmp_path, name):
    """With plain gradient descent, for which a rounding error stays as small as it is."""
    weights = []
    settings = {"num_steps": 1, "num_minibatches": 2, "num_update_epochs": 2, "kl_coef": 0.1, "max_grad_norm": 0.0}
    for budget in (1, 37, 100_000):
        trainer = toy_trainer(
            toy_folder, tmp_path / str(budget), algorithm=name, max_tokens_per_microbatch=budget, **settings
        )
        for learner in learners_of(trainer):
            learner.optimizer = torch.optim.SGD(learner.parameters, lr=1e-3)
        weights.append(trained_weights(trainer))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if not facts(name).get("LOGPROBS_ARE_REWARDS")])
def test_where_the_policy_that_sampled_is_the_one_being_updated_no_pass_is_spent_on_it(toy_folder, tmp_path, name):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=name, num_steps=1)

    def spent(*args):
        raise AssertionError("the ratio is 1 without it")

    trainer.logprobs = spent
    assert trainer.train().get("policy/ratio", 1.0) == 1.0


def passes_of(trainer) -> list[tuple[str, int]]:
    """For each pass over rollouts without gradient: of which model, and how many rows; fills while it runs."""
    passes, logprobs = [], trainer.logprobs
    trainer.logprobs = lambda name, rollouts: passes.append((name, len(rollouts))) or logprobs(name, rollouts)
    return passes


@pytest.mark.parametrize(("name", "place"), [("GRPO", {"kl_place": "reward"}), ("RLOO", {})])
def test_no_row_that_is_kept_goes_through_the_policy_twice(toy_folder, tmp_path, name, place):
    """The KL in the reward needs log-probs of all rows, and those of kept ones must be of the update's own passes."""
    settings = place | SEVERAL | {"kl_coef": 0.1, "keep_per_group": True, "max_tokens_per_microbatch": 60}
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=name, **settings | {"num_steps": 2})
    passes, updates = passes_of(trainer), updates_of(trainer)
    trainer.train()
    assert passes == [("policy", 4), ("policy", 12), ("ref", 16)] * 2
    assert [line["policy/first_ratio"] for line in metrics_of(tmp_path / "run")] == [1.0, 1.0]
    assert metrics_of(tmp_path / "run")[1]["kl"] != 0
    again = toy_trainer(toy_folder, tmp_path / "again", algorithm=name, **settings | {"num_steps": 1})
    again.current_step = 1
    _, kept = updates[0]
    assert len(kept) == 4 and torch.equal(again.logprobs("policy", kept), kept.old_logprobs)


def test_sparse_makes_no_pass_again_unless_it_dropped_a_row(toy_folder, tmp_path):
    """With the KL in the reward groups of equal scores differ as soon as the policy has left the reference."""
    settings = SEVERAL | {"kl_coef": 0.1, "kl_place": "reward", "sparse": True, "num_steps": 2}
    trainer = toy_trainer(toy_folder, tmp_path / "run", rewards=["sum"], **settings)
    passes = passes_of(trainer)
    trainer.train()
    first, second = metrics_of(tmp_path / "run")
    assert first["zero_advantage"] > 0 == second["zero_advantage"]
    num_left = round(16 * (1 - first["zero_advantage"]))
    again = [("policy", num_left)]
    assert passes == [("policy", 16), ("ref", 16), *again, ("policy", 16), ("ref", 16)]
    assert first["policy/first_ratio"] == second["policy/first_ratio"] == 1.0 or num_left == 0


# The settings


def specific_settings(name: str) -> set[str]:
    """Settings that not every algorithm has, and those for which this one has another default."""
    shared = {(field.name, field.default) for field in fields(RLConfig)}
    return {field.name for field in fields(algorithms()[name].config) if (field.name, field.default) not in shared}


EVERYWHERE = {
    "kl_coef": ({"num_steps": 3, "learning_rate": 1e-2}, 10.0),
    "missing_eos_penalty": ({}, 1.0),
    "average_over": ({}, "constant"),
    "mask_truncated": ({}, True),
    "temperature": ({}, 0.7),
}


def acts(name: str) -> dict:
    """For each setting: with which others it acts, and changed to what; the algorithm's own word counts."""
    return EVERYWHERE | facts(name).get("ACTS", {})


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_is_without_a_test_that_it_acts(name):
    assert specific_settings(name) <= facts(name).get("ACTS", {}).keys()


@pytest.fixture(scope="module")
def weights_with(toy_folder, tmp_path_factory):
    """The weights after training with these settings; the same ones are trained once."""
    known = {}

    def weights(name: str, settings: dict) -> torch.Tensor:
        key = name, str(sorted(settings.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("run") / "run"
            trainer = toy_trainer(toy_folder, folder, algorithm=name, **({"num_steps": 1} | settings))
            known[key] = trained_weights(trainer)
        return known[key]

    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in NAMES for setting, how in acts(name).items() if how is not None]
)
def test_the_setting_acts(weights_with, name, setting):
    others, changed = acts(name)[setting]
    assert not torch.equal(weights_with(name, others), weights_with(name, others | {setting: changed}))


CLIPPED = [name for name in NAMES if issubclass(algorithms()[name].config, ClippedConfig)]


def run_with_another_sampler(toy_folder, folder, name, **settings):
    """Weights and metrics of a step whose sampler is said to have drawn every third token with 3 times its chance."""
    trainer = toy_trainer(toy_folder, folder, algorithm=name, num_steps=1, max_logprob_diff=0, **settings)
    sample = trainer.sample

    def skewed(*args, **options):
        rollouts = sample(*args, **options)
        rollouts.sampling_logprobs -= math.log(3) * (rollouts.completion_mask & (rollouts.completion_ids % 3 == 0))
        return rollouts

    trainer.sample = skewed
    return trained_weights(trainer), metrics_of(folder)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPPED)
def test_every_policy_loss_has_the_weights_and_reports_them_without_a_correction_too(toy_folder, tmp_path, name):
    runs = {
        str(settings): run_with_another_sampler(toy_folder, tmp_path / str(number), name, **settings)
        for number, settings in enumerate(
            (
                {},
                {"importance_correction": "truncate"},
                {"importance_correction": "truncate", "importance_cap": 1.5},
                {"importance_correction": "mask"},
                {"importance_correction": "none", "importance_cap": 4.0},
            )
        )
    }
    auto, *corrected, none = runs.values()
    assert torch.equal(auto[0], none[0])  # in float32
    assert len({tuple(weights.tolist()) for weights, _ in (auto, *corrected)}) == 4
    for _, metrics in runs.values():
        assert 1 < metrics["sampler/weight"] < metrics["sampler/weight_max"]
    if not facts(name).get("WEIGHS_COMPLETIONS"):
        assert auto[1]["sampler/weight_max"] == pytest.approx(3, abs=1e-4)
        assert 0 < auto[1]["sampler/weight_cut"] < 1 and none[1]["sampler/weight_cut"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_whitening_is_off_where_there_is_a_baseline_already_and_on_where_it_is_the_only_one(name):
    assert algorithms()[name].config().whiten_advantages is facts(name).get("WHITENING_IS_THE_BASELINE", False)


def has_advantages(name: str) -> bool:
    try:
        return algorithms()[name].config(whiten_advantages=True).whiten_advantages
    except ValueError:  # it has none, and says so
        return False


@pytest.mark.parametrize("name", [name for name in NAMES if has_advantages(name)])
def test_whitening_can_be_asked_for(toy_folder, tmp_path, name):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=name, num_steps=1, whiten_advantages=True)
    seen = described_by(trainer)
    trainer.train()
    ((rollouts, advantages),) = seen
    real = advantages[rollouts.completion_mask].double()
    assert float(real.mean()) == pytest.approx(0, abs=1e-5)
    assert float(real.square().mean()) == pytest.approx(1, abs=1e-3)
    assert (advantages[~rollouts.completion_mask] == 0).all()
