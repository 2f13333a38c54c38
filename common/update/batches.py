"""Batches: from the rollouts of a step to the forward passes of this process, and sums over processes.

Mini-batches are chosen by the rows' numbers in the step, so that neither the number of processes nor dropping rows
changes which rows are together. Micro-batches follow a token budget, which changes only memory and speed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.config import RLConfig
from common.losses import token_weights
from common.packing import packing_of
from common.rollouts import Rollouts, filler
from common.sequences import Packing
from common.update.rows import minibatch_rows
from common.update.shared_prompts import pass_rows


class Batches:
    """Splits rollouts into mini-batches and micro-batches, and sums over processes.

    Args:
        config: batch sizes, token budget, seed.
        accelerator: knows the processes and the device.
        dtype: precision of forward passes.

    Attributes:
        max_tokens_per_microbatch: the token budget; the config's, unless the run has found that less fits.
    """

    def __init__(self, config: RLConfig, accelerator: Accelerator, dtype: torch.dtype) -> None:
        self.config = config
        self.max_tokens_per_microbatch = config.max_tokens_per_microbatch
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dtype = dtype
        self.packing: Packing | None = None

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum of the tensor over all processes, on its own device."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)

    def number(self, rollouts: Rollouts) -> None:
        """Number rows from 0 over all processes, in their order, and store how many tokens of each are trained on.

        Rollouts that are already numbered do not change. All processes must call it, each with its own rows.

        Args:
            rollouts: B rows, whose `rows` are distinct over all processes; sets `rows` and `step_lengths`.
        """
        if rollouts.step_lengths is not None:
            return
        own = list(zip(rollouts.rows.tolist(), rollouts.loss_mask.sum(1).tolist(), strict=True))
        everyone = sorted(gather_object(own) if self.accelerator.num_processes > 1 else own)
        numbers = torch.tensor([number for number, _ in everyone], dtype=torch.int64)
        rollouts.rows = torch.searchsorted(numbers, rollouts.rows)
        rollouts.step_lengths = torch.tensor([length for _, length in everyone], dtype=torch.int64)

    def minibatches(
        self,
        rollouts: Rollouts,
        *,
        step: int,
        epoch: int,
        average_over: str = "tokens",
        num_minibatches: int | None = None,
    ) -> Iterator[tuple[Tensor, Rollouts]]:
        """This process's rows of each mini-batch.

        Args:
            rollouts: B rows; they are numbered if they are not yet.
            step: the step; with the epoch it decides the order.
            epoch: which pass over the rollouts, from 0.
            average_over: "tokens", "rows" or "constant": what the token weights average over.
            num_minibatches: None: the setting.

        Yields:
            int64 indices of the rows in `rollouts`, possibly none, and the rows with their token weights.
        """
        config = self.config
        self.number(rollouts)
        num_minibatches = num_minibatches or config.num_minibatches
        num_rows = len(rollouts.step_lengths)
        for numbers in minibatch_rows(num_rows, num_minibatches, seed=config.seed, step=step, epoch=epoch):
            rows = torch.isin(rollouts.rows, numbers).nonzero().squeeze(1)
            minibatch = rollouts[rows]
            lengths = rollouts.step_lengths[numbers]
            minibatch.token_weights = token_weights(
                minibatch.loss_mask,
                average_over=average_over,
                num_rows=int((lengths > 0).sum()),
                num_tokens=int(lengths.sum()),
                max_completion_length=config.max_completion_length,
            )
            yield rows, minibatch

    def microbatches(self, minibatch: Rollouts) -> Iterator[tuple[Tensor | None, Rollouts]]:
        """The forward passes of a mini-batch: the same number on every process, so that sharded models stay in step.

        Args:
            minibatch: rows of this process, possibly none.

        Yields:
            int64 indices of the rows in `minibatch` (None for a filler without any effect), and the rows on the
            device, without common padding.
        """
        chosen = pass_rows(minibatch, self.max_tokens_per_microbatch, self.packing)
        num_passes = len(chosen)
        if self.accelerator.num_processes > 1:
            counts = torch.zeros(self.accelerator.num_processes)
            counts[self.accelerator.process_index] = num_passes
            num_passes = int(self.sum_over_processes(counts).max())
        for rows in chosen:
            yield rows, minibatch[rows].trimmed().to(self.device)
        for _ in range(num_passes - len(chosen)):
            yield None, filler(minibatch).to(self.device)

    @torch.no_grad()
    def for_each_token(self, rollouts: Rollouts, forward: Callable[[Rollouts], Tensor], *, step: int) -> Tensor:
        """A model's output for each completion token, without gradient.

        Args:
            rollouts: B rows.
            forward: gives (b, C) float32 for a micro-batch.
            step: the step.

        Returns:
            (B, C) float32 on the CPU, 0 at padding.
        """
        result = torch.zeros(rollouts.completion_ids.shape)
        # The same forward passes as in the first epoch of the update, so that its first ratio is exactly 1.
        for rows, minibatch in self.minibatches(rollouts, step=step, epoch=0):
            for chosen, microbatch in self.microbatches(minibatch):
                with self.forward_context():
                    part = forward(microbatch)
                if chosen is not None:
                    result[rows[chosen], : part.shape[1]] = part.cpu()
        return result

    def backward(
        self, minibatch: Rollouts, loss: Callable[[Rollouts], tuple[Tensor, dict[str, Tensor]]]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
        """Add the gradient of one mini-batch to the parameters, micro-batch by micro-batch.

        Args:
            minibatch: rows of this process with their token weights, possibly none.
            loss: per-token loss and metrics of a micro-batch.

        Yields:
            For each micro-batch its part of the loss, its (b, C) metrics by name, and its (b, C) loss_mask.
        """
        for _, microbatch in self.microbatches(minibatch):
            with self.forward_context():
                per_token, token_metrics = loss(microbatch)
            total = weighted_loss(per_token, microbatch)
            total.backward()
            yield total.detach(), token_metrics, microbatch.loss_mask

    @contextmanager
    def passes_of(self, model: nn.Module) -> Iterator[None]:
        """Choose micro-batches for a model that is on the device: rows with one prompt together where that pays.

        All passes of a model need it, or none: with other micro-batches its first ratio would not be exactly 1.
        """
        with self.forward_context():
            self.packing = packing_of(model)
        try:
            yield
        finally:
            self.packing = None

    def forward_context(self) -> AbstractContextManager[None]:
        """Autocast if forward passes are below float32."""
        return forward_context(self.device, self.dtype)


def forward_context(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Autocast to `dtype` where it is below float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext()


def weighted_loss(per_token: Tensor, microbatch: Rollouts) -> Tensor:
    """Sum of the per-token losses by their weights; garbage in padding, even inf or NaN, stays out.

    Args:
        per_token: (b, C) float32.
        microbatch: b rows with token weights.

    Returns:
        Scalar.
    """
    return torch.where(microbatch.loss_mask, per_token * microbatch.token_weights, 0.0).sum()


def check_processes(config: RLConfig, accelerator: Accelerator) -> None:
    """Refuse a number of prompts that the processes cannot share equally.

    Raises:
        ValueError: if prompts_per_step is no multiple of the number of processes.
    """
    num_processes = accelerator.num_processes
    if config.prompts_per_step % num_processes:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step} on {num_processes} processes: each samples the same "
            f"number of prompts. Pass a multiple of {num_processes}, or start fewer processes."
        )
