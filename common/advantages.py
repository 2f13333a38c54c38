"""From scores to advantages: the lines in which the algorithms differ, as pure functions on tensors.

Statistics over the tokens of several processes need a sum over processes; the caller hands in the function that
makes it, so that nothing here knows about processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Scores of a group that differ by less than this (of their size, where they are above 1) are float noise (0.1 + 0.2
# against 0.3), not a difference in quality; dividing by their deviation would blow noise up to full-size advantages.
SCORE_TOLERANCE = 1e-6


def group_relative(scores: Tensor, num_generations: int, *, scale_by_std: bool = True) -> Tensor:
    """Compare each completion with the other completions of its prompt.

    advantage = (score - mean of the group) / (standard deviation of the group + 1e-4), equation 3 of GRPO
    (huggingface.co/papers/2402.03300); without the division it is the advantage of Dr. GRPO
    (huggingface.co/papers/2503.20783). The standard deviation is the unbiased one. A group whose scores are all equal
    (to 1e-6) teaches nothing: exactly 0.

    Args:
        scores: (B,) float, rows of one prompt adjacent.
        num_generations: G, at least 2; divides B.
        scale_by_std: divide by the group's standard deviation.

    Returns:
        (B,) float32.

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    groups = _groups(scores, num_generations)  # (B / G, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        # 1e-4 bounds the result when scores differ by little; it is the constant of the common implementations.
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(_undecided(groups), 0.0, advantages).reshape(-1)


def rows_with_signal(scores: Tensor, num_generations: int) -> Tensor:
    """Rows of the groups whose scores differ: the others have advantage 0 and need neither forward nor backward.

    Args:
        scores: (B,) float, rows of one prompt adjacent.
        num_generations: G, at least 2; divides B.

    Returns:
        int64 tensor of row indices in ascending order, possibly empty.

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    undecided = _undecided(_groups(scores, num_generations))  # (B / G, 1)
    return (~undecided).expand(-1, num_generations).reshape(-1).nonzero().squeeze(1)


def whiten(
    values: Tensor, mask: Tensor, *, sum_over_processes: Callable[[Tensor], Tensor], shift_mean: bool = True
) -> Tensor:
    """Scale real tokens to variance 1 and, unless asked not to, mean 0.

    Mean and (biased) variance are over all real tokens of all processes, so splitting the batch changes nothing.

    Args:
        values: (B, C) float; padding may hold anything.
        mask: (B, C) bool.
        sum_over_processes: adds a tensor over all processes; the identity on one process.
        shift_mean: False keeps the mean where it was and only scales.

    Returns:
        (B, C) float32, 0 at padding.
    """
    real = torch.where(mask, values.double(), 0.0)  # float64: sums over 10^5 tokens
    count, total = sum_over_processes(torch.stack([mask.sum().double(), real.sum()]))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, real - mean, 0.0)
    variance = sum_over_processes(centred.square().sum()) / count.clamp(min=1)
    # 1e-8: a batch of equal values has variance 0 and must come out as 0, not as NaN.
    whitened = centred * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = torch.where(mask, whitened + mean, 0.0)
    return whitened.float()


def maybe_whiten(
    advantages: Tensor, mask: Tensor, *, enabled: bool, sum_over_processes: Callable[[Tensor], Tensor]
) -> Tensor:
    """Whiten if `enabled`, otherwise give the advantages back as they are. Arguments as whiten's."""
    return whiten(advantages, mask, sum_over_processes=sum_over_processes) if enabled else advantages


def _groups(scores: Tensor, num_generations: int) -> Tensor:
    if num_generations < 2 or scores.dim() != 1 or len(scores) % num_generations:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} with num_generations={num_generations}: completions of one prompt "
            "are compared with each other, so scores must be one-dimensional, in groups of at least 2. Pass "
            "--num_generations 8, say."
        )
    return scores.float().reshape(-1, num_generations)


def _undecided(groups: Tensor) -> Tensor:
    """(B / G, 1) bool: all scores of the group are equal."""
    size = groups.abs().amax(dim=1, keepdim=True).clamp(min=1)
    return groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True) < SCORE_TOLERANCE * size
