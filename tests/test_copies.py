"""Whatever a reward function does to its arguments, nobody else sees it."""

import threading
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pytest
import torch

from common.data.prompts import PromptSet
from common.embedded.policy import build_tokenizer
from common.rewards.choose import ScoringSettings, make_scorer
from common.rewards.copies import own_copy
from common.rewards.rules import rule
from common.rewards.scorer import Scorer
from common.rewards.worker import Limits, RuleWorker
from common.rollouts import Completion, Rollouts
from common.runs.measures import judge

SHORT = Limits(seconds=5, gigabytes=0.5)


def uses_all(prompts, completions, nums, **columns):
    """1 if the completion names every number, each of which it takes out of the row."""
    scores = []
    for text, left in zip(completions, nums, strict=True):
        for word in text.split():
            if int(word) in left:
                left.remove(int(word))
        scores.append(float(not left))
    return scores


def rows() -> list[dict]:
    return [{"prompt": "3 5 make 8\n", "nums": [3, 5]}, {"prompt": "4 6 make 10\n", "nums": [4, 6]}]


def scored(scorer: Scorer, prompts: PromptSet, step: int) -> dict[str, list[float]]:
    """Of each prompt two completions, the first right, the second wrong."""
    batch = prompts.batch(step, num_prompts=2)
    texts = [text for prompt in batch.prompts for text in (prompt.split(" make")[0], "9 9")]
    completions = [Completion([5], [-1.0], False)] * 4
    rollouts = Rollouts.from_completions(batch, completions, texts, num_generations=2)
    judge(rollouts, scorer)
    return {name: part.tolist() for name, part in rollouts.parts.items()}


@pytest.mark.parametrize("kind", ["function", "rule", "rule without limits", "asynchronous"])
def test_a_reward_that_consumes_its_column_consumes_it_for_nobody_else(kind):
    async def waits(**given):
        return uses_all(**given)

    function = {"function": uses_all, "asynchronous": waits}.get(kind) or rule(lambda **given: uses_all(**given))
    functions = {
        "first": function,
        "again": function,
        "left": lambda nums, **columns: [float(len(numbers)) for numbers in nums],
    }
    limits = None if kind == "rule without limits" else SHORT
    scorer = Scorer(functions, dict.fromkeys(functions, 1.0), limits=limits)
    data = rows()
    prompts = PromptSet(data, build_tokenizer(), max_prompt_length=100, seed=0)
    for step in (1, 2):
        assert scored(scorer, prompts, step) == {"first": [1, 0, 1, 0], "again": [1, 0, 1, 0], "left": [2.0] * 4}
    assert data == rows()


@dataclass
class Notes:
    """What a column of a data set in Python may hold."""

    lines: list = field(default_factory=lambda: ["a"])


VALUES = {
    "list": [1, [2, {"deep": [3]}]],
    "dict": {"key": {"inner": [1]}, "tuple": (1, [2])},
    "tuple with a list": (1, [2]),
    "set": {1, 2},
    "bytes": bytearray(b"abc"),
    "object": Notes(),
    "frozen view": MappingProxyType({"inner": [1]}),
    "array": np.arange(3),
    "array of objects": np.array([[1], [2, 3]], dtype=object),
    "tensor": torch.arange(3),
    "tensor with a gradient": torch.ones(2, requires_grad=True) * 2,
}


def change(value) -> None:
    """Change a value as deep as it goes."""
    if isinstance(value, list):
        for item in value:
            change(item)
        value.append("changed")
    elif isinstance(value, dict):
        for item in value.values():
            change(item)
        value["changed"] = True
    elif isinstance(value, tuple):
        for item in value:
            change(item)
    elif isinstance(value, MappingProxyType):
        change(value["inner"])
    elif isinstance(value, Notes):
        change(value.lines)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        change(value[0])
    elif isinstance(value, np.ndarray | torch.Tensor):
        value[0] = 9
    elif isinstance(value, set):
        value.add("changed")
    elif isinstance(value, bytearray):
        value.append(0)


def content(value) -> str:
    return repr(value.tolist() if isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize("name", VALUES)
def test_a_copy_shares_nothing_that_can_be_changed(name):
    value, copy = VALUES[name], own_copy(VALUES[name])
    before = content(value)
    assert content(copy) == before and type(copy) is type(value)
    with torch.no_grad():
        change(copy)
    assert content(value) == before != content(copy)


@pytest.mark.parametrize("value", ["text", 7, 1.5, None, b"x", (1, "a", (2, None)), range(3)], ids=str)
def test_what_cannot_be_changed_is_handed_on_as_it_is(value):
    assert own_copy(value) is value


def test_a_value_that_holds_itself_is_copied_too():
    loop = [1]
    loop.append(loop)
    seen = []
    Scorer({"r": lambda column, **_: seen.append(column[0]) or [1.0]}, {"r": 1.0})(["p"], ["c"], {"column": [loop]})
    assert seen[0] is not loop and seen[0][1] is seen[0]


def test_a_value_that_cannot_be_copied_is_refused_with_its_column_and_row():
    scorer = Scorer({"r": lambda **_: [1.0, 1.0]}, {"r": 1.0})
    with pytest.raises(ValueError, match=r"column 'door', row 1: a lock that cannot be copied.*plain values"):
        scorer(["p"] * 2, ["c"] * 2, {"door": [1, threading.Lock()]})


def clears(**given):
    """Empties every argument and everything in it."""
    count = len(given["completions"])
    for values in given.values():
        for value in values:
            change(value)
        values.clear()
    return [1.0] * count


def test_prompts_completions_and_token_ids_are_the_functions_own_too():
    def clears_ids(completion_ids, **given):
        return clears(completion_ids=completion_ids, **given)

    def counts(prompts, completions, completion_ids, **columns):
        return [float(prompts == ["p", "q"] and completions == ["c", "d"] and completion_ids == [[1], [2, 3]])] * 2

    prompts, completions, ids = ["p", "q"], ["c", "d"], [[1], [2, 3]]
    scorer = Scorer({"a": clears_ids, "b": counts}, {"a": 1.0, "b": 1.0})
    assert scorer(prompts, completions, {}, completion_ids=ids)[1]["b"].tolist() == [1.0, 1.0]
    assert (prompts, completions, ids) == (["p", "q"], ["c", "d"], [[1], [2, 3]])


def test_messages_are_the_functions_own_in_prompts_in_completions_and_in_columns(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def rude(prompts, completions, **columns):\n"
        "    for messages in [*prompts, *completions, *columns['examples']]:\n"
        "        messages[-1]['content'] = 'changed'\n"
        "        messages.append({'role': 'user', 'content': 'more'})\n"
        "    return [0.0] * len(prompts)\n"
        "def sees(prompts, completions, **columns):\n"
        "    texts = [[m['content'] for m in ms] for ms in [*prompts, *completions, *columns['examples']]]\n"
        "    return [float(texts == [['hello']] * 2 + [['c']] * 2 + [['hello']] * 2)] * 2\n"
    )
    names = [f"{tmp_path / 'mine.py'}:{name}" for name in ("rude", "sees")]
    scorer = make_scorer({}, {}, names=names, weights=None, settings=ScoringSettings(reward_format="conversational"))
    messages = [{"role": "user", "content": "hello"}]
    for _ in range(2):
        _, parts = scorer(["r"] * 2, ["c"] * 2, {"examples": [messages] * 2}, raw_prompts=[messages] * 2)
        assert parts["sees"].tolist() == [1.0, 1.0]
    assert messages == [{"role": "user", "content": "hello"}]


def test_a_function_that_changes_its_row_and_then_fails_is_named_with_the_row_it_was_given():
    def consumes(completions, nums, **columns):
        return [float(numbers.pop()) / (numbers.pop() - 2) for numbers in nums]

    with pytest.raises(ValueError, match=r"ZeroDivisionError.*row 1 of 2.*nums=\[2, 7\]"):
        Scorer({"r": consumes}, {"r": 1.0})(["p"] * 2, ["c"] * 2, {"nums": [[3, 4], [2, 7]]})


def test_what_a_rule_does_to_a_row_stays_in_that_row_within_a_request_and_between_requests():
    popped = rule(lambda completions, nums, **columns: [float(nums[0].pop())])
    worker = RuleWorker({"popped": popped}, SHORT)
    shared = [1, 2]
    arguments = {"completions": ["a", "b", "c"], "nums": [shared] * 3}
    for _ in range(2):
        assert [answer.reward for answer in worker("popped", arguments)] == [2.0, 2.0, 2.0]
    assert shared == [1, 2]


class Unreadable:
    """Can be pickled, but not be read again."""

    def __reduce__(self):
        return int, ("no number",)


@pytest.mark.parametrize("value", [threading.Lock(), lambda: 0, Unreadable()], ids=["lock", "function", "unreadable"])
def test_a_value_that_cannot_be_sent_to_a_rule_is_named_with_its_column_and_row(value):
    scorer = Scorer({"ruled": rule(lambda completions, **_: [1.0])}, {"ruled": 1.0}, limits=SHORT)
    kind = type(value).__name__
    with pytest.raises(ValueError, match=rf"column 'tool', row 1: a {kind} that cannot be pickled .*Put plain values"):
        scorer(["p"] * 2, ["c"] * 2, {"other": [1, 2], "tool": [None, value]})
    assert scorer(["p"], ["c"], {"tool": [None]})[0].tolist() == [1.0]
