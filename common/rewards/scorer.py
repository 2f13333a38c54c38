"""Reward functions: the interface that users implement, and the score, a weighted sum of rewards.

A reward is a function of the task, a function from a file, or a `RewardModel`. Functions marked as rules run in a
worker process with limits (worker.py); the others run in the training process without limits.
"""

import inspect
import logging
import math
import reprlib
import textwrap
from collections.abc import Awaitable, Collection, Mapping
from datetime import datetime
from typing import Any, Protocol

import torch
from torch import Tensor

from common.models.pool import ModelPool
from common.rewards.answers import DEFAULT_LIMITS, Limits, Lost
from common.rewards.batch import Batch
from common.rewards.copies import Arguments, own_arguments
from common.rewards.event_loop import EventLoop
from common.rewards.forms import ANNOTATED, AUTO, CONVERSATIONAL, SHOWN, TEXT, expects_messages, form_of
from common.rewards.reports import Reports, TrainerState
from common.rewards.reward_model import RewardModel
from common.rewards.rules import is_rule
from common.rewards.signatures import PER_CALL, check_columns, check_signature
from common.rewards.values import LARGEST, number_of, values_of
from common.rewards.worker import RuleWorker

logger = logging.getLogger("nanorlhf")

# Long enough to recognise a prompt, short enough for an error message.
_LONGEST_ERROR = 500  # characters of what a function raised
_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = 120

# What a function raises that was given text for messages, or messages for text.
_WRONG_FORM = ("TypeError", "AttributeError", "KeyError", "IndexError")


class RewardFunction(Protocol):
    """Scores a batch of completions, with the signature that trl uses; it may be asynchronous."""

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: list
    ) -> list[float | None] | Awaitable[list[float | None]]:
        """Score each completion.

        Args:
            prompts: the text each completion continues; chat messages in trl's conversational form.
            completions: the completions without their end token; in the conversational form a list with one message.
            columns: every other column of the data set, one value per completion; and, in a run, what trl passes:
                completion_ids (the token ids of the completions), trainer_state, log_metric and log_extra. Rules get
                of these what they name. A function without `**columns` gets only what it has parameters for.

        Returns:
            One finite number per completion, or None where the function does not apply: a list, or a one-dimensional
            tensor, array or Series. The function may change its arguments; they are its own.
        """


class _RowError(Exception):
    """A rule's exception as text, and the row that raised it."""

    def __init__(self, text: str, row: int) -> None:
        super().__init__(text)
        self.text, self.row = text, row


class Scorer:
    """The weighted sum of reward functions; each is also reported raw.

    Args:
        functions: reward functions by name.
        weights: weight of each, by the same names.
        forms: by name, what functions get: "text", "conversational" (chat messages) or "auto", which is what others
            get; see forms.py.
        limits: time and memory that a rule may use per row; None: rules run in the training process like the others.

    Attributes:
        over_limit: for each rule, (B,) bool: the rows of the last call that scored 0 because they were over a limit.
        lost: for each rule, what these rows cost.
        reports: what functions logged in the last call.

    Raises:
        ValueError: if something that cannot score completions is given as a function.
    """

    def __init__(
        self,
        functions: dict[str, RewardFunction],
        weights: dict[str, float],
        *,
        forms: Mapping[str, str] | None = None,
        limits: Limits | None = DEFAULT_LIMITS,
    ) -> None:
        for name, function in functions.items():
            check_signature(name, function)
        self.functions = functions
        self.weights = weights
        self.over_limit: dict[str, Tensor] = {}
        self.lost: dict[str, Lost] = {}
        self.reports = Reports()
        chosen = {name: (forms or {}).get(name, AUTO) for name in functions}
        self._forms = {name: form_of(functions[name]) if form == AUTO else form for name, form in chosen.items()}
        self._rules = {name: function for name, function in functions.items() if limits and is_rule(function)}
        self._worker = RuleWorker(self._rules, limits) if self._rules else None
        self._loop = EventLoop()

    @property
    def rules(self) -> list[str]:
        """Names of the functions that are called within limits, in a process of their own."""
        return [*self._rules]

    def load(self, models: ModelPool, now: datetime | None = None) -> None:
        """Load the weights of every reward model.

        Args:
            models: moves each to the device while it scores.
            now: the time that chat templates see which write the date; None: the clock.

        Raises:
            ValueError: if a model's weights are incomplete.
        """
        for function in self.functions.values():
            if isinstance(function, RewardModel):
                function.load(models, now)

    def check_columns(self, columns: Collection[str], rows: str = "the data set") -> None:
        """Refuse data without a column that a reward function needs, or with one whose name is taken.

        Args:
            columns: names of the data's columns.
            rows: what the data are, for the message.

        Raises:
            ValueError: names the reward, the missing columns and the existing ones.
        """
        if taken_names := {"completion_ids", *PER_CALL}.intersection(columns):
            raise ValueError(
                f"columns {', '.join(sorted(taken_names))}: {rows} has them, and a reward function gets something "
                "else under these names. Rename the columns."
            )
        for name, function in self.functions.items():
            check_columns(name, function, columns, rows)

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list],
        *,
        raw_prompts: list[str | list[dict]] | None = None,
        completion_ids: list[list[int]] | None = None,
        state: TrainerState | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score completions.

        Args:
            prompts: B strings.
            completions: B strings.
            columns: a list of B values each.
            raw_prompts: B prompts as the data set has them, text or chat messages; None or empty: `prompts`.
            completion_ids: token ids of the B completions.
            state: how far the run is. None: there is no run; functions get no trainer_state, log_metric, log_extra.

        Returns:
            scores: (B,) float32, the weighted sum of the rewards that are not None; 0 where all are None, or without
                any reward.
            parts: for each function (B,) float32, raw; NaN where it returned None.

        Raises:
            ValueError: if a function raises, returns the wrong number of values or something that is not a number
                (or too large), or if all functions return None for all completions.
        """
        batch = Batch(
            prompts=prompts,
            completions=completions,
            columns=columns,
            raw_prompts=raw_prompts or prompts,
            completion_ids=completion_ids,
            state=state,
        )
        self.reports = Reports(num_rows=len(completions))
        if not completions:  # of a process without rows; few functions expect empty lists
            self.over_limit = {name: torch.zeros(0, dtype=torch.bool) for name in self._rules}
            self.lost = {name: Lost() for name in self._rules}
            return torch.zeros(0), {name: torch.zeros(0) for name in self.functions}
        answers = self._answers(batch, dict(self._forms), self.reports)
        self._settle_forms(batch, answers)
        parts = {
            name: torch.tensor(self._numbers(name, answers[name], batch), dtype=torch.float32)
            for name in self.functions
        }
        if not parts:  # nothing is measured, since a teacher says what is learned
            return torch.zeros(len(completions)), {}
        if all(part.isnan().all() for part in parts.values()):
            raise ValueError(
                f"{', '.join(parts)}: every reward is None for all {len(completions)} completions. Need a number for "
                "some of them, or there is nothing to learn from. Fix the functions so that None is the exception."
            )
        weighted = {name: self.weights[name] * torch.nan_to_num(part, nan=0.0) for name, part in parts.items()}
        scores = torch.stack([*weighted.values()]).sum(0)
        if not (scores.abs() <= LARGEST).all():
            row = int((~(scores.abs() <= LARGEST)).nonzero()[0])
            terms = " + ".join(f"{self.weights[name]:g} x {parts[name][row]:g} ({name})" for name in parts)
            raise ValueError(
                f"the score of row {row} is {terms}: need at most {LARGEST:g} in size, or sums of squares over a "
                "batch overflow float32. Pass smaller --reward_weights, or scale the rewards."
            )
        return scores, parts

    # ----------------------------------------------------------------------------------------------------- calling

    def _answers(self, batch: Batch, forms: Mapping[str, str], reports: Reports) -> dict[str, object]:
        """What each function of `forms` returned or raised; asynchronous functions wait together."""
        answers, own_reports = {}, {}
        for name, form in forms.items():
            own_reports[name] = Reports(num_rows=len(batch))
            answers[name] = self._answer(name, batch, form, own_reports[name])
        waiting = {name: answer for name, answer in answers.items() if inspect.isawaitable(answer)}
        if waiting:
            answers |= zip(waiting, self._loop.outcomes([*waiting.values()]), strict=True)
        for name, answer in answers.items():
            if not isinstance(answer, Exception):
                reports.include(own_reports[name], name)
        return answers

    def _answer(self, name: str, batch: Batch, form: str, reports: Reports) -> object:
        given = batch.arguments(self.functions[name], form)
        if isinstance(self.functions[name], RewardModel):
            return self.functions[name](**given)
        extra = batch.extra(self.functions[name], reports)
        if name in self._rules:
            return self._rule_answers(name, given, extra)
        own = own_arguments(given)
        try:
            return self.functions[name](**own, **extra)
        except Exception as error:  # the user's function may raise anything
            return error

    def _rule_answers(self, name: str, arguments: Arguments, extra: dict[str, Any]) -> list | _RowError:
        """A rule's reward for each row, 0 where it was over a limit; or what a row raised."""
        rows = self._worker(name, arguments, extra)
        if rows and rows[-1].error:
            return _RowError(rows[-1].error, len(rows) - 1)
        self.over_limit[name] = torch.tensor([row.over_limit for row in rows], dtype=torch.bool)
        self.lost[name] = Lost.among(rows)
        return [0.0 if row.over_limit else None if math.isnan(row.reward) else row.reward for row in rows]

    def _settle_forms(self, batch: Batch, answers: dict[str, object]) -> None:
        """Decide the form of each "auto" function: messages if it fails on text as such functions do, else text."""
        for name in [name for name, form in self._forms.items() if form == AUTO]:
            if isinstance(answers[name], Exception) and expects_messages(_text_of(answers[name])):
                again = self._answers(batch, {name: CONVERSATIONAL}, self.reports)[name]
                if isinstance(again, Exception):
                    raise self._refusal(name, again, batch, CONVERSATIONAL, _text_of(answers[name])) from _cause(again)
                self._forms[name], answers[name] = CONVERSATIONAL, again
                logger.info(
                    "reward %r fails on text and gets chat messages, as with --reward_format conversational", name
                )
            elif any(batch.completions):
                self._forms[name] = TEXT

    # ---------------------------------------------------------------------------------------------------- checking

    def _numbers(self, name: str, rewards: object, batch: Batch) -> list[float]:
        """A function's answer as one number per completion, NaN for None."""
        if isinstance(rewards, Exception):
            raise self._refusal(name, rewards, batch, self._forms[name]) from _cause(rewards)
        values = values_of(rewards)
        if values is None or len(values) != len(batch):
            given = " ".join(_SHORTEN.repr(rewards).split()) if values is None else f"{len(values)} values"
            raise ValueError(
                f"reward {name!r} returned {given} for {len(batch)} completions: need a list with one "
                "number each, in the same order. Fix the function."
            )
        return [self._checked(name, reward, row, batch.completions[row]) for row, reward in enumerate(values)]

    def _checked(self, name: str, reward: object, row: int, completion: str) -> float:
        try:
            return number_of(reward)
        except TypeError as error:
            remedy = "Fix the function, or return None there."
            if isinstance(self.functions[name], RewardModel):
                remedy = "Its files may be damaged, or its numbers overflow. Take another reward model."
            raise ValueError(
                f"reward {name!r} returned {_SHORTEN.repr(reward)} in row {row} for {_SHORTEN.repr(completion)}: need "
                f"a finite number of at most {LARGEST:g} in size, not text, since one such value would spoil the "
                f"whole batch. {remedy}"
            ) from error

    def _refusal(
        self, name: str, error: Exception, batch: Batch, form: str, with_text: str | None = None
    ) -> ValueError:
        """The message about a function that raised.

        Args:
            name: of the reward.
            error: what it raised.
            batch: what it was called with.
            form: the form that it got.
            with_text: what it raised before, when it got text.
        """
        arguments = batch.arguments(self.functions[name], form)
        row = error.row if isinstance(error, _RowError) else self._failing_row(name, batch, form)
        where = "no single row fails alone" if row is None else self._shown(arguments, row, len(batch))
        advice = "Fix the function, or return None where it does not apply."
        if with_text is not None:
            advice += f" (With text it raised {with_text}; --reward_format says what it expects.)"
        elif other := self._other_form(name, error, batch, form):
            advice = f"It got {SHOWN[form if form != AUTO else TEXT]}, and does not fail on {SHOWN[other]}: pass "
            advice += f"--reward_format {other}, or annotate `completions: {ANNOTATED[other]}`."
        return ValueError(
            f"reward {name!r} raised {_text_of(error)}; {where}. A reward function must give a number for any text a "
            f"model may write. {advice}"
        )

    def _other_form(self, name: str, error: Exception, batch: Batch, form: str) -> str | None:
        """The form on which a function does not fail; None if it fails on both, or for another reason."""
        other = TEXT if form == CONVERSATIONAL else CONVERSATIONAL
        if not _text_of(error).startswith(_WRONG_FORM):
            return None
        answer = self._answers(batch, {name: other}, Reports(num_rows=len(batch)))[name]
        return None if isinstance(answer, Exception) else other

    def _failing_row(self, name: str, batch: Batch, form: str) -> int | None:
        """Call the function row by row to find the one it fails on."""
        for row in range(len(batch)):
            if isinstance(self._answers(batch.row(row), {name: form}, Reports(num_rows=1))[name], Exception):
                return row
        return None

    @staticmethod
    def _shown(arguments: Arguments, row: int, num_rows: int) -> str:
        shown = ", ".join(f"{key}={_SHORTEN.repr(values[row])}" for key, values in arguments.items() if values)
        return f"row {row} of {num_rows}: {shown}"


def _text_of(error: Exception) -> str:
    """What was raised, in one line that is not too long."""
    text = error.text if isinstance(error, _RowError) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text.rstrip(": "), _LONGEST_ERROR, placeholder=" ...")


def _cause(error: Exception) -> Exception | None:
    """What keeps the way to the user's line; a rule's stays in its process."""
    return None if isinstance(error, _RowError) else error
