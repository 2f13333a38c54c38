"""Rules run in another process, with a hard limit on time and memory per row, whatever text a model wrote.

A keeper process is forked during set-up, before models are loaded. It warms the rules up, forks the worker, reads its
answers row by row, and replaces it when a row takes too long or kills it. So a hanging regular expression, an endless
comparison or a crash in a C library costs one row its score, but does not end the run. This guards against accidents,
not against attackers: no rule may pass a model's text to an interpreter.
"""

import contextlib
import ctypes
import inspect
import math
import multiprocessing
import os
import pickle
import reprlib
import resource
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, partialmethod
from multiprocessing.connection import Connection
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

from torch import nn

from common.rewards.copies import Arguments, own_arguments, refuse_unpickled
from common.rewards.values import number_of, values_of
from common.signals import hear_no_signal

Function = TypeVar("Function", bound=Callable)

_PR_SET_PDEATHSIG = 1  # prctl(2)
_FORK = multiprocessing.get_context("fork")  # functions need not be picklable, and keep their caches

# The attribute that marks a rule. Unlike a list of rules it needs no hash, and pickles and copies keep it.
_MARK = "_scores_each_row_by_itself"
_WARM_UP = "_is_warmed_up_by"

# Of what a rule returned, in a message. It shows an object whose own repr raises by its type.
_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = 80

# A row may take so many times its limit on the clock: room for a busy machine, an end for a rule that sleeps.
_CLOCK_PER_LIMIT = 10


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


def warmed_up_by(warm_up: Callable[[], object]) -> Callable[[Function], Function]:
    """Have a function called once in the keeper, so that no row pays for what a rule's first call loads and caches.

    Args:
        warm_up: called without limits, only in runs that use the rule; what it raises is ignored.

    Returns:
        A decorator of a rule.
    """

    def decorate(function: Function) -> Function:
        setattr(function, _WARM_UP, warm_up)
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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a rule may use for one row.

    Attributes:
        seconds: processor time, so that a busy machine costs no row its score. On the clock, a row may take ten times
            as long: that ends one that sleeps or waits. Never less on the clock, however many threads it has.
        gigabytes: memory beyond what the process uses when the first row begins.
    """

    seconds: float = 1.0
    gigabytes: float = 2.0


DEFAULT_LIMITS = Limits()


class RowAnswer(NamedTuple):
    """The result of one row.

    Attributes:
        reward: the number that the function returned for the row, NaN for None; NaN too if it raised or was over a
            limit.
        error: the exception as text; None without one.
        over_limit: it took too long, too much memory, or the process died.
    """

    reward: float = math.nan
    error: str | None = None
    over_limit: bool = False


class RuleWorker:
    """Functions that score each row by itself, run in another process.

    Args:
        functions: by name; with the signature of a reward function.
        limits: for each row.

    Raises:
        ValueError: if a function is asynchronous.
    """

    def __init__(self, functions: dict[str, Callable], limits: Limits) -> None:
        for function in functions.values():
            refuse_asynchronous(function)
        self._functions = functions
        self._limits = limits
        self._start()

    def __call__(self, name: str, arguments: Arguments, extra: dict[str, Any] | None = None) -> list[RowAnswer]:
        """Score rows.

        Args:
            name: of the function.
            arguments: the function's arguments, each a list of B values or None; it is called with one row at a time.
            extra: arguments that are the same for every row.

        Returns:
            B answers; fewer if a row raises, which is then the last.

        Raises:
            ValueError: if an argument cannot be pickled.
            RuntimeError: if the keeper is killed twice, for example because the machine is out of memory.
        """
        try:
            request = pickle.dumps((name, arguments, extra or {}))
        except Exception as error:  # an object may raise anything
            refuse_unpickled(arguments, error)
        for _ in range(2):
            try:
                self._connection.send_bytes(request)
                answers = _receive(self._connection)
                if isinstance(answers, str):
                    refuse_unpickled(arguments, answers)
                return answers
            except (EOFError, ConnectionError):  # the keeper was killed
                self._stop()
                self._start()
        raise RuntimeError(
            f"the process that scores {name!r} was killed twice in a row: the machine is probably out of memory. Free "
            "memory and start again: the run continues from its last checkpoint."
        )

    def _start(self) -> None:
        self._connection, child_end = _FORK.Pipe()
        keeper = _FORK.Process(target=_keep, args=(child_end, self._functions, self._limits), daemon=True)
        with warnings.catch_warnings():
            # Python warns that another thread may hold a lock at the fork; rules use no lock of the training process.
            warnings.simplefilter("ignore", DeprecationWarning)
            keeper.start()
        child_end.close()
        self._stop = weakref.finalize(self, _stop, keeper, self._connection, os.getpid())


def _stop(keeper: multiprocessing.process.BaseProcess, connection: Connection, owner: int) -> None:
    if os.getpid() == owner:  # not when another child of the training process exits
        connection.close()
        keeper.kill()
        keeper.join()


def _send(connection: Connection, content: Any) -> None:
    # Not connection.send: torch makes it share the memory of each tensor, a file and a thread for one number.
    connection.send_bytes(pickle.dumps(content))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


# In the keeper


def _keep(connection: Connection, functions: dict[str, Callable], limits: Limits) -> None:
    _die_with_parent()
    hear_no_signal()  # the training process answers them, needs this one's scores meanwhile, and ends it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked tokenizer has no threads and would warn about it
    _warm_up(functions)
    worker = _Worker(functions, limits)
    while True:
        try:
            name, arguments, extra = _receive(connection)
        except (EOFError, ConnectionError):
            return
        except Exception as error:  # an object may be pickled, and raise anything when it is read
            _send(connection, _as_text(error))
            continue
        num_rows = max((len(values) for values in arguments.values() if values), default=0)
        answers: list[RowAnswer] = []
        while len(answers) < num_rows and not (answers and answers[-1].error):
            if not worker.alive:
                worker = _Worker(functions, limits)
            answers += worker.answers(name, (arguments, extra), range(len(answers), num_rows))
        _send(connection, answers)


def _warm_up(functions: dict[str, Callable]) -> None:
    """Call what warms the rules up, once each; every worker is forked with what it leaves."""
    parts = [part for function in functions.values() for part in _parts(function, [])]
    calls = [inspect.getattr_static(part, _WARM_UP, None) for part in parts]
    for warm_up in {id(call): call for call in calls if call is not None}.values():
        with contextlib.suppress(Exception):  # a row that needs the same shows the error
            warm_up()


class _Worker:
    """The process that calls the functions. It is reused until a row kills it, so that caches stay warm."""

    def __init__(self, functions: dict[str, Callable], limits: Limits) -> None:
        self.alive = True
        self._limits = limits
        self._connection, child_end = _FORK.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._connection.close()
            _work(child_end, functions, limits)
        child_end.close()
        self._clock = _processor_clock(self._pid)

    def answers(self, name: str, arguments: tuple[Arguments, dict], rows: range) -> Iterator[RowAnswer]:
        """Score rows until one raises or kills the worker."""
        _send(self._connection, (name, *arguments, rows))
        for _ in rows:
            try:
                answer = _receive(self._connection) if self._in_time() else RowAnswer(over_limit=True)
            except (EOFError, ConnectionError):  # out of memory, or crashed
                answer = RowAnswer(over_limit=True)
            yield answer
            if answer.over_limit:
                self._end()
            if answer.over_limit or answer.error:
                return

    def _in_time(self) -> bool:
        """Wait for the next answer; whether it comes within the limit."""
        limit = self._limits.seconds
        begun, last = time.clock_gettime(self._clock), time.monotonic() + _CLOCK_PER_LIMIT * limit
        left = limit
        while left > 0:
            # A share of the limit at least, or the last microseconds on a busy machine would be waited for one by one.
            if self._connection.poll(max(left, limit / 20)):
                return True
            left = min(limit - (time.clock_gettime(self._clock) - begun), last - time.monotonic())
        return False

    def _end(self) -> None:
        self.alive = False
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._connection.close()


def _processor_clock(pid: int) -> int:
    """The clock of the processor time that a process and its threads have used."""
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return clock.value


# In the worker


def _work(connection: Connection, functions: dict[str, Callable], limits: Limits) -> None:
    """Score rows until there are no more; exit silently when out of memory."""
    try:
        _die_with_parent()
        _limit_memory(limits.gigabytes)
        while True:
            name, arguments, extra, rows = _receive(connection)
            for row in rows:
                single = {key: values and [values[row]] for key, values in arguments.items()}
                answer = _answer(functions[name], single, extra)
                _send(connection, answer)
                if answer.error:
                    break
    finally:
        os._exit(0)


def _answer(function: Callable, arguments: Arguments, extra: dict[str, Any]) -> RowAnswer:
    try:
        # Its own copy: the rows of a group arrive as references to one object.
        return _as_answer(function(**own_arguments(arguments), **extra))
    except MemoryError:
        raise
    except BaseException as error:  # a function may raise anything, such as SystemExit
        return RowAnswer(error=_as_text(error))


def _as_answer(rewards: Any) -> RowAnswer:
    values = values_of(rewards)
    if values is None or len(values) != 1:
        raise TypeError(f"returned {_SHORTEN.repr(rewards)} for 1 completion, not a list with one number")
    try:
        return RowAnswer(reward=number_of(values[0]))
    except TypeError as error:
        raise TypeError(f"returned {_SHORTEN.repr(values[0])} for 1 completion, {error}") from error


def _as_text(error: BaseException) -> str:
    kind = type(error).__name__
    try:
        return f"{kind}: {error}"
    except MemoryError:
        raise
    except BaseException as second:  # so may its __str__
        return f"{kind}, whose text cannot be shown because of another {type(second).__name__}"


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent ends, for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_memory(gigabytes: float) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gigabytes * 1e9),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
