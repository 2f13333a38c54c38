"""What rules print, through pipes: whole lines, not too many, on the way to the run's output.

A rule's process may be killed at any moment, so nothing may wait in its buffers. What is printed may be a completion,
which may try to steer a terminal: control characters are shown, not obeyed.
"""

import contextlib
import ctypes
import os
import select
import sys
from typing import NamedTuple, TextIO

from common.terminal import printable

STDOUT, STDERR = 1, 2

# Of one call of a rule, which is a step's, on each of the two outputs.
MOST_BYTES = 4000
_PIPE = 1 << 16  # bytes that a pipe holds
_MOST_READS = 64  # at a time, since a thread of a rule may print without end


class Printed(NamedTuple):
    """What was printed on one output.

    Attributes:
        content: whole lines, if it was no single long one.
        left_out: bytes that were printed after it.
    """

    content: bytes = b""
    left_out: int = 0


class PrintPipes:
    """Two pipes that take the place of standard output and standard error in a rule's process.

    Raises:
        OSError: if no file can be opened any more.
    """

    def __init__(self) -> None:
        self._pipes = {STDOUT: os.pipe(), STDERR: os.pipe()}
        self._outputs = {read_end: number for number, (read_end, _) in self._pipes.items()}
        for read_end in self._outputs:
            os.set_blocking(read_end, False)
        self._content = {number: bytearray() for number in self._pipes}
        self._left_out = dict.fromkeys(self._pipes, 0)

    def register(self, poll: "select.poll") -> None:
        """Have a poll object report what is printed."""
        for read_end in self._outputs:
            poll.register(read_end, select.POLLIN)

    def read(self) -> None:
        """Take what is in the pipes."""
        for read_end, number in self._outputs.items():
            content = self._content[number]
            for _ in range(_MOST_READS):
                try:
                    new = os.read(read_end, _PIPE)
                except BlockingIOError:
                    break
                kept = new[: MOST_BYTES - len(content)]
                content += kept
                self._left_out[number] += len(new) - len(kept)

    def take(self) -> dict[int, Printed]:
        """What was printed since the last call, by output; empty if nothing was."""
        taken = {}
        for number, content in self._content.items():
            if content:
                kept = content
                if self._left_out[number] and b"\n" in content:
                    kept = content[: content.rindex(b"\n") + 1]
                taken[number] = Printed(bytes(kept), self._left_out[number] + len(content) - len(kept))
            self._content[number], self._left_out[number] = bytearray(), 0
        return taken

    def redirect(self) -> None:
        """Send all that this process and its programs print into the pipes."""
        for number, (read_end, write_end) in self._pipes.items():
            os.dup2(write_end, number)
            os.close(read_end)
            os.close(write_end)
        sys.stdout, sys.stderr = _line_by_line(sys.stdout, STDOUT), _line_by_line(sys.stderr, STDERR)


def _line_by_line(stream: object, number: int) -> TextIO:
    """A stream that writes each line to a descriptor at once; the given one, which modules may hold, if it can."""
    with contextlib.suppress(Exception):  # an object of a notebook, a test or the user, or None
        if stream.fileno() == number:
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
            return stream
    return open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def open_standard_files() -> None:
    """Make sure that descriptors 0, 1 and 2 are taken, so that a pipe does not get one of these numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free


def flush() -> None:
    """Write what waits in the buffers of Python and of C."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # None, closed, or an object of the user's
            stream.flush()
    _flush_c(None)


_flush_c = ctypes.CDLL(None).fflush


def show(printed: dict[int, Printed], name: str) -> None:
    """Print in this process what a rule printed in its own.

    Args:
        printed: by output.
        name: of the rule, for a remark about what was left out.
    """
    for number, (content, left_out) in printed.items():
        text = printable(content.decode("utf-8", "backslashreplace").replace("\r\n", "\n"))
        text += "" if text.endswith("\n") else "\n"
        if left_out:
            text += f"[the rule {name!r} printed {left_out:,} more bytes in this step, which are left out]\n"
        _write(sys.stdout if number == STDOUT else sys.stderr, text)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # a program without a console
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # a closed output; a rule's prints end no run
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
