"""Fits the value model to the policy's returns before PPO starts.

With an untrained critic the first advantages are noise, which harms the policy. So the untrained policy completes some
training prompts, and the value model is fitted to the returns that PPO would compute for them. This works with rule
rewards and with reward models.
"""

import logging
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.advantages import rewards_to_go
from common.rollouts import Rollouts
from common.trainer import OnPolicyTrainer
from common.update.learner import Learner
from PPO.value_model import (
    ValueModel,
    explained_variance,
    load_scored_value_model,
    load_value_model,
    share_backbone,
    token_values,
    value_adapter,
)

logger = logging.getLogger("nanorlhf")

# The completions are sampled in this many parts, and the first is held out: the fit uses 80 %.
NUM_PARTS = 5

# Passes over the data without a lower held-out error before the fit ends.
PATIENCE = 2


def make_value_model(trainer: OnPolicyTrainer) -> tuple[ValueModel, dict[str, Any]]:
    """The value model that the settings ask for, before any fit.

    Args:
        trainer: with its policy loaded.

    Returns:
        The model on the CPU, and the other arguments of ModelPool.add.

    Raises:
        ValueError: if value_init names a model that is no value model.
    """
    config, dtype = trainer.config, trainer.dtype
    zero_head = config.value_init != "none"
    if config.value_backbone == "shared":
        with trainer.models.use("policy") as policy:
            model = share_backbone(policy, config, zero_head=zero_head)
        return model, {"needs": "policy", "context": partial(value_adapter, policy)}
    if config.value_init in ("none", "zero_head", "fit"):
        return load_value_model(trainer.model_path, config, dtype=dtype, zero_head=zero_head), {}
    return load_scored_value_model(config.value_init, config, dtype=dtype, tokenizer=trainer.tokenizer), {}


def initialize_values(trainer: OnPolicyTrainer, model: ValueModel, in_pool: dict[str, Any]) -> None:
    """Fit the value model to returns of the untrained policy, and record the explained variance.

    A pretrained critic's head is only scaled and shifted to the returns, since its score may have another scale. With
    "none" and "zero_head" nothing is fitted. Policy, reference and random state do not change.

    Args:
        trainer: its sampler, rewards and batches are used.
        model: trained in place.
        in_pool: from make_value_model.
    """
    config = trainer.config
    if config.value_init in ("none", "zero_head"):
        return
    start = time.perf_counter()
    held_out, *fitted = [_returns(trainer, part) for part in range(1, NUM_PARTS + 1)]
    learner = trainer.add_learner("value", model, config, **in_pool)  # PPO's own replaces it afterwards
    before = _explained(trainer, held_out)
    if config.value_init == "fit":
        _fit(trainer, learner, fitted, held_out)
    else:
        _calibrate(trainer, model.head, fitted)
    after = _explained(trainer, held_out)
    trainer.models.evict()
    trainer.metrics.reduce(trainer.accelerator)  # metrics of the fit do not belong to the first step
    trainer.metrics.add("value_init/explained_variance_before", before, 1)
    trainer.metrics.add("value_init/explained_variance_after", after, 1)
    trainer.metrics.add("time/value_init", time.perf_counter() - start, 1)
    logger.info("value model: explained variance of held-out returns %.3f before, %.3f after", before, after)


def _returns(trainer: OnPolicyTrainer, part: int) -> Rollouts:
    """Completions of a part of the prompts, different from the ones PPO samples, with the returns it would compute."""
    config = trainer.config
    prompts = trainer.training_prompts(part, config.value_init_prompts // NUM_PARTS)
    rollouts = trainer.sample(prompts, num_generations=config.value_init_generations, purpose="value_init")
    rollouts.scores = trainer.score(rollouts)
    rewards = trainer.token_rewards(rollouts, rollouts.scores, whitened=config.whiten_rewards)
    rollouts.returns = rewards_to_go(rewards, rollouts.completion_mask, gamma=config.gamma)
    return rollouts


def _fit(trainer: OnPolicyTrainer, learner: Learner, fitted: list[Rollouts], held_out: Rollouts) -> None:
    config, epochs = trainer.config, trainer.config.value_init_epochs
    num_minibatches = max(config.value_init_minibatches // len(fitted), 1)
    best, best_weights, since_best = _error(trainer, held_out), _copy(learner.parameters), 0
    for epoch in range(epochs):
        with trainer.models.use("value", train=True) as model:
            for part, rollouts in enumerate(fitted):
                # The rate falls to 0: at the end, small mini-batches would add more noise than they teach.
                remaining = 1 - (epoch + part / len(fitted)) / epochs
                learner.update(
                    rollouts,
                    partial(_squared_error, model),
                    batches=trainer.batches,
                    step=epoch * len(fitted) + part,  # different mini-batches in each pass
                    rate=config.value_init_learning_rate * remaining,
                    num_minibatches=num_minibatches,
                )
        error = _error(trainer, held_out)
        since_best += 1
        if error < best:
            best, best_weights, since_best = error, _copy(learner.parameters), 0
        if since_best == PATIENCE:
            break
    with torch.no_grad(), trainer.models.use("value", train=True):
        for parameter, weight in zip(learner.parameters, best_weights, strict=True):
            parameter.copy_(weight)


def _calibrate(trainer: OnPolicyTrainer, head: nn.Linear, fitted: list[Rollouts]) -> None:
    """Scale and shift the head's values to the lowest squared error."""
    values, returns = _flat(trainer, fitted)
    moments = torch.stack([torch.ones_like(values), values, returns, values.square(), values * returns]).sum(1)
    count, value, target, square, product = trainer.sum_over_processes(moments)
    spread = square / count - (value / count).square()
    scale = (product / count - value * target / count.square()) / spread if spread > 0 else torch.zeros(())
    with torch.no_grad(), trainer.models.use("value", train=True):
        head.weight.mul_(scale.float())
        head.bias.copy_(head.bias * scale.float() + (target - scale * value) / count)


def _explained(trainer: OnPolicyTrainer, held_out: Rollouts) -> float:
    values, returns = _flat(trainer, [held_out])
    everything = torch.ones(values.shape, dtype=torch.bool)
    return explained_variance(values, returns, everything, sum_over_processes=trainer.sum_over_processes)


def _error(trainer: OnPolicyTrainer, held_out: Rollouts) -> float:
    """Mean squared error over the tokens of all processes."""
    values, returns = _flat(trainer, [held_out])
    parts = torch.stack([(values - returns).square().sum(), torch.tensor(float(len(values)))])
    total, count = trainer.sum_over_processes(parts.double())
    return float(total / count)


def _flat(trainer: OnPolicyTrainer, batches: list[Rollouts]) -> tuple[Tensor, Tensor]:
    """Values and returns of all tokens, (tokens,) float64 both."""
    values = [
        trainer.for_each_token("value", rollouts, token_values, phase="values")[rollouts.completion_mask]
        for rollouts in batches
    ]
    returns = [rollouts.returns[rollouts.completion_mask] for rollouts in batches]
    return torch.cat(values).double(), torch.cat(returns).double()


def _squared_error(model: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    return (token_values(model, minibatch) - minibatch.returns).square(), {}


def _copy(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in parameters]
