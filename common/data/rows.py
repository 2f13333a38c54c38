"""Reads a task's data from files, folders or the hub, and holds rows out.

Each task decides what the columns mean.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.data.cache import code_digest, content_digest, digest_of
from common.data.files import READABLE, format_of, is_path, json_rows, unreadable
from common.data.sources import files_of_folder, hub_table, parquet_table, saved_table, say_once, table_digest
from common.data.table import KEY, KEY_BYTES, ROW, Rows, kept_table
from common.terminal import names

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SPLIT_SEED = 42  # used by published results on Countdown and others; independent of the run's seed

# Files from this size on, and rows from this number on, are kept in the cache in the form that is read in place.
MIN_CACHED_BYTES, MIN_CACHED_ROWS = 4 * 2**20, 20_000
MAX_BATCH_BYTES = 64 * 2**20  # of rows that are in memory before they are written

# Called with a row and its place for messages; raises ValueError, or gives the key under which the row is held out.
Examine = Callable[[dict, str], str]


def read_rows(source: str, split: str, columns: list[str] | None, *, examine: Examine | None = None) -> Rows:
    """Read the named columns of all rows, or all columns.

    The rows of a large file are kept in the cache of the `datasets` library, and read from there when asked for.

    Args:
        source: path of a file (`common.data.files.READABLE`); of a folder that `Dataset.save_to_disk` or
            `DatasetDict.save_to_disk` wrote, or of one with such files, whose splits are found as `load_dataset` finds
            them, such as a copy of a hub data set; or a hub id, with a configuration as `owner/name:config`.
        split: split of a hub data set, or a slice such as ``train[:1000]``; split of a folder that has several; single
            files have none, and a line says so if it is not "train".
        columns: the columns that the task needs, others are dropped; None: all columns.
        examine: checks each row and gives the key that `split_held_out` needs.

    Returns:
        The rows, at least one.

    Raises:
        ValueError: the source is missing, unreadable or empty, or a row lacks a column.
    """
    path, file_format = Path(source), format_of(source)
    if path.is_dir():
        files = files_of_folder(source, split)
        if files is None:
            rows = _table_rows(saved_table(source, split), source=source)
        else:
            rows = _file_rows(files, source, examine, columns)
    elif path.is_file() and file_format is not None:
        _mention_split(source, split)
        rows = _file_rows([source], source, examine, columns)
    elif path.is_file():
        raise ValueError(f"dataset={source}: a file of another kind. What is read: {READABLE}. Convert or rename it.")
    elif file_format is not None or is_path(source):
        raise ValueError(f"dataset={source}: there is no such file. Pass --dataset with an existing one.")
    else:
        rows = _table_rows(hub_table(source, split), source=source)
    if not rows:
        raise ValueError(f"dataset={source}: it has no rows; at least one is needed. Pass --dataset with other data.")
    if missing := [name for name in columns or [] if name not in rows.columns]:
        raise ValueError(_lacking(f"dataset={source}: row 1", rows.columns, missing, columns))
    if columns is not None:
        rows = rows.with_names(columns)
    return rows if examine is None or rows.has_keys else _with_keys(rows, examine)


def rows_of_dataset(dataset: datasets.Dataset) -> Rows:
    """The rows of a data set of the `datasets` library, read from where they are."""
    return _table_rows(dataset.with_format("arrow")[:], source="Task")


def is_prompt(prompt: object) -> bool:
    """Whether it is text, or a list of chat messages; not empty."""
    if not isinstance(prompt, list):
        return isinstance(prompt, str) and prompt != ""
    return bool(prompt) and all(isinstance(message, dict) and _is_message(message) for message in prompt)


def _is_message(message: dict) -> bool:
    content = message.get("content")
    if isinstance(content, list):
        # Parts of another kind, such as images, would be left out of what the policy reads.
        says = bool(content) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    else:
        says = isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
    return isinstance(message.get("role"), str) and says


def prompt_key(row: dict) -> str:
    """The key that rows with the same prompt share."""
    return str(row["prompt"])


def split_held_out(
    rows: Sequence[dict], num_held_out: int, *, key: Callable[[dict], Hashable] = prompt_key
) -> tuple[Sequence[dict], Sequence[dict]]:
    """Shuffle rows and hold some out; training rows with the key of a held-out row are dropped.

    The shuffle is that of `datasets.Dataset.train_test_split(seed=42)`, so results can be compared with published ones
    that used it.

    Args:
        rows: each with `prompt`, or what `key` needs, and any other columns.
        num_held_out: number of rows to hold out; 0 keeps all rows in their order.
        key: equal for rows that are the same problem; not used for rows that have been read with their keys.

    Returns:
        Training rows and held-out rows.

    Raises:
        ValueError: no row would be left to train on.
    """
    if num_held_out == 0:
        return rows, rows[:0]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows)).tolist()
    keys = rows.keys if isinstance(rows, Rows) and rows.has_keys else [key(row) for row in rows]
    seen = {keys[index] for index in order[:num_held_out]}
    train = [index for index in order[num_held_out:] if keys[index] not in seen]
    if not train:
        raise ValueError(
            f"num_eval_prompts={num_held_out}: the data has {len(rows)} rows, and none would be left to train on "
            f"without the held-out ones and their copies. Pass a smaller --num_eval_prompts or more data."
        )
    return _chosen(rows, train), _chosen(rows, order[:num_held_out])


def take_held_out(rows: Sequence[dict], num_held_out: int) -> Sequence[dict]:
    """The first rows of a split for evaluation.

    Args:
        rows: the whole split.
        num_held_out: how many to take.

    Raises:
        ValueError: the split has fewer.
    """
    if num_held_out > len(rows):
        raise ValueError(
            f"num_eval_prompts={num_held_out}: the split for evaluation has {len(rows)} rows, and each is evaluated "
            f"once. Pass --num_eval_prompts {len(rows)} or fewer."
        )
    return rows[:num_held_out]


def _chosen(rows: Sequence[dict], indices: list[int]) -> Sequence[dict]:
    return rows.select(indices) if isinstance(rows, Rows) else [rows[index] for index in indices]


# Rows of files


def _file_rows(files: list[str], source: str, examine: Examine | None, columns: list[str] | None) -> Rows:
    """The rows of files of one kind, one after the other."""
    content = digest_of(*map(_content_digest, files), *map(format_of, files))
    is_large = sum(Path(file).stat().st_size for file in files) >= MIN_CACHED_BYTES
    if format_of(files[0]) == "parquet":
        return _table_rows(*parquet_table(files, source, content if is_large else None), source=source)
    checks = _name_of(examine) if examine else None
    code = code_digest(__name__, "common.data.files", *([examine.__module__] if examine else ()))
    fingerprint = digest_of("text", content, columns, checks, code)
    scan = _Scan(files, source, columns, examine)
    kept = kept_table(f"rows-{fingerprint}", scan.write) if is_large else None
    if kept is None:
        scan = _Scan(files, source, columns, examine)
        table, mapped, found = scan.table(), None, list(scan.columns)
    else:
        table, mapped = kept
        found = json.loads((mapped[0].parent / "columns.json").read_text(encoding="utf-8"))
    return Rows(table, is_json=True, source=source, fingerprint=fingerprint, columns=found, files=mapped)


class _Scan:
    """One pass over text files: checks every row and gives record batches with its JSON text and its key."""

    def __init__(self, files: list[str], source: str, columns: list[str] | None, examine: Examine | None) -> None:
        self.files, self.source, self.needed, self.examine = files, source, columns, examine
        self.columns: dict[str, None] = {}

    def write(self, folder: Path) -> None:
        import pyarrow as pa

        with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, self._schema()) as stream:
            for batch in self._batches():
                stream.write_batch(batch)
        (folder / "columns.json").write_text(json.dumps(list(self.columns)), encoding="utf-8")

    def table(self) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_batches(self._batches(), schema=self._schema())

    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        return pa.schema([(ROW, pa.large_binary())] + [(KEY, pa.binary(KEY_BYTES))] * (self.examine is not None))

    def _batches(self) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa

        parts: list[tuple] = []
        size = 0
        for part in self._rows():
            parts.append(part)
            size += len(part[0])
            if len(parts) == 1000 or size > MAX_BATCH_BYTES:
                yield pa.record_batch(list(zip(*parts, strict=True)), schema=self._schema())
                parts, size = [], 0
        if parts:
            yield pa.record_batch(list(zip(*parts, strict=True)), schema=self._schema())

    def _rows(self) -> Iterator[tuple]:
        number = 0
        for file in self.files:
            for _, text, row in json_rows(file):
                number += 1
                where = f"dataset={self.source}: row {number}"
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{where} holds a {type(row).__name__}; a row must be an object that maps column names to "
                        "values. Correct or remove the row."
                    )
                if missing := [name for name in self.needed or [] if name not in row]:
                    raise ValueError(_lacking(where, row, missing, self.needed))
                self.columns.update(dict.fromkeys(row))
                yield (text.encode(),) if self.examine is None else (text.encode(), _digest(self.examine(row, where)))


def _mention_split(source: str, split: str) -> None:
    """Say that a file has no splits, if another than the default is named."""
    if split not in ("", "train"):
        say_once(
            f"dataset={source}, dataset_split={split}: a single file has no splits, so all its rows are read. Leave "
            "dataset_split out, or pass --dataset with a file of the rows that are meant."
        )


def _lacking(where: str, row: Sequence[str] | dict, missing: list[str], columns: list[str]) -> str:
    return (
        f"{where} holds {names(row) or 'nothing'}; the task needs the columns {', '.join(columns)}. Add or rename "
        f"{', '.join(missing)}."
    )


# Rows of Arrow tables


def _table_rows(
    table: pa.Table, fingerprint: str | None = None, files: list[Path] | None = None, *, source: str
) -> Rows:
    fingerprint = fingerprint or digest_of("table", table_digest(table))
    names = table.column_names
    return Rows(table, is_json=False, source=source, fingerprint=fingerprint, columns=names, files=files)


def _with_keys(rows: Rows, examine: Examine) -> Rows:
    """Check each row of a table, and add its key."""
    import pyarrow as pa

    def keys() -> pa.Table:
        digests = [_digest(examine(row, rows.where(index))) for index, row in enumerate(rows)]
        return pa.table({KEY: pa.array(digests, pa.binary(KEY_BYTES))})

    def write(folder: Path) -> None:
        table = keys()
        with pa.OSFile(str(folder / "keys.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)

    code = code_digest(__name__, "common.data.table", examine.__module__)
    name = digest_of(rows.fingerprint, _name_of(examine), code)
    kept = kept_table(f"keys-{name}", write) if len(rows) >= MIN_CACHED_ROWS else None
    table = keys() if kept is None else kept[0]
    return rows.with_keys(table[KEY])


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _name_of(function: Callable) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _content_digest(file: str) -> str:
    try:
        return content_digest(file)
    except OSError as error:
        raise unreadable(file, error) from error
