"""RAFT alone: that its settings act, and by hand what it makes of a step."""

import pytest
import torch

from common.rewards.scorer import Scorer
from RAFT.raft_trainer import RAFTConfig
from tests.by_hand import WITH_KL, trained_on
from tests.toy import described_by, metrics_of, toy_trainer

# Lines of the script's literal that differ from the other scripts', and why.
OWN_VALUES = {"kl_coef": "the paper has none"}


def test_raft_learns_the_best_completion_of_each_prompt_by_its_likelihood(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RAFT", num_steps=1, num_minibatches=2)
    seen = described_by(trainer)
    losses, whole = [], trainer.loss

    def watched(policy, minibatch):
        loss, metrics = whole(policy, minibatch)
        losses.append((loss.detach(), minibatch))
        return loss, metrics

    trainer.loss = watched
    chosen = trained_on(trainer)
    ((rollouts, is_best),) = seen
    groups = rollouts.scores.reshape(4, 4)
    assert torch.equal(chosen.scores, groups.amax(1)) and chosen.rows.tolist() == [0, 1, 2, 3]
    assert is_best.reshape(4, 4).sum(1).tolist() == [1.0] * 4
    assert chosen.completions == [rollouts.completions[i] for i in is_best.nonzero().squeeze(1).tolist()]
    line = metrics_of(tmp_path / "run")[0]
    assert line["best_score"] == pytest.approx(float(groups.amax(1).mean())) and line["zero_advantage"] == 0.75
    assert line["best_score"] > line["score"]
    # The first minibatch: minus the log-probs that the sampler reported, each token with the same weight.
    loss, minibatch = losses[0]
    torch.testing.assert_close(
        loss[minibatch.completion_mask], -minibatch.sampling_logprobs[minibatch.completion_mask], atol=1e-5, rtol=1e-5
    )
    for _, minibatch in losses:
        assert minibatch.token_weights[minibatch.completion_mask].unique().numel() == 1
        assert float(minibatch.token_weights.sum()) == pytest.approx(1.0)
    assert "policy/ratio" not in line and "policy/clip_fraction" not in line


def test_raft_ranks_by_score_less_kl_where_a_kl_is_wanted(toy_folder, tmp_path):
    trainer = toy_trainer(
        toy_folder, tmp_path / "run", algorithm="RAFT", rewards=["sum"], **(WITH_KL | {"missing_eos_penalty": 0.0})
    )
    seen = described_by(trainer)
    trainer.train()
    rollouts, is_best = seen[-1]
    totals = rollouts.scores - 0.5 * (rollouts.old_logprobs - rollouts.ref_logprobs).sum(1)
    assert is_best.reshape(4, 4).argmax(1).tolist() == totals.reshape(4, 4).argmax(1).tolist()


def test_raft_takes_the_first_of_equal_completions_and_learns_also_where_all_are_equal(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="RAFT", num_steps=1)
    trainer.scorer = Scorer({"digits": lambda completions, **_: [0.0] * len(completions)}, {"digits": 1.0})
    seen = described_by(trainer)
    trainer.train()
    ((_, is_best),) = seen
    assert is_best.nonzero().squeeze(1).tolist() == [0, 4, 8, 12]
    assert metrics_of(tmp_path / "run")[0]["policy/grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"whiten_advantages": True}, r"whiten_advantages=True: RAFT has no advantages"),
        (
            {"prompts_per_step": 6, "num_minibatches": 4},
            r"num_minibatches=4: RAFT trains .* prompts_per_step=6",
        ),
    ],
)
def test_raft_refuses_what_it_cannot_do(settings, message):
    with pytest.raises(ValueError, match=message):
        RAFTConfig(**settings)
