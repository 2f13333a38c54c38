"""RLOO: REINFORCE leave-one-out (huggingface.co/papers/2402.14740)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import leave_one_out
from common.config import ClippedConfig, check_group, check_kept_rows, check_not_negative, check_whiten_rewards
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio, sequence_ratio
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer

RATIO_LEVELS = ("token", "sequence")


@dataclass(kw_only=True)
class RLOOConfig(ClippedConfig):
    """Settings of RLOO, in addition to those of every clipped algorithm."""

    average_over: str = "rows"
    """With the ratio of whole completions, the mean over completions is the unbiased gradient."""
    ratio_level: str = "sequence"
    """"sequence": the ratio of the whole completion, as in the paper; "token": of each token."""
    whiten_rewards: bool = False
    """Scale the token rewards of a step to variance 1 before they are summed to the completion's reward."""
    refill_rounds: int = 0
    """Most rounds in which groups of equal scores are replaced by groups of other prompts; 0: none."""
    keep_per_group: bool = False
    """Train on 1 random completion of each group, after all served as the baseline, to save time."""

    def __post_init__(self) -> None:
        """Check RLOO's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_group(self.num_generations, "RLOO's baseline is the mean of the prompt's other completions")
        if self.ratio_level not in RATIO_LEVELS:
            raise ValueError(
                f"ratio_level={self.ratio_level!r}: need one of {', '.join(RATIO_LEVELS)}. Pass --ratio_level token."
            )
        if self.ratio_level == "sequence" and self.average_over != "rows":
            raise ValueError(
                f"average_over={self.average_over!r} with ratio_level='sequence': a whole completion has one loss, so "
                "the mean is over rows. Pass --average_over rows, or --ratio_level token."
            )
        if self.keep_per_group:
            check_kept_rows(self, "keep_per_group")
        check_not_negative(self, "refill_rounds")
        check_whiten_rewards(self, "whiten_advantages")


class RLOOTrainer(OnPolicyTrainer):
    """Compare each completion with the mean of the prompt's other completions; no value model."""

    config: RLOOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of RLOO on this process's prompts."""
        config, group_size = self.config, self.config.num_generations
        # 1. Sample a group for each prompt; groups of equal scores may be replaced. A completion's reward is its score
        #    minus its KL.
        sampled = self.sample(prompts, num_generations=group_size)
        sampled.scores = self.score(sampled)
        rollouts = self.refilled(sampled, rounds=config.refill_rounds)
        options = {"whitened": config.whiten_rewards, "keep": config.keep_per_group}
        rewards = self.token_rewards(rollouts, rollouts.scores, **options).sum(1)  # (B,)
        # 2. The mean of the group's other completions is the baseline.
        advantages = rollouts.spread(leave_one_out(rewards, group_size))
        rollouts.advantages = self.maybe_whiten(advantages, rollouts)
        self.describe(rollouts, rollouts.advantages, sampled=sampled)
        # 3. Train on all, or on one of each group.
        if config.keep_per_group:
            rollouts = self.keep_one_per_group(rollouts)
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate, of the completion's ratio or the token's, and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)
        of_completions = self.config.ratio_level == "sequence"
        if of_completions:
            ratio = sequence_ratio(logprobs, minibatch.old_logprobs, minibatch.loss_mask)  # (b, 1)
        else:
            ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
        return self.corrected(loss, metrics, logprobs, minibatch, of_completions=of_completions)
