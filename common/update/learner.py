"""Learner: a model's trainable parameters with their optimizer, and exact optimizer steps over all processes."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.config import RLConfig
from common.mistakes import WrongNumbers, where_to_go_on
from common.rollouts import Rollouts
from common.sharding import is_part, own_part
from common.update.batches import Batches
from common.update.optimizers import HostAdamW, make_optimizer

# A process's part of a global mean: the metric's name, the sum, and what to divide by; or of a maximum: the name, the
# value, and None.
MetricPart = tuple[str, Tensor | float, Tensor | float | None]
# What a loss reports about a micro-batch; see `metric_part`.
Metric = Tensor | tuple[Tensor, Tensor]

# Numbers that are added up over processes at once: 2^26 float32 are 256 MiB, and a copy of them.
MAX_REDUCED = 2**26


class Learner:
    """Trains one model of the pool.

    Gradients are summed over processes once per optimizer step, without a wrapper around the model; those of a sharded
    model in each backward pass. This is exact for any number of rows on each process, even none.

    Args:
        name: the model's name in the pool, and the prefix of its metrics.
        module: the model; parameters that require a gradient are trained.
        config: settings of the optimizer, of its schedule and of the steps per rollout.
    """

    def __init__(self, name: str, module: nn.Module, config: RLConfig) -> None:
        self.name = name
        self.config = config
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(module, config)

    def update(
        self,
        rollouts: Rollouts,
        loss: Callable[[Rollouts], tuple[Tensor, dict[str, Metric]]],
        *,
        batches: Batches,
        step: int,
        epoch: int = 0,
        rate: float | None = None,
        average_over: str = "tokens",
        num_minibatches: int | None = None,
        check: Callable[[list[MetricPart]], None] | None = None,
    ) -> list[MetricPart]:
        """Make one pass over the rollouts, with an optimizer step for each mini-batch.

        The model must be on the device. Only its weights and its optimizer change.

        Args:
            rollouts: B rows; dropped rows of the step still count in the means.
            loss: (b, C) loss of each token of a micro-batch, of which token weights make a mean, and metrics by name,
                as in `metric_part`.
            batches: makes mini-batches and micro-batches.
            step: decides the learning rate and, with `epoch`, which rows are in which mini-batch.
            epoch: which pass over the rollouts, from 0.
            rate: learning rate; None: the schedule's at `step`.
            average_over: "tokens", "rows" or "constant": what the mean is over.
            num_minibatches: None: the setting.
            check: called on all processes with the metrics of epoch 0's first mini-batch, before its optimizer step;
                what it raises leaves the weights as they are.

        Returns:
            This process's parts of the metrics. Those with the prefix first/ come from the first mini-batch of epoch 0
            only, those with max/ are maxima over all tokens; both lose the prefix.

        Raises:
            WrongNumbers: if a gradient is not finite.
            TooLargeRow: if a row does not fit into memory alone.
        """
        parts: list[MetricPart] = []
        is_first = epoch == 0
        count = int(batches.accelerator.is_main_process)  # only the main process counts the mini-batches
        minibatches = batches.minibatches(
            rollouts,
            step=step,
            epoch=epoch,
            average_over=average_over,
            num_minibatches=num_minibatches or self.config.num_minibatches,
        )
        for _, minibatch in minibatches:
            parts.append((f"{self.name}/loss", 0.0, count))
            parts += self._add_gradient(minibatch, loss, batches, is_first=is_first)
            if is_first and check is not None:
                check(parts)
            batches.step_can_begin_anew = False
            parts.append((f"{self.name}/grad_norm", self.optimizer_step(step, batches.accelerator, rate=rate), 1))
            is_first = False
        return parts

    def _add_gradient(
        self,
        minibatch: Rollouts,
        loss: Callable[[Rollouts], tuple[Tensor, dict[str, Metric]]],
        batches: Batches,
        *,
        is_first: bool,
    ) -> list[MetricPart]:
        """Add the gradient of a mini-batch, in as many passes as memory needs, and return its parts of the metrics."""
        while True:
            parts: list[MetricPart] = []

            def report(total: Tensor, metrics: dict[str, Metric], mask: Tensor, parts: list = parts) -> None:
                parts.append((f"{self.name}/loss", total, 0))
                for name, values in metrics.items():
                    if name.startswith("max/"):
                        parts.append((name.removeprefix("max/"), values.max(), None))
                    elif is_first or not name.startswith("first/"):
                        parts.append((name.removeprefix("first/"), *metric_part(values, mask)))

            with self._gradients_leave():
                is_complete = batches.backward(minibatch, loss, report)
            if is_complete:
                return parts
            self.drop_gradient()
            batches.begin_anew()

    def optimizer_step(self, step: int, accelerator: Accelerator, *, rate: float | None = None) -> float:
        """Sum the gradients over processes, clip them, and take one step.

        A gradient of exactly 0 (no row has a signal) changes nothing: there is no momentum or weight decay either.

        Args:
            step: the run's step, from 1.
            accelerator: knows the processes.
            rate: learning rate; None: the schedule's at `step`.

        Returns:
            Norm of the gradient before clipping.

        Raises:
            WrongNumbers: if the gradient is not finite.
        """
        holders, device = self._holders_of_gradients(), self.parameters[0].device
        limit = self.config.max_grad_norm or math.inf
        # Also on one process: AdamW skips a parameter without gradient, but decays one whose gradient is 0.
        for holder in holders:
            if holder.grad is None:
                holder.grad = torch.zeros_like(holder)
        if is_part(self.parameters[0]):  # summed while they were spread again
            norm = _clip_parts([own_part(holder.grad) for holder in holders], limit, accelerator, device)
        else:
            _sum_over_processes(holders, accelerator, device)
            norm = float(nn.utils.clip_grad_norm_(holders, limit))
        if not math.isfinite(norm):
            raise WrongNumbers(
                f"step {step}: the gradient of {self.name} is {norm}; one more step would spoil its weights. A run "
                f"keeps its settings, so start a new one with a lower --learning_rate or --max_grad_norm.\n"
                f"{where_to_go_on(step)}".rstrip()
            )
        if norm > 0:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step) if rate is None else rate
            self.optimizer.step()
        self.drop_gradient()
        return norm

    def drop_gradient(self) -> None:
        """Forget the gradient of a mini-batch, wherever it is by now."""
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients_leave(self) -> AbstractContextManager[None]:
        """Within it, gradients leave the device during a backward pass if the optimizer works on the host."""
        return self.optimizer.receiving() if isinstance(self.optimizer, HostAdamW) else nullcontext()

    def _holders_of_gradients(self) -> list[Tensor]:
        """What has the gradient in .grad: the parameters, or their masters on the host, in the same order."""
        if isinstance(self.optimizer, HostAdamW):
            return self.optimizer.with_gradient(self.parameters)
        return self.parameters

    def holder(self, parameter: nn.Parameter) -> Tensor:
        """What the numbers of the optimizer for a parameter belong to: itself, or its master on the host."""
        return self.optimizer.masters[parameter] if isinstance(self.optimizer, HostAdamW) else parameter

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 1."""
        return self.config.scheduled_rate(step)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Go on from the optimizer's state in a checkpoint.

        A run that began with one group, in which vectors decay too, keeps it: resuming changes no result.

        Args:
            state: from `optimizer.state_dict()`.
        """
        groups = self.optimizer.param_groups
        if len(state["param_groups"]) == 1:
            groups[:] = [groups[0] | {"params": self.parameters}]
        self.optimizer.load_state_dict(state)


def metric_part(values: Metric, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """A micro-batch's part of the mean of a metric: the sum, and what to divide by.

    Args:
        values: (b, C) float, whose mean is over the tokens of the loss mask; (b, 1) float, whose mean is over the
            completions with such tokens; or (b, C) with the (b, C) bool mask of its own mean.
        loss_mask: (b, C) bool.
    """
    values, mask = values if isinstance(values, tuple) else (values, loss_mask)
    if values.shape[1] == 1:
        mask = mask.any(1, keepdim=True)
    return torch.where(mask, values, 0.0).sum(), mask.sum()


def _sum_over_processes(holders: list[Tensor], accelerator: Accelerator, device: torch.device) -> None:
    if accelerator.num_processes == 1:
        return
    for gradients in _parts([holder.grad for holder in holders]):
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).to(device)
        flat = accelerator.reduce(flat, "sum")
        for gradient, total in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _clip_parts(parts: list[Tensor], limit: float, accelerator: Accelerator, device: torch.device) -> float:
    """Scale a gradient that is spread over processes to a norm of at most `limit`; gives its norm before."""
    squared = nn.utils.get_total_norm(parts).double().square()
    norm = accelerator.reduce(squared.to(device), "sum").sqrt().item()
    if norm > limit:
        for part in parts:
            part.mul_(limit / (norm + 1e-6))  # as clip_grad_norm_ does
    return norm


def _parts(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in parts of at most MAX_REDUCED numbers, or of one gradient, since each part is copied."""
    part: list[Tensor] = []
    for gradient in gradients:
        if part and sum(each.numel() for each in (*part, gradient)) > MAX_REDUCED:
            yield part
            part = []
        part.append(gradient)
    yield part
