"""REINFORCE on tokens, with whitened rewards to go (Williams 1992; REINFORCE++: huggingface.co/papers/2501.03262)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import group_relative, rewards_to_go
from common.config import ClippedConfig, check_discount, check_group, check_whiten_rewards
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer


@dataclass(kw_only=True)
class ReinforceConfig(ClippedConfig):
    """Settings of REINFORCE, in addition to those of every clipped algorithm."""

    num_generations: int = 1
    """Completions per prompt; the whole step is the baseline, so one is enough."""
    whiten_advantages: bool = True
    """The only baseline: the mean over all tokens of the step. With several prompts this is REINFORCE++."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""
    whiten_rewards: bool = False
    """Scale the token rewards of a step to variance 1."""
    group_baseline: bool = False
    """Subtract the group's mean from the scores first: REINFORCE++-baseline."""

    def __post_init__(self) -> None:
        """Check REINFORCE's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_discount(self, "gamma")
        if self.group_baseline:
            check_group(self.num_generations, "group_baseline compares completions of one prompt")
        check_whiten_rewards(self, "whiten_advantages")


class ReinforceTrainer(OnPolicyTrainer):
    """Make every token more or less likely by the rewards that follow it; no value model, no groups."""

    config: ReinforceConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of REINFORCE on this process's prompts."""
        config = self.config
        # 1. Sample and score.
        rollouts = self.sample(prompts, num_generations=config.num_generations)
        rollouts.scores = scores = self.score(rollouts)
        # 2. Each token is judged by the rewards from it on: the score at the end, and its own and all later KL.
        if config.group_baseline:
            scores = group_relative(scores, config.num_generations, scale_by_std=False)
        rewards = self.token_rewards(rollouts, scores, whitened=config.whiten_rewards)
        returns = rewards_to_go(rewards, rollouts.completion_mask, gamma=config.gamma)
        rollouts.advantages = self.maybe_whiten(returns, rollouts)
        self.describe(rollouts, rollouts.advantages)
        # 3. Policy-gradient steps; the clip acts from the second one on.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate, and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
        return self.corrected(loss, metrics, logprobs, minibatch)
