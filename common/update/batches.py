"""Batches: from the rollouts of a step to the forward passes of this process, and sums over processes.

Mini-batches are chosen by the rows' numbers in the step, so that neither the number of processes nor dropping rows
changes which rows are together. Micro-batches follow a token budget, which changes only memory and speed.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from common.config import RLConfig
from common.losses import token_weights
from common.mistakes import TooLargePass
from common.packing import packing_of
from common.rollouts import Rollouts, filler
from common.sequences import Packing
from common.sharding import is_sharded, reset
from common.update.out_of_memory import (
    StepAgain,
    free_memory,
    is_out_of_memory,
    let_go,
    smaller_budget,
    too_large_pass,
    too_large_row,
)
from common.update.rows import minibatch_rows
from common.update.shared_prompts import pass_rows, tokens_of_pass

logger = logging.getLogger("nanorlhf")


class Batches:
    """Splits rollouts into mini-batches and micro-batches, and sums over processes.

    Args:
        config: batch sizes, token budget, seed.
        accelerator: knows the processes and the device.
        dtype: precision of forward passes.

    Attributes:
        max_tokens_per_microbatch: the token budget; the config's, unless the run has found that less fits.
        has_less: the budget is smaller than at the run's start, since memory was short.
        step_can_begin_anew: no weight has changed in the step, and its trainer answers StepAgain.
        lowered_midway: the budget fell when a weight had changed in the step.
    """

    def __init__(self, config: RLConfig, accelerator: Accelerator, dtype: torch.dtype) -> None:
        self.config = config
        self.max_tokens_per_microbatch = config.max_tokens_per_microbatch
        self.has_less = self.step_can_begin_anew = self.lowered_midway = False
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dtype = dtype
        self.packing: Packing | None = None
        self._is_spread = False  # the model of the passes

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
        for rows in self._passes(minibatch):
            yield rows, self._microbatch(minibatch, rows)

    def _passes(self, minibatch: Rollouts) -> list[Tensor | None]:
        """The rows of each forward pass, None for a filler; as many passes on every process."""
        chosen = pass_rows(minibatch, self.max_tokens_per_microbatch, self.packing)
        num_passes = int(self.of_each_process([len(chosen)]).max())
        return [*chosen, *[None] * (num_passes - len(chosen))]

    def _microbatch(self, minibatch: Rollouts, rows: Tensor | None) -> Rollouts:
        return (filler(minibatch) if rows is None else minibatch[rows].trimmed()).to(self.device)

    def of_each_process(self, numbers: list[int]) -> Tensor:
        """(processes, numbers) int64: what each process has, the same on all of them."""
        everyone = torch.zeros(self.accelerator.num_processes, len(numbers), dtype=torch.int64)
        everyone[self.accelerator.process_index] = torch.tensor(numbers)
        return self.sum_over_processes(everyone)

    # ------------------------------------------------------------------------------------------------ out of memory

    def run_passes(self, minibatch: Rollouts, run: Callable[[Tensor | None, Rollouts], None]) -> bool:
        """Do something with each micro-batch; if memory is short on any process, lower the token budget of all.

        A pass that fails may have added a part of its gradient, so that a part of a mini-batch is worth nothing: all
        passes of it must be done again. The caller drops what they have given, and calls `begin_anew`.

        Args:
            minibatch: rows of this process, possibly none.
            run: takes the rows and the micro-batch of each pass, as `microbatches` yields them.

        Returns:
            Whether all passes were done, the same on all processes.

        Raises:
            TooLargeRow: on all processes, if a row does not fit alone.
            TooLargePass: on the processes where a pass of a sharded model does not fit.
        """
        lengths, failed = minibatch.total_lengths, None
        for rows in self._passes(minibatch):
            try:
                run(rows, self._microbatch(minibatch, rows))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                let_go(error)
                widths = lengths[rows].tolist() if rows is not None else [2]  # a filler has two tokens
                tokens = max(widths) if rows is None else tokens_of_pass(minibatch[rows], self.packing)
                failed = tokens, max(widths) if len(widths) == 1 else 0
                if self._is_spread:  # the others wait for this process in the middle of the pass
                    if rows is not None and len(widths) == 1:
                        raise TooLargePass(str(too_large_row(tokens, self.config))) from None
                    raise too_large_pass(self.max_tokens_per_microbatch, tokens) from None
                break  # and meet the others, which know nothing of it
        everyone = self.of_each_process([*(failed or (0, 0))])  # padded tokens that failed, and of one row alone
        if not everyone.any():
            return True
        free_memory()
        if alone := int(everyone[:, 1].max()):
            raise too_large_row(alone, self.config)
        self._lower(int(everyone[:, 0][everyone[:, 0] > 0].min()))
        return False

    def _lower(self, failed: int) -> None:
        budget = self.max_tokens_per_microbatch
        self.keep_to(smaller_budget(budget, failed))
        logger.warning(
            "out of memory in a pass of %d tokens, padding included: max_tokens_per_microbatch is %d from now on, no "
            "longer %d, and the passes are done again. Checkpoints of the run keep that.",
            *(failed, self.max_tokens_per_microbatch, budget),
        )

    def keep_to(self, budget: int) -> None:
        """Have passes of at most so many padded tokens from now on, which are fewer than before."""
        self.max_tokens_per_microbatch, self.has_less = min(budget, self.max_tokens_per_microbatch), True

    def begin_anew(self) -> None:
        """Go on after passes that did not fit: with the step from its first pass if no weight has changed in it.

        Then old log-probs, values and what follows from them are of the new passes too, as in a run that began with
        this budget. Otherwise the caller repeats the mini-batch alone.

        Raises:
            StepAgain: on all processes, if the step can begin anew.
        """
        if self.step_can_begin_anew:
            raise StepAgain
        self.lowered_midway = True

    # --------------------------------------------------------------------------------------------------- the passes

    @torch.no_grad()
    def for_each_token(self, rollouts: Rollouts, forward: Callable[[Rollouts], Tensor], *, step: int) -> Tensor:
        """A model's output for each completion token, without gradient.

        Args:
            rollouts: B rows.
            forward: gives (b, C) float32 for a micro-batch.
            step: the step.

        Returns:
            (B, C) float32 on the CPU, 0 at padding.

        Raises:
            TooLargeRow: if a row does not fit into memory alone.
        """
        while True:
            result = torch.zeros(rollouts.completion_ids.shape)
            # The same forward passes as in the first epoch of the update, so that its first ratio is exactly 1.
            minibatches = self.minibatches(rollouts, step=step, epoch=0)
            if all(self._fill(result, *minibatch, forward) for minibatch in minibatches):
                return result
            self.begin_anew()

    def _fill(self, result: Tensor, rows: Tensor, minibatch: Rollouts, forward: Callable[[Rollouts], Tensor]) -> bool:
        """Write the outputs of a mini-batch into its rows of the result."""

        def run(chosen: Tensor | None, microbatch: Rollouts) -> None:
            with self.forward_context():
                part = forward(microbatch)
            if chosen is not None:
                result[rows[chosen], : part.shape[1]] = part.cpu()

        return self.run_passes(minibatch, run)

    def backward(
        self,
        minibatch: Rollouts,
        loss: Callable[[Rollouts], tuple[Tensor, dict[str, Tensor]]],
        report: Callable[[Tensor, dict[str, Tensor], Tensor], None],
    ) -> bool:
        """Add the gradient of one mini-batch to the parameters, micro-batch by micro-batch.

        Args:
            minibatch: rows of this process with their token weights, possibly none.
            loss: per-token loss and metrics of a micro-batch.
            report: takes for each micro-batch its part of the loss, its (b, C) metrics by name, and its (b, C)
                loss_mask.

        Returns:
            Whether the gradient is complete; if not, see `run_passes`.
        """

        def run(_: Tensor | None, microbatch: Rollouts) -> None:
            with self.forward_context():
                per_token, token_metrics = loss(microbatch)
            total = weighted_loss(per_token, microbatch)
            total.backward()
            report(total.detach(), token_metrics, microbatch.loss_mask)

        return self.run_passes(minibatch, run)

    @contextmanager
    def passes_of(self, model: nn.Module) -> Iterator[None]:
        """Choose micro-batches for a model that is on the device: rows with one prompt together where that pays.

        All passes of a model need it, or none: with other micro-batches its first ratio would not be exactly 1.
        """
        self._is_spread = is_sharded(model)
        with self.forward_context():
            self.packing = packing_of(model)
        try:
            yield
        finally:
            self.packing, self._is_spread = None, False
            reset(model)

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


def check_processes(config: RLConfig, num_processes: int) -> None:
    """Refuse a number of prompts that the processes cannot share equally.

    Args:
        config: prompts_per_step is read.
        num_processes: that train together.

    Raises:
        ValueError: if prompts_per_step is no multiple of the number of processes.
    """
    if config.prompts_per_step % num_processes:
        raise ValueError(
            f"prompts_per_step={config.prompts_per_step} on {num_processes} processes: each samples the same "
            f"number of prompts. Pass a multiple of {num_processes}, or start fewer processes."
        )
