r"""Where a completion says its answer: outside its thoughts, between tags, or in ``\boxed{}``.

Every task reads these places here, so all agree on what a thought is and which of several answers counts. Each
function passes over the text once, however many tags there are.
"""

import re
from typing import NamedTuple

THOUGHT_TAGS = ("think",)

_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BOX = re.compile(r"\\boxed\s*(?:(\{)|([-+]?\d[\d.,/]*|[A-Za-z](?![A-Za-z])))")


class Box(NamedTuple):
    """A box in a text.

    Attributes:
        content: what is in it.
        rest: the text after it.
    """

    content: str
    rest: str


def outside_thoughts(completion: str, prompt: str = "", tags: tuple[str, ...] = THOUGHT_TAGS) -> str:
    """What a completion says outside its thoughts; nothing if it never ends them.

    The thoughts begin at once if the prompt ends with the opening tag, or if the first such tag of the completion is
    a closing one: some chat templates put the opening tag into the prompt.

    Args:
        completion: the text to read.
        prompt: what it continues.
        tags: names of the tags around thoughts.

    Returns:
        The parts between the thoughts, with an empty pair of tags in place of each, so that what is left of two parts
        does not join to a third.
    """
    names = "|".join(tags)
    found = list(re.finditer(rf"<(/?)(?:{names})>", completion))
    inside = prompt.rstrip().endswith(tuple(f"<{tag}>" for tag in tags)) or bool(found and found[0][1])
    parts, start = [], 0
    for tag in found:
        if inside and tag[1]:
            inside, start = False, tag.end()
        elif not inside and not tag[1]:
            parts.append(completion[start : tag.start()])
            inside = True
    if not inside:
        parts.append(completion[start:])
    return f"<{tags[0]}></{tags[0]}>".join(parts)


def first_block(text: str, tag: str) -> str | None:
    """Text of the first complete block: from a closing tag back to the nearest opening one; None without a block."""
    start = None
    for found in re.finditer(f"<(/?){tag}>", text):
        if not found[1]:
            start = found.end()
        elif start is not None:
            return text[start : found.start()]
    return None


def last_block(text: str, tag: str) -> str | None:
    """Text from the last opening tag to the next closing one; None if either is missing."""
    _, opening, rest = text.rpartition(f"<{tag}>")
    block, closing, _ = rest.partition(f"</{tag}>")
    return block if opening and closing else None


def last_box(text: str) -> Box | None:
    r"""The last box of a text; None if there is no box, or if the last one is not closed.

    White space before the brace is no fault. ``\boxed 5`` and ``\boxed x`` are read as they are meant, although
    LaTeX would put no more than one digit into the box.
    """
    box = max(_BOX.finditer(text), key=re.Match.start, default=None)
    if box is None:
        return None
    if not box[1]:
        return Box(box[2].rstrip(".,"), text[box.end() :])
    end = closing_brace(text, box.end())
    return None if end is None else Box(text[box.end() : end], text[end + 1 :])


def closing_brace(text: str, start: int) -> int | None:
    """Where the brace is closed whose content begins at `start`; None if it is not. Escaped braces are text."""
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return None
