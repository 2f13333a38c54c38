"""The process that calls rules: one row at a time, within limits, whatever text a model wrote.

Whatever a rule raises or returns is an answer. What ends the process is the keeper's business (keeper.py).
"""

import math
import os
import pickle
import reprlib
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from common.processes import adopt_orphans, end_children, end_with_parent, has_children, limit_memory
from common.rewards.copies import Arguments, own_arguments
from common.rewards.prints import PrintPipes, flush
from common.rewards.values import number_of, values_of
from common.signals import ENDING

# Of what a rule returned, in a message. It shows an object whose own repr raises by its type.
_SHORTEN = reprlib.Repr()
_SHORTEN.maxstring = _SHORTEN.maxother = 80
_MOST_OF_ERROR = 10_000  # characters of what a rule raised that are passed on; a message shows fewer

OUT_OF_MEMORY = 77  # exit status

# What a queueing system may send to all processes of a job.
SENT_BY_QUEUES = (*ENDING, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a rule may use for one row.

    Attributes:
        seconds: processor time, so that a busy machine costs no row its score. On the clock, a row may take ten times
            as long: that ends one that sleeps or waits. Never less on the clock, however many threads it has.
        gigabytes: memory beyond what the process uses when the first row begins; less where `ulimit -v` leaves less.
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
        cause: which of these, for a message.
        seconds: on the clock, if it was over a limit.
    """

    reward: float = math.nan
    error: str | None = None
    over_limit: bool = False
    cause: str = ""
    seconds: float = 0.0


class Lost(NamedTuple):
    """Rows of one rule that were over a limit; those of several calls add up.

    Attributes:
        rows: how many.
        of: of so many.
        seconds: that they took, on the clock.
        cause: which limit the last one was over; empty if none was.
    """

    rows: int = 0
    of: int = 0
    seconds: float = 0.0
    cause: str = ""

    def plus(self, other: "Lost") -> "Lost":
        """Both together."""
        numbers = (self.rows + other.rows, self.of + other.of, self.seconds + other.seconds)
        return Lost(*numbers, other.cause or self.cause)

    @classmethod
    def among(cls, answers: Sequence[RowAnswer]) -> "Lost":
        """Those of one call."""
        lost = [answer for answer in answers if answer.over_limit]
        return cls(len(lost), len(answers), sum(row.seconds for row in lost), lost[-1].cause if lost else "")


def send(connection: Connection, content: Any) -> None:
    """Send an object.

    Not by connection.send: torch makes it share the memory of each tensor, a file and a thread for one number.
    """
    connection.send_bytes(pickle.dumps(content))


def receive(connection: Connection) -> Any:
    """The next object that was sent.

    Raises:
        EOFError: if the other side has ended; like ConnectionError.
    """
    return pickle.loads(connection.recv_bytes())


def work(connection: Connection, functions: dict[str, Callable], limits: Limits, pipes: PrintPipes) -> None:
    """Score rows until there are no more; in a process of its own, which this function ends.

    It sends the gigabytes that a row may take, or why it cannot begin, and then an answer for each row.
    """
    try:
        try:
            room = _prepare(limits, pipes)
        except (OSError, ValueError) as error:
            send(connection, str(error))
            return
        send(connection, room)
        _answer_requests(connection, functions)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    finally:
        os._exit(0)


def _prepare(limits: Limits, pipes: PrintPipes) -> float:
    os.setsid()  # away from the terminal's Ctrl-C, and from signals to the run's group
    end_with_parent()
    adopt_orphans()
    for number in SENT_BY_QUEUES:
        signal.signal(number, signal.SIG_DFL)  # the keeper ignores them, but a rule's programs expect this
    pipes.redirect()
    return limit_memory(limits.gigabytes)


def _answer_requests(connection: Connection, functions: dict[str, Callable]) -> None:
    own_pid = os.getpid()
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            name, arguments, extra, rows = pickle.loads(request)
        except MemoryError:
            raise
        except BaseException as error:  # an object may raise anything when it is read
            send(connection, RowAnswer(error=_as_text(error)))
            continue
        for row in rows:
            answer = _answer(functions[name], arguments, extra, row)
            if os.getpid() != own_pid:  # the rule forked, and this is its child
                return
            send(connection, answer)
            if answer.error:
                break


def _answer(function: Callable, arguments: Arguments, extra: dict[str, Any], row: int) -> RowAnswer:
    try:
        single = {key: values and [values[row]] for key, values in arguments.items()}
        # Its own copy: the rows of a group arrive as references to one object.
        answer = _as_answer(function(**own_arguments(single), **extra))
    except MemoryError:
        raise
    except BaseException as error:  # a function may raise anything, such as SystemExit
        answer = RowAnswer(error=_as_text(error))
    try:
        flush()
        if has_children():  # a row's programs end with it
            end_children()
    except Exception as error:  # an alarm that the row has set
        answer = RowAnswer(error=_as_text(error))
    return answer


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
        return f"{kind}: {error}"[:_MOST_OF_ERROR]
    except BaseException as second:  # so may its __str__
        return f"{kind}, whose text cannot be shown because of another {type(second).__name__}"
