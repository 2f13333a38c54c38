"""VinePPO: PPO whose values are mean scores of continuations (huggingface.co/papers/2410.01679)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.advantages import leave_one_out, per_token_rewards, rewards_to_go
from common.config import PlacedKLConfig, check_whiten_rewards
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio, with_kl
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer
from VinePPO.chunks import chunk_advantages, chunk_starts


@dataclass(kw_only=True)
class VinePPOConfig(PlacedKLConfig):
    """Settings of VinePPO, in addition to those of every clipped algorithm."""

    vine_k: int = 3
    """Continuations per valued state, K."""
    chunk_length: int = 100
    """Minimum tokens between two valued states; exact without chunk_separator."""
    chunk_separator: str | None = None
    """Text that ends a chunk, such as a line break; None: every chunk_length-th token does."""
    whiten_rewards: bool = False
    """Scale the token rewards of a step to variance 1; values, which are mean scores, by the same factor."""

    def __post_init__(self) -> None:
        """Check VinePPO's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        if min(self.vine_k, self.chunk_length) < 1:
            raise ValueError(
                f"vine_k={self.vine_k}, chunk_length={self.chunk_length}: a value is a mean over continuations and a "
                "chunk holds tokens, so both need at least 1. Pass --vine_k 3 --chunk_length 100."
            )
        if self.chunk_separator == "":
            raise ValueError(
                "chunk_separator='': an empty text matches everywhere, so it marks no end. Pass the text that a "
                "chunk ends with, or leave --chunk_separator out for chunks of equal length."
            )
        check_whiten_rewards(self, "whiten_advantages")

    @property
    def completions_at_once(self) -> int:
        """vine_k continuations of each chunk, if every completion is as long as it may be."""
        chunks = math.ceil(self.max_completion_length / self.chunk_length)
        return super().completions_at_once * max(chunks * self.vine_k, 1)

    @property
    def why_no_lag(self) -> str:
        """The continuations are drawn in the step, and value the states of the policy that samples."""
        return "VinePPO values their states by continuations of the policy that drew them, which is gone by then"

    def idle_settings(self) -> dict[str, str]:
        """Those of a clip and a KL, and the continuations and chunks where completions are not cut."""
        idle = super().idle_settings()
        if self.chunk_length >= self.max_completion_length:
            idle["chunk_separator"] = "a chunk of chunk_length tokens holds a whole completion"
            if self.num_generations > 1:  # the prompt's state is valued by the group
                idle["vine_k"] = idle["chunk_separator"]
        return idle


class VinePPOTrainer(OnPolicyTrainer):
    """Compare each chunk of a completion with alternatives sampled from the same state; no value model."""

    config: VinePPOConfig

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of VinePPO on this process's prompts."""
        config, group_size = self.config, self.config.num_generations
        # 1. Sample, and cut each completion into chunks.
        rollouts = self.sample(prompts, num_generations=group_size)
        rollouts.scores = scores = self.score(rollouts)
        settings = {"chunk_length": config.chunk_length, "separator": config.chunk_separator}
        starts = chunk_starts(rollouts, self.tokenizer, **settings)  # (B, C)
        # 2. The value of a state must not depend on what the completion did there, or the gradient would be biased. So
        #    new continuations are scored; for the prompt, the group's other completions serve as such for free.
        to_value = starts.clone()
        to_value[:, 0] = group_size == 1
        values = self.state_values(rollouts, to_value)
        if group_size > 1:
            values[:, 0] = scores - leave_one_out(scores, group_size)
        # 3. A chunk is as good as the change in value that it made. With the KL in the reward, each token pays its own
        #    and all later KL, without a baseline, so continuations need no reference.
        advantages = chunk_advantages(values, starts, scores, rollouts.completion_mask)
        self.metrics.add("vine/advantage", advantages.abs().sum(), rollouts.lengths.sum())
        self.metrics.add("vine/chunks", starts.sum(), len(rollouts))
        with_kl = config.kl_place == "reward"
        kl_rewards = self.token_rewards(rollouts, torch.zeros(len(rollouts)), with_kl=with_kl)
        advantages = advantages + rewards_to_go(kl_rewards, rollouts.completion_mask)
        if config.whiten_rewards:  # advantages are linear in the rewards, those of continuations included
            only_scores = per_token_rewards(scores, rollouts.completion_mask, torch.zeros(starts.shape), 0.0)
            advantages = advantages * self.reward_scale(kl_rewards + only_scores, rollouts)
        rollouts.advantages = self.maybe_whiten(advantages, rollouts)
        self.describe(rollouts, rollouts.advantages)
        # 4. Clipped policy-gradient steps; the continuations are not trained on.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        if config.has_kl_in_loss:
            rollouts.ref_logprobs = self.logprobs("ref", rollouts)
        self.update(self.policy, rollouts, self.loss, average_over=config.average_over)

    def state_values(self, rollouts: Rollouts, to_value: Tensor) -> Tensor:
        """Estimate values by the mean score of vine_k continuations each.

        Args:
            rollouts: B rows.
            to_value: (B, C) bool, True where the state in which that token was chosen is valued.

        Returns:
            (B, C) float32, 0 elsewhere.
        """
        values, k = torch.zeros(to_value.shape), self.config.vine_k
        rows, positions = to_value.nonzero(as_tuple=True)
        continuations = self.continue_from(rollouts, rows, positions, num_generations=k, purpose="vine")
        if len(rows):
            scores = self.score(continuations).reshape(-1, k)
            values[rows, positions] = scores.double().mean(1).float()  # float64: exactly the score if all are equal
        self.metrics.add_sum("vine/tokens", continuations.lengths.sum() - k * positions.sum())
        self.metrics.add_sum("vine/continuations", k * len(rows))
        return values

    def loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate with the advantages of chunks, plus the KL if it is here; metrics by name."""
        config = self.config
        logprobs, entropy = token_logprobs(policy, minibatch, config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, config.clip_ranges)
        return self.corrected(*with_kl(loss, metrics, logprobs, minibatch, config), logprobs, minibatch)
