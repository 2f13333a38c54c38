"""What a batch of completions says about the policy, and how sure the numbers are. Trains nothing."""

import math

import torch
from torch import Tensor

from common.metrics import MetricShares
from common.rollouts import Rollouts


def rollout_shares(rollouts: Rollouts, advantages: Tensor, *, shares: MetricShares) -> None:
    """Add this process's part of the means over what was sampled for training.

    Args:
        rollouts: B rows, scored.
        advantages: (B,) or (B, C) float.
        shares: where the parts go: score, length, truncated, zero_advantage (share of rows without any), and
            reward/<name> (raw, over the rows in which that reward had a say).
    """
    rows = len(rollouts)
    shares.add("score", rollouts.scores.sum(), rows)
    shares.add("length", rollouts.lengths.sum(), rows)
    shares.add("truncated", rollouts.truncated.sum(), rows)
    shares.add("zero_advantage", (advantages.reshape(rows, -1) == 0).all(1).sum(), rows)
    for name, part in rollouts.parts.items():
        shares.add(f"reward/{name}", part.nansum(), (~part.isnan()).sum())


def evaluation_shares(
    rollouts: Rollouts, scores: Tensor, correct: Tensor | None, *, num_samples: int, shares: MetricShares
) -> None:
    """Add this process's part of the evaluation's means.

    Args:
        rollouts: B completions of held-out prompts, num_samples adjacent rows per prompt.
        scores: (B,) float.
        correct: (B,) bool, completion is right; None if the task does not say.
        num_samples: completions per prompt, at least 1.
        shares: where the parts go: eval/score, eval/length, eval/truncated and, with `correct`, eval/accuracy (share
            of right completions), its square for the confidence interval, and eval/pass@k (share of prompts with at
            least one right among k) for k = num_samples above 1.
    """
    rows = len(rollouts)
    shares.add("eval/score", scores.sum(), rows)
    shares.add("eval/length", rollouts.lengths.sum(), rows)
    shares.add("eval/truncated", rollouts.truncated.sum(), rows)
    if correct is None:
        return
    per_prompt = correct.double().reshape(-1, num_samples).mean(1)  # (prompts,)
    shares.add("eval/accuracy", per_prompt.sum(), len(per_prompt))
    shares.add("eval/accuracy_square", per_prompt.square().sum(), len(per_prompt))
    if num_samples > 1:
        shares.add(f"eval/pass@{num_samples}", (per_prompt > 0).sum(), len(per_prompt))


def with_confidence_interval(metrics: dict[str, float], num_prompts: int) -> dict[str, float]:
    """Replace the mean square by the half width of the 95 % confidence interval of the accuracy.

    Prompts are the independent draws, not completions: the interval is 1.96 standard errors of the mean over prompts.

    Args:
        metrics: reduced over all processes.
        num_prompts: held-out prompts on all processes.

    Returns:
        The metrics with eval/accuracy_ci95 in place of eval/accuracy_square.
    """
    metrics = dict(metrics)
    if "eval/accuracy_square" in metrics:
        variance = max(metrics.pop("eval/accuracy_square") - metrics["eval/accuracy"] ** 2, 0.0)
        metrics["eval/accuracy_ci95"] = 1.96 * math.sqrt(variance / num_prompts)
    return metrics


def is_correct(parts: dict[str, Tensor], accuracy: str | None) -> Tensor | None:
    """(B,) bool: the reward that says so gives 1; None if the task names none or the run does not use it."""
    return torch.isclose(parts[accuracy], torch.tensor(1.0)) if accuracy in parts else None
