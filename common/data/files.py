"""Reads rows from files: JSON lines, JSON and CSV, compressed or not, in UTF-8 or marked as UTF-16.

A row comes out as JSON text, with every value exactly as it was written. The cells of a CSV file stay text.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from common.terminal import names

FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
COMPRESSIONS = ("gz", "bz2", "xz", "zst")
READABLE = (
    ".jsonl (one row per line), .json (a list of rows), .csv, .tsv (the first line names the columns), each also "
    "with .gz, .bz2, .xz or .zst, and .parquet"
)

_MARKS = {  # byte order marks; the longer ones first, since one begins with the other
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_UTF8_MARK = b"\xef\xbb\xbf"
# A row of a million tokens has a few MB. What is larger is no row, and would fill the memory.
MAX_LINE = 64 * 2**20  # bytes, decompressed
MAX_JSON = 2 * 2**30  # bytes of a .json file, which is read as a whole and takes several times as much memory
MAX_NESTING = 100  # levels of lists and objects in a row; it is read again later, from deeper within a program
# Text of people and models is compressed to a tenth, of repeated templates to a fiftieth.
MAX_RATIO, FREE_BYTES = 200, 256 * 2**20

_NOT_JSON = (ValueError, RecursionError)  # json's own errors, huge numbers; values nested too deeply
_SURROGATE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}|\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def format_of(name: str) -> str | None:
    """The format that a file's name says, in any case: one of FORMATS; None if it says none."""
    suffixes = [suffix.lower().removeprefix(".") for suffix in Path(name).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
        if suffixes and suffixes[-1] == "parquet":
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else None


def is_data_file(name: str) -> bool:
    """Whether a name is that of a file which `read_rows` reads, by its ending."""
    return format_of(name) is not None


def is_compressed(name: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return Path(name).suffix.lower().removeprefix(".") in COMPRESSIONS


def is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder, not of a data set on the hub."""
    other = (".txt", ".xlsx", ".xls", ".ods", ".arrow", ".feather", ".pkl", ".yaml", ".yml", ".zip", ".tar")
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.lower().endswith(other)


def json_rows(source: str) -> Iterator[tuple[str, str, Any]]:
    """Read a file row by row.

    Args:
        source: path of a file of any format but parquet.

    Yields:
        For each row the place in the file, for messages, its JSON text and its value.

    Raises:
        ValueError: the file cannot be read; says where.
    """
    read = {"json": _json_rows, "csv": _csv_rows, "tsv": _csv_rows}.get(format_of(source), _jsonl_rows)
    try:
        for where, text, value in read(source):
            _refuse_depth(source, where, text, value)
            _refuse_surrogates(source, where, text, value)
            yield where, text, value
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(source, error) from error
    except OSError as error:
        if error.errno is None:  # from a decompressor
            raise _damaged(source, error) from error
        raise unreadable(source, error) from error


def _jsonl_rows(source: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(_lines(source), start=1):
        text = line.strip()
        if not text:
            continue
        try:
            value = json.loads(text)
        except _NOT_JSON as error:
            raise ValueError(
                f"dataset={source}: line {number} is not JSON ({_reason(error)}); every line must be one row. "
                "Correct or remove the line."
            ) from error
        yield f"line {number}", text, value


def _json_rows(source: str) -> Iterator[tuple[str, str, Any]]:
    text = "".join(_lines(source, MAX_JSON))
    try:
        rows = json.loads(text)
    except _NOT_JSON as error:
        if _is_object(text.lstrip().partition("\n")[0]):  # JSON lines under this name, as many have them
            yield from _jsonl_rows(source)
            return
        place = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"dataset={source}: not JSON ({place}{_reason(error)}); a list of rows is needed. "
            "Correct the file, or name it .jsonl if each of its lines is a row."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"dataset={source}: holds one JSON {type(rows).__name__}; a list of rows is needed. "
            "Put the rows in [...], or name the file .jsonl if each of its lines is a row."
        )
    for number, row in enumerate(rows, start=1):
        _refuse_depth(source, f"row {number}", None, row)
        yield f"row {number}", json.dumps(row), row


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except _NOT_JSON:
        return False


def _reason(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON, or none that Python reads."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    digits = sys.get_int_max_str_digits()
    return "nested too deeply" if isinstance(error, RecursionError) else f"a number of more than {digits} digits"


def _csv_rows(source: str) -> Iterator[tuple[str, str, Any]]:
    csv.field_size_limit(MAX_LINE)  # its own limit, 128 KiB, is less than a long prompt
    lines = _lines(source)
    num_before, first, delimiter = _header(lines)
    if format_of(source) == "tsv":
        delimiter = "\t"
    reader = csv.reader(_joined(first, lines), delimiter=delimiter or _delimiter(first), strict=True)
    end = num_before  # line of the file in which the last row ends
    try:
        columns = next(reader, [])
        _check_header(source, columns)
        end = num_before + reader.line_num
        for cells in reader:
            end = num_before + reader.line_num
            if not cells:
                continue
            where = f"line {end}"
            if len(cells) != len(columns):
                raise ValueError(
                    f"dataset={source}: the row that ends in {where} has {len(cells)} cells, but the first line "
                    f"names {len(columns)} columns: {names(columns)}. Put cells with commas, quotes or line "
                    'breaks in "...", with quotes inside doubled.'
                )
            row = {name: _cell(source, where, cell) for name, cell in zip(columns, cells, strict=True)}
            yield where, json.dumps(row), row
    except csv.Error as error:
        reason = "a quote that is opened there is not closed" if "end of data" in str(error) else str(error)
        raise ValueError(
            f"dataset={source}: the row that begins in line {end + 1} is not CSV ({reason}). Put cells with commas, "
            'quotes or line breaks in "...", with quotes inside doubled.'
        ) from error


def _header(lines: Iterator[str]) -> tuple[int, str, str | None]:
    """How many lines come before the first that is not empty, that line, and the delimiter if the file notes it."""
    number, delimiter = -1, None
    for number, line in enumerate(lines):
        if note := re.fullmatch(r'"?sep=(.)"?', line.strip("\r\n")):
            delimiter = note[1]
        elif line.strip():
            return number, line, delimiter
    return number + 1, "", delimiter


def _delimiter(header: str) -> str:
    """What parts most names: the comma, or the semicolon that spreadsheets of many countries write, or the tab."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    # A comma may be part of a name; a semicolon hardly is.
    return max((";", ",", "\t"), key=unquoted.count) if re.search("[;,\t]", unquoted) else ","


def _joined(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _check_header(source: str, columns: list[str]) -> None:
    if len(set(columns)) < len(columns) or not all(map(str.strip, columns)) or not columns:
        raise ValueError(
            f"dataset={source}: the first line must name the columns, each differently; it has "
            f"{', '.join(map(repr, columns))[:200] or 'nothing'}. Write the names, such as prompt,answer."
        )


def _cell(source: str, where: str, cell: str) -> Any:
    """Text as it stands; None if it is empty; chat messages if it is JSON of such."""
    start = cell.lstrip()[:40]
    if not re.match(r"\[\s*\{\s*['\"]", start):
        return cell or None
    try:
        value = json.loads(cell)
    except _NOT_JSON:
        if re.match(r"\[\s*\{\s*'(role|content)'", start):
            raise ValueError(
                f"dataset={source}: {where} has chat messages as Python prints them ({start!r}...), which only Python "
                "reads. Write them as JSON, with json.dumps(messages), or save the data as .jsonl or .parquet."
            ) from None
        return cell
    is_chat = all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in value)
    return value if is_chat else cell


# Bytes and characters


def _lines(source: str, max_bytes: int | None = None) -> Iterator[str]:
    """The lines of a file with their line breaks; a byte order mark says the encoding and is left out.

    Args:
        source: path of the file.
        max_bytes: of all lines, decompressed; None: any number.
    """
    with _opened(source) as file:
        start = file.read(4)
    encoding = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
    with _opened(source) as file:
        if encoding is not None:
            yield from _decoded_stream(source, file, encoding, max_bytes)
            return
        for number, line in enumerate(_bounded(source, file, max_bytes), start=1):
            content = line.removeprefix(_UTF8_MARK) if number == 1 else line
            if b"\0" in line:
                # The first characters of data are ASCII, whose other byte is zero.
                order = "be" if line.startswith(b"\0") else "le"
                raise ValueError(
                    f"dataset={source}: line {number} has zero bytes, as UTF-16 without a byte order mark does. "
                    f"Convert the file, such as: iconv -f utf-16{order} -t utf8 {source} > new{Path(source).suffix}"
                )
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                place = error.start + len(line) - len(content)
                raise ValueError(
                    f"dataset={source}: byte {place + 1} of line {number} is {line[place]:#04x}, which is not UTF-8: "
                    f"{_around(content, error.start)}. Rows are read as UTF-8, or as UTF-16 with a byte order mark. "
                    f"Convert the file, such as: iconv -f latin1 -t utf8 {source} > new{Path(source).suffix}"
                ) from None
            yield text


def _bounded(source: str, file: IO, max_bytes: int | None) -> Iterator:
    """The lines of a file, or an error before one, or all of them, fill the memory.

    Raises:
        ValueError: a line is longer than MAX_LINE, the file than `max_bytes`, or a compressed file expands enormously.
    """
    size, total = os.path.getsize(source), 0
    limit = max(FREE_BYTES, MAX_RATIO * size) if is_compressed(source) else None
    for number in itertools.count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise ValueError(
                f"dataset={source}: line {number} has more than {MAX_LINE // 2**20} MB; a row has at most that much. "
                "Write one row per line, or remove the line."
            )
        total += len(line)
        if limit is not None and total > limit:
            raise ValueError(
                f"dataset={source}: {size / 2**20:.1f} MB that expand to more than {limit / 2**20:.0f} MB (line "
                f"{number}), as no text does. If it is meant, decompress the file and pass that."
            )
        if max_bytes is not None and total > max_bytes:
            raise ValueError(
                f"dataset={source}: more than {max_bytes / 2**30:.0f} GB (line {number}); a list of rows is read as a "
                "whole and takes several times as much memory. Write one row per line, as .jsonl, or as .parquet."
            )
        yield line


def _decoded_stream(source: str, file: IO[bytes], encoding: str, max_bytes: int | None) -> Iterator[str]:
    try:
        yield from _bounded(source, io.TextIOWrapper(file, encoding=encoding, newline="\n"), max_bytes)
    except UnicodeError as error:
        raise ValueError(
            f"dataset={source}: it begins with the mark of {encoding.upper()}, but is not: {error}. Write it as UTF-8."
        ) from None


def _around(line: bytes, place: int) -> str:
    """The characters before a byte, and the byte as a mark."""
    return repr(line[max(0, place - 30) : place].decode("utf-8", "replace") + "\N{REPLACEMENT CHARACTER}")


def _opened(source: str) -> IO[bytes]:
    suffix = Path(source).suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(source, compression="zstd"))
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(source, "rb")


def unreadable(source: str, error: OSError) -> ValueError:
    """What to say of a file that the system does not let us read."""
    return ValueError(f"dataset={source}: cannot be read ({error.strerror}). Check the file and its rights.")


def _damaged(source: str, error: Exception) -> ValueError:
    kind = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}.get(Path(source).suffix.lower(), "")
    return ValueError(f"dataset={source}: unreadable {kind} file ({error}). Write or fetch it again.")


def _refuse_depth(source: str, where: str, text: str | None, row: Any) -> None:
    """A row is read again, where Python may have less room for nested values than here."""
    if text is not None and text.count("[") + text.count("{") <= MAX_NESTING:
        return
    level = [row]
    for _ in range(MAX_NESTING):
        inner = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
        if not level:
            return
        level = [each for each in level if each]
    raise ValueError(
        f"dataset={source}: {where} is nested more than {MAX_NESTING} deep; values of a row are text, numbers and "
        "chat messages. Correct or remove it."
    )


def _refuse_surrogates(source: str, where: str, text: str, row: Any) -> None:
    """Half of a pair, as JSON can write it, is no character: neither tokenizers nor Arrow take it."""
    if not _SURROGATE.search(text):
        return
    columns = row.items() if isinstance(row, dict) else [("the row", row)]
    for name, value in columns:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"dataset={source}: {where} has the character {error.object[error.start]!r} in {name}: half of a pair "
                "of surrogates, which is no text that a tokenizer can read, such as an emoji that was cut in two. "
                "Remove it, or write the whole pair."
            ) from None
