"""Which groups of a step teach nothing, and what takes their place.

DAPO's dynamic sampling (huggingface.co/papers/2503.14476): groups whose completions all have the same score are
replaced by groups of other prompts. The trainer samples and scores them; here is only who replaces whom.
"""

from dataclasses import replace

import torch
from torch import Tensor

from common.advantages import rows_with_signal
from common.rollouts import Rollouts


def groups_with_signal(rollouts: Rollouts, num_generations: int) -> Tensor:
    """Groups whose scores differ and of which at least one completion is trained on.

    Args:
        rollouts: B scored rows, rows of one prompt adjacent.
        num_generations: G, at least 2; divides B.

    Returns:
        (B / G,) bool.
    """
    groups = torch.arange(len(rollouts) // num_generations)
    differing = rows_with_signal(rollouts.scores, num_generations) // num_generations
    is_trained = rollouts.loss_mask.any(1).reshape(-1, num_generations).any(1)
    return torch.isin(groups, differing) & is_trained


class Places:
    """The groups of a step on this process, and which sampled group fills the place of each.

    Args:
        sampled: scored rows of the step's own prompts.
        num_generations: G.

    Attributes:
        empty: (groups,) bool, places whose group has no signal.
    """

    def __init__(self, sampled: Rollouts, num_generations: int) -> None:
        self._parts, self._size = [sampled], num_generations
        self.empty = ~groups_with_signal(sampled, num_generations)
        self._num_own = len(self.empty)
        self._source = torch.arange(self._num_own)  # of each place: its group among those of all parts

    def fill(self, more: Rollouts) -> None:
        """Put those of additional groups that have a signal into empty places.

        The first group is for the first empty place, and so on, whatever becomes of the others: so the result does
        not depend on how places are shared among processes.

        Args:
            more: scored rows of at most as many prompts as there are empty places, possibly of none.
        """
        good = groups_with_signal(more, self._size)  # (groups of more,)
        filled = self.empty.nonzero().squeeze(1)[: len(good)][good]
        before = sum(len(part) for part in self._parts) // self._size
        self._source[filled] = before + good.nonzero().squeeze(1)
        self.empty[filled] = False
        self._parts.append(more)

    @property
    def num_filled(self) -> int:
        """Places that an additional prompt fills."""
        return int((self._source >= self._num_own).sum())

    def rollouts(self) -> Rollouts:
        """The rows of the group in each place, with the row numbers of the place; to be numbered anew."""
        rows = (self._source[:, None] * self._size + torch.arange(self._size)).reshape(-1)
        chosen = Rollouts.joined(self._parts)[rows].trimmed()
        return replace(chosen, rows=self._parts[0].rows, step_lengths=None)
