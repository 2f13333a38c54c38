"""The prompts of rows as text and token ids, in columns that are mapped into memory and kept for the next start.

Large sets go through `datasets.map`, on several processes. What they depend on is in the name of the folder in the
cache: the rows, the tokenizer, what is added to each prompt, the versions of the libraries, and the code.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from common.data.cache import code_digest, digest_of
from common.data.encoded import Encoded
from common.data.mapping import map_rows
from common.data.table import Rows, kept_table, mapped_table
from common.data.vocabulary import Characters
from common.models.spellings import Spellings, Written

if TYPE_CHECKING:
    import pyarrow as pa

MIN_CACHED = 1000  # rows from which a folder in the cache is worth its files
BATCH = 1000

Render = Callable[[list], list[Written]]


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
        render: gives what the policy continues; a picklable function of prompts.
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
        # Lists in memory would be sent to each process.
        options = {"schema": _schema(), "batch_size": BATCH, "can_share": isinstance(rows, Rows), "progress": progress}
        map_rows(batch, len(rows), folder, **options)
        _check_shapes(mapped_table(sorted(folder.glob("*.arrow"))), rows, check)

    kept = fingerprint and kept_table(f"prompts-{fingerprint}", write)
    if kept:
        return kept[0]
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
        self._characters, self._spellings = Characters(self.tokenizer), Spellings(self.tokenizer)

    def __call__(self, numbers: Sequence[int]) -> pa.RecordBatch:
        import pyarrow as pa

        if isinstance(self.rows, Rows):  # which reads neighbours together
            rows = list(self.rows[numbers[0] : numbers[-1] + 1])
        else:
            rows = [self.rows[number] for number in numbers]
        kinds = [self._kind(number, row) for number, row in zip(numbers, rows, strict=True)]
        written = self._written(rows, kinds)
        texts = [each.text for each in written]
        self._check_text(numbers, texts)
        ids = self._ids(rows, kinds, written)
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
        values = [_digest(_json(_beside_text(row, kind))) for row, kind in zip(rows, kinds, strict=True)]
        unknown = self._characters.unknown_in(texts, ids)
        spelled = [each.first for each in written]
        return pa.record_batch([texts, ids, kinds, shapes, unknown, spelled, digests, values], schema=_schema())

    def _kind(self, number: int, row: dict) -> str:
        if row.get("prompt_ids") is not None:
            self._check_ids(number, row["prompt_ids"])
            return "ids"
        if row.get("prompt") is None:
            raise ValueError(
                f"{where(self.rows, number)} has the columns {', '.join(row)}: need a column `prompt`. Rename one."
            )
        return "chat" if isinstance(row["prompt"], list) else "text"

    def _written(self, rows: list[dict], kinds: list[str]) -> list[Written]:
        rendered = iter(self.render([row["prompt"] for row, kind in zip(rows, kinds, strict=True) if kind != "ids"]))
        return [
            next(rendered)
            if kind != "ids"
            else Written(self.tokenizer.decode(row["prompt_ids"], clean_up_tokenization_spaces=False))
            for row, kind in zip(rows, kinds, strict=True)
        ]

    def _ids(self, rows: list[dict], kinds: list[str], written: list[Written]) -> list[list[int]]:
        ids = [row["prompt_ids"] if kind == "ids" else [] for row, kind in zip(rows, kinds, strict=True)]
        for kind in ("chat", "text"):
            places = [place for place, each in enumerate(kinds) if each == kind]
            if places:
                # A chat template writes the first special token itself; for plain text the tokenizer adds it.
                texts = [written[place].text for place in places]
                found = self._tokenize(texts, add_special_tokens=kind == "text")
                for place, sequence in zip(places, found, strict=True):
                    ids[place] = self._spellings.encode(written[place]) if written[place].spelled else sequence
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


def _beside_text(row: dict, kind: str) -> dict:
    """The columns that the text does not stand for; the prompt is one where the text is that of token ids."""
    return {name: row[name] for name in sorted(row) if kind == "ids" or name != "prompt"}


def where(rows: Sequence[dict], index: int) -> str:
    """A row as messages name it."""
    return rows.where(index) if isinstance(rows, Rows) else f"row {index}"


def _schema() -> pa.Schema:
    import pyarrow as pa

    digests = [("text_digest", pa.uint64()), ("value_digest", pa.uint64())]
    names = [(name, pa.string()) for name in ("kind", "shape", "unknown", "spelled")]
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


def _fingerprint(rows: Sequence[dict], tokenizer: Any, identity: Sequence) -> str | None:
    """What the encoded rows depend on; None if that cannot be said."""
    if not tokenizer.is_fast:
        return None
    content = rows.fingerprint if isinstance(rows, Rows) else _content(rows)
    try:
        backend = tokenizer.backend_tokenizer.to_str()
    except Exception:  # of no narrower class: a part of the tokenizer is Python code
        return None
    if content is None:
        return None
    names = ("transformers", "tokenizers", "jinja2")
    modules = (__name__, "common.data.prompts", "common.data.table", "common.data.vocabulary", "common.models.chat")
    modules += ("common.models.system_role", "common.models.spellings", "common.models.normalizing")
    state = [type(tokenizer).__name__, backend, tokenizer.chat_template]
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
