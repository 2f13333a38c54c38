"""Which rows go together: mini-batches (one optimizer step each) and micro-batches (one forward pass each).

Mini-batches change the result: they depend on (seed, step, epoch) and on the row's number among all rows, never on the
number of processes. Micro-batches change only memory and speed: any split of a mini-batch gives the same gradient.
"""

import numpy as np
import torch
from torch import Tensor

from common.rollouts import Rollouts
from common.seeds import hashed_seed, seeded_permutation


def minibatch_rows(num_rows: int, num_minibatches: int, *, seed: int, step: int, epoch: int) -> list[Tensor]:
    """Assign all rows of a step to its mini-batches at random.

    Args:
        num_rows: rows of the step on all processes.
        num_minibatches: optimizer steps per epoch; sizes differ by at most one row.
        seed: the run's seed.
        step: the step.
        epoch: which pass over the rollouts; each has its own order.

    Returns:
        num_minibatches int64 tensors of row numbers, together a permutation of 0 .. num_rows - 1.
    """
    order = seeded_permutation(num_rows, seed, step, epoch, "minibatches")
    return list(order.tensor_split(num_minibatches))


# Padding of a mini-batch, as a share of its real tokens. A mini-batch of few tokens may have more: another pass would
# take longer than that padding.
MAX_PADDING = 0.1
LITTLE_PADDING = 64
# What one more pass takes, in padded tokens that take as long: launching kernels and reading the weights. A GPU needs
# some hundred tokens before a pass takes longer than that. It decides only how many passes are made in these bounds.
PASS_IN_TOKENS = 512


def microbatch_rows(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Split rows into forward passes of at most `max_tokens` padded tokens, rows of similar length together.

    Padding is at most 10 % of the real tokens of all rows together, or 64 tokens where that is more. Within these
    bounds, rows sorted by length are cut where padding and the number of passes cost least together.

    Args:
        lengths: (B,) int64, tokens of each row, prompt and completion.
        max_tokens: padded tokens per forward pass; larger is faster and needs more memory. A row longer than that
            gets a pass of its own.

    Returns:
        int64 tensors of row indices, together a permutation of 0 .. B - 1, the longest rows first; empty for B = 0.
    """
    order = lengths.argsort(stable=True, descending=True)
    widths = lengths[order].numpy()
    allowed = max(MAX_PADDING * widths.sum(), LITTLE_PADDING)
    price = float(PASS_IN_TOKENS)
    while True:
        sizes = _cheapest_cuts(widths, max_tokens, price)
        starts = np.cumsum([0, *sizes[:-1]]) if sizes else []
        padding = sum(size * int(widths[start]) for start, size in zip(starts, sizes, strict=True)) - widths.sum()
        if padding <= allowed:  # at the latest without any padding, at a price of nearly 0
            return list(order.split(sizes))
        price /= 1.5


def _cheapest_cuts(widths: np.ndarray, max_tokens: int, price: float) -> list[int]:
    """Sizes of the micro-batches whose padded tokens, plus the price of each, are the fewest.

    Args:
        widths: (B,) int64, lengths in descending order: the first row of a micro-batch is its width.
        max_tokens: padded tokens of a micro-batch with several rows.
        price: of each micro-batch, in tokens.
    """
    num_rows = len(widths)
    costs = np.zeros(num_rows + 1)  # of the first j rows
    last_start = np.zeros(num_rows + 1, dtype=np.int64)  # where the last micro-batch of the first j rows begins
    first = 0  # the longest rows with which row j - 1 fits into a micro-batch
    for end in range(1, num_rows + 1):
        while first < end - 1 and (end - first) * widths[first] > max_tokens:
            first += 1
        starts = np.arange(first, end)
        candidates = costs[first:end] + (end - starts) * widths[first:end]
        best = int(candidates.argmin())
        costs[end], last_start[end] = candidates[best] + price, first + best
    sizes: list[int] = []
    end = num_rows
    while end > 0:
        sizes.append(end - int(last_start[end]))
        end = int(last_start[end])
    return sizes[::-1]


def keep_one_per_group(rollouts: Rollouts, num_generations: int, *, seed: int, step: int) -> Rollouts:
    """Keep a random row of each group: train on one completion per prompt, after all served as the baseline.

    Args:
        rollouts: rows of this process, numbered, rows of one prompt adjacent; some may have been dropped.
        num_generations: G.
        seed: the run's seed.
        step: the step.

    Returns:
        At most one row per group, renumbered: dropped rows leave the means. Of a group that was dropped before, the
        row that would have been kept still counts.
    """
    kept = kept_numbers(len(rollouts.step_lengths) // num_generations, num_generations, seed=seed, step=step)
    return rollouts.only(torch.isin(rollouts.rows, kept)).renumbered(kept)


def kept_numbers(num_groups: int, num_generations: int, *, seed: int, step: int) -> Tensor:
    """(num_groups,) int64: the number of the row that `keep_one_per_group` keeps of each group of the step."""
    generator = torch.Generator().manual_seed(hashed_seed(seed, step, "keep_per_group"))
    offsets = torch.randint(num_generations, (num_groups,), generator=generator)
    return torch.arange(num_groups) * num_generations + offsets
