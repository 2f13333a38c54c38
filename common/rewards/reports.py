"""What reward functions are told of the run, and what they may log: trl's trainer_state, log_metric and log_extra."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.rewards.values import number_of


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """How far a run is, for rewards that change with it; the names are those of transformers.

    Attributes:
        global_step: finished steps: 0 in the first step; in an evaluation, the steps before it.
        max_steps: steps of the whole run. Where nothing is trained, as in common.evaluation, both are 1: the end.
        epoch: how often each prompt has been used on average, in parts.
    """

    global_step: int = 0
    max_steps: int = 1
    epoch: float = 0.0


@dataclass(kw_only=True)
class Reports:
    """What functions logged while they scored B completions.

    Attributes:
        metrics: by name, the values that were logged.
        columns: by name, one value per completion, for tables of samples.
    """

    num_rows: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; metrics.jsonl has the mean of all values of a step and of all processes.

        Raises:
            ValueError: if it is no finite number.
        """
        try:
            number = number_of(math.inf if value is None else value)  # only a reward may be None
        except TypeError as error:
            raise ValueError(f"log_metric({name!r}, {value!r:.40}): {error}. Pass a number.") from error
        self.metrics.setdefault(str(name), []).append(number)

    def log_extra(self, column: str, values: Sequence) -> None:
        """Log one value per completion, as a column of samples.jsonl.

        Raises:
            ValueError: if there are more or fewer values than completions.
        """
        values = list(values)
        if len(values) != self.num_rows:
            raise ValueError(
                f"log_extra({column!r}, ...) with {len(values)} values for {self.num_rows} completions: need one for "
                "each, in the same order."
            )
        self.columns[str(column)] = values

    def given(self, state: TrainerState) -> dict[str, Any]:
        """The arguments of a function that logs here."""
        return {"trainer_state": state, "log_metric": self.log_metric, "log_extra": self.log_extra}

    def include(self, other: "Reports", name: str) -> None:
        """Add what one function logged; a column that another has too gets the function's name before it."""
        for metric, values in other.metrics.items():
            self.metrics.setdefault(metric, []).extend(values)
        for column, values in other.columns.items():
            self.columns[column if column not in self.columns else f"{name}/{column}"] = values
