"""Reward functions: the type a user writes, and the weighted sum that makes a score of several of them.

A reward is one of the task's, a function from a file, or a `RewardModel`. Functions run in the training process and
without a time limit, so they must be fast.
"""

import asyncio
import importlib.util
import inspect
import math
import reprlib
import sys
import weakref
from collections.abc import Awaitable, Collection
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from common.offload import ModelPool
from common.reward_model import RewardModel, as_messages

# Long enough to recognise a prompt, short enough for an error message.
_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = 120

# What a reward function gets that is no column of the data set.
_GIVEN = {"prompts", "completions", "completion_ids"}


class RewardFunction(Protocol):
    """Score a batch of completions, by the signature of trl; it may be asynchronous."""

    def __call__(
        self, prompts: list[str], completions: list[str], **columns: list
    ) -> list[float | None] | Awaitable[list[float | None]]:
        """Score each completion.

        Args:
            prompts: the text each completion continues; chat messages in trl's conversational form.
            completions: the completions, special tokens removed; in the conversational form a list with one message.
            columns: every other column of the data set, one value per completion. Who names `completion_ids` gets the
                token ids of the completions too.

        Returns:
            One finite number per completion; None where the function has no say.
        """


class Scorer:
    """The weighted sum of reward functions, each also reported raw.

    Args:
        functions: reward functions by name.
        weights: weight of each, by the same names.
        conversational: names of the functions that get chat messages, not text.
    """

    def __init__(
        self,
        functions: dict[str, RewardFunction],
        weights: dict[str, float],
        *,
        conversational: Collection[str] = (),
    ) -> None:
        self.functions = functions
        self.weights = weights
        self.conversational = conversational
        # One event loop for the whole run: a client that a function keeps open belongs to the loop that opened it.
        self._loop = asyncio.Runner()
        weakref.finalize(self, self._loop.close)

    def load(self, models: ModelPool) -> None:
        """Load the weights of every reward model.

        Args:
            models: has each on the device while it scores.

        Raises:
            ValueError: if a model's weights are not complete.
        """
        for function in self.functions.values():
            if isinstance(function, RewardModel):
                function.load(models)

    def check_columns(self, columns: Collection[str]) -> None:
        """Refuse data that lack what a reward function asks for.

        Args:
            columns: names of the data set's columns.

        Raises:
            ValueError: naming the reward, what it lacks and what there is.
        """
        for name, function in self.functions.items():
            missing = [column for column in _required(function) if column not in _GIVEN.union(columns)]
            if missing:
                raise ValueError(
                    f"reward {name!r} needs the columns {', '.join(missing)}; the data set has "
                    f"{', '.join(columns) or 'none besides the prompt'}. Pass data with these columns, or give the "
                    "function's parameters defaults."
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
            raw_prompts: B prompts as the data set has them, text or chat messages; None or empty: as `prompts`.
            completion_ids: token ids of the B completions, for functions that name this parameter.

        Returns:
            scores: (B,) float32, the weighted sum over the functions that had a say; 0 where none had.
            parts: for each function (B,) float32, raw; NaN where it had none.

        Raises:
            ValueError: if a function raises, or returns the wrong number of values or something that is no number,
                or if none has a say on any completion.
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
                f"{', '.join(parts)}: no reward has a say on any of {len(completions)} completions. Need a number for "
                "some of them, or there is nothing to learn from. Mend the functions so that None is the exception."
            )
        weighted = [self.weights[name] * torch.nan_to_num(part, nan=0.0) for name, part in parts.items()]
        return torch.stack(weighted).sum(0), parts

    def _arguments(
        self, name: str, text: dict[str, list], raw_prompts: list, completion_ids: list[list[int]] | None
    ) -> dict[str, list | None]:
        """What a function is called with."""
        arguments = dict(text)
        if isinstance(self.functions[name], RewardModel):
            arguments["prompts"] = raw_prompts
        elif name in self.conversational:
            arguments["prompts"] = [as_messages(prompt) for prompt in raw_prompts]
            arguments["completions"] = [[{"role": "assistant", "content": c}] for c in text["completions"]]
        if "completion_ids" in inspect.signature(self.functions[name]).parameters:
            arguments["completion_ids"] = completion_ids
        return arguments

    def _answers(self, arguments: dict[str, dict[str, list]]) -> dict[str, object]:
        """What each function returned or raised; asynchronous ones wait together."""
        answers = {}
        for name, given in arguments.items():
            if isinstance(self.functions[name], RewardModel):
                answers[name] = self.functions[name](**given)
                continue
            try:
                answers[name] = self.functions[name](**given)
            except Exception as error:  # whatever the user's function may raise
                answers[name] = error
        waiting = {name: answer for name, answer in answers.items() if inspect.isawaitable(answer)}

        async def together() -> list[object]:
            return await asyncio.gather(*waiting.values(), return_exceptions=True)

        if waiting:
            answers |= zip(waiting, self._loop.run(together()), strict=True)
        return answers

    def _numbers(self, name: str, rewards: object, arguments: dict[str, list], completions: list[str]) -> list[float]:
        """A function's answer as one number per completion, NaN for None."""
        if isinstance(rewards, Exception):
            raise ValueError(
                f"reward {name!r} raised {type(rewards).__name__}: {rewards}; {self._failing_row(name, arguments)}. A "
                "reward function must give a number for any text a model may write. Mend the function, or return None "
                "where it has no say."
            ) from rewards
        is_list = isinstance(rewards, list | tuple) or (isinstance(rewards, Tensor) and rewards.dim() == 1)
        if not is_list or len(rewards) != len(completions):
            given = f"{len(rewards)} values" if is_list else _SHORTEN.repr(rewards)
            raise ValueError(
                f"reward {name!r} returned {given} for {len(completions)} completions: need a list with one number "
                "each, in the same order. Mend the function."
            )
        return [self._checked(name, reward, row, completions[row]) for row, reward in enumerate(rewards)]

    @staticmethod
    def _checked(name: str, reward: float | None, row: int, completion: str) -> float:
        if reward is None:
            return math.nan
        try:
            value = float(reward)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"reward {name!r} returned {_SHORTEN.repr(reward)} in row {row} for {_SHORTEN.repr(completion)}: need "
                "a finite float32 number, since one such value would spoil the whole batch. Mend the function, or "
                "return None there."
            )
        return value

    def _failing_row(self, name: str, arguments: dict[str, list]) -> str:
        """Call the function row by row to find the one it fails on, with its arguments shortened."""
        num_rows = len(arguments["completions"])
        for row in range(num_rows):
            # A column may be None as a whole: token ids that nobody gave.
            single = {key: values and [values[row]] for key, values in arguments.items()}
            if isinstance(self._answers({name: single})[name], Exception):
                shown = ", ".join(f"{key}={_SHORTEN.repr(value[0])}" for key, value in single.items() if value)
                return f"row {row} of {num_rows}: {shown}"
        return "no single row fails alone"


def _required(function: RewardFunction) -> list[str]:
    """Parameters without a default that are passed by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind in by_name and p.default is p.empty]


def make_scorer(
    available: dict[str, RewardFunction],
    default_weights: dict[str, float],
    *,
    names: list[str] | None,
    weights: list[float] | None,
    conversational: bool = False,
    max_tokens_per_microbatch: int = 16384,
) -> Scorer:
    """Choose rewards: the task's by name, functions from files, and reward models.

    Args:
        available: the task's reward functions.
        default_weights: the task's weights.
        names: the setting `rewards`: names of the task's functions, file.py:function, folders or hub ids of reward
            models; None: all of the task's.
        weights: the setting `reward_weights`; None: the task's weights, 1 for what is not the task's.
        conversational: functions from files get chat messages, not text.
        max_tokens_per_microbatch: padded tokens per forward pass of a reward model.

    Returns:
        The scorer; its reward models are not loaded.

    Raises:
        ValueError: for a name that is none of these, for a file or function that is not there, and for a model that
            gives no single score.
    """
    if names is None:
        return Scorer(available, default_weights)
    functions, own = {}, set()
    for name in names:
        if name in available:
            functions[name] = available[name]
        elif ":" in name:
            own.add(name.rpartition(":")[2])
            functions[name.rpartition(":")[2]] = load_reward(name)
        elif Path(name).is_dir() or ("/" in name and not name.endswith(".py")):
            model = RewardModel(name, max_tokens_per_microbatch=max_tokens_per_microbatch)
            functions[model.name] = model
        else:
            raise ValueError(
                f"rewards={name!r}: the task has {', '.join(available)}. Pass --rewards with one of these, with "
                "file.py:function for your own, or with the folder or hub id of a reward model."
            )
    if len(functions) != len(names):
        raise ValueError(f"rewards={names}: two rewards have the same name. Pass --rewards with distinct names.")
    chosen = weights or [default_weights.get(name, 1.0) for name in functions]
    return Scorer(functions, dict(zip(functions, chosen, strict=True)), conversational=own if conversational else ())


def load_reward(where: str) -> RewardFunction:
    """Load a user's reward function.

    Args:
        where: file.py:function.

    Returns:
        The function.

    Raises:
        ValueError: if there is no such file, or no such function in it.
    """
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(
            f"rewards={where!r}: there is no file {file}, or it does not end in .py. Pass --rewards "
            "path/to/file.py:function."
        )
    # Registered, since a dataclass in the file looks its own module up, and under a name that hides no other module.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file may raise
        raise ValueError(
            f"rewards={where!r}: {file} cannot be imported: {type(error).__name__}: {error}. Mend the file."
        ) from error
    if not callable(vars(module).get(name)):
        raise ValueError(
            f"rewards={where!r}: {file} defines no function {name!r}. Pass the name of a function in it: "
            f"{', '.join(key for key, value in vars(module).items() if callable(value) and not key.startswith('_'))}."
        )
    return vars(module)[name]
