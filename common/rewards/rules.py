"""Rules: reward functions that score each row by itself, and so run in a worker with limits (worker.py).

The mark that `@rule` sets is found on functions, partials, methods, wrappers, objects and classes alike.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial, partialmethod
from types import FunctionType, MethodType
from typing import Any, TypeVar

from torch import nn

Function = TypeVar("Function", bound=Callable)

# The attribute that marks a rule. Unlike a list of rules it needs no hash, and pickles and copies keep it.
_MARK = "_scores_each_row_by_itself"
_WARM_UP = "_is_warmed_up_by"


def rule(function: Function) -> Function:
    """Mark a reward function that scores each row by itself, so that it runs in a worker with limits.

    It must accept any number of rows, keep no state between calls, and not use the device.

    Args:
        function: with the signature of a reward function. Any callable: a function, a partial, a method, which is
            then a rule of every object of its class, an object with `__call__`, or the class of such objects.

    Returns:
        The function.

    Raises:
        ValueError: if it is asynchronous, or cannot be marked.
    """
    code = function.__func__ if isinstance(function, MethodType | staticmethod | classmethod) else function
    refuse_asynchronous(code)
    try:
        if isinstance(code, type):
            setattr(code, _MARK, True)
        else:
            object.__setattr__(code, _MARK, True)  # also on an object whose class is frozen
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"@rule on {name_of(function)}: a {type(code).__name__} has no room for the mark, so it would run without "
            "limits. Put @rule on its class, or on a function that calls it."
        ) from error
    return function


def warmed_up_by(call: Callable[[], object]) -> Callable[[Function], Function]:
    """Have a function called once in the keeper, so that no row pays for what a rule's first call loads and caches.

    Args:
        call: called without limits, only in runs that use the rule; what it raises is ignored.

    Returns:
        A decorator of a rule.
    """

    def decorate(function: Function) -> Function:
        setattr(function, _WARM_UP, call)
        return function

    return decorate


def is_rule(function: Callable) -> bool:
    """Whether a callable is marked as a rule, or what it calls is.

    That is the function of a partial, of a method or of a wrapper by functools.wraps, and the class and the `__call__`
    of an object (of a module of torch also `forward`), in any class it inherits from: one that it overrides is what it
    extends.
    """
    return any(inspect.getattr_static(part, _MARK, False) is True for part in _parts(function, []))


def _parts(function: Any, seen: list) -> Iterator[Any]:
    """A callable, and what it calls."""
    if any(function is part for part in seen):
        return
    seen.append(function)
    yield function
    inner = [inspect.getattr_static(function, "__wrapped__", None), _partialmethod_of(function)]
    if isinstance(function, partial | partialmethod):
        inner.append(function.func)
    elif isinstance(function, MethodType | staticmethod | classmethod):
        inner.append(function.__func__)
    elif not isinstance(function, type):
        inner += [vars(base).get(name) for name in _called(function) for base in type(function).__mro__]
    for part in inner:
        if part is not None:
            yield from _parts(part, seen)


def _called(function: Any) -> tuple[str, ...]:
    """Names of the methods that run when an object is called."""
    return ("__call__", "forward") if isinstance(function, nn.Module) else ("__call__",)


def _partialmethod_of(function: Any) -> partialmethod | None:
    """The partialmethod of a class that made this method of an object."""
    for name in ("_partialmethod", "__partialmethod__"):  # until Python 3.12, and from 3.13 on
        made_by = inspect.getattr_static(function, name, None)
        if isinstance(made_by, partialmethod):
            return made_by
    # A partial with the attribute __self__ was made for a plain function, and only its class knows by which one.
    owner = vars(function).get("__self__") if isinstance(function, partial) else None
    for base in (owner if isinstance(owner, type) else type(owner)).__mro__:
        for value in vars(base).values():
            if isinstance(value, partialmethod) and _fills_in(value) == _fills_in(function):
                return value
    return None


def _fills_in(function: partial | partialmethod) -> tuple:
    """What is called with which arguments, by identity: arguments may be of any type."""
    code = (
        function.func.__func__ if isinstance(function.func, MethodType | staticmethod | classmethod) else function.func
    )
    return id(code), [*map(id, function.args)], {name: id(value) for name, value in function.keywords.items()}


def refuse_asynchronous(function: Callable) -> None:
    """Refuse a rule that gives something to wait for.

    A wrapper is not refused for what it wraps, since it may wait for it.

    Raises:
        ValueError: if what runs first when it is called, is asynchronous.
    """
    code, seen = function, []
    while code is not None and not any(code is part for part in seen):
        seen.append(code)
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise ValueError(
                f"@rule on, or inside, the asynchronous {name_of(function)}: rules only compute, under a time limit; "
                "functions that wait for something else run in the training process. Leave out @rule."
            )
        code = _runs(code)


def _runs(function: Any) -> Any:
    """What a callable calls first; for a class, what its objects call."""
    if isinstance(function, partial | partialmethod):
        return function.func
    if isinstance(function, MethodType | staticmethod | classmethod):
        return function.__func__
    if isinstance(function, FunctionType):
        return _partialmethod_of(function)
    owner = function if isinstance(function, type) else type(function)
    name = "forward" if issubclass(owner, nn.Module) else "__call__"
    return inspect.getattr_static(owner, name, None)


def name_of(function: Callable) -> str:
    """A name for messages: of the function inside a partial, and of the class of an object."""
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def warm_up(functions: Iterable[Callable]) -> None:
    """Call what warms rules up, once each; what it raises is ignored: a row that needs the same shows the error."""
    parts = [part for function in functions for part in _parts(function, [])]
    calls = [inspect.getattr_static(part, _WARM_UP, None) for part in parts]
    for call in {id(call): call for call in calls if call is not None}.values():
        with contextlib.suppress(Exception):
            call()
