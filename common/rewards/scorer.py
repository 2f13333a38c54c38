"""Reward functions: the interface that users implement, and the score, a weighted sum of rewards.

A reward is a function of the task, a function from a file, or a `RewardModel`. Functions marked as rules run in a
worker process with limits (rules.py); the others run in the training process without limits.
"""

import asyncio
import inspect
import math
import reprlib
import weakref
from collections.abc import Awaitable, Collection, Mapping
from datetime import datetime
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from common.models.pool import ModelPool
from common.rewards.copies import Arguments, own_arguments
from common.rewards.reward_model import RewardModel, as_messages
from common.rewards.rules import DEFAULT_LIMITS, Limits, RuleWorker, is_rule
from common.rewards.values import number_of, values_of

# Long enough to recognise a prompt, short enough for an error message.
_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = 120

# Arguments of reward functions that are not columns of the data set.
_GIVEN = {"prompts", "completions", "completion_ids"}


class RewardFunction(Protocol):
    """Scores a batch of completions, with the signature that trl uses; it may be asynchronous."""

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: list
    ) -> list[float | None] | Awaitable[list[float | None]]:
        """Score each completion.

        Args:
            prompts: the text each completion continues; chat messages in trl's conversational form.
            completions: the completions without their end token; in the conversational form a list with one message.
            columns: every other column of the data set, one value per completion. A function with a parameter
                `completion_ids` also gets the token ids of the completions.

        Returns:
            One finite number per completion, or None where the function does not apply: a list, or a one-dimensional
            tensor, array or Series. The function may change its arguments; they are its own.
        """


class Scorer:
    """The weighted sum of reward functions; each is also reported raw.

    Args:
        functions: reward functions by name.
        weights: weight of each, by the same names.
        conversational: names of the functions that get chat messages, not text.
        limits: time and memory that a rule may use per row; None: rules run in the training process like the others.

    Attributes:
        over_limit: for each rule, (B,) bool: the rows of the last call that scored 0 because they were over a limit.

    Raises:
        ValueError: if something that cannot be called is given as a function.
    """

    def __init__(
        self,
        functions: dict[str, RewardFunction],
        weights: dict[str, float],
        *,
        conversational: Collection[str] = (),
        limits: Limits | None = DEFAULT_LIMITS,
    ) -> None:
        for name, function in functions.items():
            if not callable(function):
                raise ValueError(
                    f"reward {name!r} is a {type(function).__name__}, which cannot be called. Need a function with "
                    "the parameters prompts, completions and columns of the data; pass one."
                )
        self.functions = functions
        self.weights = weights
        self.conversational = conversational
        self.over_limit: dict[str, Tensor] = {}
        self._rules = {name: function for name, function in functions.items() if limits and is_rule(function)}
        self._worker = RuleWorker(self._rules, limits) if self._rules else None
        # One event loop for the whole run: a client that a function keeps open belongs to the loop that opened it.
        self._loop = asyncio.Runner()
        weakref.finalize(self, self._loop.close)

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

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse data without a column that a reward function needs.

        Args:
            columns: names of the data set's columns.

        Raises:
            ValueError: names the reward, the missing columns and the existing ones.
        """
        for name, function in self.functions.items():
            missing = [column for column in _required(function) if column not in _GIVEN.union(columns)]
            if missing:
                raise ValueError(
                    f"reward {name!r} needs the columns {', '.join(missing)}; the data set has "
                    f"{', '.join(columns) or 'only the prompt'}. Pass data with these columns, or give the "
                    "function's parameters default values."
                )

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list],
        *,
        raw_prompts: list[str | list[dict]] | None = None,
        completion_ids: list[list[int]] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score completions.

        Args:
            prompts: B strings.
            completions: B strings.
            columns: a list of B values each.
            raw_prompts: B prompts as the data set has them, text or chat messages; None or empty: `prompts`.
            completion_ids: token ids of the B completions, for functions that name this parameter.

        Returns:
            scores: (B,) float32, the weighted sum of the rewards that are not None; 0 where all are None.
            parts: for each function (B,) float32, raw; NaN where it returned None.

        Raises:
            ValueError: if a function raises, returns the wrong number of values or something that is not a number,
                or if all functions return None for all completions.
        """
        text = {"prompts": prompts, "completions": completions, **columns}
        raw = raw_prompts or prompts
        arguments = {name: self._arguments(name, text, raw, completion_ids) for name in self.functions}
        answers = self._answers(arguments)
        parts = {
            name: torch.tensor(self._numbers(name, answers[name], arguments[name], completions), dtype=torch.float32)
            for name in self.functions
        }
        if completions and all(part.isnan().all() for part in parts.values()):
            raise ValueError(
                f"{', '.join(parts)}: every reward is None for all {len(completions)} completions. Need a number for "
                "some of them, or there is nothing to learn from. Fix the functions so that None is the exception."
            )
        weighted = [self.weights[name] * torch.nan_to_num(part, nan=0.0) for name, part in parts.items()]
        return torch.stack(weighted).sum(0), parts

    def _arguments(
        self, name: str, text: dict[str, list], raw_prompts: list, completion_ids: list[list[int]] | None
    ) -> Arguments:
        """The arguments that a function is called with."""
        arguments = dict(text)
        if isinstance(self.functions[name], RewardModel):
            arguments["prompts"] = raw_prompts
        elif name in self.conversational:
            arguments["prompts"] = [as_messages(prompt) for prompt in raw_prompts]
            arguments["completions"] = [[{"role": "assistant", "content": c}] for c in text["completions"]]
        if "completion_ids" in _parameters(self.functions[name]):
            arguments["completion_ids"] = completion_ids
        return arguments

    def _answers(self, arguments: dict[str, Arguments]) -> dict[str, object]:
        """What each function returned or raised; asynchronous functions run concurrently."""
        answers = {}
        for name, given in arguments.items():
            if name in self._rules:
                answers[name] = self._rule_answers(name, given)
                continue
            if isinstance(self.functions[name], RewardModel):
                answers[name] = self.functions[name](**given)
                continue
            own = own_arguments(given)
            try:
                answers[name] = self.functions[name](**own)
            except Exception as error:  # the user's function may raise anything
                answers[name] = error
        waiting = {name: answer for name, answer in answers.items() if inspect.isawaitable(answer)}

        async def together() -> list[object]:
            return await asyncio.gather(*waiting.values(), return_exceptions=True)

        if waiting:
            answers |= zip(waiting, self._loop.run(together()), strict=True)
        return answers

    def _rule_answers(self, name: str, arguments: Arguments) -> list:
        """A rule's reward for each row, 0 where it was over a limit."""
        rows = self._worker(name, arguments)
        if rows and rows[-1].error:
            self._refuse(name, rows[-1].error, self._shown(arguments, len(rows) - 1))
        self.over_limit[name] = torch.tensor([row.over_limit for row in rows], dtype=torch.bool)
        return [0.0 if row.over_limit else None if math.isnan(row.reward) else row.reward for row in rows]

    def _numbers(self, name: str, rewards: object, arguments: dict[str, list], completions: list[str]) -> list[float]:
        """A function's answer as one number per completion, NaN for None."""
        if isinstance(rewards, Exception):
            self._refuse(name, f"{type(rewards).__name__}: {rewards}", self._failing_row(name, arguments), rewards)
        values = values_of(rewards)
        if values is None or len(values) != len(completions):
            given = _SHORTEN.repr(rewards) if values is None else f"{len(values)} values"
            raise ValueError(
                f"reward {name!r} returned {given} for {len(completions)} completions: need a list with one number "
                "each, in the same order. Fix the function."
            )
        return [self._checked(name, reward, row, completions[row]) for row, reward in enumerate(values)]

    @staticmethod
    def _refuse(name: str, error: str, where: str, cause: Exception | None = None) -> NoReturn:
        raise ValueError(
            f"reward {name!r} raised {error}; {where}. A reward function must give a number for any text a model may "
            "write. Fix the function, or return None where it does not apply."
        ) from cause

    @staticmethod
    def _checked(name: str, reward: object, row: int, completion: str) -> float:
        try:
            return number_of(reward)
        except TypeError as error:
            raise ValueError(
                f"reward {name!r} returned {_SHORTEN.repr(reward)} in row {row} for {_SHORTEN.repr(completion)}: need "
                "a finite float32 number, not text, since one such value would spoil the whole batch. Fix the "
                "function, or return None there."
            ) from error

    def _failing_row(self, name: str, arguments: dict[str, list]) -> str:
        """Call the function row by row to find the one it fails on, with its arguments shortened."""
        num_rows = len(arguments["completions"])
        for row in range(num_rows):
            # A whole column may be None: token ids that were not passed.
            single = {key: values and [values[row]] for key, values in arguments.items()}
            if isinstance(self._answers({name: single})[name], Exception):
                return self._shown(arguments, row)
        return "no single row fails alone"

    @staticmethod
    def _shown(arguments: Arguments, row: int) -> str:
        shown = ", ".join(f"{key}={_SHORTEN.repr(values[row])}" for key, values in arguments.items() if values)
        return f"row {row} of {len(arguments['completions'])}: {shown}"


def _required(function: RewardFunction) -> list[str]:
    """Parameters without a default that are passed by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _parameters(function).values() if p.kind in by_name and p.default is p.empty]


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """Parameters by name; none if Python cannot tell, as for some functions of C libraries."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
