"""How much a run is going to write, estimated from its parameters, and whether there is room for it."""

import logging
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from common.config import RLConfig
from common.runs.checkpoints import POLICY_FOLDER, list_checkpoints
from common.runs.disk import free_bytes, in_bytes
from common.update.learner import Learner
from common.update.optimizers import bytes_per_weight, embedding_weights

logger = logging.getLogger("nanorlhf")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes that a run writes, without small files.

    Attributes:
        checkpoint: of one checkpoint.
        largest: of its largest file.
        final: of the final model.
    """

    checkpoint: int
    largest: int
    final: int


def sizes_of(
    learners: dict[str, tuple[Learner, nn.Module]], exported: Collection[str], *, use_lora: bool, num_writers: int = 1
) -> Sizes:
    """What the checkpoints and the final model of a run need.

    Args:
        learners: by name, each with its model.
        exported: those whose models are in final/ beside the policy.
        use_lora: checkpoints hold the adapter, and final/ the merged policy.
        num_writers: processes that share what a checkpoint holds, each with files of its own.
    """
    weights, states, final = [], [], 0
    for name, (learner, module) in learners.items():
        trained, whole = _bytes(learner.parameters), _bytes(module.parameters())
        states.append(_bytes_of_state(learner, module))
        weights.append(whole if name == POLICY_FOLDER and not use_lora else trained)
        final += whole if name == POLICY_FOLDER or name in exported else 0
    largest = math.ceil(max(states) / num_writers)
    return Sizes(checkpoint=sum(weights + states), largest=largest, final=final)


def warn_of_little_room(folder: Path, sizes: Sizes, config: RLConfig, *, first_step: int) -> None:
    """Warn at the start of a run that its disk is going to be full, unless room is made meanwhile.

    Args:
        folder: the run's folder.
        sizes: of what it writes.
        config: its settings.
        first_step: the next step to do, from 1.
    """
    every, best = config.save_every, bool(config.eval_every)
    num_there = len(list_checkpoints(folder))
    num = num_there + (config.num_steps // every - (first_step - 1) // every if every else 0)
    # A new one is written before the oldest is deleted, and final/ after that; the best is kept beside them.
    with_new = min(num, config.save_total_limit + 1 + best) * sizes.checkpoint
    with_final = min(num, config.save_total_limit + best) * sizes.checkpoint + sizes.final
    needed, free = max(with_new, with_final) - num_there * sizes.checkpoint, free_bytes(folder)
    if needed > free:
        logger.warning(
            "%s: %s are free, and this run needs about %s more: checkpoints of %s and a final model of %s. Make room "
            "while it runs, or it stops at a full disk and the same command goes on later.",
            *(folder, *map(in_bytes, (free, needed, sizes.checkpoint, sizes.final))),
        )


def _bytes_of_state(learner: Learner, module: nn.Module) -> int:
    """What a checkpoint holds of a learner beside the weights."""
    optimizer, embeddings = learner.config.optimizer, embedding_weights(module)
    sizes = ((parameter.numel(), parameter in embeddings) for parameter in learner.parameters)
    return round(sum(n * bytes_per_weight(optimizer, torch.float32, embedding=e).saved for n, e in sizes))


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
