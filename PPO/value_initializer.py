"""Fits the value model to the policy's returns before PPO starts.

With an untrained critic the first advantages are noise, which harms the policy. So the untrained policy completes some
training prompts, and the value model is fitted to the returns that PPO would compute for them. This works with rule
rewards and with reward models.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.advantages import rewards_to_go
from common.rollouts import PromptBatch, Rollouts
from common.trainer import OnPolicyTrainer
from common.update.learner import Learner
from PPO.scored_model import scored_model
from PPO.value_model import (
    ValueModel,
    check_backbone,
    explained_variance,
    load_scored_value_model,
    load_value_model,
    share_backbone,
    token_values,
    value_adapter,
)

logger = logging.getLogger("nanorlhf")

# The completions are sampled in this many parts. The first, with prompts of its own, is held out: the fit uses 80 %.
NUM_PARTS = 5

# Passes over the data without a lower held-out error before the fit ends.
PATIENCE = 2


def check_value_model(trainer: OnPolicyTrainer, policy: nn.Module) -> None:
    """Refuse a value model that cannot be made, before any model is loaded.

    Args:
        trainer: with its tokenizer.
        policy: without storage.

    Raises:
        ValueError: if value_init names a model that is no value model, or none can be made of the policy.
    """
    config = trainer.config
    if config.value_init in ("none", "zero_head", "fit"):
        check_backbone(policy)
    else:
        scored_model(config.value_init, config, trainer.tokenizer)


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
    with trainer.stopwatch("value_init"):
        parts = trainer.with_progress(range(1, NUM_PARTS + 1), "completions for the value model", "parts")
        held_out, *fitted = [_returns(trainer, part) for part in parts]
        learner = trainer.add_learner("value", model, config, **in_pool)  # PPO's own replaces it afterwards
        explained = {"before": _explained(trainer, held_out)}
        if not _num_rows([held_out]) or not _num_rows(fitted):
            logger.warning(
                "value_init=%s: the length limit cut off all completions, and mask_truncated leaves them out, so the "
                "value model stays as it is. Pass a larger --max_completion_length, or --mask_truncated false.",
                config.value_init,
            )
        elif config.value_init == "fit":
            _fit(trainer, learner, fitted, held_out)
        else:
            _calibrate(trainer, model.head, fitted)
        explained["after"] = _explained(trainer, held_out)
        trainer.models.evict()
    of_fit = trainer.metrics.reduce(trainer.accelerator)  # of it, only these belong to the first line of the run
    for name in ("value_init/completions", "value_init/tokens"):
        trainer.metrics.add_sum(name, of_fit[name] if trainer.accelerator.is_main_process else 0)
    for when, value in explained.items():
        trainer.metrics.add_if_defined(f"value_init/explained_variance_{when}", value)
    known = [f"{value:.3f} {when}" for when, value in explained.items() if value is not None]
    logger.info("value model: explained variance of held-out returns %s", ", ".join(known) or "undefined")


def _prompts(trainer: OnPolicyTrainer, part: int) -> PromptBatch:
    """This process's prompts of a part, from 1; no prompt of the first part is in another."""
    count, process = trainer.config.value_init_prompts, trainer.accelerator.process_index
    first, end = (count * number // NUM_PARTS for number in (part - 1, part))
    held_out, fitted = held_out_and_fitted(trainer.prompts.ids, trainer.prompts.order(0), count // NUM_PARTS)
    # If there are fewer prompts than asked for, they come again, with other completions.
    pool, offset = (held_out, 0) if part == 1 else (fitted, first - count // NUM_PARTS)
    bounds = [(end - first) * number // trainer.accelerator.num_processes for number in (process, process + 1)]
    rows = list(range(*bounds))
    return trainer.prompts.select(part, rows, [pool[(offset + row) % len(pool)] for row in rows])


def held_out_and_fitted(
    prompt_ids: list[list[int]], order: list[int], num_held_out: int
) -> tuple[list[int], list[int]]:
    """Split prompts by their content.

    Args:
        prompt_ids: token ids of each prompt, with duplicates or without.
        order: indices of the prompts in the order in which they are used.
        num_held_out: how many are held out; if there are fewer than NUM_PARTS times as many, every NUM_PARTS-th is.

    Returns:
        Indices of the held-out prompts, no two of the same content, and of all others without their duplicates.

    Raises:
        ValueError: if there is only one prompt.
    """
    first_with: dict[tuple[int, ...], int] = {}
    for index in order:
        first_with.setdefault(tuple(prompt_ids[index]), index)
    if len(first_with) < 2:
        raise ValueError(
            "value_init with one distinct prompt: the fit is tested on prompts that it has not seen, so it needs at "
            "least 2. Pass --value_init zero_head, or more prompts."
        )
    contents = list(first_with)
    enough = len(contents) >= NUM_PARTS * num_held_out
    held_out = {ids: first_with[ids] for ids in (contents[:num_held_out] if enough else contents[::NUM_PARTS])}
    return list(held_out.values()), [index for index in order if tuple(prompt_ids[index]) not in held_out]


def _returns(trainer: OnPolicyTrainer, part: int) -> Rollouts:
    """Completions of a part of the prompts, different from the ones PPO samples, with the returns it would compute."""
    config = trainer.config
    prompts = _prompts(trainer, part)
    rollouts = trainer.sample(prompts, num_generations=config.value_init_generations, purpose="value_init")
    rollouts.scores = trainer.score(rollouts)
    rewards = completion_rewards(trainer, rollouts)
    rollouts.returns = rewards_to_go(rewards, rollouts.completion_mask, gamma=config.gamma)
    return rollouts


def completion_rewards(trainer: OnPolicyTrainer, rollouts: Rollouts) -> Tensor:
    """(B, C) float32: the token rewards of scored completions, the same ones in the fit and in training."""
    config = trainer.config
    options = {"whitened": config.whiten_rewards, "with_kl": config.kl_place == "reward"}
    return trainer.token_rewards(rollouts, rollouts.scores, **options)


def _fit(trainer: OnPolicyTrainer, learner: Learner, fitted: list[Rollouts], held_out: Rollouts) -> None:
    config, epochs = trainer.config, trainer.config.value_init_epochs
    parts = _parts_of_a_pass(fitted, config.value_init_minibatches)
    best, best_weights, since_best = _error(trainer, held_out), _copy(learner.parameters), 0
    for epoch in trainer.with_progress(range(epochs), "fit of the value model", "passes"):
        with trainer.models.use("value", train=True) as model:
            for part, (rollouts, num_minibatches) in enumerate(parts):
                # The rate falls to 0: at the end, small mini-batches would add more noise than they teach.
                remaining = 1 - (epoch + part / len(parts)) / epochs
                learner.update(
                    rollouts,
                    partial(_squared_error, model),
                    batches=trainer.batches,
                    step=epoch * len(parts) + part,  # different mini-batches in each pass
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


def _parts_of_a_pass(fitted: list[Rollouts], num_minibatches: int) -> list[tuple[Rollouts, int]]:
    """The rows to fit, as parts with a number of mini-batches each, together num_minibatches if there are enough rows.

    Rows that are not trained on are left out. Parts of too few rows for a mini-batch are joined with the next.
    """
    total = _num_rows(fitted)
    if total < num_minibatches:
        logger.warning(
            "value_init_minibatches=%d: there are %d completions to fit, so each pass makes %d optimizer steps. Pass "
            "more --value_init_prompts, or --value_init_minibatches %d.",
            *(num_minibatches, total, total, total),
        )
        num_minibatches = total
    parts, waiting = [], []
    taken = seen = 0
    for rollouts in fitted:
        waiting.append(rollouts)
        seen += _num_rows([rollouts])
        count = num_minibatches * seen // total - taken
        if count:
            joined = Rollouts.joined(waiting)
            parts.append((joined.only(joined.loss_mask.any(1)).renumbered(), count))
            taken, waiting = taken + count, []
    return parts


def _num_rows(batches: list[Rollouts]) -> int:
    """Completions that are trained on, over all processes."""
    return sum(int((rollouts.step_lengths > 0).sum()) for rollouts in batches)


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


def _explained(trainer: OnPolicyTrainer, held_out: Rollouts) -> float | None:
    values, returns = _flat(trainer, [held_out])
    everything = torch.ones(values.shape, dtype=torch.bool)
    return explained_variance(values, returns, everything, sum_over_processes=trainer.sum_over_processes)


def _error(trainer: OnPolicyTrainer, held_out: Rollouts) -> float:
    """Mean squared error over the tokens of all processes that are trained on."""
    values, returns = _flat(trainer, [held_out])
    parts = torch.stack([(values - returns).square().sum(), torch.tensor(float(len(values)))])
    total, count = trainer.sum_over_processes(parts.double())
    return float(total / count)


def _flat(trainer: OnPolicyTrainer, batches: list[Rollouts]) -> tuple[Tensor, Tensor]:
    """Values and returns of all tokens that are trained on, (tokens,) float64 both."""
    values = [
        trainer.for_each_token("value", rollouts, token_values, phase="values")[rollouts.loss_mask]
        for rollouts in batches
    ]
    returns = [rollouts.returns[rollouts.loss_mask] for rollouts in batches]
    return torch.cat(values).double(), torch.cat(returns).double()


def _squared_error(model: nn.Module, minibatch: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
    return (token_values(model, minibatch) - minibatch.returns).square(), {}


def _copy(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in parameters]
