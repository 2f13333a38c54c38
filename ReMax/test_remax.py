"""ReMax alone: that its settings act, and by hand what it makes of a step."""

import pytest

from tests.by_hand import WITH_KL, assert_advantages, rewards_by_hand, to_go, trained_on
from tests.toy import CLIP, metrics_of, toy_trainer

# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {"num_generations": ({}, 2), "gamma": ({}, 0.5)}


def test_remax_subtracts_what_the_greedy_completion_of_the_same_prompt_brings(toy_folder, tmp_path):
    trainer = toy_trainer(
        toy_folder, tmp_path / "run", algorithm="ReMax", gamma=0.9, num_generations=2, num_steps=2, **WITH_KL
    )
    seen, returns = [], trainer.returns
    trainer.returns = lambda rollouts: seen.append(returns(rollouts)) or seen[-1]
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


def test_the_greedy_completions_of_remax_change_nothing_about_the_sampled_ones(toy_folder, tmp_path):
    completions = []
    for name in ("ReMax", "Reinforce"):
        trainer = toy_trainer(toy_folder, tmp_path / name, algorithm=name, num_steps=1)
        completions.append(trained_on(trainer).completions)
    assert completions[0] == completions[1]
