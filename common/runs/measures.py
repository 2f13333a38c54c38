"""Metrics of a batch of completions, and their confidence intervals. Nothing here trains.

Evaluation during training and the command ``python -m common.evaluation`` both use these functions.
"""

import math

import torch
from torch import Tensor

from common.losses import kl_estimate
from common.rewards.reports import TrainerState
from common.rewards.scorer import Scorer
from common.rollouts import Rollouts
from common.runs.metrics import StepMetrics


def rollout_means(rollouts: Rollouts, *, num_generations: int, metrics: StepMetrics, has_score: bool = True) -> None:
    """Add this process's part of the means over the completions of a training step's own prompts.

    Args:
        rollouts: B rows, scored.
        num_generations: completions per prompt; adjacent rows.
        metrics: gets score, score_min, score_max, length, truncated; equal_scores (where prompts have several
            completions: share of the prompts whose completions all have the same score); and reward/<name>
            (unweighted, over the rows to which that reward applies).
        has_score: False for a run without rewards, which has none of the metrics of scores.
    """
    rows = len(rollouts)
    metrics.add("length", rollouts.lengths.sum(), rows)
    metrics.add("truncated", rollouts.truncated.sum(), rows)
    if not has_score:
        return
    metrics.add("score", rollouts.scores.sum(), rows)
    if rows:
        metrics.add_min("score_min", rollouts.scores.min().item())
        metrics.add_max("score_max", rollouts.scores.max().item())
    if num_generations > 1 and rows % num_generations == 0:
        groups = rollouts.scores.reshape(-1, num_generations)
        metrics.add("equal_scores", (groups == groups[:, :1]).all(1).sum(), len(groups))
    for name, part in rollouts.parts.items():
        metrics.add(f"reward/{name}", part.nansum(), (~part.isnan()).sum())


def training_means(rollouts: Rollouts, advantages: Tensor, *, metrics: StepMetrics) -> None:
    """Add this process's part of the means over the rows that a step trains on.

    Args:
        rollouts: B rows.
        advantages: (B,) or (B, C) float.
        metrics: gets kl (k1, over all tokens) if both log-probs are known, and zero_advantage (share of the rows whose
            advantage is 0 everywhere; it leaves out rows that the loss mask leaves out).
    """
    trained = rollouts.loss_mask.any(1)  # (B,)
    metrics.add("zero_advantage", (trained & (advantages[..., None] == 0).flatten(1).all(1)).sum(), trained.sum())
    if rollouts.old_logprobs is not None and rollouts.ref_logprobs is not None:
        kl = kl_estimate(rollouts.old_logprobs, rollouts.ref_logprobs, "k1")  # (B, C)
        metrics.add("kl", torch.where(rollouts.completion_mask, kl, 0.0).sum(), rollouts.lengths.sum())


def judge(rollouts: Rollouts, scorer: Scorer, state: TrainerState | None = None) -> Tensor:
    """(B,) float32: the weighted sum of the rewards.

    Each reward is kept in rollouts.parts, and the columns that reward functions logged in rollouts.extra.

    Args:
        rollouts: B completions.
        scorer: of the rewards.
        state: how far the run is, for functions that ask.
    """
    texts = (rollouts.prompts, rollouts.completions, rollouts.columns)
    more = {"completion_ids": rollouts.completion_tokens, "raw_prompts": rollouts.raw_prompts, "state": state}
    scores, rollouts.parts = scorer(*texts, **more)
    rollouts.extra = scorer.reports.columns
    return scores


def judge_leniently(rollouts: Rollouts, scorer: Scorer | None) -> Tensor | None:
    """(B,) bool: the answer is right, in the requested form or not; None if the task has no such rule.

    It is no reward: neither the scores nor rollouts.parts change.

    Args:
        rollouts: B completions.
        scorer: of one rule, from `lenient_scorer`.
    """
    if scorer is None:
        return None
    right, _ = scorer(rollouts.prompts, rollouts.completions, rollouts.columns, raw_prompts=rollouts.raw_prompts)
    return torch.isclose(right, torch.tensor(1.0))


def evaluation_means(
    rollouts: Rollouts,
    *,
    accuracy: str | None,
    format: str | None,
    num_samples: int,
    metrics: StepMetrics,
    lenient: Tensor | None = None,
    has_score: bool = True,
) -> None:
    """Add this process's part of the evaluation's means.

    Args:
        rollouts: B scored completions of held-out prompts, num_samples adjacent rows per prompt.
        accuracy: the reward that gives 1 for a correct answer; None if the task has none.
        format: the reward that gives 1 for the requested format; None if the task has none.
        num_samples: completions per prompt, at least 1.
        metrics: gets eval/score, eval/length, eval/truncated, eval/format (share of completions in the requested
            format), eval/lenient_accuracy (share whose answer is right in any form), eval/accuracy (share of correct
            ones) with its square for the confidence interval, and eval/pass@k for k = 2, 4, ... up to num_samples.
        lenient: (B,) bool, from `judge_leniently`; None if the task has no such rule.
        has_score: False for a run without rewards, which has no eval/score.
    """
    rows = len(rollouts)
    if has_score:
        metrics.add("eval/score", rollouts.scores.sum(), rows)
    metrics.add("eval/length", rollouts.lengths.sum(), rows)
    metrics.add("eval/truncated", rollouts.truncated.sum(), rows)
    formed = is_one(rollouts.parts, format)
    if formed is not None:
        metrics.add("eval/format", formed.sum(), rows)
    if lenient is not None:
        metrics.add("eval/lenient_accuracy", lenient.sum(), rows)
    correct = is_one(rollouts.parts, accuracy)
    if correct is None:
        return
    num_correct = correct.reshape(-1, num_samples).sum(1)  # (prompts,)
    per_prompt = num_correct.double() / num_samples
    metrics.add("eval/accuracy", per_prompt.sum(), len(per_prompt))
    metrics.add("eval/accuracy_square", per_prompt.square().sum(), len(per_prompt))
    for k in sizes_of_k(num_samples)[1:]:
        metrics.add(f"eval/pass@{k}", pass_at_k(num_correct, num_samples, k).sum(), len(per_prompt))


def is_one(parts: dict[str, Tensor], name: str | None) -> Tensor | None:
    """(B,) bool: the named reward gives 1; None if there is no name or the run does not use that reward."""
    return torch.isclose(parts[name], torch.tensor(1.0)) if name in parts else None


def sizes_of_k(num_samples: int) -> list[int]:
    """1, 2, 4, ... and num_samples: the k for which pass@k is reported."""
    return [k for k in (2**i for i in range(num_samples.bit_length())) if k < num_samples] + [num_samples]


def pass_at_k(num_correct: Tensor, num_samples: int, k: int) -> Tensor:
    """Probability that at least one of k completions, drawn from a prompt's n without replacement, is correct.

    1 - C(n - c, k) / C(n, k), where c are correct (huggingface.co/papers/2107.03374, equation 1). It is unbiased, and
    has less variance than the share of prompts solved by the first k completions.

    Args:
        num_correct: (prompts,) int64, c.
        num_samples: n.
        k: from 1 to n.

    Returns:
        (prompts,) float64.
    """
    all_draws = math.comb(num_samples, k)
    all_wrong = [math.comb(num_samples - right, k) for right in num_correct.tolist()]
    return torch.tensor([1 - draws / all_draws for draws in all_wrong], dtype=torch.float64)


def confidence_interval(mean: float, mean_square: float, num_prompts: int) -> tuple[float, float]:
    """Centre and half width of the 95 % confidence interval of an accuracy.

    The independent samples are prompts, not completions: half the width is 1.96 standard errors of the mean over
    prompts. Four prompts are added, two solved always and two never. With one completion per prompt, this is the
    interval of Agresti and Coull (The American Statistician 52, 1998): it covers 95 % even with few prompts, and its
    width is above 0 even if none or all are solved.

    Args:
        mean: over prompts, of the share of correct completions.
        mean_square: over prompts, of its square.
        num_prompts: number of prompts.
    """
    count = num_prompts + 4
    centre = (num_prompts * mean + 2) / count
    variance = (num_prompts * mean_square + 2) / count - centre**2
    return centre, 1.96 * math.sqrt(max(variance, 0.0) / count)


def mean_interval(values: Tensor, num_samples: int) -> list[float] | None:
    """The 95 % confidence interval of a mean of any numbers, such as scores: 1.96 standard errors to each side.

    The independent samples are prompts, as for accuracy. But for few prompts it is too narrow, since nothing is known
    of the numbers' distribution.

    Args:
        values: (B,) float, num_samples adjacent rows per prompt; NaN where a reward has no say.
        num_samples: completions per prompt.

    Returns:
        Its two ends; None with fewer than two prompts.
    """
    per_prompt = values.double().reshape(-1, num_samples).nanmean(1)  # (prompts,)
    per_prompt = per_prompt[~per_prompt.isnan()]
    if len(per_prompt) < 2:
        return None
    half = 1.96 * float(per_prompt.std()) / math.sqrt(len(per_prompt))
    return [float(per_prompt.mean()) - half, float(per_prompt.mean()) + half]


def with_confidence_interval(metrics: dict[str, float], num_prompts: int) -> dict[str, float]:
    """Replace the mean square by the half width of the 95 % confidence interval of the accuracy.

    Args:
        metrics: reduced over all processes.
        num_prompts: held-out prompts on all processes.

    Returns:
        The metrics with eval/accuracy_ci95 in place of eval/accuracy_square.
    """
    metrics = dict(metrics)
    if "eval/accuracy_square" in metrics:
        mean_square = metrics.pop("eval/accuracy_square")
        _, metrics["eval/accuracy_ci95"] = confidence_interval(metrics["eval/accuracy"], mean_square, num_prompts)
    return metrics
