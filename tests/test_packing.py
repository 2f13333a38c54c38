"""Packed rows and shared prompts: the same numbers as padded rows, for less work."""

import pytest
import torch
from accelerate import Accelerator

from common.config import RLConfig
from common.logprobs import token_logprobs
from common.models.loading import load_policy
from common.packing import ATTENTION, packing_of
from common.rollouts import Completion, PromptBatch, Rollouts
from common.sequences import Packing, Sequences, grouped_lengths, groups
from common.update.batches import Batches
from common.update.shared_prompts import pass_rows
from PPO.value_model import load_value_model, token_values
from tests.architectures import ARCHITECTURES
from tests.test_sequences import untrained

# Of tests/architectures.py: what keeps packed rows from being the same, beside attention without a place for them.
PADDED = {"mamba": "a state", "lfm2": "a convolution", "qwen3_next": "linear attention", "bloom": "no position ids"}


def batch(prompts: list[int], completions: list[list[int]], *, vocabulary: int = 90) -> Rollouts:
    """Rows with prompts and completions of these lengths, of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(length: int) -> list[int]:
        return torch.randint(5, vocabulary, (length,), generator=generator).tolist()

    parts = []
    for prompt, lengths in zip(prompts, completions, strict=True):
        ids = tokens(prompt)
        repeated = PromptBatch(
            step=1,
            rows=list(range(len(lengths))),
            prompt_ids=[ids] * len(lengths),
            prompts=[""] * len(lengths),
            columns={},
        )
        sampled = [Completion(tokens(length), [0.0] * length, truncated=False) for length in lengths]
        part = Rollouts.from_completions(repeated, sampled, [""] * len(lengths), num_generations=1)
        part.step_lengths = part.lengths
        parts.append(part)
    return Rollouts.joined(parts)


# Groups of several rows, of one, and a completion of one token.
SKEWED = ([20, 3, 31, 9], [[7, 1, 30, 2], [12], [5, 5], [40]])


def gradients(module: torch.nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    module.zero_grad(set_to_none=True)
    (outputs * torch.linspace(-1, 2, outputs.numel()).view_as(outputs)).sum().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def padded(function, *args):
    """What a function gives where no rows are packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packing, "pays", lambda self, rows: False)
        return function(*args)


@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_packed_rows_have_the_outputs_and_the_gradient_of_padded_ones(tiny_folder, kind, settings):
    config, rows = RLConfig(**{"gradient_checkpointing": False} | settings), batch(*SKEWED)
    if kind == "policy":
        model = load_policy(str(tiny_folder), config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)

        def outputs() -> torch.Tensor:
            return token_logprobs(model, rows, 1.0)[0]
    else:
        model = load_value_model(str(tiny_folder), config, dtype=torch.float32, zero_head=False)

        def outputs() -> torch.Tensor:
            return token_values(model, rows)

    assert Sequences.of(rows, packing_of(model)).packed_rows is not None
    found, expected = outputs(), padded(outputs)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    found, expected = gradients(model, found), gradients(model, expected)
    # Rounding in float32: an adapter that is not 0 enlarges it.
    tolerance = 3e-6 if "use_lora" in settings else 1e-6
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_pass_without_gradient_has_the_same_bits(tiny_folder):
    model, rows = load_policy(str(tiny_folder), RLConfig(), dtype=torch.float32), batch(*SKEWED)
    with torch.no_grad():
        looked, _ = token_logprobs(model, rows, 1.0, with_entropy=False)
    assert torch.equal(token_logprobs(model, rows, 1.0)[0], looked)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "granite", "qwen3_moe", "deepseek_v3", "mistral"])
@torch.no_grad()
def test_other_architectures_can_be_packed(name):
    model = untrained(name)
    if name == "mistral":  # its window is shorter than the rows of the comparison
        model.config.sliding_window = 4096
    rows = batch(*SKEWED)
    assert packing_of(model).max_tokens == (4095 if name == "mistral" else float("inf"))
    assert Sequences.of(rows, packing_of(model)).packed_rows is not None
    found, expected = token_logprobs(model, rows, 1.0)[0], padded(token_logprobs, model, rows, 1.0)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", [*PADDED, "mistral", "gemma2", "gpt_oss", "deepseek_v32", "llama_dynamic", "phi3_long"]
)
def test_what_carries_more_than_attention_from_token_to_token_gets_padded_rows(name):
    model = untrained(name)
    before = model.base_model.config._attn_implementation
    assert packing_of(model) is None
    assert {each.config._attn_implementation for each in model.modules() if hasattr(each, "config")} == {before}


@pytest.mark.parametrize("name", ["qwen2", "smollm3"])
def test_a_window_that_is_switched_off_is_none(name):
    """Qwen2.5 has max_window_layers, and others the length of a window that no layer has."""
    model = untrained(name)
    assert packing_of(model).max_tokens == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_same_as_with_padded_rows(name):
    """Log-probs and gradient, packed or not, whatever the model makes of position ids and masks."""
    model, rows = untrained(name), batch([12, 30, 9], [[5, 1, 16], [9, 4], [24]])
    with torch.no_grad():
        before = padded(token_logprobs, model, rows, 1.0)[0]
    packing = packing_of(model)
    found, expected = token_logprobs(model, rows, 1.0)[0], padded(token_logprobs, model, rows, 1.0)[0]
    assert torch.equal(before, expected)  # the attention of another name is the same for padded rows
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    if packing is not None:
        found, expected = gradients(model, found), gradients(model, expected)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_attention_of_other_models_stays_that_of_transformers(tiny_folder):
    """vLLM in the same process may run models through transformers too."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = load_policy(str(tiny_folder), RLConfig(), dtype=torch.float32)
    assert packing_of(model) is not None
    assert model.base_model.config._attn_implementation == ATTENTION
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    assert AutoModelForCausalLM.from_pretrained(tiny_folder).config._attn_implementation == "sdpa"


def test_a_saved_model_does_not_name_its_attention(tiny_folder, tmp_path):
    model = load_policy(str(tiny_folder), RLConfig(), dtype=torch.float32)
    assert packing_of(model) is not None
    model.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_a_model_with_such_attention_still_generates(tiny_folder):
    model = load_policy(str(tiny_folder), RLConfig(), dtype=torch.float32)
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padding on the left
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    before = model.generate(ids, **settings)
    assert packing_of(model) is not None
    assert torch.equal(model.generate(ids, **settings), before)


def test_attention_that_is_replaced_for_a_while_is_given_no_packed_rows(tiny_folder):
    model = load_policy(str(tiny_folder), RLConfig(), dtype=torch.float32)
    assert packing_of(model) is not None
    model.base_model.config._attn_implementation = "eager"
    assert packing_of(model) is None


def test_the_prompt_is_computed_once_and_the_last_token_of_a_completion_not_at_all():
    rows = batch([20, 3], [[7, 1, 30], [4]])
    packed = Sequences.packed(rows, torch.device("cpu"))
    assert packed.ids.shape == (1, 20 + 6 + 0 + 29 + 3 + 3)
    assert packed.position_ids[0].tolist() == [*range(26), *range(20, 49), *range(6)]
    assert packed.sources.tolist() == [*range(19, 26), 19, 19, *range(26, 55), *range(57, 61)]


def test_adjacent_rows_with_one_prompt_are_a_group_whatever_their_padding():
    rows = batch([4, 4, 2], [[1, 2], [3], [4, 5]])
    rows.prompt_ids[2] = rows.prompt_ids[0]
    rows.prompt_mask[2, 0] = False  # the same ids, the first of them padding
    assert groups(rows) == [[0, 1], [2], [3, 4]]
    assert grouped_lengths(rows) == [(4, [1, 2]), (3, [3]), (2, [4, 5])]
    assert groups(rows[:0]) == []


@pytest.mark.parametrize("budget", [1, 60, 250, 10_000])
def test_passes_stay_within_the_budget_and_have_each_row_once(budget):
    rows, packing = batch([50, 50, 7], [[3] * 4, [9, 2, 3], [40, 3, 20]]), Packing(float("inf"), 64)
    passes = pass_rows(rows, budget, packing)
    assert sorted(torch.cat(passes).tolist()) == list(range(10))
    for chosen in passes:
        # Keys of a prompt are there for each of its rows, so it counts as often.
        assert int(rows[chosen].total_lengths.sum()) <= budget or len(chosen) == 1
        assert Sequences.of(rows[chosen].trimmed(), packing).ids.numel() <= budget or len(chosen) == 1
    computed = sum(Sequences.of(rows[chosen].trimmed(), packing).ids.numel() for chosen in passes)
    if budget >= 250:
        assert computed < 0.5 * int(rows.total_lengths.sum())


def test_rows_without_a_common_prompt_are_together_as_before():
    rows, packing = batch([9, 8, 7, 30], [[12], [11], [10], [40]]), Packing(float("inf"), 64)
    assert [each.tolist() for each in pass_rows(rows, 100, packing)] == [
        each.tolist() for each in pass_rows(rows, 100, None)
    ]


def test_more_tokens_than_a_window_are_not_packed():
    rows = batch([50], [[3] * 4])
    assert Packing(60, 64).pays(rows) and not Packing(50, 64).pays(rows)
    for chosen in pass_rows(rows, 10_000, Packing(54, 64)):
        assert Sequences.of(rows[chosen].trimmed(), Packing(54, 64)).ids.shape[0] > 1


def test_a_model_is_scored_in_the_passes_it_is_trained_in(tiny_folder):
    """The first ratio is exactly 1."""
    config = RLConfig(prompts_per_step=2, num_generations=2, num_minibatches=1, max_tokens_per_microbatch=250)
    model, rows = load_policy(str(tiny_folder), config, dtype=torch.float32), batch([50, 50], [[3] * 4, [9, 2, 3]])
    batches = Batches(config, Accelerator(cpu=True), torch.float32)
    with batches.passes_of(model):
        old = batches.for_each_token(
            rows, lambda each: token_logprobs(model, each, 1.0, with_entropy=False)[0], step=1
        )
        rows.old_logprobs, packed = old, []
        for _, minibatch in batches.minibatches(rows, step=1, epoch=0):
            for _, microbatch in batches.microbatches(minibatch):
                packed.append(Sequences.of(microbatch, batches.packing).packed_rows is not None)
                new, _ = token_logprobs(model, microbatch, 1.0)
                assert torch.equal(new, microbatch.old_logprobs)
    assert packed == [True, True]
    torch.testing.assert_close(old, padded(token_logprobs, model, rows, 1.0)[0], atol=2e-6, rtol=1e-5)
