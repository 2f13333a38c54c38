"""What a reward function returned, as numbers: of Python, numpy, torch or pandas, but never text."""

import math
from collections import UserString
from typing import Any

import numpy as np
from torch import Tensor

# Kinds of numpy's types that are no real numbers although they can be converted: complex, bytes, text, dates, spans.
_NO_NUMBERS = "cSUMm"
# A standard deviation sums the squares of a batch's scores: for a million scores of 1e15 that is 1e36, still below the
# 3.4e38 of float32. No larger score is meant: next to 1e15, float32 does not see a difference of 1e7.
LARGEST = 1e15


def values_of(rewards: Any) -> list | None:
    """The values of a list, tuple, or anything with one dimension: a tensor, an array, a pandas Series; else None."""
    if isinstance(rewards, list | tuple):
        return list(rewards)
    shape = getattr(rewards, "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 1:
        return None
    if isinstance(rewards, Tensor):
        rewards = rewards.detach().cpu()  # one copy from the device, not one per value
    return list(rewards)


def number_of(reward: Any) -> float:
    """A reward as a number; NaN for None, which means that the function does not apply.

    Args:
        reward: a bool or real number of any library, or a tensor or array that holds one.

    Raises:
        TypeError: if it is no number, not finite, or larger than LARGEST.
    """
    if reward is None:
        return math.nan
    try:
        value = _float(reward)
    except Exception:  # an object may raise anything
        value = math.nan
    if not abs(value) <= LARGEST:
        raise TypeError(f"not a finite number of at most {LARGEST:g} in size")
    return value


def _float(reward: Any) -> float:
    """The real number; NaN if it is none."""
    if isinstance(reward, np.ndarray | np.generic):
        # A masked value would be the number below the mask.
        if np.ma.is_masked(reward) or reward.dtype.kind in _NO_NUMBERS:
            return math.nan
        reward = reward.item()  # raises for several
    elif isinstance(reward, Tensor):
        reward = reward.item()
    # Most text has neither of these methods, but float() would read a number from it.
    is_number = hasattr(type(reward), "__float__") or hasattr(type(reward), "__index__")
    return float(reward) if is_number and not isinstance(reward, str | bytes | UserString) else math.nan
