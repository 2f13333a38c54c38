"""Reward functions: the type a user writes, and the weighted sum that makes a score of several of them.

Reward models and time limits are not here yet: a rule reward runs in the training process and must be fast.
"""

import importlib.util
import math
import reprlib
import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# Long enough to recognise a prompt, short enough for an error message.
_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = 120


class RewardFunction(Protocol):
    """Score a batch of completions, by the signature of trl."""

    def __call__(self, prompts: list[str], completions: list[str], **columns: list) -> list[float | None]:
        """Score each completion.

        Args:
            prompts: the text each completion continues.
            completions: the completions, special tokens removed.
            columns: every other column of the data set, one value per completion.

        Returns:
            One finite number per completion; None where the function has no say.
        """


class Scorer:
    """The weighted sum of reward functions, each also reported raw.

    Args:
        functions: reward functions by name.
        weights: weight of each, by the same names.
    """

    def __init__(self, functions: dict[str, RewardFunction], weights: dict[str, float]) -> None:
        self.functions = functions
        self.weights = weights

    def __call__(
        self, prompts: list[str], completions: list[str], columns: dict[str, list]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score completions.

        Args:
            prompts: B strings.
            completions: B strings.
            columns: a list of B values each.

        Returns:
            scores: (B,) float32, the weighted sum over the functions that had a say.
            parts: for each function (B,) float32, raw; NaN where it had none.

        Raises:
            ValueError: if a function raises, or returns the wrong number of values or something that is no number.
        """
        parts = {
            name: torch.tensor(self._call(name, prompts, completions, columns), dtype=torch.float32)
            for name in self.functions
        }
        weighted = [self.weights[name] * torch.nan_to_num(part, nan=0.0) for name, part in parts.items()]
        return torch.stack(weighted).sum(0), parts

    def _call(self, name: str, prompts: list[str], completions: list[str], columns: dict[str, list]) -> list[float]:
        function = self.functions[name]
        try:
            rewards = function(prompts=prompts, completions=completions, **columns)
        except Exception as error:  # whatever the user's function may raise
            row = self._failing_row(function, prompts, completions, columns)
            raise ValueError(
                f"reward {name!r} raised {type(error).__name__}: {error}; {row}. A reward function must give a number "
                "for any text a model may write. Mend the function, or return None where it has no say."
            ) from error
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

    @staticmethod
    def _failing_row(
        function: RewardFunction, prompts: list[str], completions: list[str], columns: dict[str, list]
    ) -> str:
        """Call the function row by row to find the one it fails on, with its arguments shortened."""
        for row in range(len(prompts)):
            arguments = {name: [values[row]] for name, values in columns.items()}
            arguments |= {"prompts": [prompts[row]], "completions": [completions[row]]}
            try:
                function(**arguments)
            except Exception:  # the row that was looked for
                shown = ", ".join(f"{name}={_SHORTEN.repr(value[0])}" for name, value in arguments.items())
                return f"row {row} of {len(prompts)}: {shown}"
        return "no single row fails alone"


def make_scorer(
    available: dict[str, RewardFunction],
    default_weights: dict[str, float],
    *,
    names: list[str] | None,
    weights: list[float] | None,
) -> Scorer:
    """Choose reward functions by name or file.

    Args:
        available: the task's reward functions.
        default_weights: the task's weights.
        names: the setting `rewards`: names of the task's functions or file.py:function; None: all of the task's.
        weights: the setting `reward_weights`; None: the task's weights, 1 for a function from a file.

    Returns:
        The scorer.

    Raises:
        ValueError: for a name the task does not have, and for a file or function that is not there.
    """
    if names is None:
        return Scorer(available, default_weights)
    functions = {}
    for name in names:
        if ":" in name:
            functions[name.rpartition(":")[2]] = load_reward(name)
        elif name in available:
            functions[name] = available[name]
        else:
            raise ValueError(
                f"rewards={name!r}: the task has {', '.join(available)}. Pass --rewards with one of these, or with "
                "file.py:function for your own."
            )
    if len(functions) != len(names):
        raise ValueError(f"rewards={names}: two rewards have the same name. Pass --rewards with distinct names.")
    chosen = weights or [default_weights.get(name, 1.0) for name in functions]
    return Scorer(functions, dict(zip(functions, chosen, strict=True)))


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
