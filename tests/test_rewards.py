"""Rewards: the weighted sum and its raw parts, and what a user is told about a function that goes wrong."""

import math

import pytest
import torch

from common.rewards import Scorer, load_reward, make_scorer

PROMPTS, COMPLETIONS = ["p0", "p1", "p2"], ["a", "bb", "ccc"]


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def returning(value):
    """A reward function that gives this, whatever it is asked."""
    return lambda prompts, completions, **columns: value


def score(functions: dict, weights: dict | None = None, columns: dict | None = None):
    scorer = Scorer(functions, weights or dict.fromkeys(functions, 1.0))
    return scorer(PROMPTS, COMPLETIONS, columns or {})


def refused(function, columns: dict | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        score({"mine": function}, columns=columns)
    return str(caught.value)


# Scores


def test_the_score_is_the_weighted_sum_and_each_part_is_reported_raw():
    scores, parts = score({"length": length, "right": returning([0, 1, 0])}, {"length": 0.5, "right": 10.0})
    assert scores.tolist() == [0.5, 11.0, 1.5] and scores.dtype == torch.float32
    assert parts["length"].tolist() == [1, 2, 3] and parts["right"].tolist() == [0, 1, 0]
    assert list(parts) == ["length", "right"]


def test_each_weight_belongs_to_its_name_not_to_its_place():
    scores, _ = score({"length": length, "right": returning([0, 1, 0])}, {"right": 10.0, "length": 0.5})
    assert scores.tolist() == [0.5, 11.0, 1.5]


def test_a_reward_without_a_say_adds_nothing_and_is_no_zero():
    scores, parts = score({"length": length, "shy": returning([None, 0.0, 2])})
    assert scores.tolist() == [1.0, 2.0, 5.0]
    assert math.isnan(parts["shy"][0]) and parts["shy"][1:].tolist() == [0.0, 2.0]


def test_a_reward_of_zero_counts_and_a_weight_may_be_negative_or_zero():
    scores, _ = score({"length": length, "off": returning([7, 7, 7])}, {"length": -1.0, "off": 0.0})
    assert scores.tolist() == [-1.0, -2.0, -3.0]
    scores, _ = score({"zero": returning([0.0, 0.0, 0.0])})
    assert scores.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "value", [(1, 2, 3), [True, 2.0, 3], torch.tensor([1.0, 2.0, 3.0])], ids=["ints", "mixed", "tensor"]
)
def test_any_kind_of_number_will_do(value):
    assert score({"mine": returning(value)})[0].tolist() == [1.0, 2.0, 3.0]


def test_functions_get_prompts_completions_and_every_column_by_name():
    seen = {}

    def remember(**arguments):
        seen.update(arguments)
        return [0.0] * 3

    score({"mine": remember}, columns={"answer": [4, 5, 6], "nums": [[1], [2], [3]]})
    assert seen == {"prompts": PROMPTS, "completions": COMPLETIONS, "answer": [4, 5, 6], "nums": [[1], [2], [3]]}


def test_a_function_may_name_the_columns_it_wants():
    def right(completions, answer, **rest):
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    assert score({"right": right}, columns={"answer": ["a", "x", "ccc"], "other": [1, 2, 3]})[0].tolist() == [1, 0, 1]


def test_no_completions_have_no_scores():
    scores, parts = Scorer({"length": length}, {"length": 1.0})([], [], {})
    assert scores.shape == (0,) and parts["length"].shape == (0,)


# What can go wrong


def test_a_function_that_raises_is_named_with_its_row_and_short_arguments():
    def broken(prompts, completions, number, **columns):
        return [1 / n for n in number]

    with pytest.raises(ValueError, match="mine") as caught:
        Scorer({"mine": broken}, {"mine": 1.0})(PROMPTS, ["a", "b" * 9999, "c"], {"number": [2, 0, 1]})
    message = str(caught.value)
    assert "reward 'mine' raised ZeroDivisionError: division by zero" in message
    assert "row 1 of 3" in message and "number=0" in message and "prompts='p1'" in message
    assert "bbb" in message and "..." in message and len(message) < 800
    assert "return None" in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)  # the way to the line is kept


def test_a_function_that_fails_on_the_batch_alone_is_named_too():
    def broken(prompts, completions, **columns):
        if len(completions) > 1:
            raise KeyError("gold")
        return [0.0]

    assert "KeyError: 'gold'; no single row fails alone" in refused(broken)


def test_a_column_the_function_needs_and_the_data_lack_is_named():
    def right(completions, answer, **rest):
        return [0.0] * len(completions)

    assert "TypeError" in refused(right) and "answer" in refused(right)


def test_what_ends_the_program_is_not_taken_for_a_mistake_of_the_function():
    def interrupted(**arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score({"mine": interrupted})


@pytest.mark.parametrize("rewards", [[1.0, 2.0], [1.0] * 4, []], ids=["few", "many", "none"])
def test_a_wrong_number_of_values_is_refused(rewards):
    assert f"reward 'mine' returned {len(rewards)} values for 3 completions" in refused(returning(rewards))


@pytest.mark.parametrize("rewards", [None, 1.0, {"a": 1}, torch.tensor(1.0)], ids=str)
def test_what_is_no_list_is_refused(rewards):
    assert "for 3 completions: need a list with one number each" in refused(returning(rewards))


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, "good", [1.0], 1j, 1e39, 10**400],
    ids=["nan", "inf", "-inf", "text", "list", "complex", "above float32", "above float64"],
)
def test_a_value_that_is_no_finite_number_is_refused_with_its_row(value):
    message = refused(returning([0.0, value, 0.0]))
    assert "reward 'mine' returned" in message and "in row 1 for 'bb'" in message and "return None there" in message


def test_a_tensor_of_two_numbers_per_completion_is_refused():
    assert "reward 'mine' returned" in refused(returning(torch.zeros(3, 2)))


# Choosing functions


AVAILABLE = {"format": returning([0.0] * 3), "equation": returning([1.0] * 3)}
WEIGHTS = {"format": 0.1, "equation": 0.9}


def test_without_names_all_of_the_tasks_rewards_are_used_with_its_weights():
    scorer = make_scorer(AVAILABLE, WEIGHTS, names=None, weights=None)
    assert scorer.functions == AVAILABLE and scorer.weights == WEIGHTS


def test_named_rewards_are_used_in_their_order_with_their_own_or_the_tasks_weights():
    scorer = make_scorer(AVAILABLE, WEIGHTS, names=["equation"], weights=None)
    assert list(scorer.functions) == ["equation"] and scorer.weights == {"equation": 0.9}
    scorer = make_scorer(AVAILABLE, WEIGHTS, names=["equation", "format"], weights=[3.0, 4.0])
    assert list(scorer.functions) == ["equation", "format"] and scorer.weights == {"equation": 3.0, "format": 4.0}


def test_weights_of_zero_are_weights():
    scorer = make_scorer(AVAILABLE, WEIGHTS, names=["equation", "format"], weights=[0.0, 0.0])
    assert scorer.weights == {"equation": 0.0, "format": 0.0}


def test_a_reward_the_task_does_not_have_is_answered_with_those_it_has():
    with pytest.raises(ValueError, match=r"rewards='equatoin': the task has format, equation.*file\.py:function"):
        make_scorer(AVAILABLE, WEIGHTS, names=["equatoin"], weights=None)


def test_two_rewards_of_the_same_name_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text("def format(prompts, completions, **columns):\n    return [1.0]\n")
    for names in (["format", "format"], ["format", f"{tmp_path / 'mine.py'}:format"]):
        with pytest.raises(ValueError, match=r"same name.*--rewards"):
            make_scorer(AVAILABLE, WEIGHTS, names=names, weights=None)


# Functions from a file


OWN = """
LIMIT = 2

def short(prompts, completions, **columns):
    return [float(len(text) <= LIMIT) for text in completions]
"""
WITH_A_DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Limits:
    longest: int = 2

def short(prompts, completions, **columns):
    return [float(len(text) <= Limits().longest) for text in completions]
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "my rewards.py"
    path.write_text(OWN)
    return path


def test_a_function_of_ones_own_counts_with_weight_one_beside_the_tasks(own_file):
    scorer = make_scorer(AVAILABLE, WEIGHTS, names=["equation", f"{own_file}:short"], weights=None)
    assert scorer.weights == {"equation": 0.9, "short": 1.0}
    scores, parts = scorer(PROMPTS, COMPLETIONS, {})
    assert parts["short"].tolist() == [1, 1, 0]
    assert scores.tolist() == pytest.approx([1.9, 1.9, 0.9])


def test_a_file_of_ones_own_may_hold_whatever_a_module_may(tmp_path):
    """A dataclass with deferred annotations looks its own module up."""
    (tmp_path / "mine.py").write_text(WITH_A_DATACLASS)
    assert load_reward(f"{tmp_path / 'mine.py'}:short")(PROMPTS, COMPLETIONS) == [1.0, 1.0, 0.0]


def test_two_files_of_the_same_name_stay_apart(tmp_path):
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"def value(): return [{value}]\ndef {folder}(prompts, completions, **columns): return value()\n"
        )
    first, second = (load_reward(f"{tmp_path / folder / 'mine.py'}:{folder}") for folder in "ab")
    assert first(["p"], ["c"]) == [1.0] and second(["p"], ["c"]) == [2.0]


def test_a_file_does_not_take_the_place_of_a_module_of_its_name(tmp_path):
    (tmp_path / "json.py").write_text("def short(prompts, completions, **columns):\n    return [1.0]\n")
    load_reward(f"{tmp_path / 'json.py'}:short")
    import json

    assert json.loads("1") == 1


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.py.*--rewards path/to/file\.py:function"):
        load_reward(f"{tmp_path}/nowhere.py:short")


def test_a_function_the_file_does_not_define_is_answered_with_those_it_does(own_file):
    with pytest.raises(ValueError, match=r"defines no function 'long'.*short"):
        load_reward(f"{own_file}:long")


def test_something_that_is_no_function_is_refused(own_file):
    with pytest.raises(ValueError, match=r"LIMIT.*short"):
        load_reward(f"{own_file}:LIMIT")


def test_a_file_that_is_no_python_is_refused(tmp_path):
    (tmp_path / "rewards.txt").write_text("def short(**columns): ...")
    with pytest.raises(ValueError, match=r"rewards\.txt.*\.py"):
        load_reward(f"{tmp_path / 'rewards.txt'}:short")


def test_a_file_that_cannot_be_imported_is_named_with_the_reason(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def reward(:\n")
    with pytest.raises(ValueError, match=r"broken.py cannot be imported: SyntaxError.*Mend"):
        load_reward(f"{path}:reward")
