"""The optimizer steps that one model takes on the rollouts of a step."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from common.learner import Learner
from common.passes import Passes
from common.rollouts import Rollouts

# Part of a global mean: its name, the sum, and what to divide by.
Share = tuple[str, Tensor | float, Tensor | float]


def optimizer_steps(
    learner: Learner,
    rollouts: Rollouts,
    loss: Callable[[Rollouts], tuple[Tensor, dict[str, Tensor]]],
    *,
    passes: Passes,
    step: int,
    average_over: str,
) -> Iterator[Share]:
    """Take the learner's num_update_epochs x num_minibatches steps.

    Args:
        learner: whose model, on the device, is trained by its own settings.
        rollouts: B rows; rows of the step that are missing here still count in the means.
        loss: (b, C) loss of each token of a micro-batch, and (b, C) metrics; token weights make it a mean.
        passes: makes mini-batches and micro-batches.
        step: the step.
        average_over: "tokens", "rows" or "constant", what the mean is over.

    Yields:
        This process's shares of the metrics. Those named first/ come from the first step only, without that prefix.
    """
    config, first = learner.config, True
    # Every process counts the same mini-batches, so one of them says how many there were.
    counts = int(passes.accelerator.is_main_process)
    for epoch in range(config.num_update_epochs):
        dealt = passes.minibatches(
            rollouts, step=step, epoch=epoch, average_over=average_over, num_minibatches=config.num_minibatches
        )
        for _, minibatch in dealt:
            yield f"{learner.name}/loss", 0.0, counts
            for total, metrics, mask in passes.backward(minibatch, loss):
                yield f"{learner.name}/loss", total, 0
                for name, values in metrics.items():
                    if first or not name.startswith("first/"):
                        yield name.removeprefix("first/"), torch.where(mask, values, 0.0).sum(), mask.sum()
            yield f"{learner.name}/grad_norm", learner.optimizer_step(step, passes.accelerator), 1
            first = False
