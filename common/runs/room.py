"""How much a run is going to write, estimated from its parameters, and whether there is room for it."""

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from common.config import RLConfig
from common.runs.checkpoints import POLICY_FOLDER, list_checkpoints
from common.runs.disk import free_bytes, in_bytes
from common.update.learner import Learner

logger = logging.getLogger("nanorlhf")

# Of each trained parameter, AdamW keeps two.
_MOMENTS = 2


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


def sizes_of(learners: dict[str, tuple[Learner, nn.Module]], exported: Collection[str], *, use_lora: bool) -> Sizes:
    """What the checkpoints and the final model of a run need.

    Args:
        learners: by name, each with its model.
        exported: those whose models are in final/ beside the policy.
        use_lora: checkpoints hold the adapter, and final/ the merged policy.
    """
    weights, moments, final = [], [], 0
    for name, (learner, module) in learners.items():
        trained, whole = _bytes(learner.parameters), _bytes(module.parameters())
        moments.append(_MOMENTS * trained)
        weights.append(whole if name == POLICY_FOLDER and not use_lora else trained)
        final += whole if name == POLICY_FOLDER or name in exported else 0
    return Sizes(checkpoint=sum(weights + moments), largest=max(moments), final=final)


def warn_of_little_room(folder: Path, sizes: Sizes, config: RLConfig, *, first_step: int) -> None:
    """Warn at the start of a run that its disk is going to be full, unless room is made meanwhile.

    Args:
        folder: the run's folder.
        sizes: of what it writes.
        config: its settings.
        first_step: the next step to do, from 1.
    """
    num_there = len(list_checkpoints(folder))
    num_coming = (
        config.num_steps // config.save_every - (first_step - 1) // config.save_every if config.save_every else 0
    )
    # The next one is written before the oldest is deleted; the best is kept beside them.
    num_kept = min(num_there + num_coming, config.save_total_limit + 1 + bool(config.eval_every))
    needed, free = max(num_kept - num_there, 0) * sizes.checkpoint + sizes.final, free_bytes(folder)
    if needed > free:
        logger.warning(
            "%s: %s are free, and this run needs about %s more: checkpoints of %s and a final model of %s. Make room "
            "while it runs, or it stops at a full disk and the same command goes on later.",
            *(folder, *map(in_bytes, (free, needed, sizes.checkpoint, sizes.final))),
        )


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
