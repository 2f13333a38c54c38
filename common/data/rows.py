"""Reads a task's data from a local file, a folder of `datasets` or the hub, and holds rows out.

Each task decides what the columns mean.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np

SPLIT_SEED = 42  # used by published results on Countdown and others; independent of the run's seed


def read_rows(source: str, split: str, columns: list[str] | None) -> list[dict]:
    """Read the named columns of all rows, or all columns.

    Args:
        source: path of a .jsonl or .jsonl.gz (one row per line), .json (a list of rows) or .parquet file, of a folder
            that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or a hub id, with a configuration as
            `owner/name:config`.
        split: split of a hub data set, or a slice such as ``train[:1000]``; split of a folder that has several; local
            files have none.
        columns: the columns that the task needs, others are dropped; None: all columns.

    Returns:
        The rows, at least one.

    Raises:
        ValueError: the source is missing, unreadable or empty, or a row lacks a column.
    """
    readers = {".jsonl": _read_jsonl, ".gz": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    reader = readers.get(Path(source).suffix)
    if Path(source).is_dir():
        rows = _read_folder(source, split)
    elif reader is None:
        rows = _read_hub(source, split)
    elif Path(source).is_file():
        rows = reader(source)
    else:
        raise ValueError(f"dataset={source}: there is no such file. Pass --dataset with an existing one.")
    if not rows:
        raise ValueError(f"dataset={source}: it has no rows; at least one is needed. Pass --dataset with other data.")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(
                f"dataset={source}: row {number} holds a {type(row).__name__}; a row must be an object that maps "
                "column names to values. Correct or remove the row."
            )
        missing = [column for column in columns or [] if column not in row]
        if missing:
            raise ValueError(
                f"dataset={source}: row {number} holds {', '.join(row) or 'nothing'}; the task needs the columns "
                f"{', '.join(columns)}. Add or rename {', '.join(missing)}."
            )
    if columns is None:
        return rows
    return [{column: row[column] for column in columns} for row in rows]


def prompt_key(row: dict) -> str:
    """The key that rows with the same prompt share."""
    return str(row["prompt"])


def split_held_out(
    rows: list[dict], num_held_out: int, *, key: Callable[[dict], Hashable] = prompt_key
) -> tuple[list[dict], list[dict]]:
    """Shuffle rows and hold some out; training rows with the key of a held-out row are dropped.

    The shuffle is that of `datasets.Dataset.train_test_split(seed=42)`, so results can be compared with published ones
    that used it.

    Args:
        rows: each with `prompt`, or what `key` needs, and any other columns.
        num_held_out: number of rows to hold out; 0 keeps all rows in their order.
        key: equal for rows that are the same problem.

    Returns:
        Training rows and held-out rows.

    Raises:
        ValueError: no row would be left to train on.
    """
    if num_held_out == 0:
        return rows, []
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows)).tolist()
    held_out = [rows[index] for index in order[:num_held_out]]
    seen = {key(row) for row in held_out}
    train = [rows[index] for index in order[num_held_out:] if key(rows[index]) not in seen]
    if not train:
        raise ValueError(
            f"num_eval_prompts={num_held_out}: the data has {len(rows)} rows, and none would be left to train on "
            f"without the held-out ones and their copies. Pass a smaller --num_eval_prompts or more data."
        )
    return train, held_out


def take_held_out(rows: list[dict], num_held_out: int) -> list[dict]:
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


def _read_jsonl(source: str) -> list[Any]:
    open_text = gzip.open if source.endswith(".gz") else open
    try:
        with open_text(source, "rt", encoding="utf-8") as file:
            lines = list(file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"dataset={source}: unreadable gzip file ({error}). Write or fetch it again.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"dataset={source}: line {number} is not JSON ({error.msg}); every line must be one row. "
                f"Correct or remove the line."
            ) from error
    return rows


def _read_json(source: str) -> list[Any]:
    try:
        rows = json.loads(Path(source).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"dataset={source}: not JSON (line {error.lineno}: {error.msg}); a list of rows is needed. "
            f"Correct the file, or name it .jsonl if each of its lines is a row."
        ) from error
    if not isinstance(rows, list):
        raise ValueError(
            f"dataset={source}: holds one JSON {type(rows).__name__}; a list of rows is needed. "
            f"Put the rows in [...], or name the file .jsonl if each of its lines is a row."
        )
    return rows


def _read_parquet(source: str) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(source).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"dataset={source}: unreadable parquet file ({error}). Write or fetch it again.") from error


def _read_folder(source: str, split: str) -> list[dict]:
    import datasets
    import pyarrow

    try:
        data = datasets.load_from_disk(source)
    except (FileNotFoundError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"dataset={source}: a folder, but not one that datasets' save_to_disk wrote ({error}). Pass --dataset "
            "with a file, or with such a folder."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(
                f"dataset={source}, dataset_split={split}: the folder has the splits {', '.join(data)}. Pass "
                "--dataset_split with one of these."
            )
        data = data[split]
    return data.to_list()


def _read_hub(source: str, split: str) -> list[dict]:
    import datasets

    try:
        name, *config = source.split(":")
        return datasets.load_dataset(name, *config, split=split).to_list()
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"dataset={source}, dataset_split={split}: neither a local .jsonl(.gz), .json or .parquet file nor a "
            f"data set that the hub can load ({error}). Check the name, the split and the network."
        ) from error
