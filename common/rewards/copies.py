"""Arguments of a reward function that are its own: whatever it does to them, nobody else sees it.

The rows of a group share one row of the data set, and so do all functions and all epochs. A function that consumes a
list would leave it consumed for all of them.
"""

import pickle
from copy import deepcopy
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NoReturn

from torch import Tensor

Arguments = dict[str, list | None]

# What cannot be changed is not copied. Exactly these types: an object of a subclass may hold something that can.
_UNCHANGEABLE = frozenset(
    {str, int, float, bool, complex, bytes, type(None), range, date, datetime, time, timedelta, Decimal, Fraction}
)


def own_copy(value: Any) -> Any:
    """A value that shares nothing changeable with the given one; the same object if it cannot be changed.

    Raises:
        Exception: whatever `deepcopy` raises for a value that cannot be copied, such as a lock.
    """
    try:
        return _copy(value)
    except RecursionError:  # it holds itself, which deepcopy can deal with
        return deepcopy(value)


def _copy(value: Any) -> Any:
    kind = type(value)
    if kind in _UNCHANGEABLE:
        return value
    # Rows of data are mostly these; deepcopy would take ten times as long for them.
    if kind is list:
        return value.copy() if _UNCHANGEABLE.issuperset(map(type, value)) else list(map(_copy, value))
    if kind is dict:
        return {key: _copy(item) for key, item in value.items()}
    if kind is tuple:
        copies = tuple(map(_copy, value))
        return value if all(map(_is, copies, value)) else copies
    if kind is MappingProxyType:  # deepcopy refuses it, though its content can be copied
        return MappingProxyType(_copy(dict(value)))
    if isinstance(value, Tensor):  # deepcopy refuses one that was computed with a gradient
        return value.clone()
    return deepcopy(value)


def _is(one: Any, other: Any) -> bool:
    return one is other


def own_arguments(arguments: Arguments) -> Arguments:
    """Arguments of one call, each row with its own copy.

    Args:
        arguments: a list of B values each, or None.

    Raises:
        ValueError: if a value cannot be copied.
    """
    return {name: values and own_values(name, values) for name, values in arguments.items()}


def own_values(name: str, values: list) -> list:
    """A copy of each value of an argument.

    Raises:
        ValueError: if one cannot be copied; names the argument and the row.
    """
    copies = []
    for row, value in enumerate(values):
        try:
            copies.append(value if type(value) in _UNCHANGEABLE else own_copy(value))
        except Exception as error:  # an object may raise anything
            raise ValueError(
                f"column {name!r}, row {row}: a {type(value).__name__} that cannot be copied ({error}). Every call "
                "of a reward function gets its own copy, so that what it changes is not changed for the rest of the "
                "run. Put plain values into the data, and open or build such objects in the function."
            ) from error
    return copies


def refuse_unpickled(arguments: Arguments, error: BaseException | str) -> NoReturn:
    """Say which value of the arguments is the reason that they cannot be sent to the process of the rules.

    Args:
        arguments: a list of B values each, or None.
        error: of all of them, for the case that each of them can be sent alone.

    Raises:
        ValueError: always; names the argument and the row.
    """
    for name, values in arguments.items():
        for row, value in enumerate(values or ()):
            try:
                pickle.loads(pickle.dumps(value))
            except Exception as own_error:  # an object may raise anything
                raise _unpickled(f"column {name!r}, row {row}", type(value).__name__, own_error) from own_error
    raise _unpickled("the data", "value", error)


def _unpickled(where: str, kind: str, error: BaseException | str) -> ValueError:
    return ValueError(
        f"{where}: a {kind} that cannot be pickled ({error}). A rule runs in another process, and gets its columns "
        "there. Put plain values into the data, and open or build such objects in the function."
    )
