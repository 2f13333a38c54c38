"""Algorithms that are the same where they should be: equations between functions, and between whole steps.

Whole steps are compared by the weights they end at, to the last bit where both sides do the same arithmetic.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.advantages import generalized_advantages, group_relative, leave_one_out, rewards_to_go
from common.rewards.scorer import Scorer
from tests.toy import (
    algorithms,
    learners_of,
    toy_trainer,
    trained_weights,
    updates_of,
    weights_of,
)


def policy_weights(trainer) -> torch.Tensor:
    """The policy's weights after training."""
    trainer.train()
    return torch.cat([parameter.detach().flatten().clone() for parameter in trainer.policy.parameters])


# Functions


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5), min_size=1, max_size=4))
def test_leave_one_out_is_the_group_centred_score_times_g_over_g_minus_one(groups):
    scores = torch.tensor(groups).reshape(-1)
    centred = group_relative(scores, 5, scale_by_std=False)
    torch.testing.assert_close(leave_one_out(scores, 5), 5 / 4 * centred, atol=1e-5, rtol=1e-5)


@settings(max_examples=60)
@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5), min_size=1), st.floats(0, 1))
def test_generalized_advantages_with_lambda_one_and_values_of_zero_are_the_rewards_to_go(rows, gamma):
    rewards = torch.tensor(rows)
    mask = torch.arange(5)[None, :] < torch.tensor([1 + i % 5 for i in range(len(rows))])[:, None]
    advantages, returns = generalized_advantages(rewards, torch.zeros(mask.shape), mask, gamma=gamma, gae_lambda=1.0)
    to_go = torch.zeros(len(rows), 6)
    for t in reversed(range(5)):
        to_go[:, t] = torch.where(mask[:, t], rewards[:, t] + gamma * to_go[:, t + 1], 0.0)
    torch.testing.assert_close(advantages, to_go[:, :5], atol=1e-5, rtol=1e-5)
    assert torch.equal(advantages, returns) and torch.equal(advantages, rewards_to_go(rewards, mask, gamma=gamma))


# Whole steps


def test_remax_with_a_baseline_of_zero_is_reinforce_without_whitening(toy_folder, tmp_path):
    common = {"gamma": 0.9, "num_minibatches": 2, "learning_rate": 1e-2}
    remax = toy_trainer(toy_folder, tmp_path / "remax", algorithm="ReMax", **common)
    for name, function in list(remax.scorer.functions.items()):
        is_greedy = itertools.cycle([True, False])  # of each step's two batches the greedy one is scored first

        def score(completions, function=function, is_greedy=is_greedy, **columns):
            scores = function(completions=completions, **columns)
            return [0.0] * len(scores) if next(is_greedy) else scores

        remax.scorer.functions[name] = score
    updates = updates_of(remax)
    reinforce = toy_trainer(
        toy_folder, tmp_path / "reinforce", algorithm="Reinforce", whiten_advantages=False, **common
    )
    assert torch.equal(policy_weights(remax), policy_weights(reinforce))
    assert all(rollouts.advantages.any() for _, rollouts in updates)


def test_remax_with_its_real_baseline_is_not_reinforce(toy_folder, tmp_path):
    """The baseline that is left out above acts."""
    settings = {"missing_eos_penalty": 0.5, "temperature": 0.5}
    remax = toy_trainer(toy_folder, tmp_path / "remax", algorithm="ReMax", **settings)
    reinforce = toy_trainer(
        toy_folder, tmp_path / "reinforce", algorithm="Reinforce", whiten_advantages=False, **settings
    )
    assert not torch.equal(policy_weights(remax), policy_weights(reinforce))


def test_a_sample_that_is_the_greedy_completion_teaches_remax_nothing(toy_folder, tmp_path):
    """Its baseline pays the same KL and the same penalty: from its first token on both bring the same."""
    trainer = toy_trainer(
        toy_folder, tmp_path / "run", algorithm="ReMax", kl_coef=0.5, missing_eos_penalty=0.3, num_generations=1
    )
    with torch.no_grad(), trainer.models.use("ref") as ref:
        for parameter in ref.parameters():
            parameter.add_(0.05 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    sample = trainer.sample
    trainer.sample = lambda prompts, num_generations=1, greedy=False: sample(prompts, greedy=True)
    updates = updates_of(trainer)
    trainer.train()
    _, rollouts = updates[0]
    assert (rollouts.old_logprobs - rollouts.ref_logprobs).abs().max() > 1e-3
    assert rollouts.advantages[:, 0].abs().max() < 1e-6 < rollouts.returns[:, 0].abs().max()


def test_ppo_with_lambda_one_and_values_of_zero_is_reinforce_without_whitening(toy_folder, tmp_path):
    common = {"gamma": 0.9, "kl_coef": 0.1, "missing_eos_penalty": 0.2, "num_minibatches": 2, "num_update_epochs": 2}
    common |= {"whiten_rewards": True, "learning_rate": 1e-2, "num_steps": 3}
    only_policy = {"value_init": "zero_head", "value_learning_rate": 0.0, "gae_lambda": 1.0}
    ppo = toy_trainer(toy_folder, tmp_path / "ppo", algorithm="PPO", **common, **only_policy)
    reinforce = toy_trainer(
        toy_folder, tmp_path / "reinforce", algorithm="Reinforce", whiten_advantages=False, **common
    )
    assert torch.equal(policy_weights(ppo), policy_weights(reinforce))


def test_reinforce_with_the_groups_mean_and_without_whitening_is_dr_grpo(toy_folder, tmp_path):
    common = {"average_over": "constant", "num_minibatches": 2, "num_update_epochs": 2, "num_steps": 3}
    reinforce = toy_trainer(
        toy_folder,
        tmp_path / "reinforce",
        algorithm="Reinforce",
        group_baseline=True,
        whiten_advantages=False,
        **common,
    )
    dr_grpo = toy_trainer(toy_folder, tmp_path / "grpo", algorithm="GRPO", scale_by_std=False, **common)
    assert torch.equal(policy_weights(reinforce), policy_weights(dr_grpo))


ONE_STEP = {"kl_coef": 0.1, "num_steps": 3, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("name", "settings", "of_grpo"),
    [
        ("GSPO", ONE_STEP, {"average_over": "rows"}),
        ("CISPO", ONE_STEP, {"average_over": "tokens"}),
        # Its clip is one of GRPO's too, so it stays the same over several optimizer steps.
        (
            "DAPO",
            ONE_STEP | {"num_minibatches": 2, "num_update_epochs": 2},
            {"average_over": "tokens", "clip_range_high": 0.28},
        ),
    ],
    ids=["GSPO", "CISPO", "DAPO"],
)
def test_without_what_is_theirs_gspo_cispo_and_dapo_are_grpo(toy_folder, tmp_path, name, settings, of_grpo):
    """On one optimizer step a ratio is 1, whatever it is of; DAPO without refills and price of length."""
    plain = {"refill_rounds": 0, "overlong_penalty": 0.0} if name == "DAPO" else {}
    weights = []
    for algorithm, own in ((name, plain), ("GRPO", of_grpo | {"kl_place": "reward"})):
        trainer = toy_trainer(toy_folder, tmp_path / algorithm, algorithm=algorithm, **settings | own)
        before = weights_of(trainer)
        # With plain gradient descent a rounding error stays as small as it is.
        trainer.policy.optimizer = torch.optim.SGD(trainer.policy.parameters, lr=1e-2)
        weights.append(policy_weights(trainer))
        assert (weights[-1] - before).abs().max() > 1e-4
    if name == "GSPO":  # which adds up a completion's tokens before it weighs them
        torch.testing.assert_close(*weights, atol=1e-7, rtol=1e-6)
    else:
        assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "of_grpo"), [("GSPO", {"average_over": "rows"}), ("CISPO", {}), ("DAPO", {"clip_range_high": 0.28})]
)
def test_with_what_is_theirs_they_are_not(toy_folder, tmp_path, name, of_grpo):
    settings = {"num_minibatches": 2, "num_update_epochs": 2, "num_steps": 1, "learning_rate": 1e-2}
    theirs = toy_trainer(toy_folder, tmp_path / name, algorithm=name, **settings)
    grpo = toy_trainer(toy_folder, tmp_path / "GRPO", **settings | {"average_over": "tokens"} | of_grpo)
    assert not torch.equal(policy_weights(theirs), policy_weights(grpo))


def test_rloo_on_policy_is_dr_grpo_times_two_known_factors(toy_folder, tmp_path):
    """G / (G - 1) from the baseline, and the longest length from a mean over completions instead of tokens."""
    moves = {}
    variants = {"RLOO": {}, "GRPO": {"scale_by_std": False, "average_over": "constant"}}
    for name, options in variants.items():
        trainer = toy_trainer(toy_folder, tmp_path / name, algorithm=name, num_steps=1, max_grad_norm=0.0, **options)
        trainer.policy.optimizer = torch.optim.SGD(trainer.policy.parameters, lr=1e-3)
        before = weights_of(trainer)
        moves[name] = trained_weights(trainer) - before
    assert moves["RLOO"].abs().max() > 1e-4
    torch.testing.assert_close(moves["RLOO"], 12 * 4 / 3 * moves["GRPO"], atol=1e-6, rtol=1e-3)


def test_the_ratio_of_tokens_and_of_completions_of_one_token_is_the_same(toy_folder, tmp_path):
    common = {"max_completion_length": 1, "num_minibatches": 2, "num_update_epochs": 3, "learning_rate": 1e-2}
    weights = [
        trained_weights(toy_trainer(toy_folder, tmp_path / level, algorithm="RLOO", ratio_level=level, **common))
        for level in ("token", "sequence")
    ]
    assert torch.equal(*weights)


def test_raft_of_other_scores_learns_other_rows(toy_folder, tmp_path):
    """With the sign of every score turned the worst completion of each prompt is learnt."""
    chosen = {}
    for sign in (1, -1):
        trainer = toy_trainer(toy_folder, tmp_path / str(sign), algorithm="RAFT", num_steps=1)
        trainer.scorer = Scorer({"digits": lambda prompts, completions, sign=sign, **columns: [
            sign * float(len(text)) for text in completions
        ]}, {"digits": 1.0})  # fmt: skip
        updates = updates_of(trainer)
        trainer.train()
        ((_, rollouts),) = updates
        chosen[sign] = rollouts.completions
    assert all(len(best) > len(worst) for best, worst in zip(chosen[1], chosen[-1], strict=True))


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "RAFT", "GSPO", "CISPO", "DAPO"])
def test_a_single_completion_is_refused_where_completions_are_compared(name):
    with pytest.raises(ValueError, match=rf"num_generations=1: {name}.* at least 2. Pass --num_generations 8"):
        algorithms()[name].config(num_generations=1)


def test_a_single_completion_is_enough_elsewhere(toy_folder, tmp_path):
    for name in ("PPO", "ReMax", "Reinforce"):
        trainer = toy_trainer(toy_folder, tmp_path / name, algorithm=name, num_generations=1, num_steps=1)
        before = weights_of(trainer)
        assert not torch.equal(trained_weights(trainer), before)
        assert len(learners_of(trainer)) == (2 if name == "PPO" else 1)
    with pytest.raises(ValueError, match="num_generations=1: group_baseline compares"):
        algorithms()["Reinforce"].config(num_generations=1, group_baseline=True)
