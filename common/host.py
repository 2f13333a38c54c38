"""What this process may use of its machine: memory and processors, within the limits of cgroups and of the shell.

In a container or a job of a queue the machine's own numbers are of no use: the kernel kills what goes over the limit
of the cgroup. Cgroups are nested, and the tightest one counts. Where a file cannot be read, there is no limit in it.
"""

import ctypes
import errno
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

SELF = Path("/proc/self")
_V2 = "cgroup2"
# How libraries say that they got none: the loader of libraries, C++, torch, the C library, and an extension of Python.
_NO_MEMORY = (
    "failed to map segment",
    "bad_alloc",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "returned NULL without setting an exception",
)
# What a shell's `ulimit` calls the limits that keep a process from starting or working, and its unit in bytes.
_ULIMITS = {
    "ulimit -v": (resource.RLIMIT_AS, 1024),
    "ulimit -d": (resource.RLIMIT_DATA, 1024),
    "ulimit -u": (resource.RLIMIT_NPROC, 1),
    "ulimit -n": (resource.RLIMIT_NOFILE, 1),
}
# Version 1 writes no limit as a number near 2^63, rounded down to pages.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Memory that this process may use, in bytes.

    Attributes:
        total: in all, with what it and its neighbours within the limit use already.
        available: what is left of it; file caches count as left, since the kernel drops them first.
        source: what sets the limit: "this machine", "the cgroup ..." or "ulimit -v".
    """

    total: int
    available: int
    source: str


def processes_here() -> int:
    """Processes of this run on this machine, which share its memory, as their launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def host_memory(proc: Path = SELF, *, processes: int = 1) -> HostMemory:
    """The tightest limits on the memory of this process; `total` and `available` may be of two limits.

    Args:
        proc: the process's folder in /proc.
        processes: that share the machine and the cgroup; each has an equal part. A limit of the shell is each one's.

    Returns:
        The smallest total with its source, and the smallest rest of any limit.
    """
    import psutil

    machine = psutil.virtual_memory()
    found = [HostMemory(total=machine.total, available=machine.available, source="this machine")]
    found += filter(None, map(_memory_of, _folders("memory", proc)))
    found = [replace(each, total=each.total // processes, available=each.available // processes) for each in found]
    found += _shell_limits(proc)
    tightest = min(found, key=lambda each: each.total)
    available = max(0, min(each.available for each in found))
    return HostMemory(total=tightest.total, available=available, source=tightest.source)


def allowed_cpus() -> int:
    """Processors that this process may run on, whatever the quota of its cgroup."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def num_cpus(proc: Path = SELF) -> int:
    """Processors for the threads of this process: those it may run on, but no more than the quota of its cgroup.

    A quota of 2.5 gives 2: with 3 threads, each would stop for part of every period, and the others wait for it.
    """
    quotas = [quota for folder in _folders("cpu", proc) if (quota := _quota_of(folder)) is not None]
    return max(1, min([allowed_cpus(), *map(int, quotas)]))


def oom_kills(proc: Path = SELF) -> dict[str, int]:
    """How often the kernel has killed a process for memory, by cgroup of this process; empty where it does not say."""
    counts = {}
    for folder in _folders("memory", proc):
        for name in ("memory.events", "memory.oom_control"):  # version 2 and 1
            if "oom_kill" in (events := _table(folder / name)):
                counts[f"{folder} {folder.stat().st_ino}"] = events["oom_kill"]
    return counts


def _folders(controller: str, proc: Path) -> Iterator[Path]:
    """The cgroup of a process that limits memory or processors, and those above it, as far as they can be seen."""
    paths = _cgroup_paths(proc)
    for root, point, kind, options in _mounts(proc):
        is_ours = kind == _V2 or (kind == "cgroup" and controller in options)
        path = paths.get("" if kind == _V2 else controller)
        if not is_ours or path is None:
            continue
        # In a container, only the part below the cgroup that it was given may be mounted.
        inside = os.path.relpath(path, root)
        folder = point if inside == "." or inside.startswith("..") else point / inside
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(point) and each.is_dir())


def _cgroup_paths(proc: Path) -> dict[str, str]:
    """The path of the process's cgroup by controller; "" is that of version 2."""
    paths = {}
    for line in _text(proc / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _mounts(proc: Path) -> Iterator[tuple[str, Path, str, list[str]]]:
    """Of each mounted hierarchy of cgroups: which part of it, where, its kind, and its controllers among options."""
    for line in _text(proc / "mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind in ("cgroup", _V2):
            root, point = left.split(" ")[3:5]
            yield root, Path(point.replace("\\040", " ")), kind, options.split(",")


def _memory_of(folder: Path) -> HostMemory | None:
    stat = _table(folder / "memory.stat")
    # Version 2; above memory.high, processes are slowed down until they hardly move.
    limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    limits.append(stat.get("hierarchical_memory_limit"))  # version 1; also of those above that cannot be seen
    limits = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    if not limits:
        return None
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    prefix = "total_" if "total_inactive_file" in stat else ""  # version 1: with the cgroups below
    files = sum(stat.get(f"{prefix}{name}", 0) for name in ("active_file", "inactive_file"))
    left = min(limits) - max(0, used - files)
    return HostMemory(total=min(limits), available=left, source=f"the cgroup {folder}")


def _quota_of(folder: Path) -> float | None:
    """Processors that the processes of a cgroup may use together; None: any number."""
    words = _text(folder / "cpu.max").split()  # version 2
    if not words:
        words = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdigit() for word in words) or not int(words[1]):
        return None  # "max", or -1
    return int(words[0]) / int(words[1])


def _shell_limits(proc: Path) -> Iterator[HostMemory]:
    """The limits of `ulimit`, which count addresses: more than the memory in use."""
    sizes = _text(proc / "statm").split()  # in pages: all addresses, ..., data and stack
    if len(sizes) < 6:
        return
    for name, kind, position in (("-v", resource.RLIMIT_AS, 0), ("-d", resource.RLIMIT_DATA, 5)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(sizes[position]) * resource.getpagesize()
            yield HostMemory(total=limit, available=limit - used, source=f"ulimit {name}")


def limits_in_force(letters: str = "vdun") -> str:
    """The limits of this process that can keep it or another from working, as `ulimit` shows them.

    Args:
        letters: those to look at.
    """
    found = []
    for name, (number, unit) in _ULIMITS.items():
        limits = [limit for limit in resource.getrlimit(number) if limit != resource.RLIM_INFINITY]
        if limits and name[-1] in letters:
            found.append(f"{name} {min(limits) // unit}")
    return ", ".join(found) or "no ulimit"


def limit_in_the_way(error: BaseException) -> str:
    """The limit of `ulimit` that an error of Python or a library comes from; empty if it comes from elsewhere."""
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    letters = ""
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(words in text for words in _NO_MEMORY):
        letters = "vd"
    elif number == errno.EAGAIN or "can't start new thread" in text:
        letters = "vdu"
    elif number == errno.EMFILE or "Too many open files" in text:
        letters = "n"
    limits = limits_in_force(letters)
    return "" if limits == "no ulimit" else limits


def _table(path: Path) -> dict[str, int]:
    """The numbers of a file of lines "name number"."""
    pairs = [line.split() for line in _text(path).splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max" is none


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


class FreedMemory:
    """Gives memory that was freed back to the system.

    glibc keeps it for later, in pieces between what is in use. Passes of ever other sizes find no piece that is large
    enough, so that a run on a CPU would grow by some tens of megabytes with each step.

    Args:
        every: seconds between two times: it takes time, and memory that comes back is mapped again.
    """

    def __init__(self, every: float = 30.0) -> None:
        self._every, self._last = every, time.monotonic()
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none

    def give_back(self) -> None:
        """Do it, if the last time is long enough ago."""
        now = time.monotonic()
        if self._trim is not None and now - self._last >= self._every:
            self._last = now
            self._trim(0)
