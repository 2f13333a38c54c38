"""ReMax: REINFORCE with the greedy completion as baseline (huggingface.co/papers/2310.10505)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import rewards_to_go
from common.config import ClippedConfig, check_discount, check_whiten_rewards
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer


@dataclass(kw_only=True)
class ReMaxConfig(ClippedConfig):
    """Settings of ReMax, in addition to those of every clipped algorithm."""

    num_generations: int = 1
    """Sampled completions per prompt; an additional greedy one is their baseline."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""
    whiten_rewards: bool = False
    """Scale the token rewards of a step to variance 1; those of the greedy completions by the same factor."""

    def __post_init__(self) -> None:
        """Check ReMax's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_discount(self, "gamma")
        check_whiten_rewards(self, "whiten_advantages")

    @property
    def why_no_lag(self) -> str:
        """The baseline is the greedy completion of the policy that samples, and drawn in the step."""
        return "ReMax compares them with the greedy completion of the policy that drew them, which is gone by then"


class ReMaxTrainer(OnPolicyTrainer):
    """Compare sampled completions with the policy's greedy completion; no value model."""

    config: ReMaxConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of ReMax on this process's prompts."""
        config = self.config
        # 1. The baseline of a prompt: the return of its greedy completion, with the same penalties as all others.
        greedy, _ = self.returns(self.sample(prompts, greedy=True))
        baselines = greedy.returns[:, 0].repeat_interleave(config.num_generations)  # (B,)
        # 2. Sample, and subtract the baseline.
        rollouts, rewards = self.returns(self.sample(prompts, num_generations=config.num_generations))
        advantages = rollouts.returns - rollouts.spread(baselines)
        if config.whiten_rewards:  # of both, so that the baseline stays comparable
            advantages = advantages * self.reward_scale(rewards, rollouts)
        rollouts.advantages = self.maybe_whiten(advantages, rollouts)
        self.describe(rollouts, rollouts.advantages)
        self.metrics.add("baseline", baselines.sum(), len(baselines))
        # 3. Clipped policy-gradient steps; the greedy completions are not trained on.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def returns(self, rollouts: Rollouts) -> tuple[Rollouts, Tensor]:
        """Score completions, and sum the rewards from each token on: score and KL. Also gives the rewards, (B, C)."""
        rollouts.scores = self.score(rollouts)
        rewards = self.token_rewards(rollouts, rollouts.scores)
        rollouts.returns = rewards_to_go(rewards, rollouts.completion_mask, gamma=self.config.gamma)
        return rollouts, rewards

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
        return self.corrected(loss, metrics, logprobs, minibatch)
