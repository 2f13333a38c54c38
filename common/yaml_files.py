"""All YAML that this project reads: settings, presets, recipes, config.yaml of runs that came from anywhere.

A file is UTF-8 whatever the locale says, holds plain values, and costs about as much as its size: aliases, which let a
few hundred bytes stand for gigabytes, are counted before anything is made of them.
"""

import codecs
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

MAX_BYTES = 4 * 2**20  # a file of settings has a few thousand
MAX_VALUES = 200_000  # values of a file once its aliases are written out
MAX_DEPTH = 50
MAX_DIGITS = 300  # of a number; longer ones take quadratic time to read, and Python refuses them in decimal

_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_TEXT = re.compile("[^\x09\x0a\x0d\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _PlainValues:
    """Plain values; refuses a name that stands in a mapping twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping whose keys differ."""
        seen = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_") if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise ConstructorError(
                    None, None, f"{key.value[:80]} is there twice, and one value would be lost", key.start_mark
                )
            if name is not None and name != "<<":
                seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; one that Python has no value for, such as the date 2024-13-45, is an error with its line."""
        if node.tag in _NUMBER_TAGS and len(node.value) > MAX_DIGITS:
            raise ConstructorError(
                None, None, f"a number of {len(node.value)} characters; at most {MAX_DIGITS} are read", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{str(node.value)[:80]!r} is no {kind} ({str(error)[:200]})", node.start_mark
            ) from None


class _SlowLoader(_PlainValues, yaml.SafeLoader):
    """Reads all that YAML and JSON have."""


class _Loader(_PlainValues, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Ten times as fast where PyYAML has libyaml, which refuses half of a surrogate pair, as JSON writes emojis."""


def read_yaml_file(path: Path, *, written_out: bool = True) -> Any:
    """What a YAML file holds: mappings, lists, text, numbers, dates, True, False and None.

    Args:
        path: of the file, which is UTF-8, with or without a byte order mark.
        written_out: count aliases as what they stand for; False for who looks only at the beginning of each value.

    Raises:
        ValueError: it is too large, not UTF-8 or not YAML, names a value twice, or its aliases expand to too much; the
            message begins with the path and the line.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    return parse_yaml(content, str(path), written_out=written_out)


def parse_yaml(content: bytes, name: str, *, written_out: bool = True) -> Any:
    """As `read_yaml_file`, of bytes.

    Args:
        content: of a file.
        name: of the file, for messages.
        written_out: as there.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(
            f"{name}: more than {MAX_BYTES // 2**20} MB, where settings take a few thousand bytes. Pass another file."
        )
    text = _decoded(content.removeprefix(codecs.BOM_UTF8), name)
    loader = _SlowLoader if _HALF_PAIR.search(text) else _Loader
    try:
        _refuse_growth(text, name, loader, written_out)
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(
            f"{name}: {line}not readable as YAML: {error.problem or error.context}. Fix the file."
        ) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not readable as YAML: {str(error)[:300]}. Fix the file.") from None


def _decoded(content: bytes, name: str) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}: line {line}: not readable as YAML: the byte {content[error.start]:#04x} is not UTF-8. Save the "
            "file as UTF-8."
        ) from None
    if odd := _NOT_TEXT.search(text):
        line = text.count("\n", 0, odd.start()) + 1
        raise ValueError(
            f"{name}: line {line}: not readable as YAML: it has the control character {odd[0]!r}. Remove it."
        )
    return text


def _refuse_growth(text: str, name: str, loader: type[_PlainValues], written_out: bool) -> None:
    """Count what a file holds with its aliases written out, and how deep, from the parser's events alone.

    Raises:
        ValueError: it is too much.
    """
    sizes: dict[str, int] = {}  # by anchor, of what is complete
    opened: list[tuple[str | None, int]] = []  # anchor, and how much came before
    total = 0
    for event in yaml.parse(text, loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
            total += 1
            if len(opened) > MAX_DEPTH:
                raise ValueError(f"{name}: line {line}: nested more than {MAX_DEPTH} deep. Write it flatter.")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            written_out |= event.value == "<<"  # it copies what its aliases stand for
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ValueError(f"{name}: line {line}: *{event.anchor[:80]} stands inside itself. Write it out.")
            # An unknown one is an error of the next pass.
            total += min(sizes.get(event.anchor, 1), MAX_VALUES + 1)
        if total > MAX_VALUES and written_out:
            raise ValueError(
                f"{name}: line {line}: more than {MAX_VALUES} values, aliases (*name) written out. Settings need a "
                "few hundred. Remove the aliases, or pass another file."
            )
