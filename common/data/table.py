"""Rows as a sequence of dicts over Arrow tables, which are mapped into memory: a row is read when it is asked for.

Rows of text files are kept as their JSON text, because Arrow would change their values: it gives all rows of a column
one type, turns integers into floats and fills dicts with the keys of others.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from common.data.cache import data_folder, digest_of

if TYPE_CHECKING:
    import pyarrow as pa

ROW, KEY = "row", "key"  # columns: the JSON text of a row, the digest of the key under which it is held out
KEY_BYTES = 16


class Rows(Sequence):
    """Rows of a data set, in any order, each decoded when it is asked for.

    Args:
        table: with the columns of the data set.
        is_json: the table has the column ROW instead.
        source: what the rows were read from, for messages.
        fingerprint: of the table; differs if any of its rows does.
        names: the columns that every row gets, None where it has none; None: a row's own columns.
        indices: (N,) int64, which rows of the table there are; None: all of them.
        files: of the table, if it is mapped; another process opens them, instead of being sent the rows.

    Attributes:
        columns: the columns that any row has, in the order of their first appearance.
    """

    def __init__(
        self,
        table: pa.Table,
        *,
        is_json: bool,
        source: str,
        fingerprint: str,
        columns: list[str],
        names: list[str] | None = None,
        indices: np.ndarray | None = None,
        files: list[Path] | None = None,
    ) -> None:
        self.source, self.columns, self.names, self.indices = source, columns, names, indices
        self.files, self._is_json, self._of_table = files, is_json, fingerprint
        self._open(table)

    def _open(self, table: pa.Table) -> None:
        self._table = table
        self._batches = table.to_batches()
        self._starts = np.cumsum([0, *map(len, self._batches)])
        self._keys = table[KEY] if self._is_json and KEY in table.column_names else None
        decoders = {} if self._is_json else {field.name: _json_decoder(field.type) for field in table.schema}
        self._decoders = {name: decode for name, decode in decoders.items() if decode}

    def __getstate__(self) -> dict:
        """Without the table, if it is in files."""
        state = vars(self) | {"_batches": None, "_decoders": None}
        return state | {"_table": None, "_keys": None} if self.files else state

    def __setstate__(self, state: dict) -> None:
        """Map the files again."""
        vars(self).update(state)
        self._open(mapped_table(self.files) if self.files else self._table)

    def __len__(self) -> int:
        """Number of rows."""
        return self._table.num_rows if self.indices is None else len(self.indices)

    @overload
    def __getitem__(self, index: int) -> dict: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> dict | Rows:
        """A row, or some of them as rows."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._decoded(self._cell(range(len(self))[index]))

    def __iter__(self) -> Iterator[dict]:
        """All rows in their order."""
        count, start = len(self), 0
        if self.indices is not None and count:
            start = int(self.indices[0])
        if self.indices is not None and np.any(self.indices != np.arange(start, start + count)):
            yield from map(self.__getitem__, range(count))
            return
        for batch in self._table.slice(start, count).to_batches():
            for first in range(0, len(batch), 1000):
                part = batch.slice(first, 1000)
                yield from map(self._decoded, (part.column(ROW) if self._is_json else part).to_pylist())

    def __eq__(self, other: object) -> bool:
        """Whether a sequence has the same rows."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(dict.__eq__, self, other))

    __hash__ = None

    @property
    def whole(self) -> Rows:
        """The rows of the whole table, in its order."""
        return self._with(indices=None)

    @property
    def fingerprint(self) -> str:
        """Differs if any of these rows does."""
        chosen = None if self.indices is None else hashlib.sha256(self.indices.tobytes()).hexdigest()
        return digest_of(self._of_table, self.names, chosen)

    @property
    def has_keys(self) -> bool:
        """Whether `keys` are known."""
        return self._keys is not None

    @property
    def keys(self) -> list[bytes]:
        """KEY_BYTES for each row: equal for rows that are the same problem."""
        keys = self._keys.to_pylist()
        return keys if self.indices is None else [keys[index] for index in self.indices]

    def select(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows with these indices, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return self._with(indices=chosen if self.indices is None else self.indices[chosen])

    def with_names(self, names: list[str]) -> Rows:
        """The same rows, each with exactly these columns, None where it has none."""
        return self._with(names=names)

    def with_keys(self, keys: pa.ChunkedArray) -> Rows:
        """The same rows with a key for each row of the table."""
        return self._with(_keys=keys)

    def where(self, index: int) -> str:
        """A row as messages name it, counted from 1 as in the source."""
        return f"dataset={self.source}: row {1 + int(index if self.indices is None else self.indices[index])}"

    def _with(self, **changes: Any) -> Rows:
        copy = object.__new__(Rows)
        vars(copy).update(vars(self) | changes)
        return copy

    def _cell(self, index: int) -> bytes | dict:
        place = index if self.indices is None else int(self.indices[index])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        batch, offset = self._batches[number], place - int(self._starts[number])
        return batch.column(ROW)[offset].as_py() if self._is_json else batch.slice(offset, 1).to_pylist()[0]

    def _decoded(self, cell: bytes | dict) -> dict:
        if self._is_json:
            row = json.loads(cell)
        else:
            row = {name: _without_fillings(value) for name, value in cell.items()}
            row |= {name: decode(row[name]) for name, decode in self._decoders.items()}
        return row if self.names is None else {name: row.get(name) for name in self.names}


def kept_table(name: str, make: Callable[[Path], None]) -> tuple[pa.Table, list[Path]] | None:
    """The rows of the Arrow streams in a folder of the cache of data, and these files.

    Args:
        name: see `common.data.cache.cached_folder`.
        make: likewise; writes streams of one schema with names that end in .arrow.

    Returns:
        Both, or None if the cache cannot be written. A folder that cannot be read is made anew, once.
    """
    import pyarrow as pa

    for is_last in (False, True):
        folder = data_folder(name, make)
        if folder is None:
            return None
        files = sorted(folder.glob("*.arrow"))
        try:
            return mapped_table(files), files
        except (pa.ArrowException, OSError):
            if is_last:
                raise
            shutil.rmtree(folder, ignore_errors=True)
    return None


def mapped_table(files: Sequence[Path]) -> pa.Table:
    """The rows of Arrow streams, mapped into memory."""
    import pyarrow as pa

    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(file))).read_all() for file in files)


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Decodes values with JSON in them, as which `datasets` keeps values of mixed types; None if there is none."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        found = {field.name: _json_decoder(field.type) for field in kind}
        decoders = {name: decode for name, decode in found.items() if decode}
        if decoders:
            return partial(_decoded_fields, decoders)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        item = _json_decoder(kind.value_type)
        if item:
            return lambda value: value and [item(each) for each in value]
    return None


def _decoded_fields(decoders: dict[str, Callable[[Any], Any]], value: dict | None) -> dict | None:
    """A struct, which may have lost fields without a value."""
    return value and {name: decoders[name](each) if name in decoders else each for name, each in value.items()}


def _without_fillings(value: Any) -> Any:
    """Chat messages without the keys that Arrow gave them because others have them, such as tool_calls."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value):
        return [_without_none(message) for message in value]
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(each) for name, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value
