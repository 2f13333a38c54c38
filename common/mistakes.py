"""Which errors are messages for the user, and a Python program that ends with one of them instead of a traceback."""

import dis
import io
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType

from common import others
from common.host import limit_in_the_way
from common.terminal import printable

ROOT = Path(__file__).parent.parent

# Exit status of a script whose run stopped itself because of its numbers; 2 is a mistake in what it was given.
WRONG_NUMBERS = 3
_RAISE = dis.opmap["RAISE_VARARGS"]
# Characters of another library's error in a message.
_MAX_LINE = 300


class WrongNumbers(FloatingPointError):
    """Numbers of a run cannot be right, so it stops before its policy learns from them; all processes raise it."""


class CannotWrite(ValueError):
    """The disk does not take what a run or a command has to write; the message says what stands, and how to go on."""


class TooLargeRow(ValueError):
    """A row does not fit into memory although it is alone in its forward pass; all processes raise it."""


class TooLargePass(ValueError):
    """A pass does not fit into the memory of one process, and the others cannot do it again with less."""


class UnlikeProcesses(ValueError):
    """Processes of one run differ in what they were given or see; all processes raise it."""


# All processes raise the same of these, so the main one prints it.
OF_ALL_PROCESSES = (WrongNumbers, CannotWrite, TooLargeRow, UnlikeProcesses)
# Of these, an error of ours is a message.
_MESSAGES = (ValueError, TypeError, TooLargePass, *OF_ALL_PROCESSES)


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a message of ours: one line, without a full stop at its end.

    Of a validator's error it is the line with the value. Where a text says nothing without the name of the error's
    class, as that of a KeyError, the name is put before it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        line = re.sub(r"^\w+Error: ", "", lines[1]).split(". Errors: ")[0]
    elif isinstance(error, (LookupError, ArithmeticError, AttributeError, TypeError, AssertionError, SyntaxError)):
        line = f"{type(error).__name__}: {lines[0]}"
    else:
        line = lines[0]
    return line[:_MAX_LINE].rstrip(". ")


def where_to_go_on(step: int) -> str:
    """Which checkpoints are from before numbers that cannot be right, in a line with its end; empty if there is none.

    Args:
        step: gave the numbers, and is stopped before it saves anything; 0 before the first step.
    """
    if step < 2:
        return ""
    return f"A checkpoint-{step - 1} holds the weights that gave these numbers: go on from an earlier one, if any.\n"


def is_ours(trace: TracebackType | None) -> bool:
    """Whether this project raised an error on purpose.

    Python's own functions raise ValueErrors too: those have no frame, and end in an instruction that calls them. The
    source is not read for that: it may have been edited since the program began.
    """
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    file = Path(code.co_filename)
    is_in_project = file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)
    return is_in_project and code.co_code[trace.tb_lasti] == _RAISE


def name_of_script(script: str | None) -> str:
    """A script's name in messages: its path from the repository's root."""
    path = Path(script or "the script").resolve()
    return str(path.relative_to(ROOT)) if script and path.is_relative_to(ROOT) else (script or "the script")


def explain_mistakes() -> None:
    """Make an error of ours that ends a program a message with the program's line, and exit status 2 (or 3).

    So is one that a limit of the shell or the queue causes, also while libraries are imported, and, with status 4, one
    that comes of the loss of another process.

    Every other error, and every error at Python's prompt, in a notebook or with `python -X dev`, keeps its traceback.
    """
    former = sys.excepthook

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(sys.stderr, io.StringIO):  # torch's hook for several processes: lost if this ends the program
            sys.stderr = sys.__stderr__
        frames = traceback.extract_tb(trace)
        is_script = len(frames) > 1 and frames[0].name == "<module>" and Path(frames[0].filename).is_file()
        if limits := is_script and not sys.flags.dev_mode and limit_in_the_way(error):
            print(f"error: {printable(_said_of_limits(error, limits))}", file=sys.stderr)
            sys.exit(2)
        if is_script and not sys.flags.dev_mode and others.means_lost(error):
            others.end_program(error)
        is_message = kind in _MESSAGES and is_script and is_ours(trace)
        if not is_message or sys.flags.dev_mode:
            return former(kind, error, trace)
        place = f"{name_of_script(frames[0].filename)}, line {frames[0].lineno}"
        print(f"error: {place}: {printable(str(error))}", file=sys.stderr)
        sys.exit(WRONG_NUMBERS if kind is WrongNumbers else 2)

    sys.excepthook = explain


def _said_of_limits(error: BaseException, limits: str) -> str:
    said = first_line(error)
    said = said if type(error).__name__ in said else f"{type(error).__name__}: {said}"
    return (
        f"{said}.\nThis process has reached a limit that the shell or the queue has set: {limits}. Raise it, in a "
        "queue by asking for more memory, and start the same command again: it continues from the last checkpoint, "
        "if there is one. `python -X dev` shows where it was reached."
    )
