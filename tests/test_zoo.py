"""What is particular to RLOO, ReMax, RAFT and REINFORCE, by hand from what a step has sampled and scored."""

import pytest
import torch

from common.advantages import whiten
from common.rollouts import Rollouts
from RAFT.raft_trainer import RAFTConfig
from RLOO.rloo_trainer import RLOOConfig
from tests.toy import described_by, metrics_of, save_toy_policy, toy_trainer, updates_of, without_curves

# Far enough from the reference in the second step for the KL to count.
WITH_KL = {"kl_coef": 0.5, "missing_eos_penalty": 0.25, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    with without_curves():
        yield save_toy_policy(tmp_path_factory.mktemp("policy"))


def trained_on(trainer) -> Rollouts:
    """The rollouts that the last step has updated the policy with."""
    updates = updates_of(trainer)
    trainer.train()
    return updates[-1][1]


def rewards_by_hand(rollouts: Rollouts, config) -> list[list[float]]:
    """For each row what its tokens bring: what each pays in KL, and score and penalty with the last."""
    rows = []
    for row, length in enumerate(rollouts.lengths.tolist()):
        rewards = [0.0] * length
        if config.kl_coef:
            log_ratio = (rollouts.old_logprobs - rollouts.ref_logprobs)[row, :length]
            assert log_ratio.abs().max() > 0
            rewards = (-config.kl_coef * log_ratio).tolist()
        rewards[-1] += float(rollouts.parts["digits"][row] + 0.5 * rollouts.parts["sum"][row])
        rewards[-1] -= config.missing_eos_penalty * float(rollouts.truncated[row])
        rows.append(rewards)
    return rows


def to_go(rewards: list[float], gamma: float) -> list[float]:
    return [sum(gamma**later * reward for later, reward in enumerate(rewards[t:])) for t in range(len(rewards))]


def assert_advantages(rollouts: Rollouts, expected: list[list[float]]) -> None:
    for row, values in enumerate(expected):
        ours = rollouts.advantages[row]
        torch.testing.assert_close(ours[: len(values)], torch.tensor(values), atol=2e-5, rtol=1e-4)
        assert not ours[len(values) :].any()


# RLOO


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
        ratios.append((metrics["policy/ratio"], minibatch.completion_mask))
        return loss, metrics

    trainer.loss = watched
    trainer.train()
    assert any((ratio != 1).any() for ratio, _ in ratios)
    for ratio, _ in ratios:
        assert torch.equal(ratio, ratio[:, :1].expand(ratio.shape))


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


# ReMax


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


# RAFT


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
    trainer.scorer.functions = {"digits": lambda completions, **_: [0.0] * len(completions)}
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


# REINFORCE


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


def test_whitened_rewards_keep_their_mean(toy_folder, tmp_path):
    settings = {"whiten_rewards": True, "whiten_advantages": False, "gamma": 0.0}
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm="Reinforce", **settings, **WITH_KL)
    rollouts = trained_on(trainer)
    mask = rollouts.completion_mask
    rewards = torch.zeros(mask.shape)
    rewards[mask] = torch.tensor([x for row in rewards_by_hand(rollouts, trainer.config) for x in row])
    ours = rollouts.advantages[mask].double()  # without a future each token has its own reward
    assert float(ours.mean()) == pytest.approx(float(rewards[mask].mean()), abs=1e-5)
    assert float(ours.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    expected = whiten(rewards, mask, sum_over_processes=lambda tensor: tensor, shift_mean=False)
    torch.testing.assert_close(rollouts.advantages, expected, atol=1e-4, rtol=1e-4)
