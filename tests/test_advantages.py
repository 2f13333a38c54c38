"""Advantages: each completion against its own group, noise is no signal, statistics over real tokens everywhere."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.advantages import (
    generalized_advantages,
    group_relative,
    inverse_deviation,
    leave_one_out,
    per_token_rewards,
    rewards_to_go,
    rows_with_signal,
    whiten,
)
from RAFT.raft_trainer import best_of_group
from VinePPO.chunks import chunk_advantages

NAN = float("nan")


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor


def on_processes(parts: list[tuple[torch.Tensor, torch.Tensor]], function: Callable) -> list:
    """A function in one thread per (values, mask), with a sum that really waits for all of them."""
    barrier, shares, results = threading.Barrier(len(parts), timeout=10), {}, [None] * len(parts)

    def run(process: int) -> None:
        def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
            shares[process] = tensor
            barrier.wait()
            total = torch.stack([shares[i] for i in range(len(parts))]).sum(0)
            barrier.wait()
            return total

        results[process] = function(*parts[process], sum_over_processes=sum_over_processes)

    threads = [threading.Thread(target=run, args=(process,)) for process in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# Groups


def test_advantages_by_hand():
    """Groups (0, 1) and (2, 6): half the difference, in units of the group's standard deviation 0.7071 and 2.8284."""
    scores = torch.tensor([0.0, 1.0, 2.0, 6.0])
    assert group_relative(scores, 2, scale_by_std=False).tolist() == [-0.5, 0.5, -2.0, 2.0]
    by_hand = torch.tensor([-0.7070068, 0.7070068, -0.7070818, 0.7070818])
    torch.testing.assert_close(group_relative(scores, 2), by_hand, atol=1e-6, rtol=0)


def test_a_group_is_the_rows_beside_each_other():
    """Three groups of three: taking every third row instead would have the same shape and other numbers."""
    scores = torch.tensor([0.0, 3.0, 6.0, 10.0, 10.0, 10.0, -1.0, -1.0, 2.0])
    expected = [-3.0, 0.0, 3.0, 0.0, 0.0, 0.0, -1.0, -1.0, 2.0]
    assert group_relative(scores, 3, scale_by_std=False).tolist() == expected


def test_the_better_completion_has_the_larger_advantage():
    advantages = group_relative(torch.tensor([0.1, 0.9, 0.5, 0.4]), 4)
    assert advantages.argsort().tolist() == [0, 3, 2, 1] and advantages[1] > 0 > advantages[0]


def test_without_scaling_hard_and_easy_prompts_keep_their_own_size():
    """One right of four against two of four: the standard deviation would give the rarer case the larger step."""
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    plain, scaled = group_relative(scores, 4, scale_by_std=False), group_relative(scores, 4)
    assert plain[[0, 4]].tolist() == [0.75, 0.5]
    assert scaled[0].item() == pytest.approx(1.5, abs=1e-3) and scaled[4].item() == pytest.approx(0.866, abs=1e-3)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, -7.7, 12345.678])
def test_equal_scores_give_exactly_zero(score, scale_by_std):
    scores = torch.full((8,), score)
    assert group_relative(scores, 8, scale_by_std=scale_by_std).tolist() == [0.0] * 8
    assert leave_one_out(scores, 8).tolist() == [0.0] * 8
    assert rows_with_signal(scores, 8).tolist() == []


def test_float_noise_is_not_a_difference_in_quality():
    noisy = torch.tensor([0.1 + 0.2, 0.3, 0.3 + 1e-9, 0.3], dtype=torch.float64)
    assert group_relative(noisy, 4).abs().max() < 1e-3
    nearly = torch.tensor([0.3, 0.3 + 3e-6, 0.3, 0.3])  # above the tolerance, and far below any real reward
    assert group_relative(nearly, 4).abs().max() < 0.1


def test_float_noise_of_large_scores_is_not_a_difference_in_quality():
    """The next float32 after 1000.1 is 6e-5 away."""
    scores = torch.tensor([1000.1, 1000.1, 1000.1, 1000.1])
    scores[1] = torch.nextafter(scores[1], torch.tensor(2000.0))
    assert group_relative(scores, 4).abs().max() < 1e-3
    assert rows_with_signal(scores, 4).tolist() == []


def test_a_small_real_difference_is_kept():
    assert group_relative(torch.tensor([0.50, 0.51]), 2).tolist() == pytest.approx([-0.7, 0.7], abs=0.02)
    assert rows_with_signal(torch.tensor([0.50, 0.51]), 2).tolist() == [0, 1]


scores_of_groups = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, -2.0]), min_size=4, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=50, deadline=None)
@given(scores_of_groups, st.booleans(), st.randoms(use_true_random=False))
def test_advantages_follow_their_sample_through_any_shuffle_of_groups_and_within_them(groups, scale_by_std, random):
    scores = torch.tensor(groups)
    order = random.sample(range(len(groups)), len(groups))
    within = torch.tensor([random.sample(range(4), 4) for _ in groups])
    before = group_relative(scores.reshape(-1), 4, scale_by_std=scale_by_std).reshape(-1, 4)
    shuffled = scores[order].gather(1, within)
    after = group_relative(shuffled.reshape(-1), 4, scale_by_std=scale_by_std).reshape(-1, 4)
    torch.testing.assert_close(after, before[order].gather(1, within), atol=1e-6, rtol=1e-6)


def test_leave_one_out_by_hand():
    """Groups (0, 1) and (2, 6), then 3, 6, 9: each score less the mean of the others."""
    assert leave_one_out(torch.tensor([0.0, 1.0, 2.0, 6.0]), 2).tolist() == [-1.0, 1.0, -4.0, 4.0]
    assert leave_one_out(torch.tensor([3.0, 6.0, 9.0]), 3).tolist() == [-4.5, 0.0, 4.5]


@settings(max_examples=50)
@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), st.floats(-5, 5))
def test_the_baseline_of_leave_one_out_does_not_depend_on_the_completion_itself(group, other):
    scores = torch.tensor(group)
    changed = scores.clone()
    changed[0] = other
    if scores.std() > 0.1 and changed.std() > 0.1:
        before, after = (s[0] - leave_one_out(s, 4)[0] for s in (scores, changed))
        torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_the_best_of_each_group_is_its_highest_score_and_of_equal_ones_the_first():
    scores = torch.tensor([0.0, 1.0, 0.5, 2.0, 2.0, 2.0, -3.0, -1.0, -1.0])
    best = best_of_group(scores, 3)
    assert best.tolist() == [1, 3, 7] and best.dtype == torch.int64


@settings(max_examples=50)
@given(scores_of_groups, st.randoms(use_true_random=False))
def test_permuting_the_scores_of_a_group_moves_its_best_row_along(groups, random):
    scores = torch.tensor(groups)
    order = torch.tensor([random.sample(range(4), 4) for _ in groups])
    permuted = scores.gather(1, order)
    best = best_of_group(permuted.reshape(-1), 4)
    assert (best // 4).tolist() == list(range(len(groups)))
    assert torch.equal(permuted.reshape(-1)[best], scores.amax(1))
    for group, row in zip(permuted.tolist(), (best % 4).tolist(), strict=True):
        assert group.index(max(group)) == row


@settings(max_examples=50, deadline=None)
@given(scores_of_groups, st.floats(-5, 5), st.floats(0.5, 20))
def test_a_groups_advantages_add_up_to_nothing_and_ignore_where_its_zero_is(groups, shift, scale):
    scores = torch.tensor(groups)
    plain = group_relative(scores.reshape(-1), 4, scale_by_std=False)
    assert plain.reshape(-1, 4).sum(1).abs().max() < 1e-5
    torch.testing.assert_close(
        group_relative((scores * scale + shift).reshape(-1), 4, scale_by_std=False),
        plain * scale,
        atol=1e-3,
        rtol=1e-4,
    )
    torch.testing.assert_close(
        group_relative((scores * scale + shift).reshape(-1), 4), group_relative(scores.reshape(-1), 4),
        atol=1e-2, rtol=1e-2,
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(scores_of_groups)
def test_rows_with_signal_are_those_whose_advantage_is_not_zero_with_their_whole_group(groups):
    scores = torch.tensor(groups).reshape(-1)
    kept = rows_with_signal(scores, 4)
    assert kept.dtype == torch.int64 and kept.tolist() == sorted(kept.tolist())
    assert kept.tolist() == [4 * g + i for g, group in enumerate(groups) if len(set(group)) > 1 for i in range(4)]
    left_out = torch.ones(len(scores), dtype=torch.bool)
    left_out[kept] = False
    assert (group_relative(scores, 4)[left_out] == 0).all()


@pytest.mark.parametrize("compare", [group_relative, leave_one_out, best_of_group, rows_with_signal])
@pytest.mark.parametrize(
    ("shape", "num_generations"), [((4,), 1), ((4,), 0), ((5,), 2), ((4, 1), 2), ((2, 2), 2)], ids=str
)
def test_what_makes_no_groups_is_refused(compare, shape, num_generations):
    with pytest.raises(ValueError, match=rf"num_generations={num_generations}.*at least 2.*--num_generations"):
        compare(torch.zeros(shape), num_generations)


# Rewards of tokens, and what follows from them


def mask_of(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


def test_token_rewards_by_hand():
    """Three rows and three columns: a swapped axis would have the same shape."""
    mask = mask_of([1, 2, 3], 3)
    kl = torch.tensor([[0.5, NAN, NAN], [1.0, -1.0, 1e9], [0.0, 2.0, 4.0]])
    rewards = per_token_rewards(torch.tensor([10.0, 20.0, 30.0]), mask, kl, 0.5)
    assert rewards.tolist() == [[9.75, 0, 0], [-0.5, 20.5, 0], [0, -1, 28]]


token_numbers = st.floats(-3, 3, width=32)
rows_of_tokens = st.lists(st.lists(st.tuples(token_numbers, token_numbers), min_size=1, max_size=6), min_size=1)


def padded(rows: list[list[float]], padding: float) -> torch.Tensor:
    """Rows with one column more than the longest has, as padding."""
    width = max(map(len, rows)) + 1
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])


@settings(max_examples=50)
@given(rows_of_tokens, st.floats(0, 2), st.sampled_from([NAN, float("inf"), 1e9]))
def test_the_score_comes_with_the_last_real_token_and_every_token_pays_its_own_kl(rows, kl_coef, garbage):
    mask = mask_of([len(row) for row in rows], max(map(len, rows)) + 1)
    kl = padded([[kl for kl, _ in row] for row in rows], garbage)
    scores = torch.tensor([row[0][1] for row in rows])
    rewards = per_token_rewards(scores, mask, kl, kl_coef)
    free = per_token_rewards(scores, mask, kl, 0.0)
    assert (rewards[~mask] == 0).all() and rewards.dtype == torch.float32
    last = mask.sum(1) - 1
    assert torch.equal(free.gather(1, last[:, None]).squeeze(1), scores) and torch.equal(free.sum(1), scores)
    total = torch.where(mask, kl, 0.0).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - kl_coef * total, atol=1e-4, rtol=1e-4)


def test_rewards_to_go_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, NAN, 1e9]])
    mask = mask_of([3, 1], 3)
    assert rewards_to_go(rewards, mask).tolist() == [[7, 6, 4], [8, 0, 0]]
    assert rewards_to_go(rewards, mask, gamma=0.5).tolist() == [[3, 4, 4], [8, 0, 0]]
    assert rewards_to_go(rewards, mask, gamma=0.0).tolist() == [[1, 2, 4], [8, 0, 0]]


def test_generalized_advantages_by_hand():
    """Lambda 0.5: the last token is 5 - 2 better than foreseen, the one before (1 + 2 - 4) + half of that."""
    rewards, values = torch.tensor([[1.0, 5.0, NAN]]), torch.tensor([[4.0, 2.0, 1e9]])
    advantages, returns = generalized_advantages(rewards, values, mask_of([2], 3), gamma=1.0, gae_lambda=0.5)
    assert advantages.tolist() == [[0.5, 3.0, 0.0]] and returns.tolist() == [[4.5, 5.0, 0.0]]


def brute_force_advantages(
    rewards: list[float], values: list[float], *, gamma: float, gae_lambda: float
) -> list[float]:
    """The definition, a double sum over a row: of each later surprise what (gamma lambda)^distance leaves."""
    following = [*values[1:], 0.0]  # nothing comes after the last token
    surprises = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    steps = range(len(rewards))
    return [sum((gamma * gae_lambda) ** (later - t) * surprises[later] for later in steps[t:]) for t in steps]


@settings(max_examples=100)
@given(rows_of_tokens, st.floats(0, 1), st.floats(0, 1), st.sampled_from([NAN, float("-inf"), 1e9]))
def test_generalized_advantages_are_the_double_sum_over_the_real_tokens_of_each_row(rows, gamma, gae_lambda, garbage):
    mask = mask_of([len(row) for row in rows], max(map(len, rows)) + 1)
    rewards = padded([[reward for reward, _ in row] for row in rows], garbage)
    values = padded([[value for _, value in row] for row in rows], garbage)
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    advantages, returns = generalized_advantages(rewards, values, mask, **options)
    expected = [brute_force_advantages(*map(list, zip(*row, strict=True)), **options) for row in rows]
    torch.testing.assert_close(advantages, padded(expected, 0.0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(returns, advantages + torch.where(mask, values, 0.0))
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


@settings(max_examples=50)
@given(rows_of_tokens)
def test_with_lambda_one_the_advantage_is_the_return_less_the_value_and_the_last_return_is_its_reward(rows):
    mask = mask_of([len(row) for row in rows], max(map(len, rows)) + 1)
    rewards = padded([[reward for reward, _ in row] for row in rows], 0.0)
    values = padded([[value for _, value in row] for row in rows], 0.0)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_go = torch.where(mask, rewards.flip(1).cumsum(1).flip(1), 0.0)
    torch.testing.assert_close(advantages, to_go - values, atol=1e-4, rtol=1e-4)
    last = (mask.sum(1) - 1)[:, None]
    torch.testing.assert_close(returns.gather(1, last), rewards.gather(1, last), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.95), (0.999, 0.5), (1e-30, 1.0), (0.0, 1.0)])
def test_long_rows_are_those_of_the_recursion_in_float64_but_for_the_last_rounding(gamma, gae_lambda):
    """A power of a factor below 1 is 0 somewhere in a row of this length, and sums of many tokens lose no digit."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 5000, generator=generator) + 3 for _ in range(2))
    mask = mask_of([5000, 4097, 1], 5000)
    expected, advantage = torch.zeros(3, 5000, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(5000)):
        following = torch.where(mask[:, t + 1], values[:, t + 1].double(), 0.0) if t < 4999 else 0.0
        surprise = rewards[:, t].double() + gamma * following - values[:, t].double()
        advantage = torch.where(mask[:, t], surprise + gamma * gae_lambda * advantage, 0.0)
        expected[:, t] = advantage
    options = {"gamma": gamma, "gae_lambda": gae_lambda}
    advantages, returns = generalized_advantages(rewards, values, mask, **options)
    to_returns = expected + torch.where(mask, values, 0.0).double()
    for found, wanted in ((advantages, expected), (returns, to_returns)):
        # Half a unit of float32's last place, and a little for values near 0.
        torch.testing.assert_close(found.double(), wanted, atol=1e-9, rtol=2.0**-24 * 1.001)
    alone, _ = generalized_advantages(rewards[1:2], values[1:2], mask[1:2], **options)
    assert torch.equal(alone, advantages[1:2])  # to the bit, so that dropping rows changes no result


# Chunks


def test_chunk_advantages_by_hand():
    """Values 0.5, 0.75 and 0.25 at tokens 0, 2 and 3, then a score of 1; a row of one chunk; one that ends early."""
    values = torch.tensor([[0.5, NAN, 0.75, 0.25, NAN], [0.5, NAN, NAN, NAN, NAN], [0.25, 1.0, NAN, 7.0, NAN]])
    starts = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    mask = torch.arange(5) < torch.tensor([[5], [5], [3]])
    advantages = chunk_advantages(values, starts, torch.tensor([1.0, -1.0, 0.5]), mask)
    assert advantages.tolist() == [
        [0.25, 0.25, -0.5, 0.75, 0.75],
        [-1.5, -1.5, -1.5, -1.5, -1.5],
        [0.75, -0.5, -0.5, 0.0, 0.0],
    ]


@settings(max_examples=60)
@given(st.lists(st.lists(st.tuples(st.floats(-3, 3, width=32), st.booleans()), min_size=1, max_size=6), min_size=1))
def test_the_chunks_of_a_completion_add_up_to_its_score_less_its_first_value(rows):
    lengths = [len(row) for row in rows]
    values = torch.tensor([[value for value, _ in row] + [NAN] * (6 - len(row)) for row in rows])
    starts = torch.tensor([[begins for _, begins in row] + [False] * (6 - len(row)) for row in rows])
    starts[:, 0] = True
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    scores = torch.linspace(-1, 1, len(rows))
    advantages = chunk_advantages(values, starts, scores, mask)
    assert not advantages[~mask].any()
    torch.testing.assert_close(
        torch.where(starts, advantages, 0.0).sum(1), scores - values[:, 0], atol=1e-5, rtol=1e-5
    )


# Whitening


def test_whitening_by_hand():
    """Real values 1, 3, 5, 7 have mean 4 and variance 5."""
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    by_hand = torch.tensor([[-1.3416408, -0.4472136, 0.0], [0.4472136, 1.3416408, 0.0]])
    torch.testing.assert_close(whiten(values, mask, sum_over_processes=alone), by_hand)


def test_the_factor_for_variance_one_by_hand():
    """Real values 1, 3, 5, 7 have variance 5. Without a shift a reward of 0 stays 0."""
    values, mask = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, NAN]]), torch.tensor([[True, True, False]] * 2)
    assert inverse_deviation(values, mask, sum_over_processes=alone) == pytest.approx(5**-0.5)


@pytest.mark.parametrize("values", [[[3.3] * 4], [[0.0] * 4], [[0.3, 0.1 + 0.2, 0.3, 0.30000001]]], ids=str)
def test_values_that_do_not_differ_are_not_scaled(values):
    """A deviation of float noise would make the rewards a million times larger."""
    for num_real in (0, 1, 4):
        mask = torch.arange(4)[None, :] < num_real
        assert inverse_deviation(torch.tensor(values), mask, sum_over_processes=alone) == 1.0


@pytest.mark.parametrize("lengths", [(10, 100), (3, 3), (1, 50)])
def test_scaled_rewards_of_completions_with_equal_scores_are_equal_whatever_their_lengths(lengths):
    mask = mask_of(list(lengths), max(lengths))
    rewards = per_token_rewards(torch.tensor([0.7, 0.7]), mask, torch.zeros(mask.shape), 0.0)
    scaled = (rewards * inverse_deviation(rewards, mask, sum_over_processes=alone)).sum(1)
    assert scaled[0] > 0.7 and leave_one_out(scaled, 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("garbage", [NAN, float("inf"), 1e9], ids=str)
def test_whitening_leaves_garbage_in_padding_out_and_padding_at_zero(garbage):
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(4, 6, generator=generator), torch.rand(4, 6, generator=generator) < 0.6
    options = {"sum_over_processes": alone}
    clean = whiten(torch.where(mask, values, 0.0), mask, **options)
    dirty = whiten(torch.where(mask, values, garbage), mask, **options)
    assert inverse_deviation(torch.where(mask, values, garbage), mask, **options) == inverse_deviation(
        torch.where(mask, values, 0.0), mask, **options
    )
    assert torch.equal(clean, dirty) and (dirty[~mask] == 0).all() and dirty[mask].abs().min() > 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=2, max_size=24),
    st.floats(-1e3, 1e3),
)
def test_whitened_real_tokens_have_mean_zero_and_variance_one(tokens, shift):
    mask = torch.tensor([[real for _, real in tokens]])
    values = torch.tensor([[value for value, _ in tokens]], dtype=torch.float64)
    whitened = whiten(values + shift, mask, sum_over_processes=alone)
    assert whitened.dtype == torch.float32 and whitened.isfinite().all()
    real = whitened[mask].double()
    if len(real) > 1 and values[mask].std() > 0.1:
        assert real.mean().abs() < 1e-5
        assert real.var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
        # It keeps the order: whitening is an increasing map.
        assert (real[values[mask].argsort()].diff() >= 0).all()


@pytest.mark.parametrize("num_real", [0, 1, 5])
def test_whitening_values_that_do_not_differ_gives_zero(num_real):
    mask = torch.arange(6)[None, :] < num_real
    assert whiten(torch.full((1, 6), 3.3), mask, sum_over_processes=alone).tolist() == [[0.0] * 6]


@pytest.mark.parametrize("function", [whiten, inverse_deviation])
@pytest.mark.parametrize("borders", [[2], [1, 3], [0, 5]], ids=["two", "three", "one without rows"])
def test_whitening_on_several_processes_equals_whitening_on_one(borders, function):
    generator = torch.Generator().manual_seed(1)
    values, mask = torch.randn(6, 5, generator=generator) + 2, torch.rand(6, 5, generator=generator) < 0.7
    mask[:2] = mask[:2] & (torch.arange(5) < 2)  # unequal counts of tokens
    whole = function(values, mask, sum_over_processes=alone)
    parts = on_processes(list(zip(values.tensor_split(borders), mask.tensor_split(borders), strict=True)), function)
    if function is whiten:
        torch.testing.assert_close(torch.cat(parts), whole)
    else:
        assert parts == pytest.approx([whole] * len(parts), rel=1e-12)


def test_whitening_is_exact_for_a_mean_far_from_zero():
    values = 1e4 + torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    expected = whiten(
        torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.ones(1, 4, dtype=torch.bool), sum_over_processes=alone
    )
    whitened = whiten(values, torch.ones(1, 4, dtype=torch.bool), sum_over_processes=alone)
    torch.testing.assert_close(whitened, expected, atol=1e-4, rtol=0)


def test_whitening_does_not_change_its_input():
    values, mask = torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[True, True, False]])
    whiten(values, mask, sum_over_processes=alone)
    assert values[0, :2].tolist() == [1.0, 3.0] and values[0, 2].isnan()
