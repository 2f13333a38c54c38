"""What ends a program from outside: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C, while our scripts start and end.

While a run trains, common/runs/stopping.py answers them. Only scripts of this project are changed: in a notebook or
another program, nothing here is installed. No heavy import at the top, since this must be there before torch is.
"""

import atexit
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from common.processes import end_with_parent

ROOT = Path(__file__).parent.parent

# What queues, containers and terminals send before they kill, and Ctrl-C.
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Stopped(SystemExit):
    """A signal has ended the work; a program that does not catch it exits with 128 plus the signal's number.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def name_of(number: int) -> str:
    """A signal's name in messages."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def say(text: str) -> None:
    """Write lines to standard error from a handler: print may not be called while another print is at work."""
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"{text}\n".encode())


def is_ours_to_answer(number: int) -> bool:
    """Whether nobody else answers a signal: an ignored one stays ignored (nohup), and others' handlers stay."""
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _leave, _raise)


def pass_on(number: int) -> None:
    """In a process that was forked after a handler was installed: do what the signal does by default."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def leave_while_importing() -> None:
    """In a script of this project, have a signal during the imports, which take seconds, end it with one line."""
    if _is_our_script():
        _install(_leave)
        if _is_launched() and sys.platform == "linux":
            # Its launcher may die first: torchrun does so at once of SIGKILL and, unless told otherwise, of SIGUSR1.
            end_with_parent(signal.SIGTERM)


def raise_in_script() -> None:
    """From now on, a signal raises Stopped in this script, and Ctrl-C KeyboardInterrupt as always."""
    _install(_raise)


def end_without_a_word() -> None:
    """From now on, another signal ends this program at once: what there is to say of the first is being said."""
    for number in filter(is_ours_to_answer, ENDING):
        signal.signal(number, signal.SIG_DFL)


def after_a_stop(handler: object) -> object:
    """What takes a handler's place once a run has been stopped: a script's own would raise Stopped a second time."""
    return signal.SIG_DFL if handler is _raise else handler


def ignore_while_python_ends() -> None:
    """Once Python ends, which takes seconds, a signal changes nothing: its status is known. Ctrl-C still ends it."""
    atexit.unregister(_ignore)
    atexit.register(_ignore)  # called last, so that it runs before what libraries have registered


def _ignore() -> None:
    global _is_ending
    if os.getpid() != _owner:
        return
    _is_ending = True  # for signals that come before the handlers are changed
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # gone, closed or absent
            stream.flush()
    for number in ENDING:
        if signal.getsignal(number) in (_raise, signal.default_int_handler):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)


def _install(handler: object) -> None:
    global _owner
    _owner = os.getpid()
    for number in filter(is_ours_to_answer, ENDING):
        is_plain = number == signal.SIGINT and handler is _raise
        signal.signal(number, signal.default_int_handler if is_plain else handler)


_owner = 0  # the process that installed the handlers
_is_ending = False  # whether Python ends


def _leave(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _owner:
        return pass_on(number)
    if not _is_importing(frame):  # a script of somebody else's in this folder is at its own work
        return signal.default_int_handler(number, frame) if number == signal.SIGINT else pass_on(number)
    say(f"\n{name_of(number)}: nothing had begun yet")
    os._exit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether the main script is at one of the imports on its top, or has not begun yet."""
    inner = None
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return inner is not None and inner.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame, inner = frame.f_back, frame
    return True


def _raise(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _owner:
        return pass_on(number)
    if not _is_ending:
        raise Stopped(number)


def _is_our_script() -> bool:
    """Whether Python was started with a script of this repository, or with `-m` and a module of it."""
    if sys.argv[:1] == ["-m"]:  # the module is not found yet: its package is imported first
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""
        return module.split(".")[0] == __name__.split(".")[0]
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and _is_in_project(Path(file).resolve())


def _is_in_project(file: Path) -> bool:
    return file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)


def _is_launched() -> bool:
    """Whether torchrun or `accelerate launch` is the parent."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _words() -> list[str]:
    if _is_launched():
        with suppress(OSError):
            words = Path(f"/proc/{os.getppid()}/cmdline").read_text("utf-8", "replace").split("\0")[:-1]
            return words or sys.orig_argv
    return sys.orig_argv


_WORDS = _words()  # read now: the launcher may be gone when it is asked for


def command_line() -> str:
    """The command that started this program, as a shell takes it: with its launcher, if it had one."""
    return shlex.join(_WORDS)
