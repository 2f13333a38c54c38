"""GSPO: group sequence policy optimization (huggingface.co/papers/2507.18071)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.advantages import group_relative
from common.config import ClippedConfig, check_group
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, sequence_ratio
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer


@dataclass(kw_only=True)
class GSPOConfig(ClippedConfig):
    """Settings of GSPO: those of every clipped algorithm, with the paper's much narrower clip."""

    average_over: str = "rows"
    """A completion has one ratio and one loss, so the mean is over completions."""
    clip_range: float = 3e-4
    clip_range_high: float | None = 4e-4

    def __post_init__(self) -> None:
        """Check GSPO's settings after the shared ones; a ValueError says what is wrong."""
        super().__post_init__()
        check_group(self.num_generations, "GSPO compares completions of one prompt with each other")
        if self.average_over != "rows":
            raise ValueError(
                f"average_over={self.average_over!r}: GSPO has one loss for a whole completion, so the mean is over "
                "rows. Pass --average_over rows, or use GRPO, which has a loss for each token."
            )


class GSPOTrainer(OnPolicyTrainer):
    """GRPO with one ratio for each completion, the geometric mean of its tokens', and a clip of whole completions."""

    config: GSPOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of GSPO on this process's prompts."""
        config, group_size = self.config, self.config.num_generations
        # 1. Sample a group of completions for each prompt. What counts is a completion's score less its KL.
        rollouts = self.sample(prompts, num_generations=group_size)
        rollouts.scores = self.score(rollouts)
        advantages = group_relative(self.token_rewards(rollouts, rollouts.scores).sum(1), group_size)  # (B,)
        rollouts.advantages = self.maybe_whiten(rollouts.spread(advantages), rollouts)
        self.describe(rollouts, rollouts.advantages)
        # 2. Clipped policy-gradient steps.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate of the completions' ratios, equation 5 of the paper; metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)  # (b, C) both
        ratio = sequence_ratio(logprobs, minibatch.old_logprobs, minibatch.loss_mask, per_token=True)  # (b, 1)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
        return self.corrected(loss, metrics, logprobs, minibatch, of_completions=True)
