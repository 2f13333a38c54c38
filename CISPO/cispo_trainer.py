"""CISPO: clipped weights instead of a clipped surrogate, from MiniMax-M1 (huggingface.co/papers/2506.13585)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import group_relative
from common.config import ClippedConfig, check_group
from common.logprobs import token_logprobs
from common.losses import importance_ratio, policy_metrics
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer


@dataclass(kw_only=True)
class CISPOConfig(ClippedConfig):
    """Settings of CISPO: those of every clipped algorithm, where the clip is that of weights."""

    clip_range: float = 1.0
    """How far a token's weight may fall below 1; 1: as far as it does, as in the paper's experiments."""
    clip_range_high: float | None = 4.0
    """How far it may rise above 1; 4 is the largest weight of 5 of ScaleRL (huggingface.co/papers/2510.13786)."""

    def __post_init__(self) -> None:
        """Check CISPO's settings after the shared ones; a ValueError says what is wrong."""
        super().__post_init__()
        check_group(self.num_generations, "CISPO's baseline is the mean of a prompt's completions")


class CISPOTrainer(OnPolicyTrainer):
    """GRPO in which no token ever loses its gradient: the ratio is a weight, clipped, of the log-prob."""

    config: CISPOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of CISPO on this process's prompts."""
        config = self.config
        # 1. Sample and score a group for each prompt; a completion's reward is its score less its KL.
        rollouts = self.sample(prompts, num_generations=config.num_generations)
        rollouts.scores = self.score(rollouts)
        rewards = self.token_rewards(rollouts, rollouts.scores).sum(1)  # (B,)
        # 2. Every token of a completion gets the advantage that the completion has in its group.
        advantages = rollouts.spread(group_relative(rewards, config.num_generations))
        rollouts.advantages = self.maybe_whiten(advantages, rollouts)
        self.describe(rollouts, rollouts.advantages)
        # 3. Weighed policy-gradient steps.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) minus log-prob x advantage x clipped weight without gradient, equations 4 and 5; metrics."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)  # (b, C) both
        ratio, (low, high) = importance_ratio(logprobs, minibatch.old_logprobs).detach(), self.config.clip_ranges
        weights = ratio.clamp(1 - low, 1 + high)
        metrics = policy_metrics(ratio, (weights != ratio).float(), entropy, logprobs, minibatch.sampling_logprobs)
        return self.corrected(-weights * minibatch.advantages * logprobs, metrics, logprobs, minibatch)
