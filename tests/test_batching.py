"""Mini-batches are a function of seed, step and epoch; micro-batches lose no row and keep to their budget."""

import itertools
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import RLConfig
from common.rollouts import Completion, PromptBatch, Rollouts
from common.seeds import hashed_seed, seeded_permutation
from common.update.batches import Batches
from common.update.rows import keep_one_per_group, microbatch_rows, minibatch_rows

ROOT = Path(__file__).parent.parent

numbers = st.integers(0, 10_000)


def flat(parts: list[torch.Tensor]) -> list[int]:
    return [row for part in parts for row in part.tolist()]


# Seeds


@pytest.mark.slow
def test_a_seed_is_the_same_on_every_machine_and_in_every_process():
    """Python's own hash would differ from process to process."""
    program = "from common.seeds import *; print(hashed_seed(1, 2, 'x'), seeded_permutation(5, 3).tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", program]
    told = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.strip() == f"{hashed_seed(1, 2, 'x')} {seeded_permutation(5, 3).tolist()}"
    assert hashed_seed(1, 2, "x") == 61656413758828813  # printf 1/2/x | b2sum -l 56


def test_seeds_fill_56_bits():
    seeds = [hashed_seed(i) for i in range(200)]
    assert all(0 <= seed < 2**56 for seed in seeds) and max(seeds) > 2**55
    assert 0.45 < sum(bin(seed).count("1") for seed in seeds) / (200 * 56) < 0.55


def test_seeds_of_neighbouring_steps_rows_and_runs_have_nothing_in_common():
    seeds = {hashed_seed(seed, step, row) for seed in range(5) for step in range(40) for row in range(40)}
    assert len(seeds) == 5 * 40 * 40
    assert min(abs(a - b) for a, b in pairwise(sorted(seeds))) > 1024  # seed + i stays free


def test_where_one_part_ends_and_the_next_begins_matters():
    assert len({hashed_seed(1, 23), hashed_seed(12, 3), hashed_seed(123), hashed_seed(2, 13), hashed_seed(3, 12)}) == 5


# Permutations and mini-batches


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), numbers)
def test_a_permutation_has_every_number_once(length, seed):
    assert sorted(seeded_permutation(length, seed).tolist()) == list(range(length))


def test_orders_depend_on_what_they_are_told_and_not_on_any_global_generator():
    torch.manual_seed(1), random.seed(1)
    first, state = seeded_permutation(100, 5, "prompts").tolist(), torch.get_rng_state()
    torch.manual_seed(2), random.seed(2)
    assert seeded_permutation(100, 5, "prompts").tolist() == first
    assert seeded_permutation(100, 6, "prompts").tolist() != first != seeded_permutation(100, 5, "other").tolist()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), numbers, numbers, st.integers(0, 3))
def test_every_row_is_in_exactly_one_minibatch_of_an_epoch_and_all_are_equal(size, num_minibatches, seed, step, epoch):
    dealt = minibatch_rows(size * num_minibatches, num_minibatches, seed=seed, step=step, epoch=epoch)
    assert sorted(flat(dealt)) == list(range(size * num_minibatches))
    assert [len(rows) for rows in dealt] == [size] * num_minibatches


def test_rows_that_do_not_divide_differ_by_one_at_most():
    assert sorted(len(rows) for rows in minibatch_rows(11, 4, seed=0, step=1, epoch=0)) == [2, 3, 3, 3]


def test_every_seed_step_and_epoch_deals_anew_and_the_same_ones_deal_the_same():
    def dealt(seed=0, step=1, epoch=0):
        return [rows.tolist() for rows in minibatch_rows(64, 4, seed=seed, step=step, epoch=epoch)]

    assert dealt() == dealt()
    different = [dealt(), dealt(seed=1), dealt(step=2), dealt(epoch=1), dealt(seed=1, step=0)]
    assert len({tuple(map(tuple, one)) for one in different}) == 5
    # Not only the order within: other rows are together.
    assert {frozenset(rows) for rows in dealt()}.isdisjoint({frozenset(rows) for rows in dealt(epoch=1)})


# Micro-batches


lengths_of_rows = st.lists(st.integers(1, 40), max_size=30)


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 200))
def test_micro_batches_hold_every_row_once_and_keep_to_their_budget(lengths, max_tokens):
    parts = microbatch_rows(torch.tensor(lengths, dtype=torch.int64), max_tokens)
    assert sorted(flat(parts)) == list(range(len(lengths)))
    for rows in parts:
        width = max(lengths[row] for row in rows.tolist())
        assert len(rows) * width <= max_tokens or len(rows) == 1
        assert rows.dtype == torch.int64


@settings(max_examples=80, deadline=None)
@given(lengths_of_rows, st.integers(1, 200))
def test_padding_stays_within_its_bound_and_rows_of_similar_length_are_together(lengths, max_tokens):
    parts = microbatch_rows(torch.tensor(lengths, dtype=torch.int64), max_tokens)
    assert padded_tokens(lengths, parts) - sum(lengths) <= max(0.1 * sum(lengths), 64)
    for rows, next_rows in pairwise(parts):
        assert min(lengths[row] for row in rows.tolist()) >= max(lengths[row] for row in next_rows.tolist())


def padded_tokens(lengths: list[int], parts: list[torch.Tensor]) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows.tolist()) for rows in parts)


def lengths_of_shape(shape: str, num_rows: int) -> list[int]:
    """Lengths of rows, prompt and completion."""
    generator = torch.Generator().manual_seed(num_rows)
    noise, share = (make(num_rows, generator=generator) for make in (torch.randn, torch.rand))
    lengths = {
        "log-normal": 20 + (96 * noise.exp()).clamp(1, 1500),
        "wide log-normal": 300 + (500 * (1.5 * noise).exp()).clamp(1, 7700),
        "two lengths": torch.where(share < 0.5, 60.0, 3000.0) + 20 * share,
        "all different": torch.arange(1, num_rows + 1) * (8000 // num_rows),
        "one giant": torch.cat([torch.tensor([8000.0]), 20 + 100 * share[1:]]),
        "uniform": 1 + 7999 * share,
        "growing": 8000.0 ** (torch.arange(1, num_rows + 1) / num_rows),
    }
    return lengths[shape].long().tolist()


SHAPES = ["log-normal", "wide log-normal", "two lengths", "all different", "one giant", "uniform", "growing"]


@pytest.mark.parametrize("num_rows", [32, 128, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tenth_of_the_tokens_at_most_is_padding_and_few_passes_suffice(shape, num_rows):
    lengths = lengths_of_shape(shape, num_rows)
    for budget in (4096, 16384, 65536):
        parts = microbatch_rows(torch.tensor(lengths), budget)
        assert padded_tokens(lengths, parts) <= 1.1 * sum(lengths)
        # Beyond the passes that the budget needs anyway, a few whose number hardly grows with the rows.
        assert len(parts) <= 1.1 * fewest_passes(lengths, budget) + 40, (shape, len(parts))


def fewest_passes(lengths: list[int], budget: int) -> int:
    """Passes of at most so many padded tokens, whatever the padding: each as full as the next row allows."""
    number = width = count = 0
    for length in sorted(lengths, reverse=True):
        if not number or (count + 1) * width > budget:
            number, width, count = number + 1, length, 0
        count += 1
    return number


def test_passes_are_the_fewest_for_the_padding_that_is_left():
    """Of all ways to cut ten rows, none has as few passes and less padding."""
    lengths = [1000, 970, 600, 590, 580, 300, 290, 120, 110, 100]
    parts = microbatch_rows(torch.tensor(lengths), 4096)
    ours = padded_tokens(lengths, parts)
    assert ours <= 1.1 * sum(lengths)
    for cuts in itertools.combinations(range(1, 10), len(parts) - 1):
        others = [torch.arange(start, end) for start, end in pairwise([0, *cuts, 10])]
        assert padded_tokens(lengths, others) >= ours
    fewer = [
        padded_tokens(lengths, [torch.arange(start, end) for start, end in pairwise([0, *cuts, 10])])
        for cuts in itertools.combinations(range(1, 10), len(parts) - 2)
    ]
    assert min(fewer) > ours + 512 or min(fewer) > 1.1 * sum(lengths)


def test_padding_of_a_few_tokens_is_cheaper_than_another_pass():
    """Ten rows of 3 tokens on average would have six passes with a tenth of them as padding."""
    assert len(microbatch_rows(torch.tensor([1, 2, 3, 4, 5] * 2), 8192)) == 1


def test_micro_batches_by_hand():
    """A budget of 20: 30 has a pass of its own, two rows of 9 fit, and then 5, 5 and 2; of 60, all that fit."""
    parts = microbatch_rows(torch.tensor([2, 9, 5, 30, 9, 5]), 20)
    assert [rows.tolist() for rows in parts] == [[3], [1, 4], [2, 5, 0]]
    parts = microbatch_rows(torch.tensor([2, 9, 5, 30, 9, 5]), 60)
    assert [rows.tolist() for rows in parts] == [[3], [1, 4, 2, 5, 0]]


def test_a_row_longer_than_the_budget_gets_a_pass_of_its_own():
    assert [rows.tolist() for rows in microbatch_rows(torch.tensor([50, 60]), 10)] == [[1], [0]]


def test_no_rows_need_no_pass():
    assert microbatch_rows(torch.zeros(0, dtype=torch.int64), 100) == []


@pytest.mark.parametrize(("others", "fillers"), [(5, 3), (2, 0), (0, 0)])
def test_every_process_makes_as_many_passes_as_the_one_with_the_most(others, fillers):
    """Sharded models exchange their weights in each pass, and would wait forever for a process that makes none."""
    accelerator = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    accelerator.reduce = lambda counts, how: counts + torch.tensor([0.0, others])
    batches = Batches(RLConfig(max_tokens_per_microbatch=1), accelerator, torch.float32)
    passes = [(rows is None, bool(part.loss_mask.any())) for rows, part in batches.microbatches(step_of(1, 2))]
    assert passes == [(False, True)] * 2 + [(True, False)] * fillers


def test_all_rows_share_one_pass_when_the_budget_allows():
    assert [sorted(rows.tolist()) for rows in microbatch_rows(torch.tensor([3, 1, 2]), 9)] == [[0, 1, 2]]
    assert len(microbatch_rows(torch.tensor([3, 1, 2]), 8)) == 2


def test_skewed_lengths_waste_little():
    """One row of 1000 among 99 of 10: padding all to the longest would be 100,000 tokens."""
    lengths = torch.tensor([10] * 50 + [1000] + [10] * 49)
    parts = microbatch_rows(lengths, 1000)
    assert [len(rows) for rows in parts] == [1, 99]


# Keeping one completion per prompt


def step_of(
    num_prompts: int, num_generations: int, *, first_prompt: int = 0, step_prompts: int | None = None
) -> Rollouts:
    """Part of a step of `step_prompts` prompts: row r has r + 1 tokens."""
    total = (step_prompts or num_prompts) * num_generations
    prompts = PromptBatch(
        step=1,
        rows=list(range(first_prompt, first_prompt + num_prompts)),
        prompt_ids=[[1]] * num_prompts,
        prompts=["p"] * num_prompts,
        columns={},
    )
    first = first_prompt * num_generations
    lengths = range(first + 1, first + 1 + num_prompts * num_generations)
    completions = [Completion([5] * length, [-1.0] * length, truncated=False) for length in lengths]
    rollouts = Rollouts.from_completions(
        prompts, completions, ["t"] * len(completions), num_generations=num_generations
    )
    rollouts.step_lengths = torch.arange(1, total + 1)
    return rollouts


def test_one_row_of_each_group_is_kept_and_numbered_anew():
    kept = keep_one_per_group(step_of(5, 4), 4, seed=0, step=1)
    assert kept.rows.tolist() == [0, 1, 2, 3, 4]
    assert [(length - 1) // 4 for length in kept.lengths.tolist()] == [0, 1, 2, 3, 4]
    assert kept.step_lengths.tolist() == kept.lengths.tolist()


def test_log_probs_of_the_passes_of_all_rows_do_not_stay():
    """The update's passes are other ones: its first ratio would be 1 only up to rounding."""
    rollouts = step_of(2, 2)
    rollouts.old_logprobs = torch.zeros(rollouts.completion_ids.shape)
    assert keep_one_per_group(rollouts, 2, seed=0, step=1).old_logprobs is None


def test_which_row_is_kept_depends_on_seed_and_step_and_every_place_has_its_turn():
    def kept(seed, step):
        return ((keep_one_per_group(step_of(3, 4), 4, seed=seed, step=step).lengths - 1) % 4).tolist()

    assert kept(0, 1) == kept(0, 1)
    chosen = [kept(seed, step) for seed in range(8) for step in range(8)]
    counts = torch.tensor(chosen).flatten().bincount(minlength=4)
    assert counts.sum() == 3 * 64 and counts.min() > 30  # 48 each on average
    assert len({tuple(one) for one in chosen}) > 20  # and the groups choose independently


def test_each_process_keeps_the_rows_that_one_process_would_have_kept():
    whole = keep_one_per_group(step_of(6, 4), 4, seed=3, step=2)
    parts = [
        keep_one_per_group(step_of(3, 4, first_prompt=first, step_prompts=6), 4, seed=3, step=2) for first in (0, 3)
    ]
    assert parts[0].lengths.tolist() + parts[1].lengths.tolist() == whole.lengths.tolist()
    assert parts[0].rows.tolist() + parts[1].rows.tolist() == whole.rows.tolist()
    for part in parts:
        assert part.step_lengths.tolist() == whole.step_lengths.tolist()


def test_groups_that_were_left_out_before_still_count():
    """Sparse training left the second of three groups out: what is kept of the others stays, and all three count."""
    rollouts = step_of(3, 2)
    whole = keep_one_per_group(rollouts, 2, seed=0, step=1)
    sparse = keep_one_per_group(rollouts[torch.tensor([0, 1, 4, 5])], 2, seed=0, step=1)
    assert sparse.rows.tolist() == [0, 2]
    assert sparse.lengths.tolist() == whole.lengths[[0, 2]].tolist()
    assert sparse.step_lengths.tolist() == whole.step_lengths.tolist()


@pytest.mark.parametrize("num_generations", [2, 5])
def test_the_advantage_stays_with_its_row(num_generations):
    rollouts = step_of(3, num_generations)
    rollouts.advantages = rollouts.spread(rollouts.lengths.float())
    kept = keep_one_per_group(rollouts, num_generations, seed=1, step=1)
    assert kept.advantages.amax(1).tolist() == kept.lengths.tolist()
