"""Rules in their worker: what hangs, swallows memory or crashes costs one row its score, and never the run."""

import asyncio
import copy
import ctypes
import functools
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from unittest.mock import Mock

import pytest
import torch

from benchmarks.hostile import hostile_completions, task_rules
from common.rewards.rules import is_rule, rule, warmed_up_by
from common.rewards.scorer import Scorer
from common.rewards.worker import Limits, RuleWorker
from common.tasks import _meaning
from common.tasks.math import WARM_UP_ANSWERS, correct_reward
from tests.toy import ROOT, algorithms, metrics_of, toy_config, toy_task

SHORT = Limits(seconds=0.3, gigabytes=0.5)


@rule
def obedient(prompts, completions, **columns):
    """Does what the completion says, row by row."""
    return [_obey(text) for text in completions]


def _obey(text: str) -> float | None:
    if text == "hang":
        while True:
            pass
    if text == "swallow":
        return float(len(bytearray(4_000_000_000)))
    if text == "crash":
        ctypes.string_at(0)
    if text == "raise":
        raise KeyError("no answer")
    return None if text == "shy" else float(len(text))


@rule
def process(prompts, completions, **columns):
    return [float(os.getpid()) for _ in completions]


def score(completions: list[str], limits: Limits | None = SHORT, **columns: list) -> tuple[list[float], list[bool]]:
    scorer = Scorer({"obedient": obedient}, {"obedient": 1.0}, limits=limits)
    scores, _ = scorer(["p"] * len(completions), completions, columns)
    return scores.tolist(), scorer.over_limit["obedient"].tolist()


@pytest.mark.parametrize(("accident", "seconds"), [("hang", 0.3), ("swallow", 60), ("crash", 60)])
def test_an_accident_costs_its_row_the_score_and_no_other_row_anything(accident, seconds):
    found = score(["a", accident, "bbb", accident, "cc"], Limits(seconds=seconds, gigabytes=0.5))
    assert found == ([1, 0, 3, 0, 2], [False, True, False, True, False])


def test_a_row_over_the_limit_has_a_reward_of_zero_and_not_none():
    scorer = Scorer({"obedient": obedient}, {"obedient": 1.0}, limits=SHORT)
    _, parts = scorer(["p"] * 3, ["crash", "bbb", "shy"], {})
    assert parts["obedient"].nan_to_num(nan=-1.0).tolist() == [0.0, 3.0, -1.0]


@pytest.mark.slow
def test_the_limit_is_of_processor_time_for_each_row():
    begun = time.perf_counter()
    score(["hang", "a", "hang", "hang"])
    assert 0.9 <= time.perf_counter() - begun < 10  # seconds; three rows of 0.3
    begun = time.perf_counter()
    score(["hang", *["a"] * 99])
    assert time.perf_counter() - begun < 10  # a hundred rows of 0.3 would be 30


def test_a_rule_that_waits_has_ten_times_the_limit_on_the_clock():
    """What a busy machine does to a rule looks the same: no processor time."""
    nap = rule(lambda prompts, completions, **columns: [time.sleep(float(text)) or 1.0 for text in completions])
    scorer = Scorer({"nap": nap}, {"nap": 1.0}, limits=Limits(seconds=0.2))
    begun = time.perf_counter()
    assert scorer(["p"] * 4, ["0.6", "60", "0.6", "0.6"], {})[0].tolist() == [1, 0, 1, 1]
    assert 2 <= time.perf_counter() - begun < 30


def test_what_a_rule_loads_is_loaded_before_the_first_worker_and_for_every_later_one():
    loaded = []

    def load():
        loaded.append(os.getpid())
        raise OSError("is ignored")

    @warmed_up_by(load)
    @rule
    def warm(prompts, completions, **columns):
        return [float(len(loaded) == 1 and loaded[0] == os.getppid()) + _obey(text) for text in completions]

    functions = {"warm": warm, "again": partial(warm)}
    scorer = Scorer(functions, dict.fromkeys(functions, 1.0), limits=SHORT)
    _, parts = scorer(["p"] * 3, ["a", "crash", "bb"], {})
    assert parts["warm"].tolist() == parts["again"].tolist() == [2, 0, 3] and loaded == []


def test_the_first_answers_of_the_math_task_are_compared_in_the_keeper():
    """A cold worker takes half a second for the first pair."""
    seen = rule(lambda **given: [float(_meaning._compared.cache_info().currsize) for _ in given["answer"]])
    functions = {"seen": seen, "correct": correct_reward}
    _meaning._compared.cache_clear()
    scorer = Scorer(functions, dict.fromkeys(functions, 1.0), limits=Limits(seconds=5.0))
    _, parts = scorer(["p"], [r"\boxed{(3,\pi/2)}"], {"answer": [r"\left(3,\frac{\pi}{2}\right)"]})
    assert parts["seen"].item() == len(WARM_UP_ANSWERS) and parts["correct"].item() == 1


def test_a_worker_lives_on_until_a_row_ends_it_and_is_never_the_training_process():
    scorer = Scorer({"process": process, "obedient": obedient}, {"process": 1.0, "obedient": 0.0}, limits=SHORT)
    first, second = (scorer(["p"] * 2, ["a", "b"], {})[1]["process"].tolist() for _ in range(2))
    assert len({*first, *second}) == 1 and first[0] != os.getpid()
    scorer(["p"], ["crash"], {})
    assert scorer(["p"], ["a"], {})[1]["process"][0] != first[0]


def test_a_killed_keeper_is_replaced():
    others = children()
    worker = RuleWorker({"obedient": obedient}, SHORT)
    [keeper] = set(children()) - set(others)
    arguments = {"prompts": ["p"], "completions": ["abc"]}
    [before] = worker("obedient", arguments)
    os.kill(keeper, signal.SIGKILL)
    assert worker("obedient", arguments) == [before]


def children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_nothing_is_left_of_a_worker_nobody_needs():
    before = children()
    worker = RuleWorker({"obedient": obedient}, SHORT)
    assert len(children()) == len(before) + 1
    del worker
    assert children() == before


def test_a_rule_gets_one_row_at_a_time_with_its_columns_and_tokens():
    def add_up(completions, completion_ids, answer, **columns):
        return [len(completions) + len(completion_ids[0]) + answer[0]]

    seen = rule(add_up)
    scorer = Scorer({"seen": seen}, {"seen": 1.0})
    scores, _ = scorer(["p", "p"], ["a", "b"], {"answer": [10, 20]}, completion_ids=[[7], [7, 8, 9]])
    assert scores.tolist() == [12.0, 24.0]


def test_a_rule_without_a_say_in_a_row_is_no_zero():
    scorer = Scorer({"obedient": obedient}, {"obedient": 1.0})
    assert scorer(["p", "p"], ["shy", "ab"], {})[1]["obedient"].isnan().tolist() == [True, False]


def test_a_rule_that_raises_is_named_with_its_row_and_the_worker_goes_on():
    scorer = Scorer({"obedient": obedient}, {"obedient": 1.0})
    with pytest.raises(ValueError, match=r"(?s)'obedient' raised KeyError: 'no answer'; row 1 of 3: .*'raise'"):
        scorer(["p"] * 3, ["a", "raise", "b"], {})
    assert scorer(["p"], ["abc"], {})[0].tolist() == [3.0]


def test_a_rule_that_returns_no_number_for_its_row_is_refused():
    wrong = rule(lambda prompts, completions, **columns: 3.0)
    with pytest.raises(ValueError, match=r"returned 3.0 for 1 completion"):
        Scorer({"wrong": wrong}, {"wrong": 1.0})(["p"], ["a"], {})


class Silent(Exception):
    def __str__(self):
        raise KeyError("no text")


class Shy:
    def __repr__(self):
        raise Silent


def raises(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda: raises(SystemExit(3)), r"raised SystemExit: 3; row 0"),
        (lambda: raises(SystemExit()), r"raised SystemExit; row 0"),
        (lambda: raises(Silent()), r"raised Silent, whose text cannot be shown because of another KeyError; row 0"),
        (lambda: Shy(), r"raised TypeError: returned <Shy instance at .* for 1 completion"),
        (lambda: [Shy()], r"raised TypeError: returned <Shy instance at .* for 1 completion"),
    ],
)
def test_whatever_a_rule_raises_or_returns_is_an_error_and_no_row_over_the_limit(returned, message):
    odd = rule(lambda prompts, completions, **columns: returned())
    with pytest.raises(ValueError, match=message):
        Scorer({"odd": odd}, {"odd": 1.0})(["p"], ["a"], {})


def test_values_of_torch_come_back_as_they_were():
    tensors = rule(lambda prompts, completions, **columns: [torch.tensor(0.25)])
    assert Scorer({"tensors": tensors}, {"tensors": 1.0})(["p"], ["a"], {})[0].tolist() == [0.25]


def test_functions_that_are_no_rules_and_rules_without_limits_run_in_the_training_process():
    here = partial(process)
    assert is_rule(here)
    _, parts = Scorer({"here": here}, {"here": 1.0}, limits=None)(["p"], ["a"], {})
    assert parts["here"].tolist() == torch.tensor([os.getpid()], dtype=torch.float32).tolist()
    seen = []
    Scorer({"own": lambda completions, **_: seen.extend(completions) or [1.0]}, {"own": 1.0})(["p"], ["a"], {})
    assert seen == ["a"]


# What can be a rule


def which_process(prompts, completions, offset=0.0, **columns):
    """The number of the process, and an offset: a rule's is not this one's."""
    return [os.getpid() + offset for _ in completions]


def passes_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Judge:
    def __init__(self, offset=0.0):
        self.offset = offset

    @rule
    def method(self, prompts, completions, **columns):
        return which_process(prompts, completions, self.offset)

    @rule
    @classmethod
    def of_class(cls, prompts, completions, **columns):
        return which_process(prompts, completions)

    @classmethod
    @rule
    def of_class_inside(cls, prompts, completions, **columns):
        return which_process(prompts, completions)

    @rule
    @staticmethod
    def static(prompts, completions, **columns):
        return which_process(prompts, completions)

    @passes_on
    @rule
    def wrapped(self, prompts, completions, **columns):
        return which_process(prompts, completions)

    def plain(self, prompts, completions, **columns):
        return which_process(prompts, completions)

    bound_later = functools.partialmethod(method)

    def filled_in(self, prompts, completions, **columns):
        return which_process(prompts, completions)

    marked_later = rule(functools.partialmethod(filled_in, more=2))
    marked_object_later = rule(functools.partialmethod(partial(lambda self, **given: which_process(**given)), more=2))
    unmarked_later = functools.partialmethod(filled_in, more=3)


class MarkedCall:
    @rule
    def __call__(self, prompts, completions, **columns):
        return which_process(prompts, completions)


class Heir(MarkedCall):
    pass


class Extends(MarkedCall):
    def __call__(self, prompts, completions, **columns):
        return super().__call__(prompts, completions, **columns)


class Module(torch.nn.Module):
    @rule
    def forward(self, prompts, completions, **columns):
        return which_process(prompts, completions)


class ExtendsModule(Module):
    def forward(self, prompts, completions, **columns):
        return super().forward(prompts, completions, **columns)


@rule
class MarkedClass:
    def __call__(self, prompts, completions, **columns):
        return which_process(prompts, completions)


@dataclass
class Scaled:
    """Equal to its like, and so without a hash."""

    scale: float = 1.0

    def __call__(self, prompts, completions, **columns):
        return which_process(prompts, completions)


@dataclass(frozen=True)
class Frozen:
    def __call__(self, prompts, completions, **columns):
        return which_process(prompts, completions)


@rule
@dataclass(frozen=True, slots=True)
class Slotted:
    def __call__(self, prompts, completions, **columns):
        return which_process(prompts, completions)


def rules() -> dict:
    return {
        "function": rule(lambda **given: which_process(**given)),
        "partial of a rule": partial(process),
        "rule of a partial": rule(partial(which_process, offset=0.0)),
        "partial of a marked partial": partial(rule(partial(which_process)), offset=0.0),
        "decorated rule": passes_on(rule(lambda **given: which_process(**given))),
        "rule of a decorated function": rule(passes_on(lambda **given: which_process(**given))),
        "marked method": Judge().method,
        "partial of a marked method": partial(Judge().method),
        "partial method": Judge().bound_later,
        "marked partial method": Judge().marked_later,
        "partial of a marked partial method": partial(Judge().marked_later, even_more=3),
        "marked partial method of an object": Judge().marked_object_later,
        "class method": Judge.of_class,
        "class method, marked inside": Judge().of_class_inside,
        "static method": Judge.static,
        "decorated method": Judge().wrapped,
        "rule of a method": rule(Judge().plain),
        "object with a marked call": MarkedCall(),
        "object of a heir": Heir(),
        "object that extends a marked call": Extends(),
        "object of a marked class": MarkedClass(),
        "object of a marked class with slots": Slotted(),
        "module with a marked forward": Module(),
        "module that extends a marked forward": ExtendsModule(),
        "rule of an object": rule(MarkedCall()),
        "rule of a dataclass": rule(Scaled()),
        "rule of a frozen dataclass": rule(Frozen()),
    }


def test_whatever_is_marked_as_a_rule_runs_in_the_worker():
    functions = rules()
    scorer = Scorer(functions, dict.fromkeys(functions, 1.0), limits=SHORT)
    _, parts = scorer(["p"], ["a"], {})
    assert len({part.item() for part in parts.values()}) == 1 and parts["function"].item() != os.getpid()
    assert list(scorer.over_limit) == list(functions) == list(parts)


def test_the_limits_hold_for_methods_partials_and_objects():
    class Hangs:
        @rule
        def __call__(self, completions, **columns):
            return obedient([], completions)

        @rule
        def method(self, completions, **columns):
            return obedient([], completions)

    functions = {"object": Hangs(), "method": Hangs().method, "partial": rule(partial(obedient, weight=1))}
    scorer = Scorer(functions, dict.fromkeys(functions, 1.0), limits=Limits(seconds=0.1, gigabytes=0.5))
    _, parts = scorer(["p"] * 2, ["hang", "abc"], {})
    for name in functions:
        assert parts[name].tolist() == [0.0, 3.0] and scorer.over_limit[name].tolist() == [True, False]


def test_the_mark_of_one_object_is_not_that_of_its_equal():
    """Two dataclasses with the same fields are equal, but only one was marked."""
    marked, other = rule(Frozen()), Frozen()
    assert marked == other and is_rule(marked) and not is_rule(other)
    assert is_rule(rule(partial(which_process))) and not is_rule(partial(which_process)) and not is_rule(which_process)
    assert not is_rule(Scaled()) and not is_rule(max) and not is_rule(partial(max)) and not is_rule(Judge)
    assert not is_rule(Mock()) and not is_rule(torch.nn.Linear(1, 1))
    assert not is_rule(Judge().unmarked_later) and not is_rule(partial(Judge().filled_in, more=2))
    assert is_rule(Judge().marked_later) and not is_rule(Judge().filled_in)


def test_pickles_and_copies_of_a_rule_are_rules():
    for function in (process, rule(partial(which_process)), rule(Scaled(2.0)), Judge(1.0).method, MarkedClass()):
        assert is_rule(pickle.loads(pickle.dumps(function))) and is_rule(copy.deepcopy(function))


def test_an_object_that_can_be_called_is_a_reward_like_any_other():
    @dataclass
    class Constant:
        value: float

        def __call__(self, prompts, completions, **columns):
            return [self.value] * len(completions)

    one, two = Constant(1.0), Constant(2.0)
    scores, parts = Scorer({"one": one, "two": two}, {"one": 1.0, "two": 1.0})(["p"], ["a"], {})
    assert scores.tolist() == [3.0] and list(parts) == ["one", "two"]


def test_what_cannot_be_marked_or_called_is_refused_at_the_start():
    @dataclass(slots=True)
    class Tight:
        def __call__(self, prompts, completions, **columns):
            return [0.0]

    with pytest.raises(ValueError, match=r"@rule on Tight: .*no room for the mark.*Put @rule on its class"):
        rule(Tight())
    with pytest.raises(ValueError, match=r"@rule on len: .*no room for the mark"):
        rule(len)
    with pytest.raises(ValueError, match=r"reward 'raw' is a classmethod, which cannot be called"):
        Scorer({"raw": vars(Judge)["of_class"]}, {"raw": 1.0})


def test_every_kind_of_asynchronous_rule_is_refused():
    async def judge(prompts, completions, **columns):
        return [1.0]

    class Waits:
        async def __call__(self, **given):
            return [1.0]

        async def method(self, **given):
            return [1.0]

    class WaitsStatically:
        __call__ = staticmethod(judge)

    class WaitsLater:
        __call__ = functools.partialmethod(judge)

    class WaitingModule(torch.nn.Module):
        async def forward(self, **given):
            return [1.0]

    async def one_by_one(**given):
        yield 1.0

    for function, name in [
        (judge, "judge"),
        (partial(judge, []), "judge"),
        (Waits(), "Waits"),
        (Waits, "Waits"),
        (Waits().method, "method"),
        (staticmethod(judge), "judge"),
        (WaitsStatically(), "WaitsStatically"),
        (WaitsStatically, "WaitsStatically"),
        (WaitsLater(), "WaitsLater"),
        (WaitingModule(), "WaitingModule"),
        (one_by_one, "one_by_one"),
        (partial(one_by_one), "one_by_one"),
        (passes_on(judge), None),  # it returns what has to be awaited, which Python cannot tell before
    ]:
        if name is None:
            with pytest.raises(ValueError, match=r"returned <coroutine"):
                Scorer({"late": rule(function)}, {"late": 1.0})(["p"], ["a"], {})
        else:
            with pytest.raises(ValueError, match=rf"asynchronous {name}: "):
                rule(function)


def test_an_asynchronous_function_around_a_rule_is_refused_when_the_run_starts():
    @functools.wraps(obedient)
    async def waits(**given):
        return obedient(**given)

    class Waits(MarkedCall):
        async def __call__(self, **given):
            return [1.0]

    for function, name in [(waits, "obedient"), (partial(waits), "obedient"), (Waits(), "Waits")]:
        with pytest.raises(ValueError, match=rf"inside, the asynchronous {name}: "):
            Scorer({"late": function}, {"late": 1.0})
    scores, _ = Scorer({"late": waits}, {"late": 1.0}, limits=None)(["p"], ["abc"], {})
    assert scores.tolist() == [3.0]  # no worker, and so no limit on what a function may be


def test_a_rule_may_wait_for_the_asynchronous_function_it_wraps():
    async def judge(prompts, completions, **columns):
        return which_process(prompts, completions)

    at_once = rule(functools.wraps(judge)(lambda **given: asyncio.run(judge(**given))))
    scores, _ = Scorer({"at_once": at_once}, {"at_once": 1.0})(["p"], ["a"], {})
    assert scores.item() != os.getpid()


@pytest.mark.slow
def test_every_rule_of_every_task_is_marked_and_survives_hostile_completions():
    completions = hostile_completions(1500)  # all the known attacks, and some of the mixed ones
    for name, (function, row) in task_rules().items():
        assert is_rule(function), name
        # The limit here is for a hang; how long a row takes is measured in benchmarks/hostile.py.
        scorer = Scorer({name: function}, {name: 1.0}, limits=Limits(seconds=20.0))
        columns = {key: [value] * len(completions) for key, value in row.items()}
        scores, _ = scorer(["p"] * len(completions), completions, columns)
        assert not scorer.over_limit[name].any(), name
        if name.endswith(("equation", "correct")):
            assert scores.max() == 0, name


@pytest.mark.slow
def test_rows_over_the_limit_are_in_the_metrics_of_a_run(tiny_folder, tmp_path):
    task = toy_task()
    task.rewards["sometimes"] = rule(lambda completions, total, **_: [_obey("hang") if total[0] == 5 else 1.0])
    task.reward_weights["sometimes"] = 1.0
    config = toy_config(tiny_folder, tmp_path / "run", reward_time_limit=0.3, num_steps=1, prompts_per_step=12)
    algorithms()["GRPO"].trainer(config, task=task).train()
    last = metrics_of(tmp_path / "run")[-1]
    hung = sum(row["total"] == 5 for row in task.train) * config.num_generations
    assert last["over_limit/sometimes"] == hung > 0


# Runs alone, since an audit hook can never be taken off again. Python reports to it whatever it compiles, executes,
# starts or connects to.
AUDIT = """
import common, re, sys
from benchmarks.hostile import hostile_completions, task_rules

listening, forbidden = False, []
# What sympy compiles of numbers that it reads, of its own names, and of its own polynomials.
own = re.compile(
    r"(Integer|Float|Symbol) \\(('[A-Za-z0-9.]+'|[0-9]+) \\)|E |from sympy import \\*|"
    r"def monomial_[a-z]+\\(A(, [Bk])*\\):.*", re.DOTALL
)

def hook(event, arguments):
    if not listening:
        return
    if event == "compile" and arguments[1] == "<string>":
        source = arguments[0]
        text = bytes(source).decode() if isinstance(source, bytes | bytearray) else str(source)
        if not own.fullmatch(text):
            forbidden.append(text)
    if event.startswith(("os.system", "os.exec", "os.posix_spawn", "subprocess", "socket", "shutil", "ctypes.dlopen")):
        forbidden.append(event)

sys.addaudithook(hook)
completions = hostile_completions(1500)
listening = True
for rule, row in task_rules().values():
    columns = {key: [value] * len(completions) for key, value in row.items()}
    rule(prompts=["p"] * len(completions), completions=completions, **columns)
listening = False
print(forbidden)
"""


@pytest.mark.slow
def test_no_rule_runs_what_a_model_wrote():
    done = subprocess.run([sys.executable, "-c", AUDIT], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout[-2000:] + done.stderr[-2000:]
