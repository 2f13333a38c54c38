"""A chat template is a program that came with a tokenizer: the first time it runs, it does so under limits.

transformers runs it in a sandbox that keeps it from files and the network, but not from loops without end, or from
text that fills the memory. So a child process, whose processor time and memory are limited, runs it first.
"""

import os
import resource
import select
import signal
from collections.abc import Callable

from common.processes import fork, limit_memory

# A long conversation takes milliseconds; compiling the longest templates a tenth of a second.
SECONDS = 2
GIGABYTES = 1.0
MAX_CHARACTERS = 20_000_000  # of what it writes for a few messages
_LONGEST_WAIT = 30.0  # on the clock: a child that waits for a lock of another thread says nothing about the template

_TOO_MUCH_MEMORY, _TOO_MUCH_TEXT = 3, 4
_answers: dict[str, str | None] = {}  # by template: why it may not run


def check_template(template: object, renders: list[Callable[[], str]]) -> None:
    """Refuse a template that takes far more time or memory than any needs.

    Args:
        template: its text; each is tried once in a process.
        renders: what runs it; errors in them are not this function's concern.

    Raises:
        ValueError: which limit it exceeds.
    """
    key = str(template)
    if key not in _answers:
        _answers[key] = _why_not(renders)
    if reason := _answers[key]:
        raise ValueError(
            f"{reason}. A template loops over the messages, which takes milliseconds; correct it (chat_template.jinja "
            "or tokenizer_config.json), or use another model"
        )


def _why_not(renders: list[Callable[[], str]]) -> str | None:
    import jinja2.sandbox  # noqa: F401  else both processes would import it

    reader, writer = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(reader)
        _render_and_exit(renders)
    os.close(writer)
    ended = bool(select.select([reader], [], [], _LONGEST_WAIT)[0])  # it closes its end when it exits
    os.close(reader)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not ended:
        return None
    if os.WIFSIGNALED(status):
        is_time = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return f"it takes more than {SECONDS} s of processor time" if is_time else "it crashes Python"
    return {
        _TOO_MUCH_MEMORY: f"it takes more than {GIGABYTES:g} GB of memory",
        _TOO_MUCH_TEXT: f"it writes more than {MAX_CHARACTERS} characters for one conversation",
    }.get(os.WEXITSTATUS(status))


def _render_and_exit(renders: list[Callable[[], str]]) -> None:
    """In the child: run the template; the exit status says what went wrong."""
    status = 0
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        limit_memory(GIGABYTES)
        _limit_time()
        for render in renders:
            status = max(status, _status_of(render))
    finally:
        os._exit(status)


def _status_of(render: Callable[[], str]) -> int:
    try:
        return _TOO_MUCH_TEXT if len(render()) > MAX_CHARACTERS else 0
    except MemoryError:
        return _TOO_MUCH_MEMORY
    except Exception:  # it refuses these messages; whoever wants them hears of it
        return 0


def _limit_time() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or hard > SECONDS:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, hard))
