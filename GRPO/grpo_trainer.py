"""GRPO: group relative policy optimization (huggingface.co/papers/2402.03300)."""

import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import group_relative
from common.config import PlacedKLConfig, check_group, check_kept_rows, check_not_negative, check_whiten_rewards
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio, with_kl
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer


@dataclass(kw_only=True)
class GRPOConfig(PlacedKLConfig):
    """Settings of GRPO, in addition to those of every clipped algorithm."""

    average_over: str = "rows"
    """GRPO's own mean: every completion weighs the same. "tokens" is DAPO's, "constant" is Dr. GRPO's."""
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation; False is Dr. GRPO."""
    whiten_rewards: bool = False
    """Scale the rewards of a step to variance 1 over its tokens; for scale_by_std=False, which keeps their scale."""
    kl_place: str = "loss"
    """"loss", or "reward": the completion's KL is subtracted from its score before groups are compared."""
    sparse: bool = False
    """Skip forward and backward for groups of equal scores; the gradient is the same if kl_coef is 0."""
    keep_per_group: bool = False
    """Train on 1 random completion of each group, after all served as the baseline, to save time."""
    refill_rounds: int = 0
    """Most rounds in which groups of equal scores are replaced by groups of other prompts; 0: none. DAPO's dynamic
    sampling."""

    def __post_init__(self) -> None:
        """Check GRPO's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_group(self.num_generations, "GRPO compares completions of one prompt with each other")
        if self.sparse and self.has_kl_in_loss:
            warnings.warn(
                f"sparse with kl_coef={self.kl_coef}: groups of equal scores lose their KL term too, so the gradient "
                "is not that of plain GRPO. Pass --kl_coef 0 or --sparse false for equality.",
                stacklevel=2,
            )
        if self.sparse and self.whiten_advantages:
            raise ValueError(
                "sparse with whiten_advantages: whitening moves advantages of 0 away from 0, so the rows that sparse "
                "leaves out would have had a gradient. Pass --sparse false or --whiten_advantages false."
            )
        if self.keep_per_group:
            check_kept_rows(self, "keep_per_group")
        check_not_negative(self, "refill_rounds")
        check_whiten_rewards(self, "scale_by_std", "whiten_advantages")


class GRPOTrainer(OnPolicyTrainer):
    """Compare the completions of one prompt with each other; no value model."""

    config: GRPOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of GRPO on this process's prompts."""
        config, group_size = self.config, self.config.num_generations
        # 1. Sample a group of completions for each prompt and score them; groups of equal scores may be replaced.
        sampled = self.sample(prompts, num_generations=group_size)
        sampled.scores = self.score(sampled)
        rollouts = self.refilled(sampled, rounds=config.refill_rounds)
        options = {"whitened": config.whiten_rewards, "with_kl": config.kl_place == "reward"}
        options["keep"] = config.keep_per_group
        scores = self.token_rewards(rollouts, rollouts.scores, **options).sum(1)  # (B,), less the KL if it is there
        # 2. Compare each completion with its group; every token of a completion gets the same advantage.
        advantages = group_relative(scores, group_size, scale_by_std=config.scale_by_std)
        rollouts.advantages = self.maybe_whiten(rollouts.spread(advantages), rollouts)
        self.describe(rollouts, rollouts.advantages, sampled=sampled)
        # 3. Sparse GRPO: forward and backward only for groups whose scores differ. Dropped rows still count in the
        #    loss's mean, so dropping them changes no gradient.
        if config.sparse:
            rollouts = self.only_with_signal(rollouts, scores)
        if config.keep_per_group:
            rollouts = self.keep_one_per_group(rollouts)
        # 4. Log-probs under the sampling policy and the reference.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        if config.has_kl_in_loss:
            rollouts.ref_logprobs = self.logprobs("ref", rollouts)
        # 5. Clipped policy-gradient steps.
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate plus the KL to the reference, equation 3 of the paper; (b, C) metrics by name."""
        config = self.config
        logprobs, entropy = token_logprobs(policy, minibatch, config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, config.clip_ranges)
        return self.corrected(*with_kl(loss, metrics, logprobs, minibatch, config), logprobs, minibatch)
