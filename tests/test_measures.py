"""Evaluation: shares of global means, pass@k without bias, and a confidence interval whose draws are the prompts."""

from itertools import combinations

import pytest
import torch
from accelerate import Accelerator

from common.rewards.scorer import Scorer
from common.rollouts import Completion, PromptBatch, Rollouts
from common.runs.measures import (
    confidence_interval,
    evaluation_means,
    is_one,
    judge,
    judge_leniently,
    pass_at_k,
    rollout_means,
    sizes_of_k,
    training_means,
    with_confidence_interval,
)
from common.runs.metrics import StepMetrics


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def held_out(lengths: list[int], *, num_samples: int = 1) -> Rollouts:
    """Completions of these lengths; those of five tokens were cut off."""
    count = len(lengths) // num_samples
    prompts = PromptBatch(step=0, rows=list(range(count)), prompt_ids=[[1]] * count, prompts=["p"] * count, columns={})
    completions = [Completion([3] * n, [-1.0] * n, truncated=n == 5) for n in lengths]
    return Rollouts.from_completions(prompts, completions, ["t"] * len(lengths), num_generations=num_samples)


def evaluated(accelerator, parts: list[tuple], *, num_samples: int = 1) -> dict[str, float]:
    """The global means of what each process contributes: (lengths, scores, correct)."""
    metrics = StepMetrics()
    for lengths, scores, correct in parts:
        rollouts = held_out(lengths, num_samples=num_samples)
        rollouts.scores = torch.tensor(scores)
        if correct is not None:
            rollouts.parts["right"] = torch.tensor(correct).float()
        evaluation_means(rollouts, accuracy="right", format=None, num_samples=num_samples, metrics=metrics)
    return metrics.reduce(accelerator)


# Means


def test_means_by_hand(accelerator):
    metrics = evaluated(accelerator, [([2, 5, 1, 4], [0.0, 1.0, 0.5, 1.0], [False, True, False, True])])
    assert metrics == {
        "eval/score": 0.625,
        "eval/length": 3.0,
        "eval/truncated": 0.25,
        "eval/accuracy": 0.5,
        "eval/accuracy_square": 0.5,
    }


def step_means(rollouts, advantages, *, num_generations, metrics):
    """The means of a step that trains on all that it sampled."""
    rollout_means(rollouts, num_generations=num_generations, metrics=metrics)
    training_means(rollouts, advantages, metrics=metrics)


def test_means_of_a_training_step_by_hand(accelerator):
    rollouts, metrics = held_out([2, 5, 1, 4]), StepMetrics()
    rollouts.scores = torch.tensor([0.0, 1.0, 0.5, 1.0])
    rollouts.parts = {"right": torch.tensor([float("nan"), 1.0, 0.0, float("nan")])}  # no say in two rows
    advantages = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    step_means(rollouts, advantages, num_generations=2, metrics=metrics)
    expected = {"score": 0.625, "length": 3.0, "truncated": 0.25, "zero_advantage": 0.25, "reward/right": 0.5}
    expected |= {"score_min": 0.0, "score_max": 1.0, "equal_scores": 0.0}
    assert metrics.reduce(accelerator) == expected


def test_the_means_of_a_training_step_by_hand(accelerator):
    """Rows of 1, 5 and 2 tokens. The second is cut off and not trained on: only zero_advantage leaves it out."""
    rollouts, metrics = held_out([1, 5, 2]), StepMetrics()
    rollouts.loss_mask = rollouts.completion_mask & ~rollouts.truncated[:, None]
    rollouts.scores = torch.tensor([1.0, 0.0, 0.5])
    rollouts.parts = {"part": torch.tensor([2.0, float("nan"), 4.0]), "nowhere": torch.full((3,), float("nan"))}
    rollouts.old_logprobs = torch.full((3, 5), -1.0)
    rollouts.ref_logprobs = torch.tensor([[-3.0, 9, 9, 9, 9], [-1.0] * 5, [-1.0, -3.0, 9, 9, 9]])
    step_means(rollouts, torch.tensor([0.0, 0.0, 1.0]), num_generations=1, metrics=metrics)
    assert metrics.reduce(accelerator) == {
        "score": 0.5, "length": pytest.approx(8 / 3), "truncated": pytest.approx(1 / 3),
        "reward/part": 3.0, "kl": 4 / 8, "zero_advantage": 0.5, "score_min": 0.0, "score_max": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("per_token", [False, True])
def test_a_step_that_trains_on_nothing_has_no_share_without_advantage_and_no_kl_without_a_reference(
    accelerator, per_token
):
    rollouts, metrics = held_out([1, 2]), StepMetrics()
    rollouts.scores, rollouts.loss_mask = torch.zeros(2), torch.zeros(2, 2, dtype=torch.bool)
    advantages = torch.zeros(2, 2) if per_token else torch.zeros(2)
    step_means(rollouts, advantages, num_generations=1, metrics=metrics)
    assert set(metrics.reduce(accelerator)) == {"score", "score_min", "score_max", "length", "truncated"}


def test_prompts_whose_completions_are_all_equally_good_are_counted(accelerator):
    rollouts, metrics = held_out([1] * 8), StepMetrics()
    rollouts.scores = torch.tensor([0.3, 0.3, 1.0, 1.0, 0.0, 1.0, 0.3, 0.30001])
    step_means(rollouts, torch.zeros(8), num_generations=2, metrics=metrics)
    step_means(rollouts.only(torch.zeros(8, dtype=torch.bool)), torch.zeros(0), num_generations=2, metrics=metrics)
    reduced = metrics.reduce(accelerator)
    assert reduced["equal_scores"] == 0.5 and (reduced["score_min"], reduced["score_max"]) == (0.0, 1.0)


def test_padding_counts_for_nothing(accelerator):
    """The longest row decides how wide the batch is, and nothing else."""
    narrow = evaluated(accelerator, [([2, 2], [1.0, 0.0], None)])
    wide = evaluated(accelerator, [([2, 2, 40], [1.0, 0.0, 0.5], None)])
    assert narrow["eval/length"] == 2.0 and wide["eval/length"] == pytest.approx(44 / 3)


def test_a_process_counts_for_as_many_prompts_as_it_has(accelerator):
    whole = evaluated(accelerator, [([1, 2, 3, 4, 5], [1.0, 0.0, 0.0, 0.0, 0.5], [True, False, False, False, True])])
    parts = [([1], [1.0], [True]), ([2, 3, 4, 5], [0.0, 0.0, 0.0, 0.5], [False, False, False, True])]
    assert evaluated(accelerator, parts) == pytest.approx(whole)


def test_a_process_without_prompts_contributes_nothing(accelerator):
    parts = [([1, 3], [1.0, 0.0], [True, False]), ([], [], [])]
    assert evaluated(accelerator, parts) == evaluated(accelerator, parts[:1])
    for num_samples in (2, 3):
        several = [([1] * num_samples, [1.0] * num_samples, [True] * num_samples), ([], [], [])]
        metrics = evaluated(accelerator, several, num_samples=num_samples)
        assert metrics["eval/accuracy"] == metrics[f"eval/pass@{num_samples}"] == 1.0


def test_without_a_reward_that_says_right_there_is_no_accuracy(accelerator):
    metrics = evaluated(accelerator, [([1, 3], [1.0, 0.0], None)])
    assert set(metrics) == {"eval/score", "eval/length", "eval/truncated"}


def test_the_share_of_the_right_form_is_that_of_its_reward_being_one(accelerator):
    rollouts, metrics = held_out([1, 2, 3, 4]), StepMetrics()
    rollouts.scores, rollouts.parts = torch.zeros(4), {"shape": torch.tensor([1.0, 0.5, 0.0, 1.0])}
    evaluation_means(rollouts, accuracy=None, format="shape", num_samples=1, metrics=metrics)
    assert metrics.reduce(accelerator)["eval/format"] == 0.5


def test_the_lenient_accuracy_is_the_share_of_right_answers_in_any_form_and_changes_no_score(accelerator):
    def lenient_rule(prompts, completions, word, **columns):
        return [float(w in text) for w, text in zip(word, completions, strict=True)]

    rollouts, metrics = held_out([1, 2, 3, 4]), StepMetrics()
    rollouts.columns = {"word": ["t", "u", "t", "t"]}
    rollouts.scores, rollouts.parts = torch.zeros(4), {"right": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    lenient = judge_leniently(rollouts, Scorer({"lenient_accuracy": lenient_rule}, {"lenient_accuracy": 1.0}))
    assert lenient.tolist() == [True, False, True, True] and rollouts.parts.keys() == {"right"}
    evaluation_means(rollouts, accuracy="right", format=None, num_samples=1, metrics=metrics, lenient=lenient)
    reduced = metrics.reduce(accelerator)
    assert (reduced["eval/lenient_accuracy"], reduced["eval/accuracy"], reduced["eval/score"]) == (0.75, 0.25, 0.0)
    assert judge_leniently(rollouts, None) is None


def test_judging_gives_the_weighted_sum_and_keeps_each_reward():
    rollouts = held_out([1, 2, 3])
    rewards = {
        "a": lambda completions, **_: [1.0] * 3,
        "b": lambda completion_ids, **_: [len(i) for i in completion_ids],
    }
    scores = judge(rollouts, Scorer(rewards, {"a": 1.0, "b": 0.5}))
    assert scores.tolist() == [1.5, 2.0, 2.5]
    assert {name: part.tolist() for name, part in rollouts.parts.items()} == {"a": [1, 1, 1], "b": [1, 2, 3]}


def test_pass_at_k_is_the_share_of_prompts_with_at_least_one_right(accelerator):
    """Three prompts with two completions each: none right, one right, both right."""
    correct = [False, False, True, False, True, True]
    metrics = evaluated(accelerator, [([1] * 6, [0.0] * 6, correct)], num_samples=2)
    assert metrics["eval/accuracy"] == pytest.approx(0.5)
    assert metrics["eval/pass@2"] == pytest.approx(2 / 3)
    assert metrics["eval/accuracy_square"] == pytest.approx((0 + 0.25 + 1) / 3)


def test_one_completion_per_prompt_has_no_pass_at_k(accelerator):
    assert not any("pass" in name for name in evaluated(accelerator, [([1], [1.0], [True])]))


@pytest.mark.parametrize(
    ("num_samples", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_k_doubles_up_to_the_number_of_samples(accelerator, num_samples, sizes):
    assert sizes_of_k(num_samples) == sizes
    metrics = evaluated(
        accelerator, [([1] * num_samples, [0.0] * num_samples, [True] * num_samples)], num_samples=num_samples
    )
    assert [name for name in metrics if "pass@" in name] == [f"eval/pass@{k}" for k in sizes[1:]]


def test_pass_at_k_by_hand():
    """Of four completions one is right: a draw of two misses it in 3 of 6 cases; of two right ones, in 1 of 6."""
    assert pass_at_k(torch.tensor([0, 1, 2, 3, 4]), 4, 2).tolist() == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])
    assert pass_at_k(torch.tensor([0, 1, 4]), 4, 1).tolist() == [0, 0.25, 1]
    assert pass_at_k(torch.tensor([0, 1, 4]), 4, 4).tolist() == [0, 1, 1]
    assert pass_at_k(torch.tensor([3]), 10, 5).item() == pytest.approx(11 / 12)  # 1 - C(7, 5) / C(10, 5)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_one(k):
    correct = [True, False, False, True, False, False]
    draws = [any(draw) for draw in combinations(correct, k)]
    assert pass_at_k(torch.tensor([2]), 6, k).item() == pytest.approx(sum(draws) / len(draws))


def test_pass_at_k_is_unbiased():
    """Prompts are solved by a completion with 0.3: two completions solve 1 - 0.7 ** 2 of them."""
    generator = torch.Generator().manual_seed(0)
    num_correct = (torch.rand(20_000, 8, generator=generator) < 0.3).sum(1)
    for k in (2, 4):
        assert pass_at_k(num_correct, 8, k).mean().item() == pytest.approx(1 - 0.7**k, abs=0.006)


def test_a_thousand_samples_are_no_problem():
    value = pass_at_k(torch.tensor([1]), 1000, 256).item()
    assert value == pytest.approx(0.256)


# How sure


def test_the_interval_by_hand():
    """Four prompts, two right, and four added ones, two right: the standard error is 0.5 / sqrt(8)."""
    half = pytest.approx(0.98 / 8**0.5)
    assert confidence_interval(0.5, 0.5, 4) == (0.5, half)
    metrics = with_confidence_interval({"eval/accuracy": 0.5, "eval/accuracy_square": 0.5, "score": 1.0}, 4)
    assert metrics == {"eval/accuracy": 0.5, "score": 1.0, "eval/accuracy_ci95": half}


def test_completions_of_one_prompt_are_no_independent_draws(accelerator):
    """Four prompts that are always or never right: eight completions of each make the interval no narrower."""
    intervals = []
    for num_samples in (1, 8):
        correct = [prompt % 2 == 0 for prompt in range(4) for _ in range(num_samples)]
        rows = 4 * num_samples
        metrics = evaluated(accelerator, [([1] * rows, [0.0] * rows, correct)], num_samples=num_samples)
        intervals.append(with_confidence_interval(metrics, 4)["eval/accuracy_ci95"])
    assert intervals[0] == pytest.approx(intervals[1]) == pytest.approx(0.98 / 8**0.5)


@pytest.mark.parametrize("num_prompts", [1, 30, 256, 5000])
def test_an_interval_has_a_width_and_holds_the_accuracy_also_at_0_and_at_1(num_prompts):
    for accuracy in (0.0, 0.001, 0.1, 0.5, 0.97, 1.0):
        for square in (accuracy, accuracy**2):  # completions of a prompt all alike, and as different as can be
            middle, half = confidence_interval(accuracy, square, num_prompts)
            assert half > 0 and middle - half <= accuracy <= middle + half
            mirrored = confidence_interval(1 - accuracy, 1 - 2 * accuracy + square, num_prompts)
            assert mirrored == pytest.approx((1 - middle, half))


def test_none_of_thirty_leaves_room_for_what_was_not_seen():
    """The exact upper end for 0 of 30 is 0.116 (Clopper and Pearson); the plain standard error would say 0."""
    middle, half = confidence_interval(0.0, 0.0, 30)
    assert 0.116 < middle + half < 0.15


@pytest.mark.parametrize("num_prompts", [30, 256])
@pytest.mark.parametrize("num_samples", [1, 8])
@pytest.mark.parametrize("truth", [0.02, 0.3, 0.97])
def test_nineteen_of_twenty_intervals_hold_the_truth(num_prompts, num_samples, truth):
    """Prompts of three difficulties, drawn anew each time."""
    generator = torch.Generator().manual_seed(0)
    spread = 0.9 * min(truth, 1 - truth)
    chances = truth + spread * torch.randint(-1, 2, (2000, num_prompts, 1), generator=generator)
    per_prompt = (torch.rand(2000, num_prompts, num_samples, generator=generator) < chances).double().mean(2)
    hits = 0
    for mean, square in zip(per_prompt.mean(1).tolist(), per_prompt.square().mean(1).tolist(), strict=True):
        middle, half = confidence_interval(mean, square, num_prompts)
        hits += middle - half <= truth <= middle + half
    assert 0.93 < hits / 2000 <= 1
    if num_prompts == 256 and num_samples == 8:
        assert hits / 2000 < 0.97  # no wider than it has to be


def test_rounding_never_makes_a_variance_negative():
    assert confidence_interval(0.5, 0.25 - 1.0, 4)[1] == 0.0


def test_metrics_of_a_step_without_evaluation_stay_as_they_are():
    metrics = {"score": 0.5}
    assert with_confidence_interval(metrics, 0) == {"score": 0.5}


def test_the_metrics_that_were_given_are_not_changed():
    given = {"eval/accuracy": 0.5, "eval/accuracy_square": 0.5}
    with_confidence_interval(given, 4)
    assert given == {"eval/accuracy": 0.5, "eval/accuracy_square": 0.5}


# Who is right


def test_right_is_where_the_named_reward_gives_one():
    parts = {"equation": torch.tensor([1.0, 0.0, 0.5, float("nan"), 1.0 + 1e-7, 2.0]), "format": torch.ones(6)}
    assert is_one(parts, "equation").tolist() == [True, False, False, False, True, False]


@pytest.mark.parametrize("accuracy", [None, "equation"], ids=["none named", "not used in this run"])
def test_nobody_says_who_is_right(accuracy):
    assert is_one({"format": torch.ones(2)}, accuracy) is None
