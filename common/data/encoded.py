"""Encoded prompts: text, token ids and digests of N rows, in columns of an Arrow table that are read in place."""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


class Encoded:
    """The prompts of N rows.

    Args:
        table: of all rows that were encoded together.
        places: (N,) int64, which rows of the table these are.

    Attributes:
        texts: N strings, what the policy continues.
        ids: N lists of token ids.
        unknown: N strings, the characters that the tokenizer does not know.
        spelled: N strings, the first special token that chat messages spell, which is text there; mostly empty.
        lengths: (N,) int64, in tokens.
        text_digests, value_digests: (N,) uint64, of the text, and of the row's other columns.
    """

    def __init__(self, table: pa.Table, places: np.ndarray) -> None:
        import pyarrow.compute as pc

        self.texts, self.ids = Column(table["text"], places), Column(table["ids"], places)
        self.unknown, self.spelled = Column(table["unknown"], places), Column(table["spelled"], places)
        self.lengths = pc.list_value_length(table["ids"]).to_numpy().astype(np.int64)[places]
        self.text_digests, self.value_digests = (
            table[name].to_numpy()[places] for name in ("text_digest", "value_digest")
        )
        self._table, self._places = table, places

    def has(self, kind: str) -> bool:
        """Whether any row of the table is of a kind: "text", "chat" or "ids"."""
        return kind in self._table["kind"].unique().to_pylist()

    @property
    def one_of_each_shape(self) -> np.ndarray:
        """The first row of each sequence of roles, and of prompts that are no chat."""
        _, first = np.unique(self._table["shape"].to_numpy()[self._places], return_index=True)
        return np.sort(first)

    @property
    def rows_with_unknown(self) -> np.ndarray:
        """The rows with characters that the tokenizer does not know."""
        return self._rows_with("unknown")

    @property
    def rows_with_spelled(self) -> np.ndarray:
        """The rows whose chat messages spell special tokens."""
        return self._rows_with("spelled")

    def _rows_with(self, name: str) -> np.ndarray:
        import pyarrow.compute as pc

        return np.flatnonzero(pc.not_equal(self._table[name], "").to_numpy()[self._places])

    @property
    def row_of_largest_id(self) -> int:
        """The row with the largest token id."""
        import pyarrow.compute as pc

        lengths = pc.list_value_length(self._table["ids"]).to_numpy()
        starts = np.cumsum(lengths) - lengths  # no row is empty
        return int(np.maximum.reduceat(pc.list_flatten(self._table["ids"]).to_numpy(), starts)[self._places].argmax())

    def __len__(self) -> int:
        """N."""
        return len(self._places)

    def select(self, indices: np.ndarray) -> Encoded:
        """Some of the rows."""
        return Encoded(self._table, self._places[indices])


class Column(Sequence):
    """Values of a column of an Arrow table, each read when it is asked for.

    Args:
        values: of the whole table.
        places: (N,) int64, which of them.
    """

    def __init__(self, values: pa.ChunkedArray, places: np.ndarray) -> None:
        self._chunks, self._places = values.chunks, places
        self._starts = np.cumsum([0, *map(len, self._chunks)])

    def __len__(self) -> int:
        """N."""
        return len(self._places)

    def __getitem__(self, index: int | slice) -> Any:
        """A value, or the list of some."""
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        place = self._places[range(len(self))[index]]
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._chunks[number][int(place - self._starts[number])].as_py()

    def __eq__(self, other: object) -> bool:
        """Whether a sequence has the same values."""
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None
