"""On-policy distillation: a teacher judges every token that the student samples (huggingface.co/papers/2306.13649)."""

from dataclasses import dataclass

from torch import Tensor, nn

from common.config import ClippedConfig, OtherModel
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer
from Distill.judgement import check_judgement, judged, teacher_of


@dataclass(kw_only=True)
class DistillConfig(ClippedConfig):
    """Settings of distillation, in addition to those of every clipped algorithm."""

    teacher: str | None = None
    """Model to learn from: hub id, folder, run, or LoRA adapter; it must know the policy's tokens."""
    gamma: float = 0.0
    """Discount of what the teacher says of later tokens, in [0, 1]; 0: a token answers for itself alone."""
    reward_coef: float = 0.0
    """Weight of the score, less the mean of the prompt's other completions, beside what the teacher says."""

    def __post_init__(self) -> None:
        """Check distillation's settings after the shared ones; a ValueError says what is wrong."""
        super().__post_init__()
        check_judgement(self)

    @property
    def other_models(self) -> tuple[OtherModel, ...]:
        """The teacher."""
        return (teacher_of(self),)


class DistillTrainer(OnPolicyTrainer):
    """Make each token as likely as the teacher does, in texts that the student itself writes."""

    config: DistillConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of distillation on this process's prompts."""
        rollouts = self.sample(prompts, num_generations=self.config.num_generations)  # 1. The student writes.
        rollouts.scores = self.score(rollouts)
        rollouts.old_logprobs = self.logprobs("policy", rollouts)  # (B, C)
        log_ratio = self.logprobs("teacher", rollouts) - rollouts.old_logprobs  # 2. In expectation minus their KL.
        self.metrics.add("teacher/kl", -log_ratio.sum(), rollouts.lengths.sum())
        rollouts.ref_logprobs = self.logprobs("ref", rollouts) if self.config.kl_coef else None
        rollouts.advantages = self.maybe_whiten(judged(rollouts, log_ratio, self.config), rollouts)
        self.describe(rollouts, rollouts.advantages)
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=self.config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate, and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)
        loss = clipped_policy_loss(ratio, logprobs, entropy, minibatch, self.config.clip_ranges)
        return self.corrected(*loss, logprobs, minibatch)
