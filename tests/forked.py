"""Processes like those of `python script.py`, forked from one that has imported torch, transformers and the trainer.

Imports are 4 of the 5 seconds that a toy run takes in a process of its own, and several processes wait for them as
often. What a test wants to know of a start itself, of torchrun, or of variables that imports read, it starts with
`subprocess`: a process from here has one thread, reaches for no hub, and is not a child of the test.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
MOST_BYTES = 100_000  # of a request


class Forked:
    """A process in a session of its own. As a context it is killed at the end.

    Args:
        words: what follows `python`: a script, `-m` and a module, or `-c` and code; and arguments.
        env: variables beside those of this process.
        cwd: its working directory; None: that of this process.

    Attributes:
        pid: its number.
    """

    def __init__(self, words: Sequence[object], *, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        status, written = os.pipe()
        request = {
            "words": [str(word) for word in words],
            "environment": {**os.environ, **ENVIRONMENT, **(env or {})},
            "folder": str(cwd or Path.cwd()),
        }
        content = json.dumps(request).encode()
        assert len(content) < MOST_BYTES
        socket.send_fds(_origin(), [content], [*(file.fileno() for file in self._files), written])
        os.close(written)
        self._status = os.fdopen(status)
        said = self._status.readline()
        assert said, "the process that others are forked from has ended"
        self.pid = int(said)
        self._code: int | None = None

    def poll(self, timeout: float = 0.0) -> int | None:
        """The status as of subprocess, or None if it has not ended after so many seconds."""
        if self._code is None and select.select([self._status], [], [], timeout)[0]:
            self._code = int(self._status.readline())
        return self._code

    def wait(self, timeout: float = 300.0) -> subprocess.CompletedProcess:
        """Its status and all that it has written, once it has ended; after so many seconds it is killed."""
        if self.poll(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired("forked", timeout, self.stdout, self.stderr)
        return subprocess.CompletedProcess([], self._code, self.stdout, self.stderr)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What it has written until now."""
        return self._text(0)

    @property
    def stderr(self) -> str:
        """What it has written until now to standard error."""
        return self._text(1)

    def _text(self, place: int) -> str:
        size = os.fstat(fd := self._files[place].fileno()).st_size
        return os.pread(fd, size, 0).decode(errors="replace")

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self.poll(60)
        for file in (*self._files, self._status):
            file.close()


def run(words: Sequence[object], *, timeout: float = 300.0, **options: object) -> subprocess.CompletedProcess:
    """Start a process, and give its status and what it has written once it has ended."""
    with Forked(words, **options) as process:
        return process.wait(timeout)


def launch(
    number: int, words: Sequence[object], *, timeout: float = 300.0, env: dict[str, str] | None = None, status: int = 0
) -> list[subprocess.CompletedProcess]:
    """Start so many processes in the repository's folder, as torchrun does, and wait until all have ended.

    Args:
        number: of processes.
        words: see `Forked`.
        timeout: seconds; also for those that are left once one has ended otherwise than it should, at most 10.
        env: see `Forked`.
        status: what all should end with.

    Raises:
        AssertionError: if one of them ends otherwise, or does not end; with what all have said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched |= {"TORCHELASTIC_RUN_ID": f"forked-{port}"}
    with ExitStack() as stack:
        started = []
        for rank in range(number):
            own = {name: str(value) for name, value in (launched | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            started.append(stack.enter_context(Forked(words, env=(env or {}) | own, cwd=ROOT)))
        end = time.monotonic() + timeout
        while None in (codes := [each.poll(0.01) for each in started]) and time.monotonic() < end:
            if not {*codes} <= {None, status}:
                end = min(end, time.monotonic() + 10)
        said = "\n".join(f"process {rank}:\n{each.stderr[-3000:]}" for rank, each in enumerate(started))
        assert codes == [status] * number, f"{codes}\n{said}"
        return [each.wait() for each in started]


_processes: list[subprocess.Popen] = []  # the one that others are forked from


@cache
def _origin() -> socket.socket:
    """The way to the process that others are forked from, which ends when this one does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = f"from tests import forked\nexec(forked.serve({theirs.fileno()}))"
    options = {"cwd": ROOT, "env": os.environ | ENVIRONMENT, "stdin": subprocess.DEVNULL}
    _processes.append(subprocess.Popen([sys.executable, "-c", code], pass_fds=[theirs.fileno()], **options))
    theirs.close()
    return ours


# ---------------------------------------------------------------------------------- the process that is forked from


def serve(fd: int) -> object:
    """Fork a process for each request, until nobody can ask any more. Gives the forked process the code to run."""
    _import()
    control = socket.socket(fileno=fd)
    poll, running = select.poll(), {}
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in running:
                pid, status = running.pop(ready)
                poll.unregister(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(OSError), os.fdopen(status, "w") as file:  # nobody may be there to read it
                    file.write(f"{code}\n")
                continue
            content, fds, *_ = socket.recv_fds(control, MOST_BYTES, 3)
            if not content:
                os._exit(0)
            if not (pid := os.fork()):
                control.close()
                for left in (fds[2], *running, *(status for _, status in running.values())):
                    os.close(left)
                return _become(json.loads(content), fds)
            os.write(fds[2], f"{pid}\n".encode())
            for written in fds[:2]:
                os.close(written)
            running[ended := os.pidfd_open(pid)] = pid, fds[2]
            poll.register(ended, select.POLLIN)


# What a toy run imports when it needs it; with all that these import, 3 seconds of it.
LATE = ("transformers.models.qwen2.modeling_qwen2", "peft", "pandas", "fsspec", "torch.profiler", "datasets")
OURS = (
    "common.start",
    "common.merge",
    "common.evaluation.command",
    "common.check_model",
    "tests.sharded_runs",
    "tests.sharded_step",
)


def _import() -> None:
    """What the trainer and the commands import, also late; no thread and no process is started."""
    import common  # noqa: I001

    import common.runs.run
    from tests.toy import algorithms, facts

    for name in (*LATE, *OURS):
        importlib.import_module(name)
    for name in algorithms():
        facts(name)
    common.runs.run.draw_curves = lambda folder: None  # as in conftest.py
    gc.freeze()  # so that no collection copies the pages of what is shared
    assert threading.active_count() == 1


def _become(request: dict, fds: list[int]) -> object:
    """Be the process that is asked for, up to its code, which belongs into `__main__`."""
    from common.processes import end_with_parent
    from common.signals import leave_while_importing

    end_with_parent()
    os.setsid()
    for place, fd in enumerate(fds[:2], start=1):
        os.dup2(fd, place)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    kind, *words = request["words"]
    main = sys.modules["__main__"]
    if kind == "-m":
        module, *words = words
        sys.path[0] = os.getcwd()
        sys.modules.pop(module, None)  # it is its own copy, in any process
        _, main.__spec__, code = runpy._get_module_details(module)
        file, main.__package__ = main.__spec__.origin, main.__spec__.parent
    elif kind == "-c":
        text, *words = words
        sys.path[0], file, code = "", kind, compile(text, "<string>", "exec")
    else:
        file = kind
        sys.path[0] = str(Path(file).parent.resolve())
        code = compile(Path(file).read_bytes(), file, "exec")
    if file != "-c":
        main.__file__ = file
    sys.argv = [file, *words]
    # Whoever runs the tests may ignore them, as nohup and a shell's background do.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    leave_while_importing()
    hook = sys.excepthook
    # Without the line that runs the code, which comes first.
    sys.excepthook = lambda kind, error, trace: hook(kind, error.with_traceback(trace.tb_next), trace.tb_next)
    return code
