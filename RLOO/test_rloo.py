"""RLOO alone: that its settings act, and by hand what it makes of a step."""

import pytest
import torch

from common.rewards.scorer import Scorer
from RLOO.rloo_trainer import RLOOConfig
from tests.by_hand import WITH_KL, assert_advantages, rewards_by_hand, trained_on
from tests.toy import CLIP, SEVERAL, described_by, metrics_of, toy_trainer

# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {
    "average_over": ({"ratio_level": "token"}, "tokens"),
    "ratio_level": (SEVERAL, "token"),
    "whiten_rewards": ({}, True),
    "keep_per_group": ({}, True),
    "refill_rounds": None,  # tests/test_refill.py
}
VALUES = {"refill_rounds": [0, 1, 3]}
WEIGHS_COMPLETIONS = True  # not tokens, where the sampler differs


def test_rloo_compares_score_less_kl_with_the_mean_of_the_prompts_others(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RLOO", **WITH_KL)
    rollouts = trained_on(trainer)
    totals = [sum(rewards) for rewards in rewards_by_hand(rollouts, trainer.config)]
    expected = []
    for row, length in enumerate(rollouts.lengths.tolist()):
        group = row // 4 * 4
        others = [totals[i] for i in range(group, group + 4) if i != row]
        expected.append([totals[row] - sum(others) / 3] * length)
    assert_advantages(rollouts, expected)


def test_rloo_can_train_on_one_completion_of_each_group_after_all_made_the_baseline(toy_folder, tmp_path):
    rollouts = {}
    for keep in (True, False):
        trainer = toy_trainer(
            toy_folder, tmp_path / str(keep), algorithm="RLOO", keep_per_group=keep, num_steps=1, num_minibatches=2
        )
        rollouts[keep] = trained_on(trainer)
        assert metrics_of(tmp_path / str(keep))[0]["policy/first_ratio"] == 1.0
    assert rollouts[True].rows.tolist() == [0, 1, 2, 3] and len(rollouts[False]) == 16
    everything = list(zip(rollouts[False].completions, rollouts[False].advantages[:, 0].tolist(), strict=True))
    for group, kept in enumerate(
        zip(rollouts[True].completions, rollouts[True].advantages[:, 0].tolist(), strict=True)
    ):
        assert kept in everything[4 * group : 4 * group + 4]


def test_rloo_has_one_loss_for_a_whole_completion(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RLOO", num_update_epochs=2, learning_rate=1e-2)
    ratios, whole = [], trainer.loss

    def watched(policy, minibatch):
        loss, metrics = whole(policy, minibatch)
        ratios.append(metrics["policy/ratio"])
        return loss, metrics

    trainer.loss = watched
    trainer.train()
    assert any((ratio != 1).any() for ratio in ratios)
    assert all(ratio.shape[1] == 1 for ratio in ratios)


def test_the_ratio_and_the_clip_fraction_of_rloo_are_means_over_completions(toy_folder, tmp_path):
    settings = SEVERAL | {"mask_truncated": True, "max_tokens_per_microbatch": 60}
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RLOO", **settings)
    ratios, clipped, whole = [], [], trainer.loss

    def watched(policy, minibatch):
        loss, metrics = whole(policy, minibatch)
        for row in minibatch.loss_mask.any(1).nonzero().flatten().tolist():
            ratios.append(float(metrics["policy/ratio"][row]))
            high, low = minibatch.advantages[row].max() > 0, minibatch.advantages[row].min() < 0
            clipped.append(float((high and ratios[-1] > 1.2) or (low and ratios[-1] < 0.8)))
        return loss, metrics

    trainer.loss = watched
    line = trainer.train()
    assert line["policy/ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert line["policy/clip_fraction"] == pytest.approx(sum(clipped) / len(clipped)) and sum(clipped) > 0


def test_scaling_the_rewards_rewards_no_length(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RLOO", whiten_rewards=True, num_steps=1)
    trainer.scorer = Scorer({"digits": lambda completions, **_: [0.7] * len(completions)}, {"digits": 1.0})
    seen = described_by(trainer)
    trainer.train()
    ((rollouts, advantages),) = seen
    assert len(set(rollouts.lengths.tolist())) > 3 and not advantages.any()


def test_the_ratio_of_a_completion_is_over_the_tokens_that_are_trained_on(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RLOO", num_update_epochs=2)
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    rollouts.advantages = rollouts.spread(torch.ones(len(rollouts)))
    rollouts.old_logprobs = trainer.logprobs("policy", rollouts) - 0.1 * rollouts.completion_mask
    rollouts.loss_mask = rollouts.completion_mask & (torch.arange(rollouts.completion_mask.shape[1]) != 1)
    with trainer.models.use("policy") as policy:
        _, metrics = trainer.loss(policy, rollouts)
    ratios = metrics["policy/ratio"][:, 0]
    torch.testing.assert_close(ratios, (0.1 * rollouts.loss_mask.sum(1)).exp(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average_over": "tokens"}, r"average_over='tokens' with ratio_level='sequence'.*--average_over rows"),
        ({"ratio_level": "word"}, r"ratio_level='word': need one of token, sequence"),
    ],
)
def test_rloo_refuses_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        RLOOConfig(**settings)
