"""Completions that are scored together, and the arguments that a function gets for them."""

from dataclasses import dataclass
from typing import Any

from common.rewards.copies import Arguments
from common.rewards.forms import in_form
from common.rewards.reports import Reports, TrainerState
from common.rewards.reward_model import RewardModel
from common.rewards.rules import is_rule
from common.rewards.signatures import names, taken


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B completions.

    Attributes:
        prompts: B strings, as the policy continued them.
        completions: B strings.
        columns: a list of B values each.
        raw_prompts: B prompts as the data set has them, text or chat messages.
        completion_ids: token ids of each completion; None if nobody knows them.
        state: how far the run is; None if there is no run.
    """

    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]
    raw_prompts: list[str | list[dict]]
    completion_ids: list[list[int]] | None
    state: TrainerState | None

    def __len__(self) -> int:
        """B."""
        return len(self.completions)

    def row(self, row: int) -> "Batch":
        """One row, as a batch."""
        return Batch(
            prompts=[self.prompts[row]],
            completions=[self.completions[row]],
            columns={name: [values[row]] for name, values in self.columns.items()},
            raw_prompts=[self.raw_prompts[row]],
            completion_ids=self.completion_ids and [self.completion_ids[row]],
            state=self.state,
        )

    def arguments(self, function: Any, form: str) -> Arguments:
        """The columns that a function takes, in the form that it reads; a rule gets token ids only by name."""
        given = {"prompts": self.prompts, "completions": self.completions, **self.columns}
        if isinstance(function, RewardModel):
            return given | {"prompts": self.raw_prompts}
        given |= in_form(form, self.prompts, self.completions, self.raw_prompts)
        wants_ids = names(function, "completion_ids") or not (self.completion_ids is None or is_rule(function))
        return taken(function, given | ({"completion_ids": self.completion_ids} if wants_ids else {}))

    def extra(self, function: Any, reports: Reports) -> dict[str, Any]:
        """The arguments that are no columns; a rule gets the state only by name, and can log nothing."""
        if self.state is None:
            return {}
        if is_rule(function):
            return {"trainer_state": self.state} if names(function, "trainer_state") else {}
        return taken(function, reports.given(self.state))
