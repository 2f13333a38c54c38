"""What a teacher's log-probs say of each token, beside a score of the whole completion."""

import math

from torch import Tensor

from common.advantages import leave_one_out, rewards_to_go
from common.config import RLConfig, check_discount, check_group
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


def judged(rollouts: Rollouts, rewards: Tensor, config: RLConfig) -> Tensor:
    """The advantage of each token.

    Its expectation over what the policy samples is, with gamma=1, the gradient of reward_coef x E[score] minus the KL
    of whole completions to the teacher; with gamma=0, minus that of the KL at each state, where states count as given.

    Args:
        rollouts: B scored rows, those of one prompt adjacent.
        rewards: (B, C) float32, log of the teacher's probability of a token over the policy's, 0 at padding.
        config: gamma, reward_coef and num_generations are read.

    Returns:
        (B, C) float32, 0 at padding.
    """
    advantages = rewards_to_go(rewards, rollouts.completion_mask, gamma=config.gamma)
    if not config.reward_coef:
        return advantages
    return advantages + config.reward_coef * rollouts.spread(leave_one_out(rollouts.scores, config.num_generations))
