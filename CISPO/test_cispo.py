"""CISPO alone: that its settings act, and by hand what a clipped weight leaves of each token's gradient."""

import pytest
import torch

from CISPO.cispo_trainer import CISPOConfig
from tests.by_hand import WITH_KL, assert_compared_in_groups, trained_on
from tests.toy import CLIP, SEVERAL, toy_trainer

# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP
VALUES = {"clip_range": [1.0, 0.2, 0.01], "clip_range_high": [4.0, None, 0.001]}
OWN_VALUES = {
    "num_minibatches": "on one, no ratio is off 1, which is what CISPO is about",
    "kl_coef": "the paper has none",
}


def test_cispo_compares_score_less_kl_in_its_group(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="CISPO", **WITH_KL)
    assert_compared_in_groups(trained_on(trainer), trainer.config)


@pytest.fixture
def token_gradients(toy_folder, tmp_path, monkeypatch):
    """A function: the gradient of the loss by each token's log-prob, and which weights are cut, at these ratios."""

    def gradients(ratios, advantage, **settings):
        trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="CISPO", num_minibatches=2, **settings)
        rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)[:1]
        width = rollouts.completion_mask.shape[1]
        ratios = torch.tensor(ratios).repeat(width)[:width]
        logprobs = torch.full((1, width), -2.0, requires_grad=True)
        rollouts.old_logprobs = logprobs.detach() - ratios.log()
        rollouts.advantages = torch.full((1, width), advantage)
        module = "CISPO.cispo_trainer.token_logprobs"
        monkeypatch.setattr(module, lambda *args: (logprobs, torch.zeros(1, width)))
        loss, metrics = trainer.loss(None, rollouts)
        torch.testing.assert_close(loss, logprobs * torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)[0])
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        return gradient[0].tolist(), metrics["policy/clip_fraction"][0].tolist()

    return gradients


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize(
    ("settings", "ratios", "weights"),
    [
        ({}, [0.01, 0.5, 1.0, 4.9, 5.1, 80.0], [0.01, 0.5, 1.0, 4.9, 5.0, 5.0]),  # as ScaleRL has it: no lower side
        ({"clip_range": 0.2, "clip_range_high": 0.3}, [0.7, 0.9, 1.2, 2.0, 1.0, 0.1], [0.8, 0.9, 1.2, 1.3, 1.0, 0.8]),
    ],
    ids=["default", "both sides"],
)
def test_no_token_loses_its_gradient_whatever_its_ratio_and_advantage(
    token_gradients, settings, ratios, weights, advantage
):
    """PPO's clip would give 0 at ratios above the range of a good token, and below it of a bad one."""
    gradients, clipped = token_gradients(ratios, advantage, **settings)
    assert len(gradients) >= 6
    assert gradients[:6] == pytest.approx([-advantage * weight for weight in weights], rel=1e-5)
    assert clipped[:6] == [float(weight != ratio) for weight, ratio in zip(weights, ratios, strict=True)]


def test_the_metrics_are_those_of_ratios_and_cut_weights(toy_folder, tmp_path):
    settings = SEVERAL | {"clip_range": 0.05, "clip_range_high": 0.1}
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="CISPO", **settings)
    ratios, whole = [], trainer.loss

    def watched(policy, minibatch):
        loss, metrics = whole(policy, minibatch)
        ratios.append(metrics["policy/ratio"][minibatch.loss_mask])
        return loss, metrics

    trainer.loss = watched
    line = trainer.train()
    ratio = torch.cat(ratios)
    assert line["policy/first_ratio"] == 1.0
    assert line["policy/ratio"] == pytest.approx(float(ratio.mean()), rel=1e-5)
    outside = ((ratio < 0.95) | (ratio > 1.1)).float().mean()
    assert line["policy/clip_fraction"] == pytest.approx(float(outside), abs=1e-3) and 0 < outside < 1


def test_a_single_completion_is_refused():
    with pytest.raises(
        ValueError, match=r"num_generations=1: CISPO's baseline.* at least 2. Pass --num_generations 8"
    ):
        CISPOConfig(num_generations=1)
