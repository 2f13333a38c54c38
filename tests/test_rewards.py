"""Rewards: the weighted sum and its raw parts, and what a user is told about a function that goes wrong."""

import asyncio
import math

import pytest
import torch

from common.models.pool import ModelPool
from common.rewards.choose import ScoringSettings, load_reward, make_scorer
from common.rewards.rules import rule
from common.rewards.scorer import RewardModel, Scorer
from tests.test_reward_model import save_pair_encoder

MESSAGES = ScoringSettings(reward_format="conversational")
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


def test_a_row_on_which_nobody_has_a_say_scores_zero():
    scores, parts = score({"a": returning([None, 1.0, None]), "b": returning([2.0, None, None])})
    assert scores.tolist() == [2.0, 1.0, 0.0]
    assert math.isnan(parts["a"][2]) and math.isnan(parts["b"][2])


# What functions get


def test_token_ids_go_to_the_functions_that_name_them_and_to_no_other():
    def tokens(completion_ids, **columns):
        return [float(len(ids)) for ids in completion_ids]

    scorer = Scorer({"tokens": tokens, "strict": lambda prompts, completions: [0.0] * 3}, {"tokens": 1, "strict": 1})
    assert scorer(PROMPTS, COMPLETIONS, {}, completion_ids=[[1], [1, 2], []])[0].tolist() == [1.0, 2.0, 0.0]


def test_functions_get_the_rendered_prompt_whatever_the_raw_one_was():
    scorer = Scorer({"mine": lambda prompts, **_: [float(p == "rendered") for p in prompts]}, {"mine": 1.0})
    raw = [[{"role": "user", "content": "hello"}]]
    assert scorer(["rendered"], ["a"], {}, raw_prompts=raw)[0].tolist() == [1.0]


CONVERSATIONAL = """
def polite(prompts, completions, **columns):
    assert [list(message) for message in completions[0]] == [["role", "content"]]
    asked = [prompt[-1]["content"] for prompt in prompts]
    said = [completion[0]["content"] for completion in completions]
    return [float(a in s and c[0]["role"] == "assistant") for a, s, c in zip(asked, said, completions, strict=True)]
"""


def test_functions_from_files_get_messages_if_asked_for_and_the_tasks_own_never(tmp_path):
    (tmp_path / "mine.py").write_text(CONVERSATIONAL)
    names = ["length", f"{tmp_path / 'mine.py'}:polite"]
    scorer = make_scorer({"length": length}, {"length": 0.0}, names=names, weights=None, settings=MESSAGES)
    raw = [
        "a",
        [{"role": "system", "content": "x"}, {"role": "user", "content": "b"}],
        [{"role": "user", "content": "c"}],
    ]
    _, parts = scorer(["text"] * 3, ["a!", "bb", "d"], {}, raw_prompts=raw)
    assert parts["polite"].tolist() == [1.0, 1.0, 0.0] and parts["length"].tolist() == [2.0, 2.0, 1.0]


@pytest.mark.parametrize("conversational", [True, False])
def test_rewards_of_trl_run_unchanged_in_a_file(tmp_path, conversational):
    (tmp_path / "mine.py").write_text(
        "from trl.rewards import get_soft_overlong_punishment, think_format_reward\n"
        "punish = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)\n"
        "def think(completions, **kwargs):\n"
        f"    if not {conversational}:\n"
        "        completions = [[{'content': text}] for text in completions]\n"
        "    return think_format_reward(completions, **kwargs)\n"
    )
    names = [f"{tmp_path / 'mine.py'}:{name}" for name in ("think", "punish")]
    scorer = make_scorer(
        {},
        {},
        names=names,
        weights=None,
        settings=ScoringSettings(reward_format="conversational" if conversational else "text"),
    )
    scorer.check_columns([])
    completions = ["<think>\nyes\n</think>\nso", "so"]
    _, parts = scorer(["p", "p"], completions, {"answer": [1, 2]}, completion_ids=[[1] * 3, [1] * 9])
    assert parts["think"].tolist() == [1.0, 0.0] and parts["punish"].tolist() == [-0.5, -1.0]


# Asynchronous functions


def test_asynchronous_functions_wait_together():
    """Each waits for the other, so that one after the other would never end."""
    flags = {name: asyncio.Event() for name in "ab"}

    def meeting(mine, other):
        async def judge(prompts, completions, **columns):
            flags[mine].set()
            await asyncio.wait_for(flags[other].wait(), timeout=10)
            return [1.0, None, 3.0]

        return judge

    scores, parts = score({"a": meeting("a", "b"), "length": length, "b": meeting("b", "a")})
    assert scores.tolist() == [3.0, 2.0, 9.0] and list(parts) == ["a", "length", "b"]


def test_whatever_returns_something_to_wait_for_is_asynchronous():
    class Judge:
        async def __call__(self, completions, **columns):
            return [float(len(text)) for text in completions]

    assert score({"object": Judge(), "lambda": lambda **given: Judge()(**given)})[0].tolist() == [2.0, 4.0, 6.0]


def test_what_an_asynchronous_function_keeps_open_works_in_the_next_step_too():
    """A lock belongs to the event loop that waited for it first, like the connections of a client."""
    lock = asyncio.Lock()

    async def judge(completions, **columns):
        async def one(text):
            async with lock:
                await asyncio.sleep(0)
                return float(len(text))

        return await asyncio.gather(*map(one, completions))

    scorer = Scorer({"mine": judge}, {"mine": 1.0})
    for _ in range(2):
        assert scorer(PROMPTS, COMPLETIONS, {})[0].tolist() == [1.0, 2.0, 3.0]


def test_a_function_may_run_an_event_loop_of_its_own():
    def judge(completions, **columns):
        return [asyncio.run(asyncio.sleep(0, float(len(text)))) for text in completions]

    async def zero(completions, **columns):
        return [0.0] * len(completions)

    assert score({"own": judge, "zero": zero})[0].tolist() == [1.0, 2.0, 3.0]


def test_an_asynchronous_function_that_raises_is_named_with_its_row():
    async def broken(prompts, completions, number, **columns):
        return [1 / n for n in number]

    message = refused(broken, {"number": [2, 0, 1]})
    assert "reward 'mine' raised ZeroDivisionError" in message and "row 1 of 3" in message and "number=0" in message


# Reward models


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    return save_pair_encoder(tmp_path_factory.mktemp("rewards") / "judge")


def test_the_score_is_the_weighted_sum_of_models_and_rules_and_each_part_is_raw(judge_folder):
    names = [str(judge_folder), "length"]
    scorer = make_scorer(
        {"length": length},
        {},
        names=names,
        weights=[0.5, -2.0],
        settings=ScoringSettings(max_tokens_per_microbatch=99),
    )
    assert isinstance(scorer.functions["judge"], RewardModel)
    assert scorer.functions["judge"].max_tokens_per_microbatch == 99
    scorer.load(ModelPool(torch.device("cpu"), "always"))
    prompts, completions = ["hello", "what is two"], ["four", "it is two"]
    scores, parts = scorer(prompts, completions, {"answer": [4, 2]})
    judged = scorer.functions["judge"](prompts, completions)
    assert parts["judge"].tolist() == pytest.approx(judged, abs=1e-5) and parts["length"].tolist() == [4.0, 9.0]
    assert scores.tolist() == pytest.approx([0.5 * judged[0] - 8.0, 0.5 * judged[1] - 18.0], abs=1e-5)


def test_a_reward_model_gets_the_prompts_of_the_data_set_not_the_policys_rendering(judge_folder):
    scorer = make_scorer({}, {}, names=[str(judge_folder)], weights=None, settings=MESSAGES)
    scorer.load(ModelPool(torch.device("cpu"), "never"))
    raw = [[{"role": "user", "content": "hello"}], "what is two"]
    _, parts = scorer(["<user>hello<assistant>", "x"], ["four", "two"], {}, raw_prompts=raw)
    expected = scorer.functions["judge"](["hello", "what is two"], ["four", "two"])
    assert parts["judge"].tolist() == pytest.approx(expected, abs=1e-5)


def test_two_reward_models_may_judge_together_if_their_names_differ(judge_folder, tmp_path):
    other = save_pair_encoder(tmp_path / "other")
    scorer = make_scorer({}, {"judge": 3.0}, names=[str(judge_folder), str(other)], weights=None)
    assert scorer.weights == {"judge": 3.0, "other": 1.0}
    with pytest.raises(ValueError, match="same name"):
        make_scorer({}, {}, names=[str(judge_folder), str(save_pair_encoder(tmp_path / "judge"))], weights=None)


def test_a_reward_model_that_is_not_there_is_named_with_what_else_may_be_meant(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/judge.*cannot be loaded.*reward of the task.*file\.py:function"):
        make_scorer(AVAILABLE, WEIGHTS, names=[f"{tmp_path}/nowhere/judge"], weights=None)
    with pytest.raises(ValueError, match=r"the task has format, equation.*file\.py:function.*reward model"):
        make_scorer(AVAILABLE, WEIGHTS, names=["mine/rewards.py"], weights=None)


# What can go wrong


def test_functions_without_a_say_on_any_completion_are_refused():
    with pytest.raises(ValueError, match=r"a, b: every reward is None for all 3 completions.*None is the exception"):
        score({"a": returning([None] * 3), "b": returning([None] * 3)})
    assert score({"a": returning([None] * 3), "b": returning([None, 0.0, None])})[0].tolist() == [0.0, 0.0, 0.0]


def test_columns_that_a_reward_asks_for_and_the_data_lack_are_named_before_the_run(judge_folder):
    def right(prompts, completions, answer, *, unit, weight=1.0, completion_ids, **rest):
        return [0.0] * len(completions)

    scorer = Scorer({"length": length, "right": right, "judge": RewardModel(str(judge_folder))}, {})
    scorer.check_columns(["unit", "answer", "other"])
    with pytest.raises(ValueError, match=r"reward 'right' needs the columns answer, unit; the data set has other\."):
        scorer.check_columns(["other"])
    with pytest.raises(ValueError, match=r"needs the columns answer; the data set has unit\. Pass data with"):
        scorer.check_columns(["unit"])
    with pytest.raises(ValueError, match=r"the data set has only the prompt"):
        scorer.check_columns([])


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


def test_a_function_that_raises_is_named_with_the_arguments_that_it_takes():
    def broken(completion_ids):
        return [1 / (len(ids) - 2) for ids in completion_ids]

    scorer = Scorer({"mine": broken}, {"mine": 1.0})
    with pytest.raises(ValueError, match=r"'mine' raised ZeroDivisionError.*row 1 of 3: completion_ids=\[5, 6\]\."):
        scorer(PROMPTS, COMPLETIONS, {}, completion_ids=[[5], [5, 6], [5, 6, 7]])


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
    [math.nan, math.inf, -math.inf, "good", [1.0], 1j, 3e38, -3e38, 1.1e15, 1e39, 10**400],
    ids=["nan", "inf", "-inf", "text", "list", "complex", "huge", "-huge", "large", "over float32", "over float64"],
)
def test_a_value_that_is_no_finite_number_is_refused_with_its_row(value):
    message = refused(returning([0.0, value, 0.0]))
    assert "reward 'mine' returned" in message and "in row 1 for 'bb'" in message and "return None there" in message


def test_the_largest_size_of_a_reward_is_said_and_allowed():
    assert "need a finite number of at most 1e+15 in size" in refused(returning([0.0, 3e38, 0.0]))
    assert score({"mine": returning([1e15, -1e15, 0.0])})[0].tolist() == torch.tensor([1e15, -1e15, 0.0]).tolist()


@pytest.mark.parametrize("weights", [{"a": 1e30, "b": 1.0}, {"a": 1e14, "b": 1e15}], ids=str)
def test_weights_that_make_a_score_too_large_are_named_with_their_rewards(weights):
    with pytest.raises(ValueError, match=r"the score of row 1 is .* x 1 \(a\) \+ .* x 1 \(b\): .*--reward_weights"):
        score({"a": returning([0.0, 1.0, 0.0]), "b": returning([0.0, 1.0, None])}, weights)


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


def test_a_reward_with_the_name_of_one_of_the_tasks_is_refused_and_the_tasks_own_is_not(tmp_path):
    (tmp_path / "mine.py").write_text("def equation(completions):\n    return [1.0] * len(completions)\n")
    judge = save_pair_encoder(tmp_path / "format")
    for given, name in ((f"{tmp_path / 'mine.py'}:equation", "equation"), (str(judge), "format")):
        with pytest.raises(ValueError) as caught:
            make_scorer(AVAILABLE, WEIGHTS, names=[given], weights=[1.0])
        assert repr(given) in str(caught.value) and f"my_{name}, or pass '{name}'" in str(caught.value)
    function = load_reward(f"{tmp_path / 'mine.py'}:equation")
    scorer = make_scorer({"equation": function}, WEIGHTS, names=[f"{tmp_path / 'mine.py'}:equation"], weights=None)
    assert scorer.weights == {"equation": 0.9}


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


WITH_OBJECTS = """
from dataclasses import dataclass
from functools import partial

def at_most(prompts, completions, *, limit, **columns):
    return [float(len(text) <= limit) for text in completions]

@dataclass
class Judge:
    limit: int

    def __call__(self, prompts, completions, **columns):
        return at_most(prompts, completions, limit=self.limit)

    def strict(self, prompts, completions, **columns):
        return at_most(prompts, completions, limit=self.limit - 1)

one, two = partial(at_most, limit=1), partial(at_most, limit=2)
judge, other = Judge(2), Judge(3)
strict = judge.strict
"""


def test_partials_methods_and_objects_of_a_file_are_rewards_with_the_names_they_have_there(tmp_path):
    (tmp_path / "mine.py").write_text(WITH_OBJECTS)
    names = [f"{tmp_path / 'mine.py'}:{name}" for name in ("one", "two", "judge", "other", "strict")]
    scorer = make_scorer({}, {}, names=names, weights=None)
    scorer.check_columns([])
    _, parts = scorer(PROMPTS, COMPLETIONS, {})
    assert {name: sum(part.tolist()) for name, part in parts.items()} == {
        "one": 1.0,
        "two": 2.0,
        "judge": 2.0,
        "other": 3.0,
        "strict": 1.0,
    }
    with pytest.raises(ValueError, match=r"Judge is a class.*judge = Judge\(\.\.\.\).*mine\.py:judge"):
        load_reward(f"{tmp_path / 'mine.py'}:Judge")


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
    with pytest.raises(ValueError, match=r"broken.py cannot be imported: SyntaxError.*Fix"):
        load_reward(f"{path}:reward")


def test_a_process_without_rows_calls_no_function():
    """As in an evaluation with fewer held-out prompts than processes."""

    @rule
    def longest(completions, **columns):
        return [max(map(len, completions))] * len(completions)

    def shortest(completions, **columns):
        return [min(map(len, completions))] * len(completions)

    scorer = Scorer({"longest": longest, "shortest": shortest}, {"longest": 1.0, "shortest": 1.0})
    scores, parts = scorer([], [], {})
    assert scores.shape == parts["longest"].shape == parts["shortest"].shape == (0,)
    assert scorer(["a"], ["bcd"], {})[0].tolist() == [6.0]
    scorer([], [], {})
    assert scorer.over_limit["longest"].shape == (0,)  # those of the call before are not counted again
