"""What a run that trains does when a signal asks it to end: finish the step in hand or leave it, at most one is lost.

The weights of a step change in its update alone. Until then a step can be left, and the weights are still those of the
step before; from there on it is finished. So work that may be left runs in a window, and when the grace is over an
exception is raised there, from a handler. What is saved then is in run.py.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import distributed

from common import others
from common.signals import ENDING, Stopped, after_a_stop, is_ours_to_answer, name_of, pass_on, say

# Its default is to be ignored, so one that comes late does no harm; programs that use it are rare.
_KNOCK = signal.SIGURG
_SECONDS_BETWEEN_KNOCKS = 1.0
# Signals that arrive together are one request: `timeout` sends two, and a launcher passes on what all processes got.
_SAME_REQUEST, _SAME_FROM_LAUNCHER = 1.0, 5.0
# torchrun kills its processes 30 s after it has passed a signal on; a checkpoint must be written by then.
_LONGEST_UNDER_TORCHRUN = 20.0
# How long a process that leaves waits for others, which may be busy or gone.
_TELL, _WAIT_FOR_OTHERS, _WAIT_FOR_CHECKPOINT = 5.0, 10.0, 60.0
_LEAVE = 100  # added to a signal's number where processes agree: the step is left


class StepLeft(BaseException):
    """The step is left. No Exception: code of users and libraries that handles errors must not stop it."""


class Stopping:
    """A context in which signals ask a run to end; elsewhere than in the main thread it does nothing.

    Args:
        grace: seconds that the step in hand may take from the signal on.
        accelerator: its processes decide together.
        keeps_checkpoint: what the message says.
        process_timeout: minutes for which a process waits for another one.

    Attributes:
        is_lost: another process is gone, so that this one cannot finish anything that all take part in.
        is_ending: the last step is done, and other processes may end before this one.
        number: of the signal that came, here or in another process; None: nothing has to stop.
        together: a step is left only where processes meet, since they write their checkpoint together. In between,
            one that left could leave another in an exchange of the step.
    """

    def __init__(
        self, grace: float, accelerator: Accelerator, *, keeps_checkpoint: bool, process_timeout: float
    ) -> None:
        is_launched = "TORCHELASTIC_RUN_ID" in os.environ
        self._grace = min(grace, _LONGEST_UNDER_TORCHRUN) if is_launched else grace
        self._same = _SAME_FROM_LAUNCHER if is_launched else _SAME_REQUEST
        self._accelerator, self._keeps_checkpoint = accelerator, keeps_checkpoint
        self._timeout = timedelta(minutes=process_timeout)
        self._before: dict[int, object] = {}
        self._group: distributed.ProcessGroup | None = None
        self._update_seconds = 0.0  # of the last step; an unknown one is begun
        self.together = False
        self._reset()

    def _reset(self) -> None:
        self.number: int | None = None
        self.is_lost = self.is_ending = False
        self._came = self._deadline = 0.0
        self._window = self._agreed = False
        self._update_began: float | None = None
        self._doing = "ending"
        self._over = threading.Event()
        # Held until a signal comes; the thread waits for it. An Event could not be set by a handler that interrupts
        # another call of it, which holds its lock; a Lock is released in one step.
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._terminals: list[int] = []

    def __enter__(self) -> "Stopping":
        """Install the handlers."""
        self._reset()
        self._owner = os.getpid()
        if self._accelerator.num_processes > 1 and self._group is None:
            # Of its own, so that no half-done exchange of the step is in its way; gloo, so that no GPU waits.
            self._group = distributed.new_group(backend="gloo", timeout=self._timeout)
        if threading.current_thread() is threading.main_thread():
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            answered = dict.fromkeys(filter(is_ours_to_answer, ENDING), self._receive)
            if answered:
                # Begun here: a handler that interrupts the start of a thread cannot start one.
                threading.Thread(target=self._knock, name="grace of a stop", daemon=True).start()
                if signal.getsignal(_KNOCK) is signal.SIG_DFL:
                    answered[_KNOCK] = self._knocked
            self._before = {number: signal.signal(number, handler) for number, handler in answered.items()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """Bring the former handlers back."""
        self._window = False
        self._over.set()
        if not self.is_leaving:  # else an exchange may be under way
            self._group = None  # so that its threads end with the other groups, and not while Python ends
        for number, handler in self._before.items():
            if not self.is_lost:  # else the launcher's signal comes in what is said of it
                signal.signal(number, handler if self.number is None else after_a_stop(handler))
        if self._before and self.number is None:
            self._asleep.release()
        self._before = {}

    # ------------------------------------------------------------------------------------ what the run says it does

    def begin_step(self, step: int) -> None:
        """The step's work begins, and may be left until its update."""
        self._doing, self._window = f"finishing step {step}", True
        self._leave_if_due()

    def meet(self) -> None:
        """Where processes may have to wait for each other: the others hear of one that leaves."""
        if self._window and self._group is not None:
            self._window = False
            self._decide()
            self._window = True

    def begin_update(self) -> None:
        """The weights will change, and the step be finished, unless the update does not fit into the grace."""
        if not self._window:
            return
        self._window = False
        self._decide(needs=self._update_seconds)
        self._update_began = time.monotonic()

    def end_update(self) -> None:
        """The step's weights are there."""
        self._window = False
        if self._update_began is not None:
            self._update_seconds, self._update_began = time.monotonic() - self._update_began, None

    def leave_if_asked(self) -> None:
        """A moment at which nothing is lost.

        Raises:
            StepLeft: in all processes, if a signal came to one.
        """
        self._decide(needs=float("inf"))

    def begin_end(self) -> None:
        """The last step is done: only the final model is written, which a signal does not keep from it."""
        self._doing, self._window = "writing final/, which ends the run", False
        self.is_ending = True

    @contextmanager
    def window(self, doing: str | None = None) -> Iterator[None]:
        """Work that may be left at any moment.

        Args:
            doing: what a message says of it; None: what it said before.
        """
        self._doing, self._window = doing or self._doing, True
        try:
            self._leave_if_due()
            yield
        finally:
            self._window = False

    @property
    def is_leaving(self) -> bool:
        """Whether the main thread knows that it has to leave."""
        return self.number is not None or self.is_lost

    def is_away(self) -> bool:
        """Whether it is no fault if another process ends before this one, or the main thread knows of it."""
        return self.is_leaving or self.is_ending

    @contextmanager
    def held(self) -> Iterator[Callable[[], int]]:
        """Work that several processes can only leave together: nothing is raised inside.

        Yields:
            What this process says when they ask each other: 0, or more if it has to leave now. Where one of them says
            more, all call `leave_together` with the largest.
        """
        window, self._window = self._window, False

        def says() -> int:
            is_due = window and self.number is not None and time.monotonic() >= self._deadline
            return _LEAVE + self.number if is_due else 0

        try:
            yield says
        finally:
            self._window = window

    def leave_together(self, said: int) -> NoReturn:
        """Leave the step in all processes that share the work; they may know of no signal yet.

        Args:
            said: the largest of what they said.

        Raises:
            StepLeft: always.
        """
        if self.number is None:
            self._note(said % _LEAVE)
        raise StepLeft

    def caused(self, error: BaseException) -> bool:
        """Whether an error means that the step is left: StepLeft, or another process has left and is gone."""
        has_left = self._window and self._group is not None and self.number is not None
        if isinstance(error, StepLeft) or (has_left and isinstance(error, RuntimeError)):
            return True
        if others.means_lost(error):
            self.is_lost = True
            self._ignore_signals()
        return False

    # ------------------------------------------------------------------------------------------------------ leaving

    def tell_others(self) -> None:
        """Before this process leaves: the others learn of it at their next meeting."""
        self._window = False
        if not self._agreed and not self.is_lost:
            self._exchange(_LEAVE + self.number, seconds=_TELL)
        if self._group is not None:  # the launcher ends all when one has ended: the checkpoint must be written by then
            self._ignore_signals()

    def all_are_here(self) -> bool:
        """Wait until all processes have left, which then can write together; False: one is busy or gone."""
        if self._group is None:
            return True
        if self.is_lost:
            return False
        here = torch.tensor([1])
        try:
            distributed.all_reduce(here, group=self._group, async_op=True).wait(timedelta(seconds=_WAIT_FOR_OTHERS))
        except RuntimeError:
            return False
        return True

    def wait_for_main(self) -> None:
        """Wait until the main process, which calls it too, has saved what there is to save."""
        if not self.is_lost:
            self._exchange(self.number, seconds=_WAIT_FOR_CHECKPOINT)

    def reason(self) -> BaseException:
        """What ends the program: LostProcess, KeyboardInterrupt after Ctrl-C, else Stopped."""
        if self.is_lost:
            return others.LostProcess("another process of this run is gone")
        return KeyboardInterrupt() if self.number == signal.SIGINT else Stopped(self.number)

    # ------------------------------------------------------------------------------------------------------ private

    def _ignore_signals(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _decide(self, needs: float = 0.0) -> None:
        """Leave in all processes or in none, with what the next part needs in seconds."""
        code = self.number or 0
        if self.number is not None:
            left = self._deadline - time.monotonic()
            code += _LEAVE if left <= 0 or left < needs else 0
        agreed = self._exchange(code)
        if agreed and self.number is None:
            self._note(agreed % _LEAVE)
        if agreed >= _LEAVE:
            self._agreed = True
            raise StepLeft

    def _exchange(self, code: int, *, seconds: float | None = None) -> int:
        """The largest code of all processes; with a time limit, what is known when it is over."""
        if self._group is None:
            return code
        codes = torch.tensor([code])
        work = distributed.all_reduce(codes, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        try:
            work.wait(*([] if seconds is None else [timedelta(seconds=seconds)]))
        except RuntimeError:  # too late, or another one is gone
            if seconds is None and self.number is None:
                raise
            return max(code, _LEAVE + self.number)
        return int(codes)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            return pass_on(number)
        if self.number is None:
            self._note(number)
            self._leave_if_due()
        elif time.monotonic() - self._came > self._same:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(128 + number)  # at once; what is half written has a temporary name

    def _note(self, number: int) -> None:
        self.number, self._came = number, time.monotonic()
        # Without the others the step cannot be finished: it is the launcher that ends those that are left.
        self.is_lost = number == signal.SIGTERM and others.are_lost()
        self._deadline = self._came + (0.0 if self.is_lost else self._grace)
        if self._asleep.locked():  # else a signal came just now, while this process heard of another one's
            self._asleep.release()
        if self._accelerator.is_main_process and not self.is_lost:
            limit = f" (at most {self._grace:g} s)" if self._doing.startswith("finishing") else ""
            then = ", then a checkpoint" if self._keeps_checkpoint else "; save_every=0 keeps no checkpoint"
            then = then if limit else ""
            again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
            start = "\n" if self._terminals else ""  # below the progress bar
            say(f"{start}{name_of(number)}: {self._doing}{limit}{then}; {again} leaves at once")
        if number == signal.SIGHUP:
            self._forget_terminals()

    def _forget_terminals(self) -> None:
        """Without a terminal, every line that a run says would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _knock(self) -> None:
        """In a thread: interrupt the main one, also where it waits, once the grace is over, until it has left."""
        over = self._over
        self._asleep.acquire()
        over.wait(self._same)
        while not over.is_set():
            signal.pthread_kill(threading.main_thread().ident, _KNOCK)
            left = self._deadline - time.monotonic()
            over.wait(left if left > 0 else _SECONDS_BETWEEN_KNOCKS)

    def _knocked(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner or self.number is None:
            return
        self._let_second_end()
        self._leave_if_due()

    def _let_second_end(self) -> None:
        """A second signal ends the process also while it computes, where no handler runs."""
        if os.getpid() == 1:  # in a container, where Linux keeps signals without a handler from this process
            return
        for other in self._before:
            if other not in (signal.SIGINT, _KNOCK) and signal.getsignal(other) == self._receive:
                signal.signal(other, signal.SIG_DFL)

    def _leave_if_due(self) -> None:
        """Raise StepLeft if the grace is over; again if it was swallowed, but not while it is on its way."""
        if not self._window or self.together or self.number is None or time.monotonic() < self._deadline:
            return
        handled = sys.exception()
        while handled is not None:
            if isinstance(handled, StepLeft):
                return
            handled = handled.__context__
        raise StepLeft
