"""RAFT: reward-ranked fine-tuning (huggingface.co/papers/2304.06767)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.advantages import as_groups
from common.config import RLConfig, check_group, check_kept_rows
from common.logprobs import token_logprobs
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer


@dataclass(kw_only=True)
class RAFTConfig(RLConfig):
    """Settings of RAFT: those that all algorithms share."""

    def __post_init__(self) -> None:
        """Check what RAFT needs after the shared settings.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_group(self.num_generations, "RAFT learns from the best of a prompt's K completions")
        if self.whiten_advantages:
            raise ValueError(
                "whiten_advantages=True: RAFT has no advantages; every chosen completion has the same weight. "
                "Pass --whiten_advantages false."
            )
        check_kept_rows(self, "RAFT")


class RAFTTrainer(OnPolicyTrainer):
    """Sample K completions for each prompt, and fine-tune on the best one."""

    config: RAFTConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of RAFT on this process's prompts."""
        config, group_size = self.config, self.config.num_generations
        # 1. Sample a group for each prompt. With a KL, they are ranked by score minus KL.
        rollouts = self.sample(prompts, num_generations=group_size)
        rollouts.scores = self.score(rollouts)
        best = best_of_group(self.token_rewards(rollouts, rollouts.scores).sum(1), group_size)  # (B / K,)
        is_best = torch.zeros(len(rollouts)).index_fill(0, best, 1.0)  # (B,)
        self.describe(rollouts, is_best)
        # 2. Train on the best of each group; the others leave the mean.
        chosen = rollouts.only(best).renumbered()
        self.metrics.add("best_score", chosen.scores.sum(), len(chosen))
        self.update(self.policy, chosen, self.loss, average_over=config.average_over)

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) negative log-likelihood, and (b, C) metrics by name."""
        logprobs, entropy = token_logprobs(policy, minibatch, self.config.temperature)
        difference = (logprobs.detach() - minibatch.sampling_logprobs).abs()
        return -logprobs, {"entropy": entropy, "first/sampler/logprob_diff": difference}


def best_of_group(scores: Tensor, num_generations: int) -> Tensor:
    """The row of each group with the highest score; the first one if several are equal.

    Args:
        scores: (B,) float, rows of one prompt adjacent.
        num_generations: K, at least 2; divides B.

    Returns:
        (B / K,) int64 row indices.

    Raises:
        ValueError: if num_generations is below 2 or does not divide B.
    """
    groups = as_groups(scores, num_generations)
    is_best = groups == groups.amax(dim=1, keepdim=True)
    # argmax does not guarantee which of several maxima it returns.
    first = is_best.int().cumsum(1).eq(0).sum(1)
    return torch.arange(len(groups)) * num_generations + first
