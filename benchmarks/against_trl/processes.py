"""Runs a command to its end and reads what it and its children used."""

import os
import resource
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

GB = 2**30
# Reading the memory of a large process takes tens of milliseconds of a core, which the process may want.
PAUSE = 0.5


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a command used.

    Attributes:
        seconds: from its start to its end.
        cpu: CPU seconds of it and of its children, in user and system mode.
        peak_gb: the most memory of all its processes at the same time, in GB of 2^30 bytes; shared pages count once.
    """

    seconds: float
    cpu: float
    peak_gb: float

    def as_dict(self) -> dict[str, float]:
        """The attributes by name."""
        return asdict(self)


def run(command: list[str], environment: Mapping[str, str], log: Path) -> tuple[Used, str]:
    """Run a command.

    Args:
        command: program and arguments.
        environment: its variables.
        log: file for what it writes to stderr.

    Returns:
        What it used, and what it printed.

    Raises:
        subprocess.CalledProcessError: it failed; `stderr` has the end of the log.
    """
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak = 0
    with log.open("w+b") as errors, log.with_suffix(".out").open("w+b") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=errors)
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(PAUSE)
        seconds = time.perf_counter() - clock
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        texts = [_content(file) for file in (errors, printed)]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=texts[0][-3000:])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Used(seconds=seconds, cpu=cpu, peak_gb=peak / GB), texts[1]


def _content(file: object) -> str:
    file.seek(0, os.SEEK_SET)
    return file.read().decode(errors="replace")


def _memory(pid: int) -> int:
    """Bytes of a process and its descendants, each page once."""
    total = 0
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it has just ended
    return total
