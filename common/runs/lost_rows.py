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
from common.runs.metrics import StepMetrics

logger = logging.getLogger("nanorlhf")

MANY = 0.5  # share of a step's rows above which they are no bad luck
_GROWTH = 10  # a warning comes again when what it is about has happened so many times as often
STEPS_IN_A_ROW = 5  # with such rows, after which their cost is said

# What `put_into` adds to a step's metrics. No metric's name begins so.
_ROWS, _OF, _SECONDS = "lost rows: ", "scored rows: ", "lost seconds: "

_ADVICE = (
    "Make the rule faster or more frugal, or its limits (reward_time_limit, reward_memory_limit) larger, which needs "
    "another output_dir."
)


class LostRows:
    """What a run knows of such rows, over all processes.

    Args:
        sum_over_processes: adds a tensor over all processes; the identity on one process.
        says: warn, as the main process does.
    """

    def __init__(self, *, sum_over_processes: Callable[[Tensor], Tensor], says: bool) -> None:
        self._sum, self._says = sum_over_processes, says
        self._step: dict[str, Lost] = {}  # this process's of the step
        self._all_lost: dict[str, int] = {}  # rules without a score in their last step, and that step
        self._in_a_row: dict[str, int] = {}
        self._total: dict[str, Lost] = {}
        self._many: dict[str, int] = {}
        self._causes: dict[str, str] = {}
        self._said: set[str] = set()

    def add(self, lost: dict[str, Lost]) -> None:
        """Take note of what was scored; all processes call it, those without rows too.

        Args:
            lost: by rule, of one call of a scorer.

        Raises:
            ValueError: on all processes, if no row of a rule has a score, and none had in the step before.
        """
        for name, each in lost.items():
            self._step[name] = self._step.get(name, Lost()).plus(each)
            self._causes[name] = each.cause or self._causes.get(name, "")
        # Only after such a step, which all processes know of, do they ask one another.
        suspects = [name for name in lost if name in self._all_lost]
        if not suspects:
            return
        counts = self._sum(torch.tensor([[lost[name].rows, lost[name].of] for name in suspects], dtype=torch.float64))
        for name, (rows, of) in zip(suspects, counts.tolist(), strict=True):
            if rows == of > 0:
                before = self._all_lost[name]
                self._refuse(f"all {of:.0f} rows of the rule {name!r} were over a limit, as in step {before}", name)

    def _refuse(self, what: str, name: str) -> NoReturn:
        raise ValueError(
            f"{what}{_last(self._causes[name])}. They would score 0, and from that a policy learns nothing.\n"
            f"{_ADVICE} Once the rule or the machine is right, the same command goes on from the last checkpoint."
        )

    def put_into(self, metrics: StepMetrics) -> None:
        """Add this process's rows of the step to its metrics, before they are reduced; see `take_from`."""
        for name, lost in self._step.items():
            metrics.add_sum(f"{_ROWS}{name}", lost.rows)
            metrics.add_sum(f"{_OF}{name}", lost.of)
            metrics.add_max(f"{_SECONDS}{name}", lost.seconds)  # processes wait for the slowest
        self._step = {}

    def take_from(self, metrics: dict[str, float], *, step: int) -> dict[str, float]:
        """Take note of a finished step, and warn of what is not right but may go on.

        Args:
            metrics: the step's, reduced over processes.
            step: the step.

        Returns:
            The metrics without those of `put_into`: over_limit/<rule> is among the others.
        """
        for name in [name.removeprefix(_OF) for name in metrics if name.startswith(_OF)]:
            numbers = (int(metrics[f"{_ROWS}{name}"]), int(metrics[f"{_OF}{name}"]), metrics[f"{_SECONDS}{name}"])
            self._see(name, Lost(*numbers, self._causes.get(name, "")), step)
        return {name: value for name, value in metrics.items() if not name.startswith((_ROWS, _OF, _SECONDS))}

    def _see(self, name: str, lost: Lost, step: int) -> None:
        if not lost.of:
            return
        if lost.rows == lost.of:
            self._all_lost[name] = step
        else:
            self._all_lost.pop(name, None)
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if lost.rows else 0
        self._total[name] = self._total.get(name, Lost()).plus(lost)
        if lost.rows > MANY * lost.of:
            self._warn_of_many(name, lost, step)
        if self._in_a_row[name] == STEPS_IN_A_ROW:
            self._warn_of_cost(name, step)

    def _warn_of_many(self, name: str, lost: Lost, step: int) -> None:
        self._many[name] = self._many.get(name, 0) + 1
        if self._says and _is_power(self._many[name]):
            times = f" ({self._many[name]} such steps so far)" if self._many[name] > 1 else ""
            logger.warning("step %d: %s%s.\n%s", step, describe(name, lost), times, _ADVICE)

    def _warn_of_cost(self, name: str, step: int) -> None:
        total = self._total[name]
        if self._says and name not in self._said:  # once is enough
            self._said.add(name)
            logger.warning(
                "steps %d to %d: in each of them rows of the rule %r were over a limit%s. So far these were %d rows, "
                "which took %s; %s.\n%s",
                *(step - STEPS_IN_A_ROW + 1, step, name, _last(total.cause), total.rows),
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
