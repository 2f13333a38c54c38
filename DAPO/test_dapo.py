"""DAPO alone: that its settings act, and by hand what the price of length and the refill make of a step."""

import math
from dataclasses import replace

import pytest
import torch

from DAPO.dapo_trainer import DAPOConfig
from DAPO.overlong import overlong_penalty
from tests.by_hand import WITH_KL, assert_compared_in_groups, trained_on
from tests.toy import CLIP, algorithms, described_by, metrics_of, toy_config, toy_task, toy_trainer

# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {
    "overlong_buffer": ({}, 12),
    "overlong_penalty": ({}, 0.25),
    "refill_rounds": None,  # below, and tests/test_refill.py
}
VALUES = {"refill_rounds": [4, 0, 1], "overlong_buffer": [None, 0, 1], "overlong_penalty": [1.0, 0.0, 3.0]}
OWN_VALUES = {
    "num_minibatches": "on one, no ratio is off 1, and clip-higher is a part of DAPO",
    "kl_coef": "the paper has none",
}


@pytest.mark.parametrize(
    ("settings", "lengths", "expected"),
    [
        # The paper's own numbers: a limit of 20,480 tokens, the last 4096 of them cost something.
        ({"max_completion_length": 20480}, [1, 16384, 16385, 18432, 20480], [0, 0, 1 / 4096, 0.5, 1]),
        ({"max_completion_length": 100, "overlong_buffer": 20}, [80, 90, 95, 100], [0, 0.5, 0.75, 1]),
        ({"max_completion_length": 100, "overlong_buffer": 100, "overlong_penalty": 2.0}, [1, 50, 100], [0.02, 1, 2]),
        ({"max_completion_length": 100, "overlong_buffer": 0}, [99, 100], [0, 0]),
        ({"max_completion_length": 100, "overlong_buffer": 1}, [99, 100], [0, 1]),
        ({"max_completion_length": 4}, [1, 4], [0, 0]),  # a fifth of it is no token
    ],
)
def test_the_price_of_length_by_hand(settings, lengths, expected):
    penalty = overlong_penalty(torch.tensor(lengths), DAPOConfig(**settings))
    assert penalty.dtype == torch.float32
    assert penalty.tolist() == pytest.approx(expected)


def test_the_price_of_length_is_the_soft_punishment_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    lengths = list(range(1, 41))
    theirs = rewards.get_soft_overlong_punishment(40, 12)(completion_ids=[[0] * length for length in lengths])
    ours = overlong_penalty(torch.tensor(lengths), DAPOConfig(max_completion_length=40, overlong_buffer=12))
    assert ours.tolist() == pytest.approx([-each for each in theirs])


def test_dapo_compares_score_less_penalty_less_kl_in_its_group(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="DAPO", overlong_buffer=8, **WITH_KL)
    rollouts = trained_on(trainer)
    penalties = [max(length - 4, 0) / 8 for length in rollouts.lengths.tolist()]
    assert_compared_in_groups(rollouts, trainer.config, penalties)
    line = metrics_of(tmp_path / "run")[-1]
    assert line["overlong/penalty"] == pytest.approx(sum(penalties) / 16, abs=1e-6)
    assert 0 < line["overlong/penalty"] < 1
    # What is reported as the score has no price of length in it, so it compares with that of other algorithms.
    raw = line["reward/digits"] + 0.5 * line["reward/sum"] - 0.25 * line["truncated"]
    assert line["score"] == pytest.approx(raw, abs=1e-6)


def test_a_group_of_equal_scores_is_replaced_however_long_its_completions_are(toy_folder, tmp_path):
    """The price of length is no reason to keep it; a place that stays empty is left with that price alone."""

    def odd_totals_teach(completions, total, **columns):
        return [len(text) % 7 / 7 if t % 2 else 0.5 for text, t in zip(completions, total, strict=True)]

    task = replace(toy_task(), rewards={"odd": odd_totals_teach}, reward_weights={"odd": 1.0}, accuracy=None)
    for rounds in (8, 0):
        config = toy_config(
            toy_folder, tmp_path / str(rounds), algorithm="DAPO", refill_rounds=rounds, rewards=["odd"], num_steps=1
        )
        trainer = algorithms()["DAPO"].trainer(config, task=task)
        seen = described_by(trainer)
        line = trainer.train()
        ((rollouts, advantages),) = seen
        is_even = torch.tensor([total % 2 == 0 for total in rollouts.columns["total"]])
        if rounds:
            assert line["refill/filled"] > 0 == line["refill/left_empty"] and not is_even.any()
            continue
        in_buffer = rollouts.lengths > 12 - 2
        for group in torch.arange(16).reshape(4, 4)[is_even.reshape(4, 4)[:, 0]]:
            assert advantages[group].any() == (len(set(in_buffer[group].tolist())) > 1)
        assert is_even.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong_buffer": -1}, r"overlong_buffer=-1 with max_completion_length=1024: .*--overlong_buffer 0"),
        ({"overlong_buffer": 1025}, r"overlong_buffer=1025 with max_completion_length=1024"),
        ({"overlong_penalty": -0.5}, r"overlong_penalty=-0.5: .*0 or more. Pass --overlong_penalty 1"),
        ({"overlong_penalty": math.nan}, r"overlong_penalty=nan"),
        ({"overlong_penalty": math.inf}, r"overlong_penalty=inf"),
        ({"refill_rounds": -1}, r"refill_rounds=-1: need 0 or more"),
        ({"num_generations": 1}, r"num_generations=1: DAPO compares.* at least 2. Pass --num_generations 8"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DAPOConfig(**settings)


def test_the_half_of_a_punishment_that_the_other_half_switches_off_does_nothing():
    names = {"overlong_buffer", "overlong_penalty"}
    assert not names & DAPOConfig().idle_settings().keys()
    assert names & DAPOConfig(overlong_penalty=0.0).idle_settings().keys() == {"overlong_buffer"}
    assert names & DAPOConfig(overlong_buffer=0).idle_settings().keys() == {"overlong_penalty"}
    assert names & DAPOConfig(max_completion_length=4).idle_settings().keys() == {"overlong_penalty"}
