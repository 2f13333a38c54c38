"""The other processes of a run: whether they live, and what the ones that are left say when one is lost.

Where a process has died or hangs, what all take part in fails in the others: with gloo by an error, at once or after
`process_timeout`. NCCL gives no error that Python sees: it aborts the process after that time. So while a run trains,
a thread looks after the processes of this machine. Whether those of other machines live is not known here.
"""

import hashlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from common.processes import process_state
from common.signals import ENDING, command_line, say
from common.terminal import printable

# Exit status of a script whose run could not go on without another process.
LOST_PROCESS = 4

# What torch, gloo and NCCL say when others do not answer; other errors of theirs are faults of a program.
_NO_ANSWER = re.compile(
    r"[Tt]imed? ?out|closed|reset by peer|Broken pipe|Connection refused|connectFullMesh|ncclRemoteError|was aborted"
)
# An error of an operation of several processes comes from below one of these; DTensors add frames of torch's own.
_PLACES, _FRAMES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}runs{os.sep}stopping.py"), 6

# Seconds. A process that was killed closes its connections before it is gone. The lowest living process speaks, and
# another one if it does not; who has spoken stays for so long that the others know.
_UNTIL_GONE, _UNTIL_LOWEST_SPOKE, _STAY = 2.0, 3.0, 4.0
# What Python does when it ends may wait for the lost process too; launchers would then wait as well.
_LONGEST_END = 30
# The thread leaves the error to the main one, which can do more, for so long.
_PATIENCE, _EVERY = 10.0, 1.0
# NCCL aborts a process at the timeout; where it waits must be said before.
_BEFORE_THE_ABORT = 0.9


class LostProcess(RuntimeError):
    """Another process of the run is lost, and this one leaves."""


class Place(NamedTuple):
    """Where a process is.

    Attributes:
        machine: the same for processes that see each other.
        host: name of the machine, for messages.
        pid: number of the process on it.
        started: when, in the machine's ticks: a number is given again.
    """

    machine: str
    host: str
    pid: int
    started: int


def own_place() -> Place:
    """Where this process is."""
    host = socket.gethostname()
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return Place(machine, host, os.getpid(), process_state(os.getpid()).started)
    return Place(f"{host} {os.getpid()}", host, os.getpid(), 0)  # no /proc: nothing is known of others


class Others:
    """The processes of a run, as one of them sees them.

    Args:
        timeout: minutes after which one that does not answer is lost.
        folder: the run's.
        how_to_go_on: says which checkpoint a run goes on from, once it is asked.
    """

    def __init__(self, timeout: float, folder: Path, how_to_go_on: Callable[[], str]) -> None:
        self.timeout = timeout
        self._folder, self._how_to_go_on = folder, how_to_go_on
        self._rank, self._count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._places: Sequence[Place] = ()
        self._spoken: socket.socket | None = None

    def meet(self, places: Sequence[Place], own: int) -> None:
        """From now on it is known where they are.

        Args:
            places: of all processes, in their order.
            own: this one's index.
        """
        self._places, self._rank, self._count = places, own, len(places)

    @property
    def gone(self) -> list[int]:
        """Processes of this machine that have ended."""
        return [process for process in self._here() if self._state(process) in ("gone", "ended")]

    @property
    def stopped(self) -> list[int]:
        """Processes of this machine that a signal has stopped (SIGSTOP, SIGTSTP), until another lets them go on."""
        return [process for process in self._here() if self._state(process) == "stopped"]

    def says(self) -> bool:
        """Whether this process is to say what happened: one on each machine, the first that lives if it notices."""
        living = [process for process in self._here() if self._state(process) == "lives"]
        if living and min(living) < self._rank:
            time.sleep(_UNTIL_LOWEST_SPOKE)
        launch = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")]
        name = hashlib.sha256(" ".join([*launch, str(_restart()), str(os.getuid())]).encode()).hexdigest()[:20]
        if sys.platform != "linux":
            return self._rank == 0
        self._spoken = socket.socket(socket.AF_UNIX)
        try:
            self._spoken.bind(f"\0nanorlhf-lost-{name}")  # a name without a file, given back when the process ends
        except OSError:
            return False
        return True

    def stay(self) -> None:
        """After it was said: until the others that live know that it was."""
        if any(self._state(process) == "lives" for process in self._here()):
            time.sleep(_STAY)

    def message(self, error: BaseException | None = None) -> str:
        """What has happened, the last checkpoint, and the command that goes on, in lines.

        Args:
            error: by which it was noticed.
        """
        until = time.monotonic() + _UNTIL_GONE
        while self._places and not (self.gone or self.stopped) and time.monotonic() < until:
            time.sleep(0.05)
        lines = [self._what(error), f"run: {self._folder}: {self._how_to_go_on()}", command_line()]
        most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        if _restart() < most:
            lines.append(f"torchrun starts all processes again (restart {_restart() + 1} of {most}).")
        return "\n".join(lines)

    @property
    def speaks_for_main(self) -> bool:
        """Whether the main process is gone, and this is the next that lives on its machine."""
        living = [process for process in self._here() if self._state(process) == "lives"]
        return 0 in self.gone and self._rank < min(living, default=self._count)

    def named(self, processes: list[int]) -> str:
        """Processes in words, with a verb: process 1 of 2 (pid 4711 on n1) is."""
        numbers = ", ".join(str(self._places[process].pid) for process in processes)
        names, verb = ", ".join(map(str, processes)), "is" if len(processes) == 1 else "are"
        word = "process" if len(processes) == 1 else "processes"
        return f"{word} {names} of {self._count} (pid {numbers} on {self._places[self._rank].host}) {verb}"

    @contextmanager
    def watched(
        self, is_leaving: Callable[[], bool], *, leave: Callable[[], None], is_aborted: bool = False
    ) -> Iterator[None]:
        """Have a thread end this process if another one is lost and the main thread does not notice.

        Args:
            is_leaving: whether the main thread has noticed, or leaves for another reason.
            leave: what is to be done before the thread ends this process.
            is_aborted: NCCL ends this process at the timeout, so that the thread must speak before.
        """
        over, until_abort = threading.Event(), 60 * self.timeout * (_BEFORE_THE_ABORT if is_aborted else 1)
        args = (over, is_leaving, leave, threading.get_ident(), until_abort)
        options = {"name": "looks after other processes", "daemon": True}
        threading.Thread(target=self._watch, args=args, **options).start()
        try:
            yield
        finally:
            over.set()

    # ------------------------------------------------------------------------------------------------------ private

    def _here(self) -> list[int]:
        """The other processes of this machine."""
        own = self._places[self._rank].machine if self._places else ""
        return [i for i, place in enumerate(self._places) if place.machine == own and i != self._rank]

    def _state(self, process: int) -> str:
        place, found = self._places[process], process_state(self._places[process].pid)
        if found is None or found.started != place.started:
            return "gone"
        return {"Z": "ended", "X": "ended", "T": "stopped"}.get(found.state, "lives")

    def _what(self, error: BaseException | None) -> str:
        gone, stopped, minutes = self.gone, self.stopped, f"{self.timeout:g} minutes (process_timeout)"
        if gone:
            them = "it was" if len(gone) == 1 else "they were"
            return f"{self.named(gone)} gone: {them} killed, or ended with an error that is shown above."
        if stopped:
            return f"{self.named(stopped)} stopped by a signal (SIGSTOP); the others wait no longer than {minutes}."
        is_late = error is None or re.search("[Tt]imed? ?out", str(error))
        if not self._places:
            return f"not all {self._count} processes found each other within {minutes}: one has not been started, has "
            "ended, or cannot be reached."
        here = f"those of this machine ({self._places[self._rank].host}) live"
        if is_late:
            return (
                f"a process of {self._count} did not answer within {minutes}: it hangs, is gone, or needs longer, as "
                f"for saving a large model; {here}. If it needs longer, pass a larger --process_timeout."
            )
        return f"the connection to a process of {self._count} is lost; {here}."

    def _watch(
        self,
        over: threading.Event,
        is_leaving: Callable[[], bool],
        leave: Callable[[], None],
        main: int,
        until_abort: float,
    ) -> None:
        gone_since = stopped_since = None
        place, there_since, is_said = None, time.monotonic(), False
        while not over.wait(_EVERY) and not is_leaving():
            now = time.monotonic()
            stopped_since = (stopped_since or now) if self.stopped else None
            gone_since = (gone_since or now) if self.gone else None
            patience = _PATIENCE if until_abort >= 60 * self.timeout else 0.0
            is_late = stopped_since and now - stopped_since > until_abort + patience
            if is_late or (gone_since and now - gone_since > _PATIENCE):
                if self.says():
                    say(f"error: {printable(self.message())}")
                    self.stay()
                leave()
                os._exit(LOST_PROCESS)
            frame = sys._current_frames().get(main)
            if frame is None or (id(frame), frame.f_lasti) != place:
                place, there_since, is_said = frame and (id(frame), frame.f_lasti), now, False
            elif not is_said and now - there_since > 60 * _BEFORE_THE_ABORT * self.timeout:
                is_said = True
                if not any(part in frame.f_code.co_filename for part in _PLACES):
                    where = f"{frame.f_code.co_filename}, line {frame.f_lineno}, in {frame.f_code.co_name}"
                    minutes = (now - there_since) / 60
                    say(printable(f"process {self._rank} has been at {where} for {minutes:.3g} minutes"))


_others: Others | None = None


def expect(timeout: float, folder: Path, how_to_go_on: Callable[[], str]) -> Others | None:
    """The other processes, which this one is about to find; None if it is alone.

    Args:
        timeout: minutes after which one that does not answer is lost.
        folder: the run's.
        how_to_go_on: says which checkpoint a run goes on from.
    """
    global _others
    is_alone = os.environ.get("WORLD_SIZE", "1") == "1"
    _others = None if is_alone else Others(timeout, folder.absolute(), how_to_go_on)
    return _others


def are_lost() -> bool:
    """Whether another process of this machine is gone."""
    return _others is not None and bool(_others.gone)


def named_gone() -> str:
    """For a message: the processes of this machine that are gone, in brackets; empty if all live."""
    gone = _others.gone if _others is not None else []
    return f" ({_others.named(gone)} gone)" if gone else ""


def speaks_for_main() -> bool:
    """Whether the main process is gone, and this is the next that lives on its machine."""
    return _others is not None and _others.speaks_for_main


@contextmanager
def watched(is_leaving: Callable[[], bool], *, leave: Callable[[], None], is_aborted: bool = False) -> Iterator[None]:
    """See Others.watched; nothing if this process is alone."""
    if _others is None:
        yield
        return
    with _others.watched(is_leaving, leave=leave, is_aborted=is_aborted):
        yield


def means_lost(error: BaseException) -> bool:
    """Whether an error says that another process does not answer, and is no fault of a program."""
    if _others is None:
        return False
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, LostProcess) or _is_no_answer(found):
            return True
        # A signal may come while the error is on its way.
        found = found.__cause__ or (found.__context__ if isinstance(found, SystemExit) else None)
    return False


def _is_no_answer(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or not _NO_ANSWER.search(str(error)):
        return False
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)][-_FRAMES:]
    return "gloo" in str(error) or any(part in file for part in _PLACES for file in files)


def end_program(error: BaseException) -> NoReturn:
    """Say once what has happened, and end.

    Args:
        error: for which `means_lost` holds, or a signal that came because of it.

    Raises:
        SystemExit: always.
    """
    for number in ENDING:  # a launcher sends one as soon as it knows
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_LONGEST_END)
    if _others.says():
        print(f"error: {printable(_others.message(error))}", file=sys.stderr, flush=True)
        _others.stay()
    sys.exit(LOST_PROCESS)


def _restart() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
