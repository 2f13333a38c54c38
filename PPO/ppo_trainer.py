"""PPO: proximal policy optimization with a value model (huggingface.co/papers/1707.06347)."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor, nn

from common.advantages import generalized_advantages, rewards_to_go
from common.config import ON_POLICY, OtherModel, PlacedKLConfig, check_discount
from common.logprobs import token_logprobs
from common.losses import clipped_policy_loss, importance_ratio, with_kl
from common.rollouts import PromptBatch, Rollouts
from common.tasks import Task
from common.trainer import OnPolicyTrainer
from PPO.value_initializer import (
    NUM_PARTS,
    check_value_model,
    completion_rewards,
    initialize_values,
    make_value_model,
)
from PPO.value_model import clipped_value_loss, explained_variance, save_value_model, token_values


@dataclass(kw_only=True)
class PPOConfig(PlacedKLConfig):
    """Settings of PPO, in addition to those of every clipped algorithm."""

    num_generations: int = 1
    """Completions per prompt; the value model is the baseline, so one is enough."""
    gamma: float = 1.0
    """Discount of later rewards, in [0, 1]."""
    gae_lambda: float = 0.95
    """How far advantages rely on rewards (1) instead of the next value (0)."""
    whiten_rewards: bool = False
    """Scale the token rewards of a step to variance 1."""
    value_learning_rate: float = 1e-5
    """Learning rate of the value model."""
    value_clip_range: float | None = 0.2
    """How far a value may move in one step before its gradient stops, in units of the score; None: no limit."""
    value_loss_coef: float = 0.5
    """Factor of the value loss. It does not change Adam's steps, only when max_grad_norm clips."""
    value_backbone: str = "own"
    """"own": a second model; "shared", with LoRA: the policy's frozen base with an adapter and a head of its own."""
    value_init: str = "fit"
    """"none" (random head), "zero_head", "fit" (to returns of the untrained policy), or a model with a score."""
    value_init_prompts: int = 640
    """Training prompts completed for the fit, over all processes; one in five is held out from it."""
    value_init_generations: int = 4
    """Completions per prompt of the fit."""
    value_init_epochs: int = 4
    """Maximum number of passes over them; the weights with the lowest held-out error are kept."""
    value_init_minibatches: int = 64
    """Optimizer steps per pass."""
    value_init_learning_rate: float = 3e-5
    """Learning rate of the fit; falls linearly to 0."""

    def __post_init__(self) -> None:
        """Check PPO's settings after the shared ones.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        check_discount(self, "gamma", "gae_lambda")
        for name in ("value_learning_rate", "value_init_learning_rate", "value_loss_coef"):
            if not 0 <= vars(self)[name] < math.inf:
                raise ValueError(
                    f"{name}={vars(self)[name]}: need a finite number, 0 or more, since the value model goes down its "
                    f"loss. Pass --{name} {type(self).__dataclass_fields__[name].default}."
                )
        if self.value_clip_range is not None and not self.value_clip_range > 0:
            raise ValueError(
                f"value_clip_range={self.value_clip_range}: values must be able to change, so it must be above 0. "
                "Pass --value_clip_range 0.2, or null for no clip."
            )
        if self.value_backbone not in ("own", "shared") or (self.value_backbone == "shared" and not self.use_lora):
            raise ValueError(
                f"value_backbone={self.value_backbone!r} with use_lora={self.use_lora}: need own, or shared with "
                "LoRA, since only a frozen base can serve both models. Pass --value_backbone own or --use_lora true."
            )
        if self.value_backbone == "shared" and self.value_init not in ("none", "zero_head", "fit"):
            raise ValueError(
                f"value_init={self.value_init!r} with value_backbone='shared': that model would need a base of its "
                "own. Pass --value_backbone own, or --value_init none, zero_head or fit."
            )
        counts = self.value_init_generations, self.value_init_epochs, self.value_init_minibatches
        if self.value_init_prompts < NUM_PARTS or min(counts) < 1:
            raise ValueError(
                f"value_init_prompts={self.value_init_prompts}, value_init_generations, _epochs, _minibatches="
                f"{counts}: need at least {NUM_PARTS} prompts, since one part tests the fit, and 1 of the others. "
                "Pass --value_init_prompts 640."
            )

    @property
    def completions_at_once(self) -> int:
        """Those of a step, or of a part of what the value model is fitted to."""
        if self.value_init in ("none", "zero_head"):
            return super().completions_at_once
        of_fit = math.ceil(self.value_init_prompts / NUM_PARTS) * self.value_init_generations
        return max(super().completions_at_once, of_fit)

    @property
    def other_models(self) -> tuple[OtherModel, ...]:
        """The value model: the policy's architecture, or that of the model it begins as."""
        path = None if self.value_init in ("none", "zero_head", "fit") else self.value_init
        return (
            OtherModel(name="value", setting="value_init", path=path, shares_base=self.value_backbone == "shared"),
        )

    def idle_settings(self) -> dict[str, str]:
        """Those of a clip and a KL, the clip of values where it cannot act, and the fit's if there is none."""
        idle = super().idle_settings()
        if self.takes_one_step:
            idle["value_clip_range"] = ON_POLICY
        if self.value_init != "fit":
            names = [field.name for field in fields(self) if field.name.startswith("value_init_")]
            idle |= dict.fromkeys(names, f"value_init is {self.value_init}")
        return idle


class PPOTrainer(OnPolicyTrainer):
    """A value model predicts the score; tokens that do better than predicted become more likely."""

    config: PPOConfig

    def __init__(self, config: PPOConfig, *, task: Task | None = None) -> None:
        super().__init__(config, task=task)
        model, in_pool = make_value_model(self)
        if self.run.checkpoint is None:
            initialize_values(self, model, in_pool)
        self.value = self.add_learner(
            "value",
            model,
            replace(config, learning_rate=config.value_learning_rate),
            save=self.save_value_model,
            **in_pool,
        )

    def check_models(self, policy: nn.Module) -> None:
        """Refuse a value model that cannot be made."""
        check_value_model(self, policy)

    def step(self, prompts: PromptBatch) -> None:
        """One iteration of PPO on this process's prompts."""
        config = self.config
        # 1. Sample and score. The last token gets the score; unless the KL is in the loss, each token pays its own.
        rollouts = self.sample(prompts, num_generations=config.num_generations)
        rollouts.scores = self.score(rollouts)
        rewards = completion_rewards(self, rollouts)
        # 2. What the value model predicted in each state, and how much better or worse the outcome was.
        mask, gamma = rollouts.completion_mask, config.gamma
        rollouts.values = self.for_each_token("value", rollouts, token_values, phase="values")
        advantages, rollouts.returns = generalized_advantages(
            rewards, rollouts.values, mask, gamma=gamma, gae_lambda=config.gae_lambda
        )
        rollouts.advantages = self.maybe_whiten(advantages, rollouts)
        self.describe(rollouts, rollouts.advantages)
        explained = explained_variance(
            rollouts.values,
            rewards_to_go(rewards, mask, gamma=gamma),  # what came, not rollouts.returns, which contain the values
            rollouts.loss_mask,
            sum_over_processes=self.sum_over_processes,
        )
        self.metrics.add_if_defined("value/explained_variance", explained)
        # 3. Clipped steps of the policy, then of the value model; one of them is on the device at a time.
        rollouts.old_logprobs = self.old_logprobs(rollouts)
        if config.has_kl_in_loss:
            rollouts.ref_logprobs = self.logprobs("ref", rollouts)
        self.update(self.policy, rollouts, self.policy_loss, average_over=config.average_over)
        self.update(self.value, rollouts, self.value_loss, average_over=config.average_over)

    def save_value_model(self, folder: Path) -> None:
        """Write the value model, with its adapter active, as a folder that transformers loads."""
        with self.models.use("value") as model:
            save_value_model(model, self.tokenizer, folder)

    def policy_loss(self, policy: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped surrogate, equation 7 of the paper, plus the KL if it is here; (b, C) metrics by name."""
        config = self.config
        logprobs, entropy = token_logprobs(policy, minibatch, config.temperature)  # (b, C) both
        ratio = importance_ratio(logprobs, minibatch.old_logprobs)  # (b, C)
        loss, metrics = clipped_policy_loss(ratio, logprobs, entropy, minibatch, config.clip_ranges)
        return self.corrected(*with_kl(loss, metrics, logprobs, minibatch, config), logprobs, minibatch)

    def value_loss(self, value_model: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """(b, C) clipped squared error of the values, and (b, C) metrics by name."""
        values = token_values(value_model, minibatch)
        loss, clipped = clipped_value_loss(
            values, minibatch.values, minibatch.returns, clip_range=self.config.value_clip_range
        )
        return self.config.value_loss_coef * loss, {"value/clip_fraction": clipped, "value/mean": values.detach()}
