"""Learner: a model's trainable parameters with their optimizer, and one exact optimizer step over all processes."""

import math

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW

from common.config import RLConfig


class Learner:
    """What is needed to train one model of the pool.

    Gradients are summed over processes once per optimizer step, without a wrapper around the model: exact whatever
    the number of rows on each process, also when one has none.

    Args:
        name: the model's name in the pool, and the prefix of its metrics.
        module: the model; parameters that require a gradient are trained.
        config: settings of the optimizer, of its schedule and of the steps per rollout.
    """

    def __init__(self, name: str, module: nn.Module, config: RLConfig) -> None:
        self.name = name
        self.config = config
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def optimizer_step(self, step: int, accelerator: Accelerator) -> float:
        """Sum the gradients over processes, clip them, and take one step with the learning rate of `step`.

        A gradient of exactly 0 (no row had anything to teach) changes nothing: momentum and weight decay rest too.

        Args:
            step: the run's step, from 1.
            accelerator: knows the processes.

        Returns:
            Norm of the gradient before clipping.

        Raises:
            FloatingPointError: if the gradient is not finite.
        """
        _sum_over_processes(self.parameters, accelerator)
        limit = self.config.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step}: the gradient of {self.name} is {norm}; one more step would spoil its weights. The last "
                "checkpoint is intact: go on from it with a lower --learning_rate or --max_grad_norm."
            )
        if norm > 0:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 1: linear warm-up, then constant, or falling to its floor at the last step."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * step / config.warmup_steps
        if config.lr_scheduler == "constant":
            return config.learning_rate
        progress = (step - config.warmup_steps) / max(config.num_steps - config.warmup_steps, 1)
        height = 1 - progress if config.lr_scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * height)


def _sum_over_processes(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    # On one process too: AdamW leaves a parameter without gradient alone, and decays one whose gradient is 0.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
    flat = accelerator.reduce(flat, "sum")
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter))
