"""ReMax: REINFORCE with the greedy completion as baseline (huggingface.co/papers/2310.10505)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import rewards_to_go
from common.config import ClippedConfig, check_discount
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

    def __post_init__(self) -> None:
        """Check ReMax's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_discount(self, "gamma")


class ReMaxTrainer(OnPolicyTrainer):
    """Compare sampled completions with the policy's greedy completion; no value model."""

    config: ReMaxConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of ReMax on this process's prompts."""
        config = self.config
        # 1. The baseline of a prompt: the return of its greedy completion, with the same penalties as all others.
        greedy = self.returns(self.sample(prompts, greedy=True))
        baselines = greedy.returns[:, 0].repeat_interleave(config.num_generations)  # (B,)
        # 2. Sample, and subtract the baseline.
        rollouts = self.returns(self.sample(prompts, num_generations=config.num_generations))
        rollouts.advantages = self.maybe_whiten(rollouts.returns - rollouts.spread(baselines), rollouts)
        self.describe(rollouts, rollouts.advantages)
        self.metrics.add("baseline", baselines.sum(), len(baselines))
        # 3. Clipped policy-gradient steps; the greedy completions are not trained on.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def returns(self, rollouts: Rollouts) -> Rollouts:
        """Score completions, and sum the rewards from each token on: score and KL to the reference."""
        rollouts.scores = self.score(rollouts)
        rewards = self.token_rewards(rollouts, rollouts.scores)
        rollouts.returns = rewards_to_go(rewards, rollouts.completion_mask, gamma=self.config.gamma)
        return rollouts

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        return clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
