"""The batch: padding counts for nothing, rows keep what belongs to them, prompt and completion join without a gap."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.rollouts import Completion, PromptBatch, Rollouts, filler
from common.update.rows import microbatch_rows

END = 9


def make_batch(prompts: list[list[int]], completions: list[list[int]], *, first_row: int = 0) -> Rollouts:
    """Rollouts of these token ids; the log-prob of a token is minus its id, so that a shift shows."""
    num_generations = len(completions) // len(prompts)
    batch = PromptBatch(
        step=1,
        rows=list(range(first_row, first_row + len(prompts))),
        prompt_ids=prompts,
        prompts=[f"prompt {i}" for i in range(len(prompts))],
        columns={"answer": list(range(len(prompts)))},
    )
    sampled = [Completion(ids, [-float(i) for i in ids], truncated=ids[-1:] != [END]) for ids in completions]
    texts = [f"text {i}" for i in range(len(completions))]
    rollouts = Rollouts.from_completions(batch, sampled, texts, num_generations=num_generations)
    rollouts.step_lengths = rollouts.lengths
    return rollouts


def with_every_field(rollouts: Rollouts) -> Rollouts:
    """The same with every optional field filled, each number different."""
    shape = rollouts.completion_ids.shape
    rollouts.scores = torch.arange(float(len(rollouts)))
    rollouts.parts = {"digits": rollouts.scores + 0.5, "sum": -rollouts.scores}
    rollouts.raw_prompts = [[{"role": "user", "content": f"{i}"}] for i in range(len(rollouts))]
    names = ["old_logprobs", "ref_logprobs", "values", "advantages", "returns", "token_weights"]
    for offset, name in enumerate(names):
        setattr(rollouts, name, torch.arange(float(rollouts.completion_ids.numel())).reshape(shape) + 1000 * offset)
    return rollouts


# Padding


def test_prompts_are_padded_on_the_left_and_completions_on_the_right():
    rollouts = make_batch([[1, 2], [3, 4, 5, 6]], [[7, END], [8, 8, END]])
    assert rollouts.prompt_ids.tolist() == [[0, 0, 1, 2], [3, 4, 5, 6]]
    assert rollouts.prompt_mask.tolist() == [[False, False, True, True], [True] * 4]
    assert rollouts.completion_ids.tolist() == [[7, END, 0], [8, 8, END]]
    assert rollouts.completion_mask.tolist() == [[True, True, False], [True] * 3]
    assert rollouts.sampling_logprobs.tolist() == [[-7, -END, 0], [-8, -8, -END]]


def test_tensors_have_the_types_that_the_notation_promises():
    rollouts = make_batch([[1]], [[7, END]])
    assert rollouts.prompt_ids.dtype == rollouts.completion_ids.dtype == rollouts.rows.dtype == torch.int64
    assert rollouts.prompt_mask.dtype == rollouts.completion_mask.dtype == rollouts.truncated.dtype == torch.bool
    assert rollouts.sampling_logprobs.dtype == torch.float32


@pytest.mark.parametrize(
    ("completion", "length"),
    [([END], 1), ([5, END, 6, END], 4), ([5, 6, END], 3), ([5, 6, 7], 3), ([END, END], 2), ([0, 0, 0], 3)],
    ids=["at once", "in the middle too", "at the end", "never", "twice", "tokens of id 0"],
)
def test_every_sampled_token_counts_and_nothing_after_the_last_one(completion, length):
    rollouts = make_batch([[1]], [completion, [5] * 6])
    assert rollouts.completion_mask[0].tolist() == [True] * length + [False] * (6 - length)
    assert rollouts.lengths.tolist() == [length, 6]


def test_a_padding_id_within_the_text_stays_a_real_token():
    """Masks come from lengths, never from comparing ids: pad and end token are often the same id."""
    rollouts = make_batch([[0, 0, 4], [5]], [[0, 0], [3, 0, 0, 0]])
    assert rollouts.total_lengths.tolist() == [5, 5]
    ids, prompt_lengths = rollouts.sequences()
    assert ids.tolist() == [[0, 0, 4, 0, 0], [5, 3, 0, 0, 0]]
    assert prompt_lengths.tolist() == [3, 1]


def test_an_end_token_within_the_prompt_leaves_the_completion_whole():
    rollouts = make_batch([[END, 1, END], [2]], [[5, 6, 7, END], [5]])
    assert rollouts.lengths.tolist() == [4, 1]
    assert rollouts.prompt_mask.sum(1).tolist() == [3, 1]


def test_a_batch_is_as_wide_as_its_own_longest_row():
    rollouts = make_batch([[1], [1, 2]], [[5], [5, 6, 7]])
    assert rollouts.prompt_ids.shape == (2, 2) and rollouts.completion_ids.shape == (2, 3)


def test_a_token_without_a_logprob_is_refused():
    """Only what was sampled has one: a token that somebody appended must not get into the loss."""
    with pytest.raises((AssertionError, ValueError)):
        Completion([5, 6, END], [-1.0, -1.0], truncated=False)


def test_no_prompts_make_an_empty_batch():
    rollouts = make_batch([[1]], [[5]])[torch.zeros(1, dtype=torch.bool)]
    assert len(rollouts) == 0 and len(rollouts.trimmed()) == 0
    assert rollouts.sequences()[0].shape[0] == 0
    nobody = PromptBatch(step=0, rows=[], prompt_ids=[], prompts=[], columns={"answer": []})
    empty = Rollouts.from_completions(nobody, [], [], num_generations=4)
    assert len(empty) == 0 and empty.lengths.tolist() == []


# Who belongs to whom


def test_rows_of_a_prompt_are_adjacent_and_numbered_over_all_processes():
    """The second process holds prompts 2 and 3 of the step: with three completions each, rows 6 to 11."""
    rollouts = make_batch([[1], [2]], [[5]] * 6, first_row=2)
    assert rollouts.rows.tolist() == [6, 7, 8, 9, 10, 11]
    assert rollouts.prompt_ids.squeeze(1).tolist() == [1, 1, 1, 2, 2, 2]
    assert rollouts.prompts == ["prompt 0"] * 3 + ["prompt 1"] * 3
    assert rollouts.columns == {"answer": [0, 0, 0, 1, 1, 1]}


def test_prompts_as_the_data_set_has_them_are_repeated_with_their_rows():
    chats = [[{"role": "user", "content": "a"}], "plain"]
    batch = PromptBatch(
        step=1, rows=[0, 1], prompt_ids=[[1], [2]], prompts=["<a>", "plain"], columns={}, raw_prompts=chats
    )
    completions = [Completion([5], [-1.0], truncated=False)] * 4
    rollouts = Rollouts.from_completions(batch, completions, ["t"] * 4, num_generations=2)
    assert rollouts.raw_prompts == [chats[0], chats[0], "plain", "plain"]
    assert rollouts[torch.tensor([3, 0])].raw_prompts == ["plain", chats[0]]
    assert rollouts[:0].raw_prompts == [] == make_batch([[1]], [[5]]).raw_prompts


@pytest.mark.parametrize(
    "index",
    [torch.tensor([4, 1, 1]), torch.tensor([False, True, False, True, True, False]), slice(1, 5, 2), slice(0, 0)],
    ids=["numbers", "mask", "slice", "nothing"],
)
def test_choosing_rows_takes_every_field_along(rollouts, index):
    rollouts = with_every_field(rollouts)
    numbers = torch.arange(6)[index].tolist()
    chosen = rollouts[index]
    assert chosen.scores.tolist() == numbers
    assert {name: part.tolist() for name, part in chosen.parts.items()} == {
        "digits": [i + 0.5 for i in numbers],
        "sum": [-i for i in numbers],
    }
    assert [messages[0]["content"] for messages in chosen.raw_prompts] == [str(i) for i in numbers]
    assert chosen.completions == [f"text {i}" for i in numbers]
    assert chosen.prompts == [rollouts.prompts[i] for i in numbers]
    assert chosen.columns == {"answer": [1 + i // 2 for i in numbers]}
    for name, value in vars(rollouts).items():
        if isinstance(value, torch.Tensor) and name != "step_lengths":
            assert torch.equal(vars(chosen)[name], torch.stack([value[i] for i in numbers]) if numbers else value[:0])


def test_lengths_of_the_step_stay_whole_when_rows_are_left_out(rollouts):
    assert rollouts[:1].step_lengths.tolist() == [4, 1, 7, 3, 2, 5]


def test_what_is_not_known_yet_stays_unknown(rollouts):
    chosen = rollouts[torch.tensor([0])].trimmed().to(torch.device("cpu"))
    assert chosen.advantages is None and chosen.ref_logprobs is None and chosen.scores is None


def test_moving_to_a_device_moves_every_tensor(rollouts):
    moved = with_every_field(rollouts).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 16 and all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.prompts == rollouts.prompts


# Spreading and trimming


def test_spreading_gives_a_rows_number_to_its_real_tokens_only():
    rollouts = make_batch([[1]], [[5], [5, 6, 7], [5, 6]])  # as many rows as columns: a swapped axis would fit
    assert rollouts.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 0, 0], [2, 2, 2], [3, 3, 0]]
    assert rollouts.spread(torch.tensor([1, 2, 3])).dtype == torch.float32
    rollouts.loss_mask = torch.zeros_like(rollouts.completion_mask)  # what is not trained on is real too
    assert rollouts.spread(torch.ones(3)).sum() == 6


def test_spreading_lets_no_garbage_into_padding():
    rollouts = make_batch([[1]], [[5], [5, 6]])
    spread = rollouts.spread(torch.tensor([float("nan"), 1.0]))
    assert spread[0, 1] == 0.0 and spread[1].tolist() == [1, 1]


def test_trimming_drops_the_columns_that_are_padding_in_every_row(rollouts):
    trimmed = with_every_field(rollouts)[
        torch.tensor([0, 1])
    ].trimmed()  # a prompt of 2 tokens, completions of 4 and 1
    assert trimmed.prompt_ids.shape == (2, 2) and trimmed.completion_ids.shape == (2, 4)
    assert trimmed.advantages.shape == trimmed.sampling_logprobs.shape == trimmed.token_weights.shape == (2, 4)
    assert trimmed.prompt_mask.all()
    for name in ("completion_ids", "advantages", "old_logprobs"):
        assert torch.equal(vars(trimmed)[name], vars(rollouts)[name][:2, :4])
    assert torch.equal(trimmed.prompt_ids, rollouts.prompt_ids[:2, 3:])


# Sequences: what a model is shown


def test_prompt_and_completion_are_put_together_without_a_gap():
    ids, prompt_lengths = make_batch([[1, 2], [3, 4, 5, 6]], [[7, END], [8, 8, END]]).sequences()
    assert ids.tolist() == [[1, 2, 7, END, 0, 0, 0], [3, 4, 5, 6, 8, 8, END]]
    assert prompt_lengths.tolist() == [2, 4]


token_lists = st.lists(st.integers(0, 50), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6), st.integers(1, 40))
def test_no_split_into_passes_loses_or_moves_a_token(rows, max_tokens):
    """Whatever rows share a pass, each shows the model its prompt and its completion, and then only zeros."""
    rollouts = make_batch([prompt for prompt, _ in rows], [completion for _, completion in rows])
    seen = {}
    for numbers in microbatch_rows(rollouts.total_lengths, max_tokens):
        part = rollouts[numbers].trimmed()
        ids, prompt_lengths = part.sequences()
        assert ids.shape[1] == max(len(rows[i][0]) + len(rows[i][1]) for i in numbers)
        for i, sequence, start in zip(numbers.tolist(), ids.tolist(), prompt_lengths.tolist(), strict=True):
            prompt, completion = rows[i]
            assert sequence[:start] == prompt
            assert sequence[start:] == completion + [0] * (len(sequence) - len(prompt) - len(completion))
            seen[i] = True
    assert len(seen) == len(rows)


def test_garbage_in_padding_does_not_reach_the_sequences():
    rollouts = make_batch([[1, 2], [3, 4, 5]], [[7], [8, 8, END]])
    clean = rollouts.sequences()[0]
    rollouts.prompt_ids[~rollouts.prompt_mask] = 999
    rollouts.completion_ids[~rollouts.completion_mask] = 999
    assert torch.equal(rollouts.sequences()[0], clean)


# Who counts


def test_rows_left_out_still_count_and_their_log_probs_are_taken_anew(rollouts):
    full = with_every_field(rollouts)
    rest = full.only(torch.tensor([1, 3]))
    assert rest.rows.tolist() == [1, 3] and rest.step_lengths.tolist() == full.step_lengths.tolist()
    assert rest.old_logprobs is None and torch.equal(rest.ref_logprobs, full.ref_logprobs[[1, 3]])
    assert full.old_logprobs is not None  # the others are left as they were


def test_renumbered_rows_are_the_only_ones_that_count(rollouts):
    full = with_every_field(rollouts)
    lengths = full.step_lengths.tolist()
    some = full.only(torch.tensor([1, 3])).renumbered(torch.tensor([1, 3, 4]))
    assert some.rows.tolist() == [0, 1] and some.step_lengths.tolist() == [lengths[i] for i in (1, 3, 4)]
    alone = full.only(torch.tensor([1, 3])).renumbered()
    assert alone.step_lengths is None and alone.old_logprobs is None


def test_joined_rollouts_have_the_rows_of_all_parts_and_count_all_of_theirs():
    first = with_every_field(make_batch([[1, 2], [3]], [[7, END], [8, END], [8, 8, END], [END]]))
    second = with_every_field(make_batch([[4, 5, 6]], [[7, 7, 7, 7, END], [END]]))
    both = Rollouts.joined([first[torch.tensor([0, 3])], second])
    assert both.rows.tolist() == [0, 3, 4, 5]
    assert both.step_lengths.tolist() == [2, 2, 3, 1, 5, 1]
    assert both.prompts == ["prompt 0", "prompt 1", "prompt 0", "prompt 0"]
    assert both.columns == {"answer": [0, 1, 0, 0]}
    for row, part, index in ((0, first, 0), (1, first, 3), (2, second, 0), (3, second, 1)):
        mine, theirs = both[row : row + 1].trimmed(), part[index : index + 1].trimmed()
        for name, value in theirs._content():
            if isinstance(value, torch.Tensor) and name not in ("rows", "step_lengths"):
                assert torch.equal(vars(mine)[name], value), name
        assert {name: float(values[0]) for name, values in mine.parts.items()} == {
            name: float(values[0]) for name, values in theirs.parts.items()
        }
        assert mine.sequences()[0].tolist() == theirs.sequences()[0].tolist()


def test_parts_that_do_not_go_together_are_refused(rollouts):
    scored = rollouts[torch.arange(6)]
    scored.scores = torch.zeros(6)
    with pytest.raises(ValueError, match="the same fields in all"):
        Rollouts.joined([rollouts, scored])
    with pytest.raises(ValueError, match=r"before `renumbered`"):
        Rollouts.joined([rollouts.renumbered(), rollouts.renumbered()])


def test_every_token_is_trained_on_unless_the_loss_mask_says_otherwise(rollouts):
    assert torch.equal(rollouts.loss_mask, rollouts.completion_mask)


@pytest.mark.parametrize("name", ["completion_mask", "prompt_mask"])
def test_a_mask_with_a_hole_is_refused(rollouts, name):
    """The tokens behind it would get the log-probs of their neighbours."""
    mask = vars(rollouts)[name].clone()
    row = int(mask.sum(1).argmax())
    mask[row, mask.shape[1] // 2] = False
    with pytest.raises(ValueError, match=f"{name} has a hole.*loss_mask"):
        replace(rollouts, **{name: mask, "loss_mask": None})


def test_padding_cannot_be_trained_on(rollouts):
    with pytest.raises(ValueError, match="only real tokens can be trained on"):
        replace(rollouts, loss_mask=torch.ones_like(rollouts.completion_mask))


# The filler


def test_a_filler_has_one_row_that_counts_for_nothing(rollouts):
    one = filler(with_every_field(rollouts))
    assert len(one) == 1 and one.lengths.tolist() == [0] and one.total_lengths.tolist() == [1]
    assert one.sequences()[0].tolist() == [[0]]
    for name, value in vars(rollouts).items():
        if isinstance(value, torch.Tensor) and name != "step_lengths":
            assert vars(one)[name].dtype == value.dtype and vars(one)[name].dim() == value.dim(), name
    assert not any(vars(one)[name].any() for name in ("advantages", "token_weights", "completion_mask", "truncated"))


def test_a_filler_can_be_made_from_an_empty_batch(rollouts):
    empty = with_every_field(rollouts)[:0]
    assert len(filler(empty)) == 1 and filler(empty).ref_logprobs.shape == (1, 1)


def test_a_filler_has_no_field_that_the_others_lack(rollouts):
    assert filler(rollouts).ref_logprobs is None and filler(rollouts).step_lengths is None
