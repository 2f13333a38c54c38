"""trl's trainer_state, log_metric and log_extra: who gets them, and where what is logged goes."""

from functools import partial

import pytest

from common.rewards.reports import Reports, TrainerState
from common.rewards.rules import rule
from common.rewards.scorer import Scorer
from common.tasks import Task
from tests.toy import algorithms, metrics_of, samples_of, toy_config, toy_task

STATE = TrainerState(global_step=3, max_steps=10, epoch=0.5)


def score(functions: dict, completions=("a", "bb"), **options) -> Scorer:
    scorer = Scorer(functions, dict.fromkeys(functions, 1.0), **options)
    ids = [[1]] * len(completions)
    scorer(["p"] * len(completions), [*completions], {}, completion_ids=ids, state=STATE)
    return scorer


def test_functions_get_them_by_name_or_among_all_the_rest_and_no_other_does():
    seen = {}

    def by_name(completions, trainer_state):
        seen["by name"] = trainer_state
        return [0.0] * len(completions)

    def rest(completions, **kwargs):
        seen["rest"] = kwargs
        return [0.0] * len(completions)

    score({"by name": by_name, "rest": rest, "none": lambda completions: [0.0] * len(completions)})
    assert seen["by name"] == STATE and seen["rest"]["trainer_state"] == STATE
    assert seen["rest"].keys() == {"prompts", "completion_ids", "trainer_state", "log_metric", "log_extra"}


def test_without_a_run_there_are_none():
    seen = []
    Scorer({"rest": lambda **given: seen.append(given) or [0.0]}, {"rest": 1.0})(["p"], ["c"], {})
    assert seen[0].keys() == {"prompts", "completions"}


def test_what_functions_log_is_kept_of_the_last_call():
    def one(completions, log_metric, log_extra):
        log_metric("size", len(completions))
        log_metric("size", 0)
        log_extra("letters", [len(text) for text in completions])
        return [0.0] * len(completions)

    async def two(completions, log_metric, log_extra):
        log_metric("size", 4.0)
        log_extra("letters", completions)
        return [0.0] * len(completions)

    scorer = score({"one": one, "two": two})
    assert scorer.reports.metrics == {"size": [2.0, 0.0, 4.0]}
    assert scorer.reports.columns == {"letters": [1, 2], "two/letters": ["a", "bb"]}
    scorer(["p"], ["c"], {}, state=STATE)
    assert scorer.reports.columns == {"letters": [1], "two/letters": ["c"]}


def test_a_call_that_fails_on_text_logs_nothing():
    def of_messages(completions, log_metric):
        log_metric("calls", 1.0)
        return [float(len(completion[0]["content"])) for completion in completions]

    assert score({"mine": of_messages}).reports.metrics == {"calls": [1.0]}


def test_a_rule_gets_the_state_if_it_names_it_and_cannot_log():
    @rule
    def late(completions, trainer_state):
        return [trainer_state.global_step / trainer_state.max_steps]

    @rule
    def others(completions, log_metric=None, log_extra=None, **kwargs):
        return [float(log_metric is None and log_extra is None and "trainer_state" not in kwargs)]

    for limits in ({}, {"limits": None}):
        scorer = Scorer({"late": late, "others": others}, {"late": 1.0, "others": 1.0}, **limits)
        _, parts = scorer(["p"], ["c"], {}, state=STATE)
        assert parts["late"].tolist() == pytest.approx([0.3]) and parts["others"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (lambda log_metric, log_extra: log_metric("x", "high"), r"log_metric\('x', 'high'\): not a finite number"),
        (lambda log_metric, log_extra: log_metric("x", float("nan")), r"log_metric\('x', nan\)"),
        (lambda log_metric, log_extra: log_metric("x", None), r"log_metric\('x', None\)"),
        (lambda log_metric, log_extra: log_extra("x", [1]), r"log_extra\('x', ...\) with 1 values for 2 completions"),
    ],
    ids=["text", "nan", "none", "too few"],
)
def test_what_cannot_be_logged_is_refused(log, message):
    def mine(completions, log_metric, log_extra):
        log(log_metric, log_extra)
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=message):
        score({"mine": mine})


def test_a_metric_may_be_a_number_of_any_library():
    import torch

    reports = Reports(num_rows=1)
    reports.log_metric("x", torch.tensor(0.5))
    assert reports.metrics == {"x": [0.5]}


# In a run


def logs(completions, trainer_state, log_metric, log_extra, total, *, seen):
    seen.append((trainer_state.global_step, trainer_state.max_steps, trainer_state.epoch, len(completions)))
    log_metric("rows", len(completions))
    log_extra("half", [number / 2 for number in total])
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("name", ["GRPO", "ReMax"])
def test_a_run_writes_what_is_logged_into_its_metrics_and_samples(toy_folder, tmp_path, name):
    rows, seen = toy_task(), []
    task = Task(train=rows.train, eval=rows.eval, rewards={"mine": partial(logs, seen=seen)})
    config = toy_config(toy_folder, tmp_path / "run", algorithm=name, num_steps=2, eval_every=1)
    algorithms()[name].trainer(config, task=task).train()
    # Evaluations of four rows, before training and after each step; a step has four prompts of twelve.
    evaluated = [state for *state, size in seen if size == 4]
    trained = [state for *state, size in seen if size == 16]
    thirds = [[step, 2, pytest.approx(step / 3)] for step in range(3)]
    assert trained == thirds[:2] and [state for state in thirds if state in evaluated] == thirds
    first, second, third = metrics_of(tmp_path / "run")
    assert first["eval/logged/rows"] == third["eval/logged/rows"] == 4.0
    assert second["logged/rows"] > 0 and "logged/rows" not in first
    for sample in samples_of(tmp_path / "run"):
        a, _, rest = sample["prompt"].partition(" ")
        assert sample["extra"] == {"half": (int(a) + int(rest[0])) / 2}


def test_samples_of_functions_that_log_nothing_have_no_such_column(toy_folder, tmp_path):
    config = toy_config(toy_folder, tmp_path / "run", num_steps=1)
    algorithms()["GRPO"].trainer(config, task=toy_task()).train()
    assert all("extra" not in sample for sample in samples_of(tmp_path / "run"))
