"""Losses and KL estimators as pure functions of per-token tensors.

Nothing here reduces: every function returns one number per token. The trainer multiplies by token weights and sums,
so no memory setting can change a gradient. float32 throughout.
"""

from typing import Any

import torch
from torch import Tensor

from common.config import AVERAGES, PlacedKLConfig
from common.rollouts import Rollouts

# |log ratio| is clamped to this before exp(): e^20 is 5e8, far beyond any clip range, and float32 stays finite.
MAX_LOG_RATIO = 20.0


def log_importance_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Log ratio of each token's current probability to its probability when it was sampled.

    Args:
        logprobs: (b, C) float32, with gradient.
        old_logprobs: (b, C) float32 under the policy that sampled. None: that policy is the one being updated, so
            the result is exactly 0 and only its gradient matters.

    Returns:
        (b, C) float32.
    """
    return logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs)


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """Ratio of each token's current probability to that when it was sampled; arguments as in log_importance_ratio."""
    return log_importance_ratio(logprobs, old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor | None, mask: Tensor, *, per_token: bool = False) -> Tensor:
    """Ratio of each completion's current probability to that when it was sampled.

    Args:
        logprobs: (b, C) float32, with gradient.
        old_logprobs: (b, C) float32, or None as in log_importance_ratio.
        mask: (b, C) bool.
        per_token: the geometric mean of the tokens' ratios instead of their product: the ratio of GSPO
            (huggingface.co/papers/2507.18071, equation 7). It lies as near 1 for long completions as for short ones.

    Returns:
        (b, 1) float32.
    """
    log_ratio = torch.where(mask, log_importance_ratio(logprobs, old_logprobs), 0.0).sum(1, keepdim=True)  # (b, 1)
    if per_token:
        log_ratio = log_ratio / mask.sum(1, keepdim=True).clamp(min=1)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float) -> Tensor:
    """The clipped policy-gradient loss of PPO, equation 7 of huggingface.co/papers/1707.06347, one number per token.

    loss = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range_high)). A wider upper side is DAPO's clip-higher
    (huggingface.co/papers/2503.14476).

    Args:
        ratio: (b, C) float32 of tokens, or (b, 1) of completions.
        advantages: (b, C) float32.
        clip_range: in (0, 1], how far the ratio may fall; 1: as far as it does.
        clip_range_high: above 0, how far it may rise.

    Returns:
        (b, C) float32.
    """
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped_ratio)


def clipped_tokens(ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float) -> Tensor:
    """(b, C) float32: 1 where the clip removes the gradient, 0 elsewhere. Arguments as in clipped_surrogate."""
    risen = (advantages > 0) & (ratio > 1 + clip_range_high)
    fallen = (advantages < 0) & (ratio < 1 - clip_range)
    return (risen | fallen).float()


def clipped_policy_loss(
    ratio: Tensor, logprobs: Tensor, entropy: Tensor, minibatch: Rollouts, clip_ranges: tuple[float, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate of a micro-batch, and its metrics.

    Args:
        ratio: (b, C) float32, with gradient, of tokens; or (b, 1), of completions.
        logprobs: (b, C) float32.
        entropy: (b, C) float32.
        minibatch: b rows with advantages.
        clip_ranges: how far the ratio may fall, and rise.

    Returns:
        (b, C) loss, and metrics by name. Ratio and clip of completions are (b, 1): each completion counts once.
    """
    loss = clipped_surrogate(ratio, minibatch.advantages, *clip_ranges)
    clipped = clipped_tokens(ratio, minibatch.advantages, *clip_ranges)
    if ratio.shape != loss.shape:
        mask = minibatch.loss_mask
        clipped = torch.where(mask, clipped, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return loss, policy_metrics(ratio, clipped, entropy, logprobs, minibatch.sampling_logprobs)


def policy_metrics(
    ratio: Tensor, clipped: Tensor, entropy: Tensor, logprobs: Tensor, sampling_logprobs: Tensor
) -> dict[str, Tensor]:
    """What every policy loss reports, all without gradient.

    Args:
        ratio: (b, C) float32 from importance_ratio, or (b, 1) from sequence_ratio.
        clipped: float32 of the same shape, the share that the clip stops.
        entropy: (b, C) float32, nats.
        logprobs: (b, C) float32.
        sampling_logprobs: (b, C) float32, as the sampler reported them.

    Returns:
        Tensors by metric name. Names under first/ are for the first optimizer step after sampling: the policy is
        still the one that sampled, so the ratio must be 1 and both log-probs equal.
    """
    return {
        "policy/ratio": ratio.detach(),
        "policy/clip_fraction": clipped,
        "entropy": entropy,
        "first/policy/first_ratio": ratio.detach(),
        "first/sampler/logprob_diff": (logprobs.detach() - sampling_logprobs).abs(),
    }


def chosen_correction(setting: str, dtype: torch.dtype, device: torch.device) -> str:
    """What the setting importance_correction means: "auto" is "truncate" in bfloat16 on CUDA, else "none".

    In float32, log-probs of sampler and trainer differ by less than 1e-6. In bfloat16 other kernels round them apart.

    Args:
        setting: of the run.
        dtype: precision of forward passes.
        device: of the trainer.
    """
    if setting != "auto":
        return setting
    return "truncate" if dtype == torch.bfloat16 and device.type == "cuda" else "none"


def importance_weights(
    logprobs: Tensor, minibatch: Rollouts, *, correction: str, cap: float, of_completions: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights that make up for a sampler that computes the policy's probabilities a little differently.

    weight = probability of the token as the trainer computes it for the policy that sampled / as the sampler did. A
    mean over what was sampled, each times its weight, is the mean under the trainer's policy. "truncate" cuts weights
    to the cap (Ionides, Truncated importance sampling, 2008): they stay bounded, and rare tokens are corrected less
    than they should be. "mask" leaves out what the two disagree on by more than the cap in either direction, above
    the cap or below its inverse: there the sampler may be wrong. Means divide as before by all that was sampled.

    A token's weight corrects the choice of that token, not how often the sampler comes to the state before it, nor
    what it does afterwards. The weight of a completion, the product over its tokens, corrects everything, but lies far
    from 1 for long ones.

    Args:
        logprobs: (b, C) float32 of the policy being updated, which has sampled if there are no old_logprobs.
        minibatch: b rows.
        correction: "none", "truncate" or "mask".
        cap: at least 1.
        of_completions: one weight for each completion.

    Returns:
        Weights without gradient, (b, C) float32, or (b, 1) of completions; all 1 for "none". And metrics of the same
        shape by name, of the weights before they are cut.
    """
    policy = logprobs.detach() if minibatch.old_logprobs is None else minibatch.old_logprobs
    log_weights = torch.where(minibatch.loss_mask, policy - minibatch.sampling_logprobs, 0.0)  # (b, C)
    if of_completions:
        log_weights = log_weights.sum(1, keepdim=True)  # (b, 1)
    weights = log_weights.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    is_cut = weights > cap
    if correction == "mask":
        is_cut = is_cut | (weights < 1 / cap)
    metrics = {"sampler/weight": weights, "sampler/weight_cut": is_cut.float()}
    if correction == "none":
        return torch.ones_like(weights), metrics
    return torch.where(is_cut, cap if correction == "truncate" else 0.0, weights), metrics


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """Estimate KL(policy || reference) at each sampled token (Schulman, joschu.net/blog/kl-approx.html).

    With d = ref_logprobs - logprobs:  k1 = -d, unbiased, may be negative;  k2 = d^2 / 2, low bias;
    k3 = exp(d) - d - 1, unbiased and never negative.

    As loss terms, their gradients differ from their values. That of k1 has mean zero; that of k2 is the gradient of
    KL(policy || reference), that of k3 the one of KL(reference || policy), both for the next token in the states that
    the policy reaches now. In the reward, only k1 gives the gradient of KL(policy || reference): near the reference
    those of k2 and k3 vanish, because their values are of second order.

    Args:
        logprobs: (b, C) float32.
        ref_logprobs: (b, C) float32.
        estimator: "k1", "k2" or "k3".

    Returns:
        (b, C) float32.

    Raises:
        ValueError: for any other estimator.
    """
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return difference.exp() - difference - 1
    raise ValueError(f"kl_estimator={estimator!r}: need one of k1, k2, k3. Pass --kl_estimator k3.")


def with_kl(
    loss: Tensor, metrics: dict[str, Any], logprobs: Tensor, minibatch: Rollouts, config: PlacedKLConfig
) -> tuple[Tensor, dict[str, Any]]:
    """A policy loss with the KL to the reference as a further term, if the settings place it there.

    With sampling_lag=1 the term is weighed by the ratio, so that its mean, too, is over what the policy samples now.

    Args:
        loss: (b, C) float32.
        metrics: of the loss, by name.
        logprobs: (b, C) float32 of the policy being updated, with gradient.
        minibatch: b rows, with ref_logprobs if the KL is in the loss.
        config: kl_coef, kl_place and kl_estimator; None is k3 here, as in GRPO's paper.

    Returns:
        (b, C) float32, and the metrics with the KL's.
    """
    if not config.has_kl_in_loss:
        return loss, metrics
    kl = kl_estimate(logprobs, minibatch.ref_logprobs, config.kl_estimator or "k3")
    if config.sampling_lag:
        kl = kl * importance_ratio(logprobs.detach(), minibatch.old_logprobs)
    of_kl = {"policy/kl_loss": kl.detach(), "kl": sampling_kl(logprobs, minibatch)}
    return loss + config.kl_coef * kl, metrics | of_kl


def sampling_kl(logprobs: Tensor, minibatch: Rollouts) -> tuple[Tensor, Tensor]:
    """The metric `kl` of an algorithm with the KL in its loss: k1 of the policy that sampled, over all real tokens.

    So it is what an algorithm with the KL in the reward reports, whatever the loss's estimator and mask.

    Args:
        logprobs: (b, C) float32 of the policy being updated, which has sampled if there are no old_logprobs.
        minibatch: b rows with ref_logprobs.

    Returns:
        (b, C) float32 without gradient, and the (b, C) bool mask of its mean.
    """
    sampled = logprobs.detach() if minibatch.old_logprobs is None else minibatch.old_logprobs
    return kl_estimate(sampled, minibatch.ref_logprobs, "k1"), minibatch.completion_mask


def token_weights(
    mask: Tensor, *, average_over: str, num_rows: float, num_tokens: float, max_completion_length: int
) -> Tensor:
    """Weight of each token in the loss; the weights define the mean.

    "tokens": 1 / all tokens of the mini-batch (DAPO). "rows": 1 / (tokens of its row x all rows) (GRPO).
    "constant": 1 / (longest completion allowed x all rows) (Dr. GRPO, huggingface.co/papers/2503.20783).
    The counts include all processes, and rows that were dropped because their advantage is 0.

    Args:
        mask: (b, C) bool, tokens that count.
        average_over: "tokens", "rows" or "constant".
        num_rows: rows of the mini-batch on all processes.
        num_tokens: their real tokens.
        max_completion_length: the setting, in tokens.

    Returns:
        (b, C) float32, 0 at padding.

    Raises:
        ValueError: for any other average_over.
    """
    if average_over == "tokens":
        weights = torch.full(mask.shape, 1 / max(num_tokens, 1))
    elif average_over == "rows":
        weights = (1 / (mask.sum(1, keepdim=True).clamp(min=1) * max(num_rows, 1))).expand(mask.shape)
    elif average_over == "constant":
        weights = torch.full(mask.shape, 1 / (max_completion_length * max(num_rows, 1)))
    else:
        raise ValueError(
            f"average_over={average_over!r}: need one of {', '.join(AVERAGES)}. Pass --average_over rows."
        )
    return torch.where(mask, weights.float(), 0.0)  # (b, C)
