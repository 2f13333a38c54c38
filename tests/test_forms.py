"""Text or chat messages: what a function gets follows from its annotation, or from how it fails."""

import json
import logging
from typing import Any

import pytest

from common.rewards.choose import ScoringSettings, make_scorer
from common.rewards.forms import form_of
from common.rewards.rules import rule
from common.rewards.scorer import Scorer

RAW = [[{"role": "user", "content": "hello"}], "\n\nHuman: hi\n\nAssistant:"]


def score(function, completions=("yes", "no"), *, form: str = "auto") -> list[float]:
    scorer = Scorer({"mine": function}, {"mine": 1.0}, forms={"mine": form})
    return scorer(["r"] * len(completions), [*completions], {}, raw_prompts=RAW[: len(completions)])[0].tolist()


def refused(function, **options) -> str:
    with pytest.raises(ValueError, match="'mine'") as caught:
        score(function, **options)
    return str(caught.value)


def of_messages(prompts, completions, **columns):
    return [
        float(len(p[-1]["content"]) + 100 * len(c[0]["content"])) for p, c in zip(prompts, completions, strict=True)
    ]


def by_get(completions, **columns):
    return [float(len(completion[0].get("content"))) for completion in completions]


def of_each(completions, **columns):
    return [float(sum(len(message["content"]) for message in completion)) for completion in completions]


async def waits(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


def of_text(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def of_both(completions, **columns):
    return [float(isinstance(each, str)) for each in completions]


def annotated(completions: list[list[dict[str, str]]], **columns) -> list[float]:
    return [float(len(completion)) for completion in completions]  # would not fail on text


EXPECTED = {
    of_messages: [305.0, 202.0],
    by_get: [3.0, 2.0],
    of_each: [3.0, 2.0],
    waits: [3.0, 2.0],
    rule(lambda completions, **columns: of_each(completions)): [3.0, 2.0],
    of_text: [3.0, 2.0],
    of_both: [1.0, 1.0],
    annotated: [1.0, 1.0],
}


@pytest.mark.parametrize("function", EXPECTED, ids=lambda function: function.__name__)
def test_a_function_gets_what_it_reads_without_being_asked(function):
    assert score(function) == EXPECTED[function]


def test_a_function_that_got_messages_keeps_getting_them_and_this_is_said_once(caplog):
    calls = []

    def counted(completions, **columns):
        calls.append(type(completions[0]))
        return of_each(completions)

    scorer = Scorer({"mine": counted}, {"mine": 1.0})
    with caplog.at_level(logging.INFO, logger="nanorlhf"):
        for _ in range(2):
            scorer(["r"], ["yes"], {}, raw_prompts=RAW[:1])
    assert calls == [str, list, list]
    assert caplog.messages == [
        "reward 'mine' fails on text and gets chat messages, as with --reward_format conversational"
    ]


def test_what_worked_with_text_gets_text_for_good():
    """A mistake in a later step must not be taken for a wish."""
    texts = []

    def sometimes(completions, **columns):
        texts.extend(completions)
        return [float(len(each)) if each != "bad" else each["content"] for each in completions]

    scorer = Scorer({"mine": sometimes}, {"mine": 1.0})
    assert scorer(["r"], ["good"], {})[0].tolist() == [4.0]
    with pytest.raises(ValueError, match="string indices"):
        scorer(["r"], ["bad"], {})
    assert texts[:3] == ["good", "bad", "bad"] and texts[-1] == [{"role": "assistant", "content": "bad"}]


def test_completions_without_text_decide_nothing():
    scorer = Scorer({"mine": of_each}, {"mine": 1.0})
    assert scorer(["r"], [""], {})[0].tolist() == [0.0]  # no message was looked at
    assert scorer(["r"], ["four"], {})[0].tolist() == [4.0]


def test_another_mistake_is_no_wish_for_messages():
    def broken(completions, **columns):
        return [{}[each] for each in completions]

    seen = refused(broken)
    assert "KeyError: 'yes'" in seen and "reward_format" not in seen


def test_a_mistake_in_a_function_of_messages_is_shown_with_the_messages():
    def broken(completions, **columns):
        return [{}[completion[0]["content"]] for completion in completions]

    message = refused(broken)
    assert "raised KeyError: 'yes'" in message and "'role': 'assistant'" in message
    assert "With text it raised TypeError: string indices" in message and "--reward_format" in message


@pytest.mark.parametrize(
    ("function", "form", "advice"),
    [
        (of_messages, "text", "got text, and does not fail on chat messages: pass --reward_format conversational"),
        (waits, "text", "got text, and does not fail on chat messages: pass --reward_format conversational"),
        (rule(lambda completions: [float(completions[0].count("e"))]), "conversational", None),
        (lambda completions: [float(c.count("e") + len(c.lower())) for c in completions], "conversational", "text"),
    ],
    ids=["messages", "asynchronous", "no failure", "text"],
)
def test_the_wrong_form_is_named_with_the_setting(function, form, advice):
    if advice is None:
        assert score(function, form=form) == [0.0, 0.0]
    else:
        message = refused(function, form=form)
        assert advice in message and f"--reward_format {'text' if form != 'text' else 'conversational'}" in message


def test_a_form_that_was_chosen_is_not_left():
    assert score(of_both, form="text") == [1.0, 1.0] and score(of_both, form="conversational") == [0.0, 0.0]
    assert score(annotated, form="text") == [3.0, 2.0]


@pytest.mark.parametrize(
    ("annotation", "form"),
    [
        (list[str], "text"),
        ("list[str]", "text"),
        ("List[str]", "text"),
        (list[list[dict[str, str]]], "conversational"),
        ("list[list[dict]]", "conversational"),
        ("list[list[ChatMessage]]", "conversational"),
        ("list[str] | list[list[dict]]", "auto"),
        ("Union[list[str], list[list[dict]]]", "auto"),
        (list, "auto"),
        (Any, "auto"),
    ],
    ids=str,
)
def test_the_form_that_an_annotation_names(annotation, form):
    def mine(prompts, completions, **columns): ...

    mine.__annotations__["completions"] = annotation
    assert form_of(mine) == form


def test_functions_of_trl_name_their_form():
    from trl.rewards import accuracy_reward, get_cosine_scaled_reward, think_format_reward

    functions = (accuracy_reward, think_format_reward, get_cosine_scaled_reward(max_len=9))
    assert [form_of(function) for function in functions] == ["conversational"] * 3


def test_the_setting_reaches_functions_from_files(tmp_path):
    (tmp_path / "both.py").write_text("def f(completions):\n    return [float(isinstance(completions[0], str))]\n")
    for form, expected in (("auto", 1.0), ("text", 1.0), ("conversational", 0.0)):
        settings = ScoringSettings(reward_format=form)
        scorer = make_scorer({}, {}, names=[f"{tmp_path / 'both.py'}:f"], weights=None, settings=settings)
        assert json.dumps(scorer(["p"], ["c"], {})[0].tolist()) == json.dumps([expected])


@pytest.mark.parametrize("place", [0, -1])
def test_a_text_without_that_character_is_no_wish_for_messages(place):
    """Else the function would be given dicts, which equal no character, and score 0 from then on."""

    def begins(completions, **columns):
        return [float(text[place] == "A") for text in completions]

    seen = refused(begins, completions=("A", ""))
    assert "IndexError: string index out of range" in seen and "row 1 of 2" in seen


def test_a_function_of_messages_that_meets_an_empty_completion_first_is_told_of_the_setting():
    def first(completions, **columns):
        return [float(completion[0]["content"] == "yes") for completion in completions]

    assert "--reward_format conversational" in refused(first, completions=("", "yes"))
    assert score(first, completions=("", "yes"), form="conversational") == [0.0, 1.0]
