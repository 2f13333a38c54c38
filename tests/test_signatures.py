"""What a reward function takes: it gets that and no more, and one that can never be called is refused before a run."""

from functools import partial

import pytest
from transformers import PretrainedConfig, PreTrainedModel

from common.rewards.rules import rule
from common.rewards.scorer import Scorer
from common.rewards.signatures import shown, taken

GIVEN = {"prompts": ["p"], "completions": ["c"], "completion_ids": [[1]], "answer": [4]}


class Judge:
    """Callable objects, and methods."""

    def __call__(self, prompts, completions):
        return [1.0] * len(completions)

    def method(self, completions, *, answer):
        return [float(a) for a in answer]

    @classmethod
    def of_class(cls, completions):
        return [1.0] * len(completions)

    @staticmethod
    def static(completion_ids):
        return [float(len(ids)) for ids in completion_ids]


def scaled(scale, prompts, completions):
    return [float(scale)] * len(completions)


async def waits(completions):
    return [1.0] * len(completions)


CALLABLE = {
    "without **columns": lambda prompts, completions: [1.0],
    "completions only": lambda completions: [1.0],
    "a column only beside": lambda completions, answer: [float(answer[0])],
    "a default": lambda completions, unit="m": [float(unit == "m")],
    "everything": lambda **given: [float(sorted(given) == sorted(GIVEN))],
    "object": Judge(),
    "method": Judge().method,
    "class method": Judge.of_class,
    "static method": Judge.static,
    "partial by position": partial(scaled, 2.0),
    "partial by name": partial(scaled, scale=2.0),
    "asynchronous": waits,
    "rule": rule(lambda completions: [1.0]),
    "rule of an object": rule(Judge()),
}


@pytest.mark.parametrize("name", CALLABLE)
def test_a_function_gets_what_it_has_parameters_for(name):
    scorer = Scorer({"mine": CALLABLE[name]}, {"mine": 1.0})
    scorer.check_columns(["answer"])
    scores, _ = scorer(["p"], ["c"], {"answer": [4]}, completion_ids=[[1]])
    assert scores.item() in (1.0, 2.0, 4.0)


def test_what_is_taken_by_hand():
    assert taken(lambda prompts, answer: 0, GIVEN).keys() == {"prompts", "answer"}
    assert taken(lambda prompts, **rest: 0, GIVEN) == GIVEN
    assert taken(lambda completions, /, answer: 0, GIVEN).keys() == {"answer"}
    assert taken(dict.fromkeys, GIVEN) == {}
    assert taken(type("Opaque", (), {"__call__": lambda self, **given: 0, "__signature__": 5})(), GIVEN) == GIVEN
    assert shown(partial(scaled, 2.0)) == "scaled(prompts, completions)"
    long = {f"parameter_{i}": i for i in range(50)}
    assert len(shown(eval(f"lambda {', '.join(long)}: 0"))) < 140


class Model(PreTrainedModel):
    """A model of transformers, as trl takes it for a reward."""

    config_class = PretrainedConfig


def yields(completions):
    yield 1.0


async def yields_later(completions):
    yield 1.0


REFUSED = {
    "builtin": (len, ["len(obj) takes obj by position only", "by name: prompts, completions, completion_ids"]),
    "by position": (lambda prompts, completions, /: [], ["takes prompts, completions by position only"]),
    "one argument": (lambda c: [], ["<lambda>(c) has no parameter `completions`", "every column of the data"]),
    "singular": (lambda completion: [], ["Did you mean completions by completion?"]),
    "none": (lambda: [], ["<lambda>() has no parameter `completions`"]),
    "positions": (lambda *args: [], ["<lambda>(*args) has no parameter `completions`"]),
    "columns only": (lambda prompts, answer: [], ["has no parameter `completions`", "would not see what it scores"]),
    "class": (Judge, ["is the class Judge, and a reward is one of its objects", "judge = Judge(...)"]),
    "text": ("gpt2", ["is a str, which cannot be called", "named in the setting `rewards`"]),
    "number": (3, ["is a int, which cannot be called"]),
    "model": (Model(PretrainedConfig()), ["is a Model, which scores token ids", "folder or hub id"]),
    "generator": (yields, ["yields its values one by one", "Return a list"]),
    "partial of a generator": (partial(yields), ["yields its values one by one"]),
    "asynchronous generator": (yields_later, ["yields its values one by one"]),
    "rule that logs": (rule(lambda completions, log_metric: []), ["is a rule and needs log_metric", "default None"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_never_score_completions_is_refused_when_it_is_given(name):
    function, parts = REFUSED[name]
    with pytest.raises(ValueError, match="reward 'mine'") as caught:
        Scorer({"mine": function}, {"mine": 1.0})
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 8 * 80


def test_a_missing_column_is_answered_with_the_signature_and_what_there_is():
    scorer = Scorer({"mine": lambda completion, completions, anser: [1.0]}, {"mine": 1.0})
    with pytest.raises(
        ValueError, match=r"needs the columns completion, anser; the held-out part has answer\."
    ) as caught:
        scorer.check_columns(["answer"], "the held-out part")
    for part in (
        "<lambda>(completion, completions, anser)",
        "trainer_state, log_metric",
        "mean completions by completion",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["completion_ids", "trainer_state", "log_metric", "log_extra"])
def test_a_column_with_the_name_of_something_else_is_refused(name):
    with pytest.raises(ValueError, match=rf"columns {name}: the data set has them.*Rename the columns"):
        Scorer({"mine": lambda completions: [1.0]}, {"mine": 1.0}).check_columns(["answer", name])
