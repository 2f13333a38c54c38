"""Which rows go into one forward pass where completions share their prompt."""

import torch
from torch import Tensor

from common.rollouts import Rollouts
from common.sequences import WORTH_IT, Packing, grouped_lengths, groups
from common.update.rows import PASS_IN_TOKENS, microbatch_rows


def pass_rows(minibatch: Rollouts, max_tokens: int, packing: Packing | None) -> list[Tensor]:
    """Split rows into forward passes of at most `max_tokens` tokens.

    Rows with one prompt are in one pass where computing the prompt once saves enough; all other rows are with rows of
    similar length, as in `microbatch_rows`. A prompt counts for each of its rows all the same: attention has a copy of
    its keys for each, so that a pass needs no more memory than that of the same rows with padding.

    Args:
        minibatch: b rows on the CPU.
        max_tokens: tokens per forward pass, padding included. A row longer than that gets a pass of its own.
        packing: what the model can do with packed rows; None: nothing.

    Returns:
        int64 tensors of row indices, together a permutation of 0 .. b - 1.
    """
    padded = microbatch_rows(minibatch.total_lengths, max_tokens)
    if packing is None:
        return padded
    shared = _sharing(minibatch, max_tokens, packing)
    # A pass more may take longer than the tokens that it saves.
    costs = [sum(_cost(minibatch[rows], packing) for rows in passes) for passes in (shared, padded)]
    return shared if costs[0] < costs[1] else padded


def tokens_of_pass(rows: Rollouts, packing: Packing | None) -> int:
    """Tokens of a pass with these rows as its budget counts them: padding, and a prompt for each of its rows."""
    if packing is not None and packing.pays(rows):
        return sum(_tokens(*group) for group in grouped_lengths(rows))
    return len(rows) * int(rows.total_lengths.max())


def _cost(rows: Rollouts, packing: Packing) -> float:
    """Of a pass with these rows, in tokens."""
    width = int(rows.total_lengths.max())
    packed = [packing.of_group(*group)[1] for group in grouped_lengths(rows)]
    return PASS_IN_TOKENS + (sum(packed) if packing.pays(rows) else len(rows) * packing.cost(width, width))


def _sharing(minibatch: Rollouts, max_tokens: int, packing: Packing) -> list[Tensor]:
    """Passes in which groups that save enough are together, and then the other rows."""
    lengths = minibatch.total_lengths
    limit = min(max_tokens, packing.max_tokens)
    shared: list[tuple[int, int, list[int]]] = []  # the longest completion, tokens, rows
    alone: list[int] = []
    for rows, (prompt, completions) in zip(groups(minibatch), grouped_lengths(minibatch), strict=True):
        for start, end in _parts([prompt + length for length in completions], limit):
            part = completions[start:end]
            tokens = _tokens(prompt, part)
            _, cost = packing.of_group(prompt, part)
            apart = sum(packing.cost(prompt + length, prompt + length) for length in part)
            if tokens <= limit and cost < WORTH_IT * apart:
                shared.append((max(part), tokens, rows[start:end]))
            else:
                alone += rows[start:end]
    others = torch.tensor(alone, dtype=torch.int64)
    return _filled(shared, limit) + [others[each] for each in microbatch_rows(lengths[others], max_tokens)]


def _tokens(prompt: int, completions: list[int]) -> int:
    """Tokens of rows with one prompt, counted for each of them."""
    return len(completions) * prompt + sum(completions)


def _parts(lengths: list[int], limit: float) -> list[tuple[int, int]]:
    """Where a group is cut, so that each part has at most `limit` tokens, or is one row."""
    parts, start, tokens = [], 0, 0
    for number, length in enumerate(lengths):
        if number > start and tokens + length > limit:
            parts.append((start, number))
            start, tokens = number, 0
        tokens += length
    return [*parts, (start, len(lengths))]


def _filled(shared: list[tuple[int, int, list[int]]], limit: float) -> list[Tensor]:
    """Passes of whole groups, those with completions of similar length together."""
    passes: list[list[int]] = []
    free = 0.0
    for _, tokens, rows in sorted(shared, key=lambda group: -group[0]):
        if not passes or tokens > free:
            passes.append([])
            free = limit
        passes[-1] += rows
        free -= tokens
    return [torch.tensor(rows, dtype=torch.int64) for rows in passes]
