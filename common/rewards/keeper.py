"""The keeper: a process that starts the one that calls rules, reads its answers row by row, and replaces it.

It is forked from the training process before models are loaded. All that a rule starts descends from it, so nothing
outlives it; and it lives no longer than the training process, however that ends.
"""

import errno
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from types import FrameType
from typing import NamedTuple, NoReturn

from common.host import limits_in_force
from common.processes import (
    adopt_orphans,
    children,
    describe_end,
    end_children,
    end_with_parent,
    has_children,
    processor_clock,
    wait_for_end,
)
from common.rewards.answers import OUT_OF_MEMORY, SENT_BY_QUEUES, Limits, RowAnswer, receive, send, work
from common.rewards.copies import Arguments
from common.rewards.prints import Printed, PrintPipes, flush, open_standard_files
from common.rewards.rules import warm_up
from common.rewards.secret_variables import forget_secrets

# A row may take so many times its limit on the clock: room for a busy machine, an end for a rule that sleeps.
_CLOCK_PER_LIMIT = 10
# Less memory than this is no limit on a row, but none at all: importing a small module takes more.
_LEAST_GIGABYTES = 0.1
# A process that was forked is ready within milliseconds.
_SECONDS_TO_START = 60.0
# A process whose files are closed has nearly ended, unless its rule closed them.
_SECONDS_TO_CLOSE = 1.0

# Signals that nobody else sends: the run needs its rules no longer, and the thread that forked the keeper has ended.
END, PARENT_ENDED = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2


class Reply(NamedTuple):
    """What the keeper sends: once when it has started, and for each request.

    Attributes:
        answers: one for each row; fewer if a row raised, which is then the last.
        printed: what the rule printed, by output.
        unread: the exception as text, if an argument could be sent but not read.
        failure: why no process can score rows, which is no row's fault.
    """

    answers: list[RowAnswer]
    printed: dict[int, Printed] = {}  # noqa: RUF012  never changed
    unread: str = ""
    failure: str = ""


class _Failure(Exception):
    """No process can score rows."""


def keep(
    connection: Connection,
    other_end: Connection,
    functions: dict[str, Callable],
    limits: Limits,
    *,
    parent: int,
    note_worker: Callable[[int], None],
) -> NoReturn:
    """Answer requests until the training process ends, or says so.

    Args:
        connection: to the training process.
        other_end: that of the training process, which a fork copies.
        functions: by name.
        limits: for each row.
        parent: the training process.
        note_worker: tells it each process that is forked to call rules.
    """
    try:
        _leave_the_run(other_end, parent)
        _Keeper(connection, functions, limits, note_worker).serve()
    except (EOFError, ConnectionError):
        pass
    finally:
        _end()


def _end() -> NoReturn:
    """End this process and all that descends from it."""
    try:
        end_children()
    finally:
        os._exit(0)


def _leave_the_run(other_end: Connection, parent: int) -> None:
    """Become a process of its own, which no signal to the run's group or from its terminal disturbs."""
    os.setsid()
    for number in SENT_BY_QUEUES:
        signal.signal(number, signal.SIG_IGN)

    def end(number: int, _: FrameType | None) -> None:
        if number == END or os.getppid() != parent:
            _end()  # an exception could be swallowed by a warm-up, or printed by Python where it handles none

    signal.signal(END, end)
    signal.signal(PARENT_ENDED, end)
    end_with_parent(PARENT_ENDED)
    if os.getppid() != parent:  # it has ended just now
        _end()
    adopt_orphans()
    other_end.close()
    open_standard_files()
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115  a rule that asks a question finds nobody there
    forget_secrets()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked tokenizer has no threads and would warn about it


class _Keeper:
    def __init__(
        self,
        connection: Connection,
        functions: dict[str, Callable],
        limits: Limits,
        note_worker: Callable[[int], None],
    ) -> None:
        self._connection, self._functions, self._limits = connection, functions, limits
        self._note_worker = note_worker
        self._worker: _Worker | None = None
        self._helpers: set[int] = set()  # programs that a warm-up started, for all rows
        self._pipes: PrintPipes | None = None

    def serve(self) -> None:
        """Answer requests until there are no more."""
        send(self._connection, self._try(self._check))
        warm_up(self._functions.values())
        flush()  # what it printed
        if has_children():
            self._helpers = children()
        self._try(self._start)  # now rather than in the first step; a failure comes again there
        while True:
            try:
                name, arguments, extra = receive(self._connection)
            except (EOFError, ConnectionError):
                return
            except Exception as error:  # an object may be pickled, and raise anything when it is read
                send(self._connection, Reply([], unread=f"{type(error).__name__}: {error}"))
                continue
            reply = self._try(partial(self._answers, name, (arguments, extra)))
            if reply.failure and self._worker:
                self._replace()  # it may still be at a row of this request
            send(self._connection, reply)

    def _try(self, action: Callable[[], list[RowAnswer] | None]) -> Reply:
        try:
            answers, failure = action() or [], ""
        except Exception as error:  # such as that of an argument that can be pickled only once
            answers, failure = [], describe_failure(error)
        return Reply(answers, self._pipes.take() if self._pipes else {}, failure=failure)

    def _check(self) -> None:
        """Start a process as that of every row, and end it."""
        self._pipes = PrintPipes()
        self._start()
        self._replace()

    def _start(self) -> None:
        start = partial(_Worker, self._functions, self._limits, self._pipes, self._connection)
        try:
            self._worker = start()
        except _Failure:  # perhaps by a signal from outside
            self._worker = start()
        self._note_worker(self._worker.pid)

    def _replace(self) -> None:
        """End the process and all that it started; the next is started when there is a row for it."""
        self._worker.end()
        if has_children():
            end_children(spared=self._helpers)
        self._pipes.read()  # the last words
        self._worker = None

    def _answers(self, name: str, arguments: tuple[Arguments, dict]) -> list[RowAnswer]:
        num_rows = max((len(values) for values in arguments[0].values() if values), default=0)
        answers: list[RowAnswer] = []
        again = -1  # the row that is scored a second time
        while len(answers) < num_rows and not (answers and answers[-1].error):
            if self._worker and self._worker.has_ended():  # between two calls, which is no row's fault
                self._replace()
            if not self._worker:
                self._start()
            answers += self._worker.answers(name, arguments, range(len(answers), num_rows))
            if not self._worker.alive:
                by_queue = self._worker.ended_by_queue
                self._replace()
                if by_queue and again != len(answers) - 1:
                    again = len(answers) - 1
                    answers.pop()
        return answers


def describe_failure(error: Exception) -> str:
    """Why no process can score rows, with the limit that is the likely cause, and what to do."""
    reasons = {
        errno.EAGAIN: "no more processes may be started (ulimit -u, or the container's limit on pids)",
        errno.EMFILE: "no more files may be opened (ulimit -n)",
        errno.ENFILE: "no more files may be opened on this machine",
        errno.ENOMEM: "there is no memory for it (ulimit -v, or the machine's)",
    }
    if isinstance(error, MemoryError):
        reason = reasons[errno.ENOMEM]
    elif isinstance(error, OSError):
        reason = reasons.get(error.errno, str(error))
    else:
        reason = str(error) if isinstance(error, _Failure) else f"{type(error).__name__}: {error}"
    return f"{reason}. Limits in force: {limits_in_force()}"


class _Worker:
    """The process that calls the functions. It is reused until a row ends it, so that caches stay warm.

    Raises:
        OSError: if it cannot be forked.
        _Failure: if it does not get ready.
    """

    def __init__(
        self, functions: dict[str, Callable], limits: Limits, pipes: PrintPipes, to_training: Connection
    ) -> None:
        self.alive, self.ended_by_queue = True, False
        self._limits, self._pipes = limits, pipes
        self._connection, child_end = multiprocessing.Pipe()
        try:
            self.pid = os.fork()
        except OSError:
            self._connection.close()
            child_end.close()
            raise
        if self.pid == 0:
            try:
                self._connection.close()
                to_training.close()  # the training process shall notice if the keeper ends
                work(child_end, functions, limits, pipes)
            finally:
                os._exit(1)
        child_end.close()
        self._status: int | None = None
        self._poll = select.poll()
        self._poll.register(self._connection.fileno(), select.POLLIN)
        pipes.register(self._poll)
        self._room = self._wait_until_ready()
        self._clock = processor_clock(self.pid)

    def _wait_until_ready(self) -> float:
        """The gigabytes that a row may take."""
        try:
            if not self._connection.poll(_SECONDS_TO_START):
                raise _Failure(f"it did not start within {_SECONDS_TO_START:g} s")
            room = receive(self._connection)
        except (EOFError, ConnectionError):
            room = self._describe_end()
        if isinstance(room, float) and room >= min(_LEAST_GIGABYTES, self._limits.gigabytes):
            return room
        self.end()
        if isinstance(room, float):
            room = f"ulimit -v leaves it {max(room, 0):.2f} GB of memory"
        raise _Failure(room)

    def answers(self, name: str, arguments: tuple[Arguments, dict], rows: range) -> Iterator[RowAnswer]:
        """Score rows until one raises or ends the process."""
        send(self._connection, (name, *arguments, rows))
        for _ in rows:
            answer = self._next_answer()
            yield answer
            if answer.over_limit:
                self.alive = False
            if answer.over_limit or answer.error:
                return

    def _next_answer(self) -> RowAnswer:
        begun = time.monotonic()
        cause = self._wait()
        if not cause:
            try:
                return receive(self._connection)
            except (EOFError, ConnectionError):  # out of memory, or crashed
                cause = self._describe_end()
        return RowAnswer(over_limit=True, cause=cause, seconds=time.monotonic() - begun)

    def _wait(self) -> str:
        """Wait for the next answer, or the end of the process; which limit was reached first, empty for none."""
        limit = self._limits.seconds
        begun, last = time.clock_gettime(self._clock), time.monotonic() + _CLOCK_PER_LIMIT * limit
        left = limit
        while left > 0:
            # A share of the limit at least, or the last microseconds on a busy machine would be waited for one by one.
            ready = self._poll.poll(1000 * max(left, limit / 20))
            if len(ready) > 1 or (ready and ready[0][0] != self._connection.fileno()):
                self._pipes.read()
            if any(number == self._connection.fileno() for number, _ in ready):
                return ""
            used, clock_left = time.clock_gettime(self._clock) - begun, last - time.monotonic()
            left = min(limit - used, clock_left)
        if used >= limit:
            return f"more than {limit:g} s of processor time"
        return f"more than {_CLOCK_PER_LIMIT * limit:g} s on the clock"

    def _describe_end(self) -> str:
        self._status = wait_for_end(self.pid, _SECONDS_TO_CLOSE)
        if self._status is None:
            return "it closed the file that its answers go into"
        self.ended_by_queue = os.WIFSIGNALED(self._status) and os.WTERMSIG(self._status) in SENT_BY_QUEUES
        if os.WIFEXITED(self._status) and os.WEXITSTATUS(self._status) == OUT_OF_MEMORY:
            return f"more than {self._room:.2g} GB of memory"
        return describe_end(self._status)

    def has_ended(self) -> bool:
        """Whether the process has ended by itself."""
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if ended else None
        return self._status is not None

    def end(self) -> None:
        """Kill and reap the process."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)
            _, self._status = os.waitpid(self.pid, 0)
        self._connection.close()
