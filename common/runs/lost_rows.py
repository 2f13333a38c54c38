"""Rows of rules that were over their limit: what they cost, and the end of a run whose rules score nothing.

Such a row scores 0. A few of them are the bad luck of odd texts. When they are most rows, the fault is the limit, the
rule or the machine, and the policy would learn from zeros that say nothing.
"""

import logging
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from common.rewards.answers import Lost

logger = logging.getLogger("nanorlhf")

MANY = 0.5  # share of a step's rows above which they are no bad luck
_GROWTH = 10  # a warning comes again when what it is about has happened so many times as often
STEPS_IN_A_ROW = 5  # with such rows, after which their cost is said

Rule = tuple[str, str]  # of which scorer, and its name: two scorers may have rules of one name

_ADVICE = (
    "Make the rule faster or more frugal, or its limits (reward_time_limit, reward_memory_limit) larger, which needs "
    "another output_dir."
)


class LostRows:
    """What a run knows of such rows, over all processes.

    Args:
        rules: names of the rules of each scorer.
        sum_over_processes: adds a tensor over all processes; the identity on one process.
        says: warn, as the main process does.
    """

    def __init__(
        self, rules: dict[str, list[str]], *, sum_over_processes: Callable[[Tensor], Tensor], says: bool
    ) -> None:
        self._rules = [(scorer, name) for scorer, names in rules.items() for name in names]
        self._sum, self._says = sum_over_processes, says
        self._step = dict.fromkeys(self._rules, Lost())  # this process's
        self._all_lost: dict[Rule, int] = {}  # rules without a score in their last step, and that step
        self._in_a_row: dict[Rule, int] = {}
        self._total: dict[Rule, Lost] = {}
        self._many: dict[Rule, int] = {}
        self._causes: dict[Rule, str] = {}
        self._said: set[Rule] = set()

    def add(self, scorer: str, lost: dict[str, Lost]) -> None:
        """Take note of what was scored; all processes call it, those without rows too.

        Args:
            scorer: one of those in `rules`.
            lost: by rule, of one call of it.

        Raises:
            ValueError: on all processes, if no row of a rule has a score, and none had in the step before.
        """
        rules = {(scorer, name): each for name, each in lost.items()}
        for rule, each in rules.items():
            self._step[rule] = self._step[rule].plus(each)
            self._causes[rule] = each.cause or self._causes.get(rule, "")
        # Only after such a step, which all processes know of, do they ask one another.
        suspects = {rule: each for rule, each in rules.items() if rule in self._all_lost}
        for rule, each in self._over_processes(suspects).items():
            if each.rows == each.of > 0:
                what = f"all {each.of} rows of the rule {rule[1]!r} were over a limit"
                self._refuse(f"{what}, as in step {self._all_lost[rule]}", rule)

    def _over_processes(self, lost: dict[Rule, Lost]) -> dict[Rule, Lost]:
        """The sums over all processes, which have the same rules, with the causes that this one knows."""
        if not lost:
            return {}
        sums = self._sum(torch.tensor([each[:3] for each in lost.values()], dtype=torch.float64))  # (rules, 3)
        return {
            rule: Lost(int(rows), int(of), seconds, self._causes.get(rule, ""))
            for rule, (rows, of, seconds) in zip(lost, sums.tolist(), strict=True)
        }

    def _refuse(self, what: str, rule: Rule) -> NoReturn:
        raise ValueError(
            f"{what}{_last(self._causes[rule])}. They would score 0, and from that a policy learns nothing.\n"
            f"{_ADVICE} Once the rule or the machine is right, the same command goes on from the last checkpoint."
        )

    def end_step(self, step: int) -> None:
        """Take note of a finished step, and warn of what is not right but may go on; all processes call it."""
        for rule, lost in self._over_processes(self._step).items():
            self._see(rule, lost, step)
        self._step = dict.fromkeys(self._rules, Lost())

    def _see(self, rule: Rule, lost: Lost, step: int) -> None:
        if not lost.of:
            return
        if lost.rows == lost.of:
            self._all_lost[rule] = step
        else:
            self._all_lost.pop(rule, None)
        self._in_a_row[rule] = self._in_a_row.get(rule, 0) + 1 if lost.rows else 0
        self._total[rule] = self._total.get(rule, Lost()).plus(lost)
        if lost.rows > MANY * lost.of:
            self._warn_of_many(rule, lost, step)
        if self._in_a_row[rule] == STEPS_IN_A_ROW:
            self._warn_of_cost(rule, step)

    def _warn_of_many(self, rule: Rule, lost: Lost, step: int) -> None:
        self._many[rule] = self._many.get(rule, 0) + 1
        if self._says and _is_power(self._many[rule]):
            times = f" ({self._many[rule]} such steps so far)" if self._many[rule] > 1 else ""
            logger.warning("step %d: %s%s.\n%s", step, describe(rule[1], lost), times, _ADVICE)

    def _warn_of_cost(self, rule: Rule, step: int) -> None:
        total = self._total[rule]
        if self._says and rule not in self._said:  # once is enough
            self._said.add(rule)
            logger.warning(
                "steps %d to %d: in each of them rows of the rule %r were over a limit%s. So far these were %d rows, "
                "which took %s; %s.\n%s",
                *(step - STEPS_IN_A_ROW + 1, step, rule[1], _last(total.cause), total.rows),
                *(_time(total.seconds), _cost(total), _ADVICE),
            )


def judge_evaluation(lost: dict[str, Lost]) -> None:
    """Warn of an evaluation in which most rows of a rule were over a limit.

    Args:
        lost: by rule.

    Raises:
        ValueError: if all rows of a rule were.
    """
    for name, each in lost.items():
        if each.rows == each.of > 0:
            raise ValueError(
                f"{describe(name, each)}. A result of zeros would say nothing about the model. Make the "
                "rule faster or more frugal, or pass a larger --reward_time_limit or --reward_memory_limit."
            )
        if each.rows > MANY * each.of:
            logger.warning("%s. The result counts them as 0.", describe(name, each))


def describe(name: str, lost: Lost) -> str:
    """How many rows of a rule were lost, the last cause, and what they cost."""
    all_of = "all" if lost.rows == lost.of else f"{lost.rows} of"
    cost = f"they took {_time(lost.seconds)}; {_cost(lost)}" if lost.seconds else "they scored 0"
    return f"{all_of} {lost.of} rows of the rule {name!r} were over a limit{_last(lost.cause)}: {cost}"


def _last(cause: str) -> str:
    return f" (the last one: {cause})" if cause else ""


def _cost(lost: Lost) -> str:
    """What many such rows would take, however few there were."""
    return f"at this rate 3,000 such rows take {_time(3000 * lost.seconds / max(lost.rows, 1))}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.3g} s"


def _is_power(number: int) -> bool:
    """Whether it is 1, 10, 100, ..."""
    while number % _GROWTH == 0:
        number //= _GROWTH
    return number == 1
