"""Text from outside, as a terminal may show it.

Names of columns, rewards, runs and models, completions, and what other programs say can hold escape sequences that
clear a screen, rewrite lines, or turn the direction of writing. All that this project prints goes through here.
"""

import logging
import re
from collections.abc import Iterable

MAX_NAME = 80  # characters of one name in a message
MAX_NAMES = 20  # names in a message

# Line breaks and tabs are ours. Of the others, "\r" would overwrite a line.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # line ends, overrides of direction, and what is not seen
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""The text with control characters written as Python writes them: ``\x1b[2J``; line breaks and tabs stay."""
    return _UNSAFE.sub(_escaped, text)


def one_line(text: object, length: int = MAX_NAME) -> str:
    """A name or text from outside on one line, without what acts on a terminal, cut to `length` characters.

    Args:
        text: any object, shown as `str` shows it.
        length: at most so many characters; what is left out is counted.
    """
    shown = str(text)
    left_out = len(shown) - length
    shown = printable(shown[:length]).replace("\n", "\\n").replace("\t", "\\t")
    return f"{shown}... ({left_out} characters more)" if left_out > 0 else shown


def names(given: Iterable[object]) -> str:
    """Names from outside as a list with commas: each on one line and short, and not too many of them."""
    given = list(given)
    shown = [one_line(name) for name in given[:MAX_NAMES]]
    return ", ".join([*shown, *([f"... ({len(given) - MAX_NAMES} more)"] if len(given) > MAX_NAMES else [])])


class PrintableFormatter(logging.Formatter):
    """Writes log messages without what acts on a terminal; arguments are names and texts from outside."""

    def format(self, record: logging.LogRecord) -> str:
        """The whole message."""
        return printable(super().format(record))


def _escaped(found: re.Match) -> str:
    character = found[0]
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}" if character != "\r" else "\\r"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
