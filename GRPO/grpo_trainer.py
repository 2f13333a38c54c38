"""GRPO: group relative policy optimization (huggingface.co/papers/2402.03300)."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.advantages import group_relative, maybe_whiten, rows_with_signal
from common.batching import keep_one_per_group
from common.config import RLConfig
from common.losses import clipped_surrogate, clipped_tokens, importance_ratio, kl_estimate, policy_metrics
from common.models import token_logprobs
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(kw_only=True)
class GRPOConfig(RLConfig):
    """Settings of GRPO besides those all algorithms share."""

    average_over: str = "rows"
    """GRPO's own mean: every completion weighs the same. "tokens" is DAPO's, "constant" is Dr. GRPO's."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation; False is Dr. GRPO."""
    clip_range: float = 0.2
    """How far a token's probability ratio may fall below 1 before its gradient stops."""
    clip_range_high: float | None = None
    """How far it may rise above 1; None: clip_range. DAPO's clip-higher uses 0.28."""
    kl_estimator: str | None = None
    """"k1", "k2" or "k3"; None: the paper's k3 in the loss, k1 in the reward, where only its gradient is right."""
    kl_place: str = "loss"
    """"loss", or "reward": the completion's KL is taken from its score before groups are compared."""
    sparse: bool = False
    """Leave groups of equal scores out of forward and backward; the same gradient when kl_coef is 0."""
    keep_per_group: bool = False
    """Train on 1 random completion of each group after all made the baseline, to save time."""

    def __post_init__(self) -> None:
        """Check GRPO's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations}: GRPO compares completions of one prompt with each other, so "
                "it needs at least 2. Pass --num_generations 8, or use an algorithm with another baseline."
            )
        if not 0 < self.clip_range < 1 or (self.clip_range_high is not None and not self.clip_range_high > 0):
            raise ValueError(
                f"clip_range={self.clip_range}, clip_range_high={self.clip_range_high}: the ratio is kept in "
                "[1 - clip_range, 1 + clip_range_high], so the first must be in (0, 1) and the second above 0. Pass "
                "--clip_range 0.2."
            )
        if self.kl_estimator not in (None, *KL_ESTIMATORS) or self.kl_place not in ("loss", "reward"):
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r}, kl_place={self.kl_place!r}: need one of "
                f"{', '.join(KL_ESTIMATORS)} and one of loss, reward. Pass --kl_estimator k3 --kl_place loss."
            )
        if self.kl_coef and self.kl_place == "reward" and self.kl_estimator in ("k2", "k3"):
            warnings.warn(
                f"kl_estimator={self.kl_estimator} in the reward: only k1's gradient is that of the KL there; k2's "
                "and k3's are small and may point away from the reference. Pass --kl_estimator k1 or --kl_place loss.",
                stacklevel=2,
            )
        if self.sparse and self.kl_coef and self.kl_place == "loss":
            warnings.warn(
                f"sparse with kl_coef={self.kl_coef}: groups of equal scores also miss their KL term, so the gradient "
                "is not that of plain GRPO. Pass --kl_coef 0 or --sparse false for equality.",
                stacklevel=2,
            )
        if self.sparse and self.whiten_advantages:
            raise ValueError(
                "sparse with whiten_advantages: whitening moves advantages of 0 away from 0, so the rows that sparse "
                "leaves out would have had a gradient. Pass --sparse false or --whiten_advantages false."
            )
        if self.keep_per_group and self.completions_per_step // self.num_generations % self.num_minibatches:
            raise ValueError(
                f"keep_per_group leaves {self.prompts_per_step} rows for num_minibatches={self.num_minibatches}: "
                "mini-batches must be equal. Pass a divisor of prompts_per_step."
            )

    @property
    def estimator(self) -> str:
        """kl_estimator, None resolved by kl_place."""
        return self.kl_estimator or ("k1" if self.kl_place == "reward" else "k3")


class GRPOTrainer(OnPolicyTrainer):
    """Compare the completions of one prompt with each other; no value model."""

    config: GRPOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of GRPO.

        Args:
            prompts: this process's prompts.
        """
        config, group_size = self.config, self.config.num_generations
        # 1. Sample a group of completions for each prompt and score them.
        rollouts = self.sample(prompts, num_generations=group_size)
        rollouts.scores = self.score(rollouts)
        scores = rollouts.scores
        if config.kl_place == "reward" and config.kl_coef:
            scores = scores - config.kl_coef * self.sequence_kl(rollouts)
        # 2. Compare each completion with its group; every token of a completion gets the same advantage.
        advantages = group_relative(scores, group_size, scale_by_std=config.scale_by_std)
        rollouts.advantages = maybe_whiten(
            rollouts.spread(advantages),
            rollouts.completion_mask,
            enabled=config.whiten_advantages,
            sum_over_processes=self.passes.sum_over_processes,
        )
        self.describe(rollouts, rollouts.advantages)
        # 3. Sparse GRPO: forward and backward only the groups that have something to teach. The rows left out still
        #    count in the loss's mean, so leaving them out changes no gradient.
        if config.sparse:
            rollouts = rollouts[rows_with_signal(scores, group_size)]
        if config.keep_per_group:
            rollouts = keep_one_per_group(rollouts, group_size, seed=config.seed, step=prompts.step)
        # 4. What the sampling policy and the reference thought of these tokens. With one optimizer step per rollout
        #    the sampling policy is the one being updated: its pass would only repeat the update's own.
        if not config.trains_on_policy:
            rollouts.old_logprobs = self.logprobs("policy", rollouts)
        if config.kl_coef and config.kl_place == "loss":
            rollouts.ref_logprobs = self.logprobs("ref", rollouts)
        # 5. Clipped policy-gradient steps.
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped surrogate plus the KL to the reference, equation 3 of the paper.

        Args:
            policy: the model being trained.
            minibatch: b rows on its device.

        Returns:
            (b, C) loss of each token, and (b, C) metrics by name.
        """
        config = self.config
        clip_range = config.clip_range
        clip_range_high = clip_range if config.clip_range_high is None else config.clip_range_high
        logprobs, entropy = token_logprobs(policy, minibatch, config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)
        loss = clipped_surrogate(ratio, minibatch.advantages, clip_range, clip_range_high)
        clipped = clipped_tokens(ratio, minibatch.advantages, clip_range, clip_range_high)
        metrics = policy_metrics(ratio, clipped, entropy, logprobs, minibatch.sampling_logprobs)
        if minibatch.ref_logprobs is not None:
            kl = kl_estimate(logprobs, minibatch.ref_logprobs, config.estimator)
            loss = loss + config.kl_coef * kl
            metrics["kl"] = kl.detach()
        return loss, metrics

    @torch.no_grad()
    def sequence_kl(self, rollouts: Rollouts) -> Tensor:
        """(B,) float32: estimated KL to the reference, summed over each completion."""
        logprobs = self.logprobs("policy", rollouts)
        kl = kl_estimate(logprobs, self.logprobs("ref", rollouts), self.config.estimator)
        kl = torch.where(rollouts.completion_mask, kl, 0.0)
        self.shares.add("kl", kl.sum(), rollouts.completion_mask.sum())
        return kl.sum(1)
