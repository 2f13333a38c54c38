"""Evaluation: shares of global means, pass@k, and a confidence interval whose draws are the prompts."""

import pytest
import torch
from accelerate import Accelerator

from common.evaluation import evaluation_shares, is_correct, with_confidence_interval
from common.metrics import MetricShares
from common.rollouts import Completion, PromptBatch, Rollouts


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
    shares = MetricShares()
    for lengths, scores, correct in parts:
        evaluation_shares(
            held_out(lengths, num_samples=num_samples),
            torch.tensor(scores),
            None if correct is None else torch.tensor(correct, dtype=torch.bool),
            num_samples=num_samples,
            shares=shares,
        )
    return shares.reduce(accelerator)


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


def test_pass_at_k_is_the_share_of_prompts_with_at_least_one_right(accelerator):
    """Three prompts with two completions each: none right, one right, both right."""
    correct = [False, False, True, False, True, True]
    metrics = evaluated(accelerator, [([1] * 6, [0.0] * 6, correct)], num_samples=2)
    assert metrics["eval/accuracy"] == pytest.approx(0.5)
    assert metrics["eval/pass@2"] == pytest.approx(2 / 3)
    assert metrics["eval/accuracy_square"] == pytest.approx((0 + 0.25 + 1) / 3)


def test_one_completion_per_prompt_has_no_pass_at_k(accelerator):
    assert not any("pass" in name for name in evaluated(accelerator, [([1], [1.0], [True])]))


# How sure


def test_the_interval_by_hand():
    """Four prompts, two right: the standard error is a quarter."""
    metrics = with_confidence_interval({"eval/accuracy": 0.5, "eval/accuracy_square": 0.5, "score": 1.0}, 4)
    assert metrics == {"eval/accuracy": 0.5, "score": 1.0, "eval/accuracy_ci95": pytest.approx(0.49)}


def test_completions_of_one_prompt_are_no_independent_draws(accelerator):
    """Four prompts that are always or never right: eight completions of each make the interval no narrower."""
    intervals = []
    for num_samples in (1, 8):
        correct = [prompt % 2 == 0 for prompt in range(4) for _ in range(num_samples)]
        rows = 4 * num_samples
        metrics = evaluated(accelerator, [([1] * rows, [0.0] * rows, correct)], num_samples=num_samples)
        intervals.append(with_confidence_interval(metrics, 4)["eval/accuracy_ci95"])
    assert intervals[0] == pytest.approx(intervals[1]) == pytest.approx(0.49)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    generator = torch.Generator().manual_seed(0)
    accuracies = (torch.rand(2000, 256, generator=generator) < 0.3).float().mean(1).tolist()
    hits = 0
    for accuracy in accuracies:
        metrics = with_confidence_interval({"eval/accuracy": accuracy, "eval/accuracy_square": accuracy}, 256)
        hits += abs(accuracy - 0.3) <= metrics["eval/accuracy_ci95"]
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("accuracy", [0.0, 1.0, 1 / 3])
def test_rounding_never_makes_a_variance_negative(accuracy):
    metrics = with_confidence_interval({"eval/accuracy": accuracy, "eval/accuracy_square": accuracy**2 - 1e-12}, 9)
    assert metrics["eval/accuracy_ci95"] == 0.0


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
    assert is_correct(parts, "equation").tolist() == [True, False, False, False, True, False]


@pytest.mark.parametrize("accuracy", [None, "equation"], ids=["none named", "not used in this run"])
def test_nobody_says_who_is_right(accuracy):
    assert is_correct({"format": torch.ones(2)}, accuracy) is None
