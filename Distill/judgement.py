"""What a teacher's log-probs say of each token, beside a score of the whole completion."""

import math

from torch import Tensor

from common.advantages import leave_one_out, rewards_to_go
from common.config import OtherModel, RLConfig, check_discount, check_group
from common.rollouts import Rollouts


def check_judgement(config: RLConfig) -> None:
    """Refuse a discount that is none, and a score without completions to compare it with.

    Args:
        config: gamma, reward_coef and num_generations are read.

    Raises:
        ValueError: what was given, what is needed and why, what to do.
    """
    check_discount(config, "gamma")
    if not math.isfinite(config.reward_coef):
        raise ValueError(
            f"reward_coef={config.reward_coef}: it weighs the score against the teacher, so it must be a finite "
            "number. Pass --reward_coef 0 for the teacher alone."
        )
    if config.reward_coef:
        check_group(config.num_generations, "reward_coef weighs what a score has over the prompt's other completions")


def teacher_of(config: RLConfig) -> OtherModel:
    """The teacher, as the pool and the memory plan know it.

    Args:
        config: teacher and reward_coef are read.
    """
    options = {"path": config.teacher, "is_trained": False, "replaces_score": not config.reward_coef}
    return OtherModel(name="teacher", setting="teacher", **options)


def judged(rollouts: Rollouts, log_ratio: Tensor, config: RLConfig) -> Tensor:
    """The advantage of each token: the rewards from it on, less what the prompt's other completions have on average.

    reward_t = log teacher_t / policy_t - kl_coef log policy_t / reference_t, where t is a sampled token;
    advantage_t = sum over s >= t of gamma^(s - t) reward_s - their mean + reward_coef (score - mean of their scores).
    With gamma=1 it estimates the gradient of reward_coef E[score] - KL(policy || teacher) of whole completions, with
    gamma=0 that of the KL at each state, where states count as given (huggingface.co/papers/2306.13649, with the
    reverse KL; huggingface.co/papers/2306.08543, equation 2, for gamma=1). Neither mean depends on the completion
    itself, so that both estimates are unbiased.

    Args:
        rollouts: B scored rows, those of one prompt adjacent, with old_logprobs, and with ref_logprobs if kl_coef is
            above 0.
        log_ratio: (B, C) float32, log of the teacher's probability of a token over the policy's, 0 at padding.
        config: gamma, kl_coef, reward_coef and num_generations are read.

    Returns:
        (B, C) float32, 0 at padding.
    """
    rewards = log_ratio
    if config.kl_coef:
        rewards = rewards - config.kl_coef * (rollouts.old_logprobs - rollouts.ref_logprobs)
    to_go = rewards_to_go(rewards, rollouts.completion_mask, gamma=config.gamma)
    if config.num_generations == 1:
        return to_go
    sums, lengths = (each.reshape(-1, config.num_generations) for each in (to_go.sum(1), rollouts.lengths))
    others, tokens = (each.sum(1, keepdim=True) - each for each in (sums, lengths))  # (B / G, G)
    advantages = to_go - rollouts.spread((others / tokens.clamp(min=1)).reshape(-1))
    if not config.reward_coef:
        return advantages
    return advantages + config.reward_coef * rollouts.spread(leave_one_out(rollouts.scores, config.num_generations))
