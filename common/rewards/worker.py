"""Rules run in another process, with a hard limit on time and memory per row, whatever text a model wrote.

A keeper process (keeper.py) is forked during set-up, before models are loaded. It warms the rules up, forks the worker
(answers.py), and replaces it when a row takes too long or ends it. So a hanging regular expression, an endless
comparison or a crash in a C library costs one row its score, but does not end the run. This guards against accidents,
not against attackers: a rule may pass no text of a model to an interpreter, except numerals of bounded length.
"""

import logging
import mmap
import os
import pickle
import signal
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from common.processes import describe_end, end_sessions, fork, wait_for_end
from common.rewards.answers import DEFAULT_LIMITS, Limits, RowAnswer, receive
from common.rewards.copies import Arguments, refuse_unpickled
from common.rewards.keeper import END, Reply, describe_failure, keep
from common.rewards.prints import flush, show
from common.rewards.rules import refuse_asynchronous

logger = logging.getLogger("nanorlhf")

__all__ = ["DEFAULT_LIMITS", "Limits", "RowAnswer", "RuleWorker"]

# It kills what rules have started, which takes milliseconds, before it ends.
_SECONDS_TO_END = 10.0


class RuleWorker:
    """Functions that score each row by itself, run in another process.

    Args:
        functions: by name; with the signature of a reward function.
        limits: for each row.

    Raises:
        ValueError: if a function is asynchronous, or no process can be started for them, with the limit that is in
            the way.
    """

    def __init__(self, functions: dict[str, Callable], limits: Limits) -> None:
        for function in functions.values():
            refuse_asynchronous(function)
        self._functions = functions
        self._limits = limits
        self._interrupted = False
        try:
            self._start()
        except (EOFError, ConnectionError):
            self._refuse(f"it was killed at once ({describe_end(self._stop())})")

    def __call__(self, name: str, arguments: Arguments, extra: dict[str, Any] | None = None) -> list[RowAnswer]:
        """Score rows. What the function prints is printed here, before this returns.

        Args:
            name: of the function.
            arguments: the function's arguments, each a list of B values or None; it is called with one row at a time.
            extra: arguments that are the same for every row.

        Returns:
            B answers; fewer if a row raises, which is then the last.

        Raises:
            ValueError: if an argument cannot be pickled; if no process can be started that scores; if the keeper is
                killed twice, for example because the machine is out of memory.
        """
        try:
            request = pickle.dumps((name, arguments, extra or {}))
        except Exception as error:  # an object may raise anything
            refuse_unpickled(arguments, error)
        if self._interrupted:  # the answers to another request are still to come
            self._stop()
            self._start()
        self._interrupted = True
        for _ in range(2):
            try:
                self._connection.send_bytes(request)
                reply: Reply = receive(self._connection)
            except (EOFError, ConnectionError):
                self._restart()
                continue
            self._interrupted = False
            show(reply.printed, name)
            if reply.unread:
                refuse_unpickled(arguments, reply.unread)
            if reply.failure:
                self._refuse(reply.failure)
            return reply.answers
        raise ValueError(
            f"the process that scores {name!r} was killed twice in a row: the machine, or the container, is probably "
            "out of memory. Free memory and start again: the run continues from its last checkpoint."
        )

    def _restart(self) -> None:
        """Replace a keeper that was killed, and say so."""
        logger.warning(
            "the process that starts rules ended (%s), and another takes its place: it scores the same rows again, so "
            "no score changes. If nobody killed it, the machine is probably short of memory.",
            describe_end(self._stop()),
        )
        try:
            self._start()
        except (EOFError, ConnectionError):
            self._refuse(f"it was killed again at once ({describe_end(self._stop())})")

    def _start(self) -> None:
        flush()  # or a rule's process would print a second time what waits in this one's buffers
        training = os.getpid()
        worker = _SharedNumber()
        try:
            self._connection, keepers_end = Pipe()
            pid = fork()
        except OSError as error:
            self._refuse(describe_failure(error))
        if pid == 0:
            try:
                other = {"parent": training, "note_worker": worker.set}
                keep(keepers_end, self._connection, self._functions, self._limits, **other)
            finally:
                os._exit(1)
        keepers_end.close()
        self._stop = weakref.finalize(self, _stop, pid, worker, self._connection, training)
        if failure := receive(self._connection).failure:
            self._refuse(failure)

    def _refuse(self, reason: str) -> NoReturn:
        limits = f"reward_time_limit={self._limits.seconds:g}, reward_memory_limit={self._limits.gigabytes:g}"
        raise ValueError(
            f"the process that runs rules ({', '.join(self._functions)}) cannot start: {reason}.\n"
            f"It keeps a text from hanging or crashing the run ({limits}), and without it no completion has a score. "
            "Raise the limit that is in the way, or pass --reward_time_limit 0: rules then run in the training "
            "process, without limits."
        )


class _SharedNumber:
    """A number, 0 at first, in memory that a forked process shares."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def set(self, number: int) -> None:
        self._memory[:] = number.to_bytes(8, "little")

    def get(self) -> int:
        return int.from_bytes(self._memory[:], "little")


def _stop(keeper: int, worker: _SharedNumber, connection: Connection, owner: int) -> int:
    """End the keeper, and with it all that rules have started.

    Returns:
        Its status as of `os.waitpid`; -1 if it is unknown.
    """
    if os.getpid() != owner:  # another child of the training process exits
        return -1
    connection.close()
    status = wait_for_end(keeper, 0)
    if status is None:
        os.kill(keeper, END)
        status = wait_for_end(keeper, _SECONDS_TO_END)
    if status is None:
        os.kill(keeper, signal.SIGKILL)
        status = wait_for_end(keeper, _SECONDS_TO_END)
    if status != 0:  # it was killed, perhaps before it has ended what rules have started
        end_sessions({keeper, worker.get()} - {0})
    return -1 if status is None else status
