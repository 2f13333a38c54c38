"""ReMax alone: that its settings act, and by hand what it makes of a step."""

import pytest
import torch

from common.rewards.scorer import Scorer
from tests.by_hand import WITH_KL, assert_advantages, rewards_by_hand, to_go, trained_on
from tests.toy import CLIP, described_by, metrics_of, toy_trainer

# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {"num_generations": ({}, 2), "gamma": ({}, 0.5), "whiten_rewards": ({}, True)}


def test_remax_subtracts_what_the_greedy_completion_of_the_same_prompt_brings(toy_folder, tmp_path):
    trainer = toy_trainer(
        toy_folder, tmp_path / "run", algorithm="ReMax", gamma=0.9, num_generations=2, num_steps=2, **WITH_KL
    )
    seen, returns = [], trainer.returns
    trainer.returns = lambda rollouts: (seen.append(rollouts), returns(rollouts))[1]
    rollouts = trained_on(trainer)
    greedy, sampled = seen[-2:]
    assert sampled.prompts == [prompt for prompt in greedy.prompts for _ in range(2)] and len(greedy) == 4
    assert len(set(greedy.prompts)) == 4 and not greedy.returns.requires_grad
    baselines = [to_go(rewards, 0.9)[0] for rewards in rewards_by_hand(greedy, trainer.config)]
    assert len({round(baseline, 4) for baseline in baselines}) > 1
    rewards = rewards_by_hand(rollouts, trainer.config)
    assert_advantages(rollouts, [[x - baselines[row // 2] for x in to_go(r, 0.9)] for row, r in enumerate(rewards)])
    untrained = toy_trainer(toy_folder, tmp_path / "untrained", algorithm="ReMax")
    likeliest = untrained.sample(untrained.training_prompts(1), greedy=True).completions
    assert seen[0].completions == likeliest and seen[1].completions[::2] != likeliest
    line = metrics_of(tmp_path / "run")[-1]
    assert line["baseline"] == pytest.approx(sum(baselines) / 4, abs=1e-5)
    assert line["policy/tokens"] == rollouts.lengths.sum()  # the greedy completions are not trained on


def test_the_kl_and_the_episodes_of_remax_are_those_of_its_sampled_completions(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="ReMax", num_generations=2, num_steps=2, **WITH_KL)
    greedy, sample = [], trainer.sample

    def watched(prompts, **settings):
        rollouts = sample(prompts, **settings)
        greedy.extend([rollouts] * settings.get("greedy", False))
        return rollouts

    trainer.sample = watched
    rollouts = trained_on(trainer)
    line, mask = metrics_of(tmp_path / "run")[-1], rollouts.completion_mask
    kl = float((rollouts.old_logprobs - rollouts.ref_logprobs)[mask].double().mean())
    assert line["kl"] == pytest.approx(kl, rel=1e-5) and kl != 0
    other = (greedy[-1].old_logprobs - greedy[-1].ref_logprobs)[greedy[-1].completion_mask].mean()
    assert abs(float(other) - kl) > 1e-4  # which a mean over both would show
    assert line["episodes"] == 2 * 8
    assert line["greedy/completions"] == 4 and line["greedy/tokens"] == greedy[-1].lengths.sum()


def test_remax_scales_sampled_and_greedy_rewards_by_one_factor(toy_folder, tmp_path):
    advantages = {}
    for whitened in (False, True):
        trainer = toy_trainer(
            toy_folder, tmp_path / str(whitened), algorithm="ReMax", whiten_rewards=whitened, num_steps=1
        )
        trainer.scorer = Scorer(
            {"digits": lambda completions, **_: [len(text) / 10 for text in completions]}, {"digits": 1.0}
        )
        seen = described_by(trainer)
        assert trainer.train()["baseline"] > 0.1  # of the greedy completions
        ((rollouts, advantages[whitened]),) = seen
    rewards = []
    for length, score in zip(rollouts.lengths.tolist(), rollouts.scores.tolist(), strict=True):
        rewards += [0.0] * (length - 1) + [score]
    factor = 1 / torch.tensor(rewards, dtype=torch.float64).std(correction=0)
    assert factor > 1.5
    torch.testing.assert_close(advantages[True], advantages[False] * float(factor), atol=1e-5, rtol=1e-4)


def test_the_greedy_completions_of_remax_change_nothing_about_the_sampled_ones(toy_folder, tmp_path):
    completions = []
    for name in ("ReMax", "Reinforce"):
        trainer = toy_trainer(toy_folder, tmp_path / name, algorithm=name, num_steps=1)
        completions.append(trained_on(trainer).completions)
    assert completions[0] == completions[1]
