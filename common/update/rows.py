"""Which rows go together: mini-batches (one optimizer step each) and micro-batches (one forward pass each).

Mini-batches change the result: they depend on (seed, step, epoch) and on the row's number among all rows, never on the
number of processes. Micro-batches change only memory and speed: any split of a mini-batch gives the same gradient.
"""

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


def microbatch_rows(lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Split rows into forward passes of at most `max_tokens` padded tokens, rows of similar length together.

    Args:
        lengths: (B,) int64, tokens of each row, prompt and completion.
        max_tokens: padded tokens per forward pass; larger is faster and needs more memory. A row longer than that
            gets a pass of its own.

    Returns:
        int64 tensors of row indices, together a permutation of 0 .. B - 1; empty for B = 0.
    """
    order = lengths.argsort(stable=True, descending=True).tolist()
    microbatches: list[list[int]] = []
    width = 0
    for row in order:
        # Longest first: the first row of a micro-batch is its width.
        if microbatches and (len(microbatches[-1]) + 1) * width <= max_tokens:
            microbatches[-1].append(row)
        else:
            microbatches.append([row])
            width = int(lengths[row])
    return [torch.tensor(rows, dtype=torch.int64) for rows in microbatches]


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
