"""DAPO: decoupled clip and dynamic sampling policy optimization (huggingface.co/papers/2503.14476)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import group_relative
from common.config import check_group, check_not_negative
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer
from DAPO.overlong import OverlongConfig, overlong_penalty


@dataclass(kw_only=True)
class DAPOConfig(OverlongConfig):
    """Settings of DAPO, in addition to those of every clipped algorithm and of the price of length."""

    clip_range_high: float | None = 0.28
    refill_rounds: int = 4
    """Most rounds in which groups of equal scores are replaced by groups of other prompts: dynamic sampling."""

    def __post_init__(self) -> None:
        """Check DAPO's settings after the shared ones; a ValueError says what is wrong."""
        super().__post_init__()
        check_group(self.num_generations, "DAPO compares completions of one prompt with each other")
        check_not_negative(self, "refill_rounds")


class DAPOTrainer(OnPolicyTrainer):
    """GRPO with a wider upper clip, a mean over tokens, prompts that teach something, and a price of length."""

    config: DAPOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of DAPO on this process's prompts."""
        config, size = self.config, self.config.num_generations
        # 1. Sample groups, and replace those of equal scores, whatever their lengths: they teach nothing.
        sampled = self.sample(prompts, num_generations=size)
        sampled.scores = self.score(sampled)
        rollouts = self.refilled(sampled, rounds=config.refill_rounds)
        # 2. Completions that are nearly too long, or too long, lose a part of their score. Then compare in groups.
        penalties = overlong_penalty(rollouts.lengths, config)  # (B,)
        self.metrics.add("overlong/penalty", penalties.sum(), len(rollouts))
        scores = self.token_rewards(rollouts, rollouts.scores - penalties).sum(1)  # (B,)
        rollouts.advantages = self.maybe_whiten(rollouts.spread(group_relative(scores, size)), rollouts)
        self.describe(rollouts, rollouts.advantages, sampled=sampled)
        # 3. Clipped policy-gradient steps.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate, equation 8 of the paper, and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)
        loss = clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
        return self.corrected(*loss, logprobs, minibatch)
