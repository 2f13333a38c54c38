"""Rewards and advantages of a step, computed by hand from its samples; for the tests of the algorithms."""

import torch

from common.advantages import group_relative
from common.rollouts import Rollouts
from tests.toy import updates_of

# Far enough from the reference in the second step for the KL to count.
WITH_KL = {"kl_coef": 0.5, "missing_eos_penalty": 0.25, "learning_rate": 1e-2}


def trained_on(trainer) -> Rollouts:
    """The rollouts with which the last step updated the policy."""
    updates = updates_of(trainer)
    trainer.train()
    return updates[-1][1]


def rewards_by_hand(rollouts: Rollouts, config) -> list[list[float]]:
    """For each row the reward of each token: its KL penalty; at the last token also score and missing-EOS penalty."""
    rows = []
    for row, length in enumerate(rollouts.lengths.tolist()):
        rewards = [0.0] * length
        if config.kl_coef:
            log_ratio = (rollouts.old_logprobs - rollouts.ref_logprobs)[row, :length]
            assert log_ratio.abs().max() > 0
            rewards = (-config.kl_coef * log_ratio).tolist()
        rewards[-1] += float(rollouts.parts["digits"][row] + 0.5 * rollouts.parts["sum"][row])
        rewards[-1] -= config.missing_eos_penalty * float(rollouts.truncated[row])
        rows.append(rewards)
    return rows


def to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma**later * reward for later, reward in enumerate(rewards[t:])) for t in range(len(rewards))]


def assert_advantages(rollouts: Rollouts, expected: list[list[float]]) -> None:
    for row, values in enumerate(expected):
        ours = rollouts.advantages[row]
        torch.testing.assert_close(ours[: len(values)], torch.tensor(values), atol=2e-5, rtol=1e-4)
        assert not ours[len(values) :].any()


def assert_compared_in_groups(rollouts: Rollouts, config, penalties: list[float] | None = None) -> None:
    """Every token has what its completion's score, less its KL and a penalty, is in its group of four."""
    totals = torch.tensor([sum(rewards) for rewards in rewards_by_hand(rollouts, config)])
    if penalties is not None:
        totals = totals - torch.tensor(penalties)
    lengths = rollouts.lengths.tolist()
    expected = group_relative(totals, 4)
    assert_advantages(rollouts, [[float(a)] * n for a, n in zip(expected, lengths, strict=True)])
