"""GSPO alone: that its settings act, and by hand what the ratio of a completion does."""

import pytest
import torch

from common.losses import sequence_ratio
from GSPO.gspo_trainer import GSPOConfig
from tests.by_hand import WITH_KL, assert_compared_in_groups, trained_on
from tests.toy import CLIP, SEVERAL, toy_trainer

# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {"clip_range": (SEVERAL, 0.5), "clip_range_high": (SEVERAL, 1.0)}
ACTS |= {"average_over": None}  # "rows" alone is allowed, see below
VALUES = {"average_over": ["rows", "tokens"]}
WEIGHS_COMPLETIONS = True  # not tokens, where the sampler differs
OWN_VALUES = {"num_minibatches": "on one, no ratio is off 1, which is what GSPO is about"}


def test_gspo_compares_score_less_kl_in_its_group(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="GSPO", **WITH_KL)
    assert_compared_in_groups(trained_on(trainer), trainer.config)


def test_the_ratio_of_a_completion_is_the_geometric_mean_of_its_tokens():
    """1/2 and 2 make 1, 4 and 1 make 2; a token that is not trained on has no part in it."""
    ratios = torch.tensor([[0.5, 2.0, 1.0], [4.0, 1.0, 9.0], [0.25, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, True, False], [True, False, False], [False, False, False]])
    ratio = sequence_ratio(ratios.log(), torch.zeros(4, 3), mask, per_token=True)
    torch.testing.assert_close(ratio, torch.tensor([[1.0], [2.0], [0.25], [1.0]]))
    product = sequence_ratio(ratios.log(), torch.zeros(4, 3), mask)
    torch.testing.assert_close(product, torch.tensor([[1.0], [4.0], [0.25], [1.0]]))


def loss_at(trainer, rollouts, shift, advantage):
    """Loss and clip fraction of each completion, all of whose tokens now are e^shift times as likely."""
    rollouts.advantages = rollouts.spread(torch.full((len(rollouts),), advantage))
    rollouts.old_logprobs = trainer.logprobs("policy", rollouts) - shift * rollouts.completion_mask
    with trainer.models.use("policy") as policy:
        loss, metrics = trainer.loss(policy, rollouts)
    return loss[:, 0].detach(), metrics["policy/ratio"], metrics["policy/clip_fraction"]


def test_the_clip_takes_or_leaves_whole_completions_whatever_their_length(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="GSPO", num_minibatches=2)
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    assert len(set(rollouts.lengths.tolist())) > 3
    for shift, advantage, ratio, is_clipped in (
        (2e-4, 1.0, 1.0002, 0),
        (5e-4, 1.0, 1.0004, 1),  # the paper's range is [1 - 3e-4, 1 + 4e-4]
        (5e-4, -1.0, 1.0005, 0),
        (-3.5e-4, 1.0, 0.99965, 0),
        (-3.5e-4, -1.0, 0.9997, 1),
    ):
        loss, ratios, clipped = loss_at(trainer, rollouts, shift, advantage)
        assert ratios.shape == clipped.shape == (16, 1) and (clipped == is_clipped).all()
        torch.testing.assert_close(loss, torch.full((16,), -advantage * ratio), atol=1e-5, rtol=0)
        torch.testing.assert_close(ratios, torch.full((16, 1), shift).exp(), atol=1e-5, rtol=0)


def test_completions_that_are_left_out_have_no_part_in_ratio_and_clip(toy_folder, tmp_path):
    settings = SEVERAL | {"mask_truncated": True, "clip_range": 0.01, "clip_range_high": 0.01}
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="GSPO", **settings)
    ratios, clipped, whole = [], [], trainer.loss

    def watched(policy, minibatch):
        loss, metrics = whole(policy, minibatch)
        for row in minibatch.loss_mask.any(1).nonzero().flatten().tolist():
            ratios.append(float(metrics["policy/ratio"][row]))
            sign = float(minibatch.advantages[row, 0])
            clipped.append(float((sign > 0 and ratios[-1] > 1.01) or (sign < 0 and ratios[-1] < 0.99)))
        return loss, metrics

    trainer.loss = watched
    line = trainer.train()
    assert 0 < line["truncated"] < 1 and 0 < sum(clipped) < len(clipped)
    assert line["policy/ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert line["policy/clip_fraction"] == pytest.approx(sum(clipped) / len(clipped))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average_over": "tokens"}, r"average_over='tokens': GSPO has one loss.*--average_over rows, or use GRPO"),
        ({"num_generations": 1}, r"num_generations=1: GSPO compares.* at least 2. Pass --num_generations 8"),
    ],
)
def test_gspo_refuses_what_contradicts_it(settings, message):
    with pytest.raises(ValueError, match=message):
        GSPOConfig(**settings)
