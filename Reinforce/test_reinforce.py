"""REINFORCE alone: that its settings act, and by hand what it makes of a step."""

import pytest
import torch

from tests.by_hand import WITH_KL, assert_advantages, rewards_by_hand, to_go, trained_on
from tests.toy import CLIP, toy_trainer

WHITENING_IS_THE_BASELINE = True
# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {
    "num_generations": ({}, 2),
    "whiten_advantages": ({}, False),
    "gamma": ({}, 0.5),
    "whiten_rewards": ({"whiten_advantages": False}, True),
    "group_baseline": ({}, True),
}


@pytest.mark.parametrize("whitened", [True, False])
def test_reinforce_judges_each_token_by_what_comes_from_it_on(toy_folder, tmp_path, whitened):
    trainer = toy_trainer(
        toy_folder, tmp_path / "run", algorithm="Reinforce", gamma=0.9, whiten_advantages=whitened, **WITH_KL
    )
    rollouts = trained_on(trainer)
    expected = [to_go(rewards, 0.9) for rewards in rewards_by_hand(rollouts, trainer.config)]
    if whitened:
        flat = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
        expected = [[float((x - flat.mean()) / flat.std(correction=0)) for x in row] for row in expected]
    assert_advantages(rollouts, expected)


def test_the_group_baseline_of_reinforce_is_taken_from_the_score_alone(toy_folder, tmp_path):
    trainer = toy_trainer(
        toy_folder, tmp_path / "run", algorithm="Reinforce", group_baseline=True, whiten_advantages=False, **WITH_KL
    )
    rollouts = trained_on(trainer)
    means = rollouts.scores.reshape(4, 4).mean(1).repeat_interleave(4).tolist()
    rewards = rewards_by_hand(rollouts, trainer.config)
    assert_advantages(rollouts, [to_go([*r[:-1], r[-1] - mean], 1.0) for r, mean in zip(rewards, means, strict=True)])


def test_scaled_rewards_have_variance_one_and_a_reward_of_zero_stays_zero(toy_folder, tmp_path):
    settings = {"whiten_rewards": True, "whiten_advantages": False, "gamma": 0.0}
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="Reinforce", **settings)
    rollouts = trained_on(trainer)
    mask = rollouts.completion_mask
    rewards = torch.zeros(mask.shape)
    rewards[mask] = torch.tensor([x for row in rewards_by_hand(rollouts, trainer.config) for x in row])
    ours = rollouts.advantages[mask].double()  # without a future each token has its own reward
    assert float(ours.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(rollouts.advantages == 0, rewards == 0) and 0 < (rewards[mask] == 0).sum() < mask.sum()
    ratio = rollouts.advantages[rewards != 0] / rewards[rewards != 0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(1 / rewards[mask].std(correction=0))))
