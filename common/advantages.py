"""From scores to advantages: where the algorithms differ, as pure functions on tensors.

Statistics over several processes need a sum over processes. The caller passes the function that computes it, so
nothing here knows about processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

# Scores of a group that differ by less than this (relative to their size if that is above 1) differ by float noise
# (0.1 + 0.2 against 0.3), not in quality. Dividing by their deviation would turn the noise into full-size advantages.
SCORE_TOLERANCE = 1e-6


def group_relative(scores: Tensor, num_generations: int, *, scale_by_std: bool = True) -> Tensor:
    """Compare each completion with the other completions of its prompt.

    advantage = (score - mean of the group) / (standard deviation of the group + 1e-4), equation 3 of GRPO
    (huggingface.co/papers/2402.03300); without the division it is the advantage of Dr. GRPO
    (huggingface.co/papers/2503.20783). The standard deviation is the unbiased one. A group whose scores are all equal
    (to 1e-6) gets exactly 0.

    Args:
        scores: (B,) float, rows of one prompt adjacent.
        num_generations: G, at least 2; divides B.
        scale_by_std: divide by the group's standard deviation.

    Returns:
        (B,) float32.

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    groups = as_groups(scores, num_generations)  # (B / G, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        # 1e-4 bounds the result when scores barely differ; it is the constant of the usual implementations.
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return torch.where(_all_equal(groups), 0.0, advantages).reshape(-1)


def leave_one_out(scores: Tensor, num_generations: int) -> Tensor:
    """Compare each completion with the mean of the other completions of its prompt.

    advantage = score - mean of the other G - 1 scores, equation 8 of RLOO (huggingface.co/papers/2402.14740). That
    baseline does not depend on the completion itself, so the policy gradient stays unbiased.

    Args:
        scores: (B,) float, rows of one prompt adjacent.
        num_generations: G, at least 2; divides B.

    Returns:
        (B,) float32; exactly 0 in a group whose scores are all equal (to 1e-6).

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    groups = as_groups(scores, num_generations)  # (B / G, G)
    others = (groups.sum(dim=1, keepdim=True) - groups) / (num_generations - 1)
    return torch.where(_all_equal(groups), 0.0, groups - others).reshape(-1)


def per_token_rewards(scores: Tensor, mask: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """One reward per token: every token pays its own KL, the last one gets the score.

    reward_t = -kl_coef kl_t, plus the score at the last token (huggingface.co/papers/1909.08593, equation 2).

    Args:
        scores: (B,) float.
        mask: (B, C) bool.
        kl: (B, C) float, estimated KL to the reference at each token; padding may hold anything.
        kl_coef: weight of the KL, 0 or more.

    Returns:
        (B, C) float32, 0 at padding. Each row sums to score - kl_coef x its KL.
    """
    columns = torch.arange(mask.shape[1])[None, :]
    is_last = columns == mask.sum(1, keepdim=True) - 1
    return torch.where(mask, -kl_coef * kl.float(), 0.0) + torch.where(is_last, scores.float()[:, None], 0.0)


def rewards_to_go(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Sum of the rewards from each token on: return_t = reward_t + gamma return_(t + 1).

    Args:
        rewards: (B, C) float; padding may hold anything.
        mask: (B, C) bool.
        gamma: discount in [0, 1].

    Returns:
        (B, C) float32, 0 at padding.
    """
    advantages, _ = generalized_advantages(rewards, torch.zeros(mask.shape), mask, gamma=gamma, gae_lambda=1.0)
    return advantages


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation, equation 16 of huggingface.co/papers/1506.02438.

    delta_t = reward_t + gamma value_(t + 1) - value_t;  advantage_t = delta_t + gamma gae_lambda advantage_(t + 1).
    The value after the last token is 0, even if the length limit cut the completion off: it was scored as it is.

    Args:
        rewards: (B, C) float; padding may hold anything, in values too.
        values: (B, C) float; column t is the value of the state in which token t was chosen.
        mask: (B, C) bool, padding on the right.
        gamma: discount in [0, 1].
        gae_lambda: in [0, 1]; 1 uses the rewards alone (return - value), 0 relies on the next value.

    Returns:
        advantages and returns = advantages + values, both (B, C) float32, 0 at padding; sums are made in float64.
    """
    rewards = torch.where(mask, rewards.double(), 0.0)
    values = torch.where(mask, values.double(), 0.0)
    next_values = pad(values[:, 1:], (0, 1))  # (B, C)
    advantages = _discounted_sums(rewards + gamma * next_values - values, gamma * gae_lambda)
    return advantages.float(), (advantages + values).float()


def _discounted_sums(values: Tensor, factor: float) -> Tensor:
    """Sums from each column on, each later column less by `factor`: sum_t = value_t + factor sum_(t + 1).

    After k rounds a column holds the sum of 2^k columns, so there are log2(C) rounds instead of C. Nothing is divided
    by powers of the factor, so that they may become 0 in a long row. No row depends on another one.

    Args:
        values: (B, C) float64, 0 at padding, which is on the right.
        factor: in [0, 1].

    Returns:
        (B, C) float64.
    """
    sums, reach = values.clone(), 1
    while factor and reach < sums.shape[1]:
        sums[:, :-reach] += factor * sums[:, reach:]
        reach, factor = 2 * reach, factor * factor
    return sums


def rows_with_signal(scores: Tensor, num_generations: int) -> Tensor:
    """Rows of the groups whose scores differ; all others have advantage 0 and need no forward or backward pass.

    Args:
        scores: (B,) float, rows of one prompt adjacent.
        num_generations: G, at least 2; divides B.

    Returns:
        int64 tensor of row indices in ascending order, possibly empty.

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    all_equal = _all_equal(as_groups(scores, num_generations))  # (B / G, 1)
    return (~all_equal).expand(-1, num_generations).reshape(-1).nonzero().squeeze(1)


def whiten(values: Tensor, mask: Tensor, *, sum_over_processes: Callable[[Tensor], Tensor]) -> Tensor:
    """Scale the tokens of `mask` to variance 1 and shift them to mean 0.

    Mean and (biased) variance are over these tokens of all processes, so splitting the batch changes nothing.

    Args:
        values: (B, C) float; may hold anything outside the mask.
        mask: (B, C) bool.
        sum_over_processes: adds a tensor over all processes; the identity on one process.

    Returns:
        (B, C) float32, 0 outside the mask.
    """
    centred, _, variance = moments(values, mask, sum_over_processes)
    # 1e-8: a batch of equal values has variance 0 and must come out as 0, not as NaN.
    return (centred * torch.rsqrt(variance + 1e-8)).float()


def inverse_deviation(values: Tensor, mask: Tensor, *, sum_over_processes: Callable[[Tensor], Tensor]) -> float:
    """The factor that gives values variance 1: 1 / their standard deviation.

    Rewards are multiplied by it and not shifted. A shift gives every token the same reward on top, also those that
    have none, and their sum over a completion would then reward length.

    Args:
        values: (B, C) float; may hold anything outside the mask.
        mask: (B, C) bool.
        sum_over_processes: adds a tensor over all processes; the identity on one process.

    Returns:
        1 if all values are equal (to 1e-6): there is nothing to scale.
    """
    _, mean, variance = moments(values, mask, sum_over_processes)
    return float(variance.rsqrt()) if is_spread(mean, variance) else 1.0


def is_spread(mean: Tensor, variance: Tensor) -> bool:
    """True if numbers of this mean and variance differ by more than float noise."""
    size = (mean.square() + variance).sqrt().clamp(min=1)
    return bool(variance.sqrt() > SCORE_TOLERANCE * size)


def moments(
    values: Tensor, mask: Tensor, sum_over_processes: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Values less their mean (B, C), 0 outside the mask; mean; biased variance. float64: sums over 10^5 tokens."""
    real = torch.where(mask, values.double(), 0.0)
    count, total = sum_over_processes(torch.stack([mask.sum().double(), real.sum()]))
    mean = total / count.clamp(min=1)
    centred = torch.where(mask, real - mean, 0.0)
    return centred, mean, sum_over_processes(centred.square().sum()) / count.clamp(min=1)


def as_groups(scores: Tensor, num_generations: int) -> Tensor:
    """Scores (B,) as float32 (B / G, G), one row per prompt.

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    if num_generations < 2 or scores.dim() != 1 or len(scores) % num_generations:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} with num_generations={num_generations}: completions of one prompt "
            "are compared with each other, so scores must be one-dimensional, in groups of at least 2. Pass "
            "--num_generations 8, for example."
        )
    return scores.float().reshape(-1, num_generations)


def _all_equal(groups: Tensor) -> Tensor:
    """(B / G, 1) bool: all scores of the group are equal, up to float noise."""
    size = groups.abs().amax(dim=1, keepdim=True).clamp(min=1)
    return groups.amax(dim=1, keepdim=True) - groups.amin(dim=1, keepdim=True) < SCORE_TOLERANCE * size
