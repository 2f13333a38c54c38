"""The prompts of rows as text and token ids, in columns that are mapped into memory and kept for the next start.

Large sets go through `datasets.map`, on several processes. What they depend on is in the name of the folder in the
cache: the rows, the tokenizer, what is added to each prompt, the versions of the libraries, and the code.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from common.data.cache import code_digest, data_folder, digest_of
from common.data.table import Rows, mapped_table
from common.data.vocabulary import Characters

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("nanorlhf")

MIN_CACHED = 1000  # rows from which a folder in the cache is worth its files
ROWS_PER_PROCESS = 20_000  # what one process encodes in a second or two, several times its start
BATCH = 1000

Render = Callable[[list], list[str]]


class Encoded:
    """The prompts of N rows.

    Args:
        table: of all rows that were encoded together.
        places: (N,) int64, which rows of the table these are.

    Attributes:
        texts: N strings, what the policy continues.
        ids: N lists of token ids.
        unknown: N strings, the characters that the tokenizer does not know.
        lengths: (N,) int64, in tokens.
        text_digests, value_digests: (N,) uint64, of the text, and of the row's other columns.
    """

    def __init__(self, table: pa.Table, places: np.ndarray) -> None:
        import pyarrow.compute as pc

        self.texts, self.ids = Column(table["text"], places), Column(table["ids"], places)
        self.unknown = Column(table["unknown"], places)
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
        import pyarrow.compute as pc

        return np.flatnonzero(pc.not_equal(self._table["unknown"], "").to_numpy()[self._places])

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


def encode(
    rows: Sequence[dict],
    tokenizer: transformers.PreTrainedTokenizerBase,
    render: Render,
    *,
    check: Callable[[list[dict]], None],
    identity: Sequence | None,
    progress: bool = True,
) -> Encoded:
    """Text and token ids of each row's prompt.

    Args:
        rows: with `prompt`, or with `prompt_ids`, which are taken as they are.
        tokenizer: the policy's.
        render: gives the texts that the policy continues; a picklable function of prompts.
        check: called with one prompt of each sequence of roles; raises ValueError for a template that leaves some out.
        identity: what `render` depends on besides the tokenizer; None: more than this, so that nothing is kept.
        progress: show a bar, or a line in a file, if it takes a while.

    Raises:
        ValueError: a row has no prompt, or one that cannot be encoded.
    """
    if isinstance(rows, Rows) and rows.indices is not None and 2 * len(rows) > len(rows.whole):
        # Encoded in the order of the table, and so again for any other rows that are held out.
        table, places = _encoded(rows.whole, tokenizer, render, check, identity, progress), rows.indices
    else:
        table, places = _encoded(rows, tokenizer, render, check, identity, progress), np.arange(len(rows))
    return Encoded(table, places)


def _encoded(rows: Sequence[dict], tokenizer: Any, render: Render, check: Callable, identity: Any, progress: bool):
    batch = _Batch(rows, tokenizer, render)
    fingerprint = None if identity is None or len(rows) < MIN_CACHED else _fingerprint(rows, tokenizer, identity)

    def write(folder: Path) -> None:
        _map(batch, len(rows), folder, progress)
        _check_shapes(_mapped(folder), rows, check)

    folder = fingerprint and data_folder(f"prompts-{fingerprint}", write)
    if folder:
        return _mapped(folder)
    table = _in_memory(batch, len(rows))
    _check_shapes(table, rows, check)
    return table


@dataclass
class _Batch:
    """Encodes some rows."""

    rows: Sequence[dict]
    tokenizer: transformers.PreTrainedTokenizerBase
    render: Render

    def __post_init__(self) -> None:
        """Know no character yet."""
        self._characters = Characters(self.tokenizer)

    def __call__(self, numbers: Sequence[int]) -> pa.RecordBatch:
        import pyarrow as pa

        if isinstance(self.rows, Rows):  # which reads neighbours together
            rows = list(self.rows[numbers[0] : numbers[-1] + 1])
        else:
            rows = [self.rows[number] for number in numbers]
        kinds = [self._kind(number, row) for number, row in zip(numbers, rows, strict=True)]
        texts = self._texts(rows, kinds)
        self._check_text(numbers, texts)
        ids = self._ids(rows, kinds, texts)
        for number, sequence in zip(numbers, ids, strict=True):
            if not sequence:
                raise ValueError(
                    f"{where(self.rows, number)} has a prompt without tokens: there is nothing to continue. Remove "
                    "the row, or give its prompt some text."
                )
        shapes = [
            " ".join(str(message["role"]) for message in row["prompt"]) if kind == "chat" else ""
            for kind, row in zip(kinds, rows, strict=True)
        ]
        digests = [_digest(text.encode()) for text in texts]
        values = [_digest(_json({name: row[name] for name in sorted(row) if name != "prompt"})) for row in rows]
        unknown = self._characters.unknown_in(texts, ids)
        return pa.record_batch([texts, ids, kinds, shapes, unknown, digests, values], schema=_schema())

    def _kind(self, number: int, row: dict) -> str:
        if row.get("prompt_ids") is not None:
            self._check_ids(number, row["prompt_ids"])
            return "ids"
        if row.get("prompt") is None:
            raise ValueError(
                f"{where(self.rows, number)} has the columns {', '.join(row)}: need a column `prompt`. Rename one."
            )
        return "chat" if isinstance(row["prompt"], list) else "text"

    def _texts(self, rows: list[dict], kinds: list[str]) -> list[str]:
        rendered = iter(self.render([row["prompt"] for row, kind in zip(rows, kinds, strict=True) if kind != "ids"]))
        return [
            next(rendered)
            if kind != "ids"
            else self.tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False)
            for row, kind in zip(rows, kinds, strict=True)
        ]

    def _ids(self, rows: list[dict], kinds: list[str], texts: list[str]) -> list[list[int]]:
        ids = [row["prompt_ids"] if kind == "ids" else [] for row, kind in zip(rows, kinds, strict=True)]
        for kind in ("chat", "text"):
            places = [place for place, each in enumerate(kinds) if each == kind]
            if places:
                # A chat template writes the first special token itself; for plain text the tokenizer adds it.
                found = self._tokenize([texts[place] for place in places], add_special_tokens=kind == "text")
                for place, sequence in zip(places, found, strict=True):
                    ids[place] = sequence
        return ids

    def _check_ids(self, number: int, prompt_ids: Any) -> None:
        size = len(self.tokenizer)
        valid = isinstance(prompt_ids, list) and all(type(token) is int and 0 <= token < size for token in prompt_ids)
        if not valid:
            raise ValueError(
                f"{where(self.rows, number)} has prompt_ids={prompt_ids!r:.80}; need a list of token ids, integers "
                f"from 0 to {size - 1}, which are those of this model's tokenizer. Correct the row, or leave the "
                "column out and give a column `prompt`."
            )

    def _check_text(self, numbers: Sequence[int], texts: list[str]) -> None:
        for number, text in zip(numbers, texts, strict=True):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{where(self.rows, number)} has the character {text[error.start]!r} in its prompt: half of a "
                    "pair of surrogates, which no tokenizer reads. Remove it, or write the whole pair."
                ) from None

    def _tokenize(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        kind = type(self.tokenizer)
        own = (kind.__call__, kind._encode_plus) != (TokenizersBackend.__call__, TokenizersBackend._encode_plus)
        if own:
            return self.tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]
        # The first call sets the backend up. Then the backend alone gives the ids, without where each token stands.
        self.tokenizer(texts[:1], add_special_tokens=add_special_tokens, **options)
        encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]


def where(rows: Sequence[dict], index: int) -> str:
    """A row as messages name it."""
    return rows.where(index) if isinstance(rows, Rows) else f"row {index}"


def _schema() -> pa.Schema:
    import pyarrow as pa

    digests = [("text_digest", pa.uint64()), ("value_digest", pa.uint64())]
    names = [("kind", pa.string()), ("shape", pa.string()), ("unknown", pa.string())]
    return pa.schema([("text", pa.large_string()), ("ids", pa.list_(pa.int32())), *names, *digests])


def _check_shapes(table: pa.Table, rows: Sequence[dict], check: Callable[[list[dict]], None]) -> None:
    shapes = table["shape"]
    for shape in shapes.unique().to_pylist():
        if shape:
            check(rows[shapes.index(shape).as_py()]["prompt"])


def _in_memory(batch: _Batch, count: int) -> pa.Table:
    import pyarrow as pa

    starts = range(0, count, BATCH)
    return pa.Table.from_batches([batch(range(i, min(i + BATCH, count))) for i in starts], schema=_schema())


def _mapped(folder: Path) -> pa.Table:
    return mapped_table(sorted(folder.glob("*.arrow")))


def _map(batch: _Batch, count: int, folder: Path, progress: bool) -> None:
    """Encode all rows into Arrow files in a folder."""
    import datasets

    shows_bar = progress and sys.stderr.isatty()
    if progress and not shows_bar:
        logger.info("encoding %d prompts, which later starts with the same data find in %s ...", count, folder.parent)
    numbers = datasets.Dataset.from_dict({"number": range(count)}).with_format("arrow")
    # Lists in memory would be sent to each process.
    num_processes = _num_processes(count) if isinstance(batch.rows, Rows) else 1
    with _bars(shows_bar), _one_thread_per_process(num_processes > 1):
        numbers.map(
            partial(_mapped_batch, batch),
            batched=True,
            batch_size=BATCH,
            remove_columns=["number"],
            features=datasets.Features.from_arrow_schema(_schema()),
            num_proc=num_processes if num_processes > 1 else None,
            cache_file_name=str(folder / "prompts.arrow"),
            load_from_cache_file=False,
            new_fingerprint="prompts",  # the folder's name says what they are
            desc="Encoding prompts",
        )


def _mapped_batch(batch: _Batch, numbers: pa.Table) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches([batch(numbers["number"].to_pylist())])


def _num_processes(count: int) -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # the machine's other processes of the run
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return max(1, min(cores // local, count // ROWS_PER_PROCESS))


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Bars of `datasets`, or none."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


@contextmanager
def _one_thread_per_process(enabled: bool) -> Iterator[None]:
    """Keep the tokenizer from starting threads in each of several processes."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if enabled:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if enabled and before is None:
            del os.environ[name]
        elif enabled:
            os.environ[name] = before


def _fingerprint(rows: Sequence[dict], tokenizer: Any, identity: Sequence) -> str | None:
    """What the encoded rows depend on; None if that cannot be said."""
    if not tokenizer.is_fast:
        return None
    content = rows.fingerprint if isinstance(rows, Rows) else _content(rows)
    if content is None:
        return None
    names = ("transformers", "tokenizers", "jinja2")
    modules = (__name__, "common.data.prompts", "common.data.table", "common.data.vocabulary", "common.models.chat")
    modules += ("common.models.system_role",)
    state = [type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    state += [tokenizer.special_tokens_map, tokenizer.split_special_tokens]
    return digest_of(content, _json(state).decode(), list(identity), list(map(version, names)), code_digest(*modules))


def _content(rows: Sequence[dict]) -> str | None:
    digest = hashlib.sha256()
    try:
        for row in rows:
            digest.update(json.dumps(row).encode() + b"\n")
    except (TypeError, ValueError):  # values that JSON cannot write
        return None
    return digest.hexdigest()


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _json(value: Any) -> bytes:
    return json.dumps(value, default=_type_name, skipkeys=True).encode()


def _type_name(value: object) -> str:
    """Stands for a value that JSON cannot hold, whose text may differ from process to process."""
    return type(value).__name__
