"""The processes that a comparison starts, each with a log of its own; they end with the comparison."""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from common.host import num_cpus


class Processes:
    """Starts processes from several threads; each runs on the CPUs of the thread that starts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._has_ended = False

    def run(self, command: Sequence[object], log: Path) -> int:
        """Run a command to its end.

        Args:
            command: program and arguments.
            log: what the command prints is appended to it.

        Returns:
            Its exit status; that of a terminated process if nothing may start any more.
        """
        with open(log, "ab") as file:
            with self._lock:
                if self._has_ended:
                    return -signal.SIGTERM
                words = [str(word) for word in command]
                process = subprocess.Popen(words, env=run_environment(), stdout=file, stderr=subprocess.STDOUT)
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        return status

    def end(self) -> None:
        """Terminate what runs, and start nothing more."""
        with self._lock:
            self._has_ended = True
            for process in list(self._running):
                process.terminate()


def run_environment() -> dict[str, str]:
    """The environment of a run, which lets torch use all CPUs of the calling thread that a quota allows.

    The run inherits these CPUs. Variables that the user has set are kept.
    """
    threads = {"OMP_NUM_THREADS": str(num_cpus()), "OMP_WAIT_POLICY": "PASSIVE"}
    return threads | os.environ


def last_line(log: Path) -> str:
    """What a process wrote last."""
    return (log.read_text(errors="replace", encoding="utf-8").splitlines() or ["it wrote nothing"])[-1]
