"""Attention of rows that lie one after the other in a single row, where completions share their prompt.

A segment is a prompt, a completion, or a prompt with its only completion. The tokens of a completion attend to its
prompt and to themselves, so a prompt goes through all other layers once for its completions, and nothing is padded
there.
"""

from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segment:
    """Tokens in a row of their own (start, length), which also see those of a prompt (prompt_start, prompt_length)."""

    start: int
    length: int
    prompt_start: int = 0
    prompt_length: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """Which of the N packed tokens attend to which, as indices of tokens.

    Attributes:
        whole: (W, w) int64, the tokens of each segment without a prompt; any token at padding.
        queries: (S, m) int64, the tokens of each segment with a prompt.
        keys: (S, p + m) int64, its prompt and itself.
        visible: (S, 1, m, p + m) bool, which keys each query sees.
        order: (N,) int64, where each token is in (W w + S m), the outputs of both.
        query_ends: (W + S + 1,) int32, where the segments begin and end.
        key_ends: (W + S + 1,) int32, where the keys of each segment begin and end in `all_keys`.
        all_keys: int64, the keys of all segments without padding.
        longest: of queries and of keys in a segment.
    """

    whole: Tensor
    queries: Tensor
    keys: Tensor
    visible: Tensor
    order: Tensor
    query_ends: Tensor
    key_ends: Tensor
    all_keys: Tensor
    longest: tuple[int, int]

    @staticmethod
    def of(segments: list[Segment], num_tokens: int) -> "PackedRows":
        """The indices of segments that follow each other without a gap."""
        whole = [each for each in segments if not each.prompt_length]
        split = [each for each in segments if each.prompt_length]
        whole_index, _ = _padded([_range(each.start, each.length) for each in whole])
        queries, _ = _padded([_range(each.start, each.length) for each in split])
        prompts, is_prompt = _padded([_range(each.prompt_start, each.prompt_length) for each in split])
        size = queries.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool).tril().expand(len(split), size, size)
        order = torch.empty(num_tokens, dtype=torch.int64)
        for block, first, width in ((whole, 0, whole_index.shape[1]), (split, whole_index.numel(), size)):
            for number, each in enumerate(block):
                order[each.start : each.start + each.length] = _range(first + number * width, each.length)
        keys = [
            torch.cat([_range(each.prompt_start, each.prompt_length), _range(each.start, each.length)])
            for each in segments
        ]
        return PackedRows(
            whole=whole_index,
            queries=queries,
            keys=torch.cat([prompts, queries], dim=1),
            visible=torch.cat([is_prompt[:, None].expand(-1, size, -1), causal], dim=2)[:, None],
            order=order,
            query_ends=_ends([each.length for each in segments]),
            key_ends=_ends([len(each) for each in keys]),
            all_keys=torch.cat(keys),
            longest=(max(each.length for each in segments), max(len(each) for each in keys)),
        )

    def to(self, device: torch.device) -> "PackedRows":
        """The same on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return PackedRows(**moved)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Transformers' sdpa, and that of packed rows where a pass is given `packed_rows`.

    Args:
        module: the attention layer.
        query: (1, heads, N, size of a head).
        key: (1, heads of keys, N, size of a head).
        value: as `key`.
        attention_mask: None for packed rows.
        packed_rows: which tokens attend to which.
        options: of transformers' sdpa.

    Returns:
        (1, N, heads, size of a head), and None as transformers wants it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward  # importing it takes seconds

    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert attention_mask is None, "a mask would be left out"
    rows, queries, keys_values = packed_rows, query[0], (key[0], value[0])
    if has_varlen() and query.device.type == "cuda" and query.dtype in SIXTEEN_BITS:
        return _varlen(queries, *keys_values, rows, options.get("scaling"))[None], None
    blocks = []
    for places, seen, mask in ((rows.whole, rows.whole, None), (rows.queries, rows.keys, rows.visible)):
        if places.numel():
            chosen = (_chosen(each, seen) for each in keys_values)
            block, _ = sdpa_attention_forward(module, _chosen(queries, places), *chosen, mask, **options)
            blocks.append(block.flatten(0, 1))
    return torch.cat(blocks).index_select(0, rows.order)[None], None


def _varlen(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, scale: float | None) -> Tensor:
    """(N, heads, size): flash attention of segments of any length, the last query of each sees its last key.

    Never run: there was no GPU. tests/gpu/test_packing_cuda.py compares it with padded rows, and so does each model's
    first pass.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (each.transpose(0, 1).contiguous() for each in (query, key, value))
    return varlen_attn(
        query,
        key.index_select(0, rows.all_keys),
        value.index_select(0, rows.all_keys),
        rows.query_ends,
        rows.key_ends,
        *rows.longest,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def has_varlen() -> bool:
    """Whether torch has attention of rows of unequal length here: flash attention, of GPUs since Ampere."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return torch.backends.cuda.is_flash_attention_available()


def _chosen(tensor: Tensor, places: Tensor) -> Tensor:
    """(b, heads, m, size): the tokens at (b, m) places of (heads, N, size)."""
    found = tensor.index_select(1, places.flatten())
    return found.view(len(tensor), *places.shape, tensor.shape[-1]).transpose(0, 1)


def _range(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length)


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64 with 0 at padding, and the bool mask of what is not padding."""
    if not rows:
        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool)
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
