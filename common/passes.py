"""From the rollouts of a step to the forward passes of this process.

Mini-batches are dealt out by the rows' numbers in the step, so that neither the number of processes nor leaving rows
out changes who is together; micro-batches by a token budget, which changes nothing but memory and speed.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor

from common.batching import microbatch_rows, minibatch_rows
from common.config import RLConfig
from common.losses import token_weights
from common.models import forward_context
from common.rollouts import Rollouts, filler


class Passes:
    """Splits rollouts, and adds up sums over processes.

    Args:
        config: batch sizes, token budget, seed, mask_truncated.
        accelerator: knows the processes and the device.
        dtype: precision of forward passes.
    """

    def __init__(self, config: RLConfig, accelerator: Accelerator, dtype: torch.dtype) -> None:
        self.config = config
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dtype = dtype

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The tensor added up over all processes, on the device it came from."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)

    def step_lengths(self, rollouts: Rollouts, num_rows: int) -> Tensor:
        """(num_rows,) int64: completion tokens of every row of the step; 0 for rows that mask_truncated leaves out."""
        lengths = torch.zeros(num_rows, dtype=torch.int64)
        left_out = rollouts.truncated & self.config.mask_truncated
        lengths[rollouts.rows] = torch.where(left_out, 0, rollouts.lengths)
        return self.sum_over_processes(lengths)

    def minibatches(
        self, rollouts: Rollouts, *, step: int, epoch: int, average_over: str = "tokens"
    ) -> Iterator[tuple[Tensor, Rollouts]]:
        """This process's rows of each mini-batch.

        Args:
            rollouts: B rows, with step_lengths.
            step: the step; it decides the order together with the epoch.
            epoch: which pass over the rollouts, from 0.
            average_over: "tokens", "rows" or "constant", what the token weights make the mean over.

        Yields:
            int64 indices of the rows in `rollouts`, possibly none, and the rows with their token weights.
        """
        config = self.config
        dealt = minibatch_rows(
            len(rollouts.step_lengths), config.num_minibatches, seed=config.seed, step=step, epoch=epoch
        )
        for numbers in dealt:
            rows = torch.isin(rollouts.rows, numbers).nonzero().squeeze(1)
            minibatch = rollouts[rows]
            lengths = rollouts.step_lengths[numbers]
            mask = minibatch.completion_mask
            if config.mask_truncated:
                mask = mask & ~minibatch.truncated[:, None]
            minibatch.token_weights = token_weights(
                mask,
                average_over=average_over,
                num_rows=int((lengths > 0).sum()),
                num_tokens=int(lengths.sum()),
                max_completion_length=config.max_completion_length,
            )
            yield rows, minibatch

    def microbatches(self, minibatch: Rollouts) -> Iterator[tuple[Tensor | None, Rollouts]]:
        """The forward passes of a mini-batch: as many on every process, so that sharded models stay in step.

        Args:
            minibatch: rows of this process, possibly none.

        Yields:
            int64 indices of the rows in `minibatch` (None for a filler that counts for nothing), and the rows on the
            device, without common padding.
        """
        chosen = microbatch_rows(minibatch.total_lengths, self.config.max_tokens_per_microbatch)
        num_passes = len(chosen)
        if self.accelerator.num_processes > 1:
            counts = torch.zeros(self.accelerator.num_processes)
            counts[self.accelerator.process_index] = num_passes
            num_passes = int(self.sum_over_processes(counts).max())
        for rows in chosen:
            yield rows, minibatch[rows].trimmed().to(self.device)
        for _ in range(num_passes - len(chosen)):
            yield None, filler(minibatch).to(self.device)

    def forward_context(self) -> AbstractContextManager[None]:
        """Autocast where passes are in less than float32."""
        return forward_context(self.device, self.dtype)


def weighted_loss(per_token: Tensor, microbatch: Rollouts) -> Tensor:
    """Sum of the per-token losses by their weights; garbage in padding, even inf or NaN, stays out.

    Args:
        per_token: (b, C) float32.
        microbatch: b rows with token weights.

    Returns:
        Scalar.
    """
    return torch.where(microbatch.completion_mask, per_token * microbatch.token_weights, 0.0).sum()
