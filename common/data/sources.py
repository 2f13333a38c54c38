"""Arrow tables of data: parquet files, what `datasets` has saved, the hub; and which files of a folder are a split."""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import io
import logging
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.cache import code_digest, digest_of
from common.data.files import READABLE, format_of, unreadable
from common.data.table import kept_table

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("nanorlhf")

# What `datasets` raises for a folder that it cannot read: without data, with a script, with a damaged archive.
_NO_DATA = (OSError, ValueError, RuntimeError, zipfile.BadZipFile)


def parquet_table(
    files: list[str], source: str, content: str | None
) -> tuple[pa.Table, str | None, list[Path] | None]:
    """The rows of parquet files.

    Args:
        files: their paths.
        source: what to call them in messages.
        content: a digest of what is in them, under which the rows are kept in the cache, decompressed; None: not kept.

    Returns:
        The table, its fingerprint if there is one, and its files in the cache if it is there.

    Raises:
        ValueError: a file is damaged, or the types of their columns do not go together.
    """
    import pyarrow as pa

    schema = _common_schema(files, source)

    def batches() -> Iterator[pa.RecordBatch]:
        for file in files:
            for batch in _parquet_batches(file, source):
                # As in a table of all files: absent columns are empty, integers become floats if others are.
                parts = [pa.Table.from_batches([], schema), pa.Table.from_batches([batch])]
                yield from pa.concat_tables(parts, promote_options="permissive").to_batches()

    def write(folder: Path) -> None:
        with pa.OSFile(str(folder / "rows.arrow"), "wb") as copy, pa.ipc.new_stream(copy, schema) as stream:
            for batch in batches():
                stream.write_batch(batch)

    name = digest_of("parquet", content, code_digest(__name__))
    kept = None if content is None else kept_table(f"parquet-{name}", write)
    return (kept[0], name, kept[1]) if kept else (pa.Table.from_batches(batches(), schema), None, None)


def _common_schema(files: list[str], source: str) -> pa.Schema:
    """The columns of all files, each of the type that holds the values of all."""
    import pyarrow as pa
    import pyarrow.parquet

    schemas = []
    for file in files:
        with _unless_damaged(file, source):
            schemas.append(pa.parquet.read_schema(file))
        names = schemas[-1].names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"dataset={source}: {Path(file).name} has more than one column of the name {', '.join(twice)}. Write "
                "it again with each name once."
            )
    try:
        return pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"dataset={source}: its parquet files have columns of one name whose types do not go together ({error}). "
            "Write each column with the same type in all files."
        ) from error


def _parquet_batches(file: str, source: str) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    with _unless_damaged(file, source), pa.parquet.ParquetFile(file) as rows:
        yield from rows.iter_batches(1000)


@contextmanager
def _unless_damaged(file: str, source: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(source, error) from error
        where = "" if file == source else f" {Path(file).name}"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"dataset={source}: unreadable parquet file{where} ({reason:.200}). Write or fetch it again."
        ) from error


def saved_table(source: str, split: str) -> pa.Table:
    """The rows of a folder that `save_to_disk` wrote.

    Raises:
        ValueError: it is damaged, or has no such split.
    """
    import datasets
    import pyarrow as pa

    try:
        data = datasets.load_from_disk(source)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise ValueError(
            f"dataset={source}: unreadable folder of datasets ({error}). Write or fetch it again."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        data = data[_checked_split(source, split, list(data))]
    return data.with_format("arrow")[:]


def hub_table(source: str, split: str) -> pa.Table:
    """The rows of a split of a hub data set, `owner/name` or `owner/name:config`.

    Raises:
        ValueError: there is no such data set, configuration or split, or it cannot be fetched.
    """
    import datasets

    try:
        name, *config = source.split(":")
        return datasets.load_dataset(name, *config, split=split).with_format("arrow")[:]
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise ValueError(
            f"dataset={source}, dataset_split={split}: neither a local file or folder nor a data set that the hub can "
            f"load ({error}). Check the name, the split and the network. Local files: {READABLE}."
        ) from error


def files_of_folder(source: str, split: str) -> list[str] | None:
    """The files of a split in a folder, found as `load_dataset` finds them; None if `save_to_disk` wrote the folder.

    Raises:
        ValueError: it has no such split, no files that are read, or files of different kinds.
    """
    if any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    found = _data_files(source)
    _mention_left_out(source, found)
    files = list(map(str, found[_checked_split(source, split, list(found))]))
    kinds = {format_of(file) == "parquet" if format_of(file) else None for file in files}
    if None in kinds or len(kinds) > 1:
        shown = ", ".join(sorted({Path(file).name for file in files})[:5])
        raise ValueError(
            f"dataset={source}, dataset_split={split}: the split has the files {shown}. What is read: {READABLE}; not "
            "parquet and others together. Pass --dataset with one file, or move the others away."
        )
    return files


def _data_files(folder: str) -> dict[str, list[str]]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:  # nothing is built there
        try:
            return datasets.load_dataset_builder(folder, cache_dir=cache).config.data_files
        except _NO_DATA as error:
            if "Config name is missing" in str(error):
                configs = datasets.get_dataset_config_names(folder)
                raise ValueError(
                    f"dataset={folder}: a copy of a hub data set with the configurations {', '.join(configs)[:300]}. "
                    "Pass --dataset with the files of one: a folder in it, or a file."
                ) from error
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"dataset={folder}: a folder without data that can be read ({reason}). Pass --dataset with a file, "
                f"with a folder of files ({READABLE}), or with one that datasets' save_to_disk wrote."
            ) from error


def _mention_left_out(folder: str, found: dict[str, list[str]]) -> None:
    """Say which files `load_dataset` leaves out on its own: it reads those of the most frequent kind."""
    card = Path(folder) / "README.md"
    if card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace"):
        return
    kinds = {format_of(str(file)) for files in found.values() for file in files}
    visible = [path for path in sorted(Path(folder).rglob("*")) if not path.name.startswith(".") and path.is_file()]
    others = [path.name for path in visible if format_of(path.name) not in {None, *kinds}]
    if others and None not in kinds:
        logger.warning(
            "dataset=%s: of a folder only the files of its most frequent kind are read (%s), not %s. Convert these, "
            "or move them away.",
            folder,
            ", ".join(f".{kind}" for kind in sorted(kinds)),
            ", ".join(others[:3]) + (" ..." if others[3:] else ""),
        )


def _checked_split(source: str, split: str, splits: list[Any]) -> str:
    names = list(map(str, splits))
    if split not in names:
        raise ValueError(
            f"dataset={source}, dataset_split={split}: the folder has the splits {', '.join(names)}. Pass "
            "--dataset_split with one of these."
        )
    return split


def table_digest(table: pa.Table) -> str:
    """A digest of the rows of a table."""
    import pyarrow as pa

    sink = _Digest()
    with pa.PythonFile(sink, mode="w") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    return sink.digest.hexdigest()


class _Digest(io.RawIOBase):
    """A file that keeps only the digest of what is written into it."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return len(content)
