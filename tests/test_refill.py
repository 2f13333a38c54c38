"""Refill: which groups teach nothing, which groups take their place, and what a step then counts and reports."""

from dataclasses import replace

import pytest
import torch

from common.refill import Places, groups_with_signal
from common.rewards.scorer import Scorer
from common.rollouts import Rollouts
from tests.toy import (
    algorithms,
    described_by,
    metrics_of,
    share_of_digits,
    toy_config,
    toy_task,
    toy_trainer,
    train_until,
    updates_of,
)


def scored(scores: list[float], *, first: int = 0, not_trained: tuple[int, ...] = ()) -> Rollouts:
    """Completions of one token, whose id says which row it is; two for each prompt."""
    count = len(scores)
    mask = torch.ones(count, 1, dtype=torch.bool)
    loss_mask = mask.clone()
    loss_mask[list(not_trained)] = False
    return Rollouts(
        rows=torch.arange(count),
        prompt_ids=torch.full((count, 1), 5),
        prompt_mask=mask,
        completion_ids=torch.arange(first, first + count)[:, None],
        completion_mask=mask,
        loss_mask=loss_mask,
        truncated=~loss_mask[:, 0],
        sampling_logprobs=torch.zeros(count, 1),
        step_lengths=loss_mask.sum(1),
        scores=torch.tensor(scores),
    )


def test_a_group_has_a_signal_if_its_scores_differ_and_a_completion_of_it_is_trained_on():
    rollouts = scored([0, 1, 0.3, 0.1 + 0.2, 0, 1, 0, 1], not_trained=(4, 5, 6))
    assert groups_with_signal(rollouts, 2).tolist() == [True, False, False, True]
    assert groups_with_signal(scored([]), 2).tolist() == []


def test_each_additional_group_is_for_one_place_and_the_others_stay_where_they_are():
    places = Places(scored([0, 0, 0, 1, 1, 1, 2, 2]), 2)
    assert places.empty.tolist() == [True, False, True, True]
    places.fill(scored([5, 5, 0, 5, 5, 5], first=10))  # for the places 0, 2 and 3
    assert places.empty.tolist() == [True, False, False, True] and places.num_filled == 1
    places.fill(scored([0, 7], first=20))  # there was one prompt left, for place 0
    assert places.empty.tolist() == [False, False, False, True] and places.num_filled == 2
    rollouts = places.rollouts()
    assert rollouts.completion_ids[:, 0].tolist() == [20, 21, 2, 3, 12, 13, 6, 7]
    assert rollouts.rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rollouts.scores.tolist() == [0, 7, 0, 1, 0, 5, 2, 2]


def odd_totals_teach(prompts: list[str], completions: list[str], total: list[int], **columns: list) -> list[float]:
    """Scores that differ for prompts with an odd total, and one score for all completions of an even one."""
    return [digits if t % 2 else 0.25 for digits, t in zip(share_of_digits(prompts, completions), total, strict=True)]


def few_totals_teach(prompts: list[str], completions: list[str], total: list[int], **columns: list) -> list[float]:
    """The same for the two prompts with a total of 3."""
    return odd_totals_teach(prompts, completions, [int(t == 3) for t in total])


def refilling(model, folder, algorithm="GRPO", reward=odd_totals_teach, num_rows=12, **settings):
    """A trainer with refills, on the first rows of the toy task; half of the 12 teach something."""
    rewards = {"rewards": {"odd": reward}, "reward_weights": {"odd": 1.0}, "accuracy": None}
    task = replace(toy_task(), train=toy_task().train[:num_rows], **rewards)
    settings = {"refill_rounds": 8, "rewards": ["odd"]} | settings
    config = toy_config(model, folder, algorithm=algorithm, **settings)
    return algorithms()[algorithm].trainer(config, task=task)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        *[(name, settings) for name in ("GRPO", "RLOO") for settings in ({}, {"keep_per_group": True})],
        *[(name, {"num_minibatches": 2, "kl_coef": 0.1}) for name in ("GRPO", "RLOO", "DAPO")],
    ],
    ids=str,
)
def test_a_step_is_filled_with_groups_of_other_prompts_that_teach_something(toy_folder, tmp_path, algorithm, settings):
    trainer = refilling(toy_folder, tmp_path / "run", algorithm, **settings)
    described, updated = described_by(trainer), updates_of(trainer)
    trainer.train()
    totals = [row["total"] for row in toy_task().train[:12]]
    for (rollouts, advantages), (_, trained), line in zip(
        described, updated, metrics_of(tmp_path / "run"), strict=True
    ):
        own = trainer.training_prompts(line["step"]).prompts
        groups = [rollouts.prompts[row] for row in range(0, 16, 4)]
        num_odd = sum(total % 2 for total in trainer.training_prompts(line["step"]).columns["total"])
        assert 0 < num_odd < 4 and sum(totals) > 0
        # Those that teach are still there, in their places; the others are new prompts, each once.
        kept = [new == old for new, old in zip(groups, own, strict=True)]
        assert sum(kept) == num_odd and not set(groups).difference(own).intersection(own)
        assert len(set(groups)) == 4 and all(total % 2 for total in rollouts.columns["total"])
        assert (advantages.reshape(4, -1) != 0).any(1).all()
        assert len(trained) == (4 if settings.get("keep_per_group") else 16)
        assert line["refill/filled"] == 4 - num_odd and line["refill/left_empty"] == 0
        assert 1 <= line["refill/rounds"] <= 8 and line["zero_advantage"] == 0
        assert line["refill/completions"] >= 4 * line["refill/filled"]
        assert line["policy/first_ratio"] == 1.0
        assert line["episodes"] == 16 * line["step"]


def test_scores_that_are_reported_are_those_of_the_steps_own_prompts(toy_folder, tmp_path):
    for rounds in (0, 8):
        refilling(toy_folder, tmp_path / str(rounds), refill_rounds=rounds, num_steps=1).train()
    plain, filled = (metrics_of(tmp_path / str(rounds))[0] for rounds in (0, 8))
    for name in ("score", "score_min", "score_max", "length", "truncated", "equal_scores", "reward/odd", "episodes"):
        assert filled[name] == plain[name], name
    assert plain["equal_scores"] > 0 and filled["zero_advantage"] == 0 < plain["zero_advantage"]
    assert filled["tokens"] == plain["tokens"] + filled["refill/tokens"]
    assert not any(name.startswith("refill/") for name in plain)
    own = (tmp_path / "0" / "samples.jsonl").read_bytes()
    assert (tmp_path / "8" / "samples.jsonl").read_bytes() == own


def test_where_every_group_teaches_nothing_changes(toy_folder, tmp_path):
    for rounds in (0, 3):
        trainer = toy_trainer(toy_folder, tmp_path / str(rounds), refill_rounds=rounds, rewards=["digits"])
        trainer.scorer = Scorer({"digits": lambda completions, **_: list(range(len(completions)))}, {"digits": 1.0})
        trainer.train()
    plain, filled = (metrics_of(tmp_path / str(rounds)) for rounds in (0, 3))
    for line in filled:
        assert [line.pop(f"refill/{name}") for name in ("rounds", "filled", "left_empty")] == [0, 0, 0]
    assert filled == plain


@pytest.mark.parametrize(("num_rows", "rounds"), [(4, 0), (6, 1), (12, 2)])
def test_it_ends_when_no_other_prompt_is_left_or_after_the_rounds(toy_folder, tmp_path, num_rows, rounds):
    """With 4 prompts a step there is no other one, one round of 2, or 8 that two rounds use up."""
    settings = {"reward": lambda completions, **_: [0.5] * len(completions), "num_rows": num_rows, "num_steps": 1}
    trainer = refilling(toy_folder, tmp_path / "run", **settings)
    seen = described_by(trainer)
    trainer.train()
    for (rollouts, _), line in zip(seen, metrics_of(tmp_path / "run"), strict=True):
        assert line["refill/rounds"] == rounds and line.get("refill/completions", 0) == 4 * (num_rows - 4)
        assert (line["refill/filled"], line["refill/left_empty"], line["zero_advantage"]) == (0, 4, 1)
        assert rollouts.rows.tolist() == list(range(16))
    bounded = refilling(toy_folder, tmp_path / "bounded", **settings | {"num_rows": 12, "refill_rounds": 1})
    bounded.train()
    assert all(line["refill/completions"] == 16 for line in metrics_of(tmp_path / "bounded"))


@pytest.mark.parametrize(("num_rows", "said"), [(12, "refills found no other"), (4, "refills have no prompts")])
def test_a_refill_that_never_finds_anything_says_so_once_and_the_run_goes_on(
    toy_folder, tmp_path, caplog, num_rows, said
):
    settings = {"reward": lambda completions, **_: [0.5] * len(completions), "num_rows": num_rows, "num_steps": 5}
    refilling(toy_folder, tmp_path / "run", "DAPO", refill_rounds=1, overlong_penalty=0.0, **settings).train()
    (message,) = [text for text in caplog.messages if "refill" in text]
    assert (
        message.startswith("steps 1 to 3: all completions had the score 0.5, so there was nothing") and said in message
    )
    lines = metrics_of(tmp_path / "run")
    assert [line["refill/rounds"] for line in lines] == [int(num_rows > 4)] * 5
    assert all(line["refill/left_empty"] == 4 and line["policy/grad_norm"] == 0 for line in lines)


def test_places_that_stay_empty_still_count_in_the_mean_unless_sparse_only_spares_their_passes(toy_folder, tmp_path):
    weights = {}
    for sparse in (False, True):
        settings = {"refill_rounds": 1, "sparse": sparse, "num_steps": 1}
        trainer = refilling(toy_folder, tmp_path / str(sparse), reward=few_totals_teach, **settings)
        updated = updates_of(trainer)
        trainer.train()
        line = metrics_of(tmp_path / str(sparse))[0]
        weights[sparse] = torch.cat([p.detach().flatten() for p in trainer.policy.parameters])
        ((_, rollouts),) = updated
        assert line["refill/left_empty"] > 0 and len(rollouts.step_lengths) == 16
        assert len(rollouts) == 16 - 4 * sparse * line["refill/left_empty"]
    torch.testing.assert_close(weights[True], weights[False], atol=1e-5, rtol=1e-4)


def test_an_interrupted_run_with_refills_continues_as_if_nothing_had_happened(toy_folder, tmp_path):
    settings = {"num_steps": 3, "save_every": 1}
    refilling(toy_folder, tmp_path / "whole", **settings).train()
    train_until(refilling(toy_folder, tmp_path / "run", **settings), 2)
    continued = refilling(toy_folder, tmp_path / "run", **settings)
    assert continued.run.first_step == 3
    continued.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_with_the_kl_in_the_reward_a_group_of_equal_scores_is_empty_whatever_its_kl(toy_folder, tmp_path):
    """And no pass is made for a group that is replaced."""
    settings = {"kl_coef": 0.5, "kl_place": "reward", "num_steps": 2, "learning_rate": 1e-2}
    trainer = refilling(toy_folder, tmp_path / "run", **settings)
    passes, logprobs = [], trainer.logprobs
    trainer.logprobs = lambda name, rollouts: passes.append((name, len(rollouts))) or logprobs(name, rollouts)
    trainer.train()
    assert metrics_of(tmp_path / "run")[1]["kl"] != 0
    assert passes == [("policy", 16), ("ref", 16)] * 2
    assert all(line["refill/filled"] > 0 for line in metrics_of(tmp_path / "run"))


def test_a_count_of_rounds_below_0_is_refused():
    for name in ("GRPO", "RLOO", "DAPO"):
        with pytest.raises(ValueError, match="refill_rounds=-1: need 0 or more"):
            algorithms()[name].config(refill_rounds=-1)
