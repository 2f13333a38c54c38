"""Processes on Linux: who ends with whom, who descends from whom, and which limits hold."""

import contextlib
import ctypes
import os
import resource
import signal
import time
import warnings
from collections.abc import Collection, Iterator
from typing import NamedTuple

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)

# Processes that were killed are gone within milliseconds, unless they wait for a disk.
_SECONDS_TO_END = 5.0


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when the thread that forked it ends, for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def adopt_orphans() -> None:
    """Make this process the new parent of every descendant whose parent ends, also of one in another session."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def processor_clock(pid: int) -> int:
    """The clock of the processor time that a process and its threads have used.

    Raises:
        OSError: if there is no such process.
    """
    clock = ctypes.c_int()
    error = ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock))
    if error:
        raise OSError(error, os.strerror(error))
    return clock.value


def fork() -> int:
    """Fork this process with no signal in the middle: Python would drop what its handler raises there.

    The child may use no lock that another thread could hold at the fork; of that, Python does not warn here.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return os.fork()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def has_children() -> bool:
    """Whether this process has children, running or ended; one system call."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children() -> set[int]:
    """This process's children."""
    return set(_children_by_parent().get(os.getpid(), ()))


def end_children(spared: Collection[int] = ()) -> None:
    """Kill and reap all descendants of this process, which must adopt orphans.

    Args:
        spared: children that live on, with what descends from them.
    """
    last = time.monotonic() + _SECONDS_TO_END
    while has_children() and time.monotonic() < last:
        found = _children_by_parent()
        own = [pid for pid in found.get(os.getpid(), ()) if pid not in spared]
        if not own:
            return
        # All of them before any is reaped, so that few are left to start others.
        for pid in _with_descendants(own, found):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)  # until Linux has ended them, and has given this process their children


def end_sessions(leaders: Collection[int]) -> None:
    """Kill all processes of sessions, which need not descend from this one any more.

    Args:
        leaders: the processes that began the sessions, which may have ended.
    """
    last = time.monotonic() + _SECONDS_TO_END
    while time.monotonic() < last:
        found = [each.pid for each in _processes() if each.session in leaders and each.state not in "ZX"]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


class State(NamedTuple):
    """A process as Linux sees it: the letter of its state, see proc(5), and when it began, in ticks."""

    state: str
    started: int


def process_state(pid: int) -> State | None:
    """The state of any process; None if there is none of this number."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return State(fields[0].decode(), int(fields[19]))
    except (OSError, IndexError):
        return None


class _Process(NamedTuple):
    pid: int
    state: str
    parent: int
    session: int


def _processes() -> Iterator[_Process]:
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # A program's name is in parentheses and may hold any character; state, parent, group, session follow.
                fields = file.read().rpartition(b")")[2].split()
            yield _Process(int(name), fields[0].decode(), int(fields[1]), int(fields[3]))
        except (OSError, IndexError):  # it has just ended
            continue


def _children_by_parent() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for process in _processes():
        found.setdefault(process.parent, []).append(process.pid)
    return found


def _with_descendants(pids: list[int], children_by_parent: dict[int, list[int]]) -> list[int]:
    found = list(pids)
    for pid in found:  # grows meanwhile
        found += children_by_parent.get(pid, ())
    return found


def wait_for_end(pid: int, seconds: float) -> int | None:
    """The status of a child of this process as of `os.waitpid`, -1 if it was reaped before; None: it goes on."""
    last, pause = time.monotonic() + seconds, 0.0005
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return -1
        if ended:
            return status
        if time.monotonic() > last:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def describe_end(status: int) -> str:
    """How a process ended, from the status of `os.waitpid`."""
    if status < 0:
        return "it ended"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in list(signal.Signals) else "a real-time signal"
        return f"signal {number} ({name}) ended its process"
    return f"its process ended with status {os.WEXITSTATUS(status)}"


def limit_memory(gigabytes: float) -> float:
    """Limit this process's memory to what it uses now and so much more, and have a crash write no core file.

    Only soft limits change, and they only become lower: a process may not have more than its hard limit, and whoever
    set a soft one wants it.

    Returns:
        The gigabytes that it may still take.
    """
    with open("/proc/self/statm", encoding="utf-8") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + int(gigabytes * 1e9)
    limit = min(each for each in (wanted, soft, hard) if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    return (limit - used) / 1e9
