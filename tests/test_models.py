"""Log-probs of completions: the one place they come from."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DogeConfig,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    GPT2Config,
    GptOssConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from common import logprobs as logprobs_module
from common.config import RLConfig
from common.embedded import check_model
from common.evaluation.command import _load_merged
from common.logprobs import token_logprobs
from common.merge import Source
from common.models.attention import attention_for, check_attention
from common.models.configs import describe_multimodal, read_config
from common.models.loading import end_token_ids, load_policy, load_reference, turn_end_token
from common.models.saving import save_model
from common.rollouts import Completion, PromptBatch, Rollouts, filler
from common.sequences import Sequences
from common.update.batches import forward_context
from tests.architectures import make

T = 0.7


def rows(prompts: list[list[int]], completions: list[list[int]]) -> Rollouts:
    """One row per pair; sampling log-probs are not needed here."""
    batch = PromptBatch(
        step=1, rows=list(range(len(prompts))), prompt_ids=prompts, prompts=[""] * len(prompts), columns={}
    )
    sampled = [Completion(ids, [0.0] * len(ids), False) for ids in completions]
    return Rollouts.from_completions(batch, sampled, [""] * len(prompts), num_generations=1)


def one_by_one(model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """The definition: the token's log-softmax given everything before it, each prefix in a pass of its own."""
    found = []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1].double()
        found.append(float(F.log_softmax(logits / temperature, dim=-1)[token]))
    return torch.tensor(found)


@pytest.fixture
def policy(tiny_folder):
    return load_policy(str(tiny_folder), RLConfig(temperature=T), dtype=torch.float32)


@torch.no_grad()
def test_each_token_is_scored_by_what_precedes_it(policy):
    prompts, completions = [[5, 9], [7, 3, 8, 2, 6]], [[4, 11, 30, 1], [12]]
    logprobs, entropy = token_logprobs(policy, rows(prompts, completions), T)
    for row in range(2):
        expected = one_by_one(policy, prompts[row], completions[row], T)
        torch.testing.assert_close(logprobs[row, : len(expected)], expected, atol=1e-5, rtol=0)
    assert logprobs[1, 1:].eq(0).all() and entropy[1, 1:].eq(0).all()


@torch.no_grad()
def test_temperature_is_applied_once(policy):
    batch = rows([[5, 9]], [[4]])
    cold, _ = token_logprobs(policy, batch, T)
    logits = policy(torch.tensor([[5, 9]])).logits[0, -1]
    expected = F.log_softmax(logits / T, dim=-1)[4]
    torch.testing.assert_close(cold[0, 0], expected, atol=1e-5, rtol=0)
    warm, _ = token_logprobs(policy, batch, 1.0)
    assert abs(cold - warm).max() > 1e-3


@torch.no_grad()
def test_a_row_has_the_same_logprobs_in_any_company(policy, rollouts):
    together, _ = token_logprobs(policy, rollouts, T)
    for row in range(len(rollouts)):
        alone, _ = token_logprobs(policy, rollouts[row : row + 1].trimmed(), T)
        length = int(rollouts.lengths[row])
        torch.testing.assert_close(alone[0, :length], together[row, :length], atol=2e-6, rtol=0)


@torch.no_grad()
def test_the_pad_and_end_token_may_appear_in_a_text(policy):
    end = policy.config.eos_token_id
    completion = [4, 0, end, 7, 0]
    logprobs, _ = token_logprobs(policy, rows([[end, 0, 5]], [completion]), T)
    torch.testing.assert_close(logprobs[0], one_by_one(policy, [end, 0, 5], completion, T), atol=1e-5, rtol=0)


def save_tiny(config, folder, **weights):
    """An untrained causal language model in a folder, and itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, **weights)
    return model


SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_LIKE = {**SMALL, "hidden_size": 32, "intermediate_size": 32, "num_key_value_heads": 1}
EXPERTS = {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}
# Each with what is random in it in train mode.
RANDOM = {
    "attention dropout": Qwen2Config(**LLAMA_LIKE, attention_dropout=0.5),
    "other names of dropout": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5
    ),
    "read at each call": FalconConfig(
        **SMALL, hidden_size=32, hidden_dropout=0.5, attention_dropout=0.5, parallel_attn=False
    ),
    "skipped layers": OPTConfig(
        **SMALL, hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, dropout=0.5, layerdrop=0.5
    ),
    "jitter of routers": MixtralConfig(**EXPERTS, router_jitter_noise=0.3),
    "drawn experts": PhimoeConfig(**EXPERTS, router_jitter_noise=0.01, input_jitter_noise=0.3),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RANDOM)
def test_nothing_is_random_in_training(tmp_path, tokenizer, name, checkpointing):
    plain = save_tiny(RANDOM[name], tmp_path)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert not torch.equal(plain.train()(ids).logits, plain(ids).logits)  # as transformers would train it
        expected = plain.eval()(ids).logits
    policy = load_policy(str(tmp_path), RLConfig(gradient_checkpointing=checkpointing), dtype=torch.float32)
    logits = [policy(ids, use_cache=False).logits for _ in range(2)]
    assert torch.equal(*logits)
    torch.testing.assert_close(logits[0].detach(), expected, atol=1e-5, rtol=0)
    logits[0].sum().backward()
    # What is switched off in memory is saved as it was.
    save_model(policy, tokenizer, tmp_path / "saved")
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "saved"))
    assert ours == theirs


def test_passes_with_and_without_gradient_agree_to_the_last_bit(policy, rollouts):
    with torch.no_grad():
        without, _ = token_logprobs(policy, rollouts, T)
    assert torch.equal(token_logprobs(policy, rollouts, T)[0], without)


@torch.no_grad()
def test_entropy_is_that_of_the_distribution(policy):
    _, entropy = token_logprobs(policy, rows([[5, 9]], [[4]]), T)
    p = torch.softmax(policy(torch.tensor([[5, 9]])).logits[0, -1].double() / T, dim=-1)
    assert float(entropy[0, 0]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)


@torch.no_grad()
def test_tokens_that_the_model_rules_out_add_nothing_to_the_entropy():
    logits = torch.tensor([[1.0, -torch.inf, 0.5], [2.0, -torch.inf, -torch.inf]])
    _, entropy = logprobs_module._in_chunks(torch.nn.Identity(), logits, torch.tensor([0, 0]), T, vocabulary=3)
    p = torch.softmax(logits[0, [0, 2]].double() / T, dim=-1)
    assert entropy.tolist() == pytest.approx([float(-(p * p.log()).sum()), 0.0], abs=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
def test_chunking_the_head_changes_neither_values_nor_gradients(policy, rollouts, monkeypatch, chunk_tokens):
    def result():
        policy.zero_grad()
        logprobs, _ = token_logprobs(policy, rollouts, T)
        (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
        return logprobs.detach(), [p.grad.clone() for p in policy.parameters()]

    whole = result()
    monkeypatch.setattr(logprobs_module, "MAX_CHUNK_LOGITS", chunk_tokens * policy.config.vocab_size)
    chunked = result()
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_the_fused_head_agrees_with_the_plain_one_in_values_and_gradients(policy, rollouts):
    results = []
    for head in (logprobs_module._plain, logprobs_module._fused):
        policy.zero_grad()
        logprobs, entropy = head(policy, Sequences.of(rollouts), T, True)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), [p.grad.clone() for p in policy.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_with_capped_logits_is_scored_with_the_cap(tmp_path):
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), RLConfig(attn_implementation="eager"), dtype=torch.float32)
    logprobs, _ = token_logprobs(policy, rows([[5, 9]], [[4, 11, 30]]), 1.0)
    expected = one_by_one(policy, [5, 9], [4, 11, 30], 1.0)
    torch.testing.assert_close(logprobs[0], expected, atol=1e-5, rtol=0)


def test_reference_is_frozen_and_equal_to_the_policy_at_first(tiny_folder, rollouts):
    config = RLConfig(kl_coef=0.1)
    policy = load_policy(str(tiny_folder), config, dtype=torch.float32)
    reference = load_reference(str(tiny_folder), config)
    scored, _ = token_logprobs(reference, rollouts, 1.0)
    assert not scored.requires_grad
    ours, _ = token_logprobs(policy, rollouts, 1.0)
    assert ours.requires_grad and torch.equal(ours.detach(), scored)


def test_lora_reference_is_the_policy_with_its_adapter_off(tiny_folder, rollouts):
    config = RLConfig(use_lora=True, lora_r=4, lora_alpha=8)
    base = load_policy(str(tiny_folder), RLConfig(), dtype=torch.float32)
    expected = token_logprobs(base, rollouts, 1.0)[0].detach()
    policy = load_policy(str(tiny_folder), config, dtype=torch.float32)
    assert isinstance(policy, PeftModel)
    assert torch.equal(token_logprobs(policy, rollouts, 1.0)[0].detach(), expected)  # a new adapter adds nothing
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    moved = token_logprobs(policy, rollouts, 1.0)[0].detach()
    assert abs(moved - expected).max() > 1e-3
    with pytest.raises(RuntimeError, match="in the pass"), policy.disable_adapter():
        torch.testing.assert_close(token_logprobs(policy, rollouts, 1.0)[0].detach(), expected, atol=1e-6, rtol=0)
        raise RuntimeError("in the pass")
    assert torch.equal(token_logprobs(policy, rollouts, 1.0)[0].detach(), moved)  # on again after an error


def test_lora_starts_the_same_for_the_same_seed_and_leaves_the_global_generator_alone(tiny_folder):
    config = RLConfig(use_lora=True, lora_r=4, lora_alpha=8, seed=3)
    before = torch.get_rng_state()
    first, second = (load_policy(str(tiny_folder), config, dtype=torch.float32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    elsewhere = load_policy(str(tiny_folder), replace(config, seed=4), dtype=torch.float32)
    drawn = {name: weight for name, weight in elsewhere.named_parameters() if "lora_A" in name}
    assert drawn and not any(torch.equal(weight, first.get_parameter(name)) for name, weight in drawn.items())


def test_gradient_checkpointing_changes_no_gradient(tiny_folder, rollouts):
    gradients = []
    for checkpointing in (False, True):
        config = RLConfig(gradient_checkpointing=checkpointing)
        policy = load_policy(str(tiny_folder), config, dtype=torch.float32)
        assert policy.is_gradient_checkpointing is checkpointing
        token_logprobs(policy, rollouts, 1.0)[0].sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_bfloat16_trains_float32_weights(tiny_folder, rollouts):
    policy = load_policy(str(tiny_folder), RLConfig(), dtype=torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    exact, _ = token_logprobs(policy, rollouts, 1.0)
    with forward_context(torch.device("cpu"), torch.bfloat16):
        rounded, _ = token_logprobs(policy, rollouts, 1.0)
    assert rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact).max() < 0.05
    # A LoRA base only serves forward passes, so it is held in their precision.
    lora = load_policy(str(tiny_folder), RLConfig(use_lora=True), dtype=torch.bfloat16)
    assert {(p.requires_grad, p.dtype) for p in lora.parameters()} == {(False, torch.bfloat16), (True, torch.float32)}


def test_end_tokens_are_those_of_generation_config_and_tokenizer(policy, tokenizer):
    policy.generation_config.eos_token_id = [7, 5]
    assert end_token_ids(policy, tokenizer) == tuple(sorted({7, 5, tokenizer.eos_token_id}))
    policy.generation_config.eos_token_id = None
    policy.config.eos_token_id = 9  # only where the generation configuration names none
    assert end_token_ids(policy, tokenizer) == tuple(sorted({9, tokenizer.eos_token_id}))
    policy.config.eos_token_id = None
    nameless = copy.deepcopy(tokenizer)
    nameless.eos_token = None
    with pytest.raises(ValueError, match="name no end token: completions could never end"):
        end_token_ids(policy, nameless)


def test_an_end_token_beyond_the_embedding_can_never_end_a_completion(policy, tokenizer):
    size = policy.get_input_embeddings().num_embeddings
    added = copy.deepcopy(tokenizer)
    added.add_special_tokens({"eos_token": "<end>"})
    policy.generation_config.eos_token_id = [size + 7, 5]
    assert added.eos_token_id >= size and end_token_ids(policy, added) == (5,)
    policy.generation_config.eos_token_id = [-1]
    with pytest.raises(
        ValueError, match=rf"\[-1, {added.eos_token_id}\] as end tokens, and the model has {size} tokens"
    ):
        end_token_ids(policy, added)


def test_what_the_chat_template_ends_a_turn_with_is_an_end_token_too(policy, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.add_tokens(["<|im_end|>"], special_tokens=True)
    policy.resize_token_embeddings(len(chat))
    alone = end_token_ids(policy, chat)
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    assert turn_end_token(chat) == "<|im_end|>"
    assert set(end_token_ids(policy, chat)) == {*alone, chat.convert_tokens_to_ids("<|im_end|>")}
    chat.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    assert turn_end_token(chat) is None and end_token_ids(policy, chat) == alone


def test_a_model_that_is_not_there_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model='no/such-model'.*--model"):
        check_model("no/such-model")
    with pytest.raises(ValueError, match=r"config\.json"):
        check_model(str(tmp_path))


@pytest.mark.parametrize("use_lora", [False, True])
@torch.no_grad()
def test_a_saved_policy_loads_in_plain_transformers(tiny_folder, tmp_path, tokenizer, rollouts, use_lora):
    policy = load_policy(str(tiny_folder), RLConfig(use_lora=use_lora, lora_r=4), dtype=torch.float32)
    policy.generation_config.eos_token_id = [7, 9]
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(0.01)
    save_model(policy, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.generation_config.eos_token_id == [7, 9]
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight  # still tied
    ids = torch.tensor([[5, 9, 4, 11]])
    torch.testing.assert_close(plain(ids).logits, policy.eval()(ids).logits, atol=1e-5, rtol=0)
    assert (tmp_path / "tokenizer_config.json").exists()
    assert (tmp_path / "adapter").exists() is use_lora


SHIPPED = {
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
    "one beam": {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True},
    "a negative pad token": {"pad_token_id": -1},
}


@pytest.mark.parametrize("use_lora", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_a_generation_config_is_saved_as_it_was(tiny_folder, tmp_path, tokenizer, name, use_lora):
    shutil.copytree(tiny_folder, tmp_path / "model")
    values = {"eos_token_id": [1, 7], **SHIPPED[name]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(values))
    check_model(str(tmp_path / "model"))
    policy = load_policy(str(tmp_path / "model"), RLConfig(use_lora=use_lora, lora_r=4), dtype=torch.float32)
    save_model(policy, tokenizer, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    del saved["transformers_version"]
    assert saved == values


# Outputs

OUTPUTS = {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "output_router_logits": True}


@pytest.mark.parametrize("use_lora", [False, True])
def test_settings_of_outputs_change_nothing_in_training_and_are_saved_as_they_were(
    tmp_path, tokenizer, rollouts, use_lora
):
    plain, folder, saved = (tmp_path / name for name in ("plain", "model", "saved"))
    save_tiny(MixtralConfig(**EXPERTS | {"vocab_size": 459}), plain)
    shutil.copytree(plain, folder)
    values = json.loads((folder / "config.json").read_text()) | OUTPUTS
    (folder / "config.json").write_text(json.dumps(values))
    check_model(str(folder))
    config = RLConfig(use_lora=use_lora, lora_r=4)
    policies = [load_policy(str(each), config, dtype=torch.float32) for each in (plain, folder)]
    expected, found = (token_logprobs(policy, rollouts, 1.0)[0] for policy in policies)
    assert torch.equal(expected, found)
    reference = load_reference(str(folder), RLConfig())
    assert torch.equal(token_logprobs(reference, rollouts, 1.0)[0], expected)
    save_model(policies[1], tokenizer, saved)
    assert json.loads((saved / "config.json").read_text()).items() >= OUTPUTS.items()
    again = load_policy(str(saved), RLConfig(), dtype=torch.float32)
    torch.testing.assert_close(token_logprobs(again, rollouts, 1.0)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_logits_is_no_rounding_in_any_precision(tmp_path, dtype):
    model = save_tiny(CohereConfig(**LLAMA_LIKE, logit_scale=1.04), tmp_path).to(dtype).eval()
    assert logprobs_module._cheapest_head(model, model.device, 1.0) is not logprobs_module._plain
    plain = save_tiny(CohereConfig(**LLAMA_LIKE, logit_scale=1.0), tmp_path).to(dtype).eval()
    head = plain.get_output_embeddings()
    assert logprobs_module._cheapest_head(plain, plain.device, 1.0) is logprobs_module._plain
    assert plain.get_output_embeddings() is head


def test_a_row_that_only_keeps_processes_in_step_decides_nothing(tmp_path, rollouts):
    """Its one token is padding, whose embedding is 0."""
    model = save_tiny(CohereConfig(**LLAMA_LIKE, logit_scale=1.0), tmp_path).eval().requires_grad_(False)
    model.get_input_embeddings().weight[0] = 0
    logprobs, entropy = token_logprobs(model, filler(rollouts), 1.0)
    assert not logprobs.any() and not entropy.any()
    assert logprobs_module._heads[model] is logprobs_module._plain
    found = logprobs_module._own(model, Sequences.of(filler(rollouts)), 1.0, True)
    assert [each.shape for each in found] == [(0,), (0,)]


def test_in_16_bits_a_token_that_changes_its_expert_is_no_look_ahead(tmp_path):
    """Which expert it goes to can depend on the rounding of a product, and that on the other tokens of the batch."""

    def flip(_model, _args, options, output):
        output.logits[:, 3] += (options["input_ids"][:, -1:] > 15) * 10

    ids = torch.arange(5, 21)[None]
    model = save_tiny(Qwen2Config(**LLAMA_LIKE), tmp_path).eval()
    model.register_forward_hook(flip, with_kwargs=True)
    with pytest.raises(ValueError, match="is not causal"), torch.no_grad():
        logprobs_module._check_causal(model, ids)
    with torch.no_grad():
        logprobs_module._check_causal(model.to(torch.bfloat16), ids)


# Attention


def test_flash_attention_is_refused_in_float32():
    with pytest.raises(ValueError, match=r"flash_attention_2: it takes numbers of 16 bits.*--dtype bfloat16"):
        check_attention(Qwen2Config(**LLAMA_LIKE), "flash_attention_2", dtype=torch.float32)


def test_attention_that_adds_biases_twice_is_refused(tmp_path):
    """Until transformers' Falcon adds ALiBi once in eager attention; then why_not has nothing to refuse."""
    sizes = {"vocab_size": 459, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FalconConfig(**sizes, alibi=True, initializer_range=0.3)
    save_tiny(config, tmp_path)
    ids = torch.arange(5, 25)[None]
    by_name = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(ids).logits
        for name in ("sdpa", "eager")
    }
    assert (by_name["sdpa"] - by_name["eager"]).abs().max() > 0.01
    with pytest.raises(ValueError, match="=eager: falcon with alibi adds its biases right in sdpa only"):
        check_model(str(tmp_path), attention="eager")
    check_model(str(tmp_path))


def test_attention_that_makes_no_causal_mask_is_replaced(tmp_path, rollouts):
    """Until transformers' Doge is causal in sdpa; then why_not has nothing to refuse."""
    save_tiny(DogeConfig(**LLAMA_LIKE | {"vocab_size": 459}), tmp_path)
    assert attention_for(read_config(tmp_path), "auto", torch.device("cpu"))[0] == "eager"
    token_logprobs(load_policy(str(tmp_path), RLConfig(), dtype=torch.float32), rollouts, 1.0)
    sdpa = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="is not causal"):
        token_logprobs(sdpa, rollouts, 1.0)
    with pytest.raises(ValueError, match="doge makes no causal mask for sdpa"):
        check_model(str(tmp_path), attention="sdpa")


def test_a_model_that_does_not_run_at_all_is_refused(tmp_path):
    save_tiny(DogeConfig(**LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2}, is_moe=True), tmp_path)
    with pytest.raises(ValueError, match="doge: its layers of experts do not run in this version of transformers"):
        check_model(str(tmp_path))


CAPPED = Gemma2Config(**LLAMA_LIKE, head_dim=16, attn_logit_softcapping=0.5, query_pre_attn_scalar=1)


@torch.no_grad()
def test_a_cap_on_attention_logits_is_not_left_out(tmp_path):
    save_tiny(CAPPED, tmp_path)
    ids = torch.arange(5, 25)[None]
    by_name = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(ids).logits
        for name in ("eager", "sdpa")
    }
    assert abs(by_name["eager"] - by_name["sdpa"]).max() > 1e-4  # sdpa leaves it out
    policy = load_policy(str(tmp_path), RLConfig(), dtype=torch.float32)
    torch.testing.assert_close(policy(ids).logits, by_name["eager"], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"attn_implementation=sdpa: it leaves out attn_logit_softcapping=0.5"):
        check_model(str(tmp_path), attention="sdpa")


@pytest.mark.parametrize(
    ("config", "device", "dtype", "expected"),
    [
        (Qwen2Config(**LLAMA_LIKE), "cuda", torch.bfloat16, "sdpa"),
        (CAPPED, "cpu", torch.float32, "eager"),
        (CAPPED, "cuda", torch.float32, "flex_attention"),  # flash attention has no float32
        (Gemma2Config(**LLAMA_LIKE, attn_logit_softcapping=None), "cpu", torch.float32, "sdpa"),
        (GptOssConfig(), "cpu", torch.float32, "eager"),  # sinks
        (GptOssConfig(), "cuda", torch.bfloat16, "flex_attention"),
        (BloomConfig(), "cuda", torch.bfloat16, "eager"),  # a bias
        (MambaConfig(), "cuda", torch.bfloat16, "eager"),  # no attention at all
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PreTrainedConfig) else str(value),
)
def test_attention_is_what_the_model_can_do_rightly(config, device, dtype, expected):
    chosen, reason = attention_for(config, "auto", torch.device(device), dtype=dtype)
    assert chosen == expected and (reason is None) is (expected == "sdpa")


def test_an_evaluation_computes_attention_as_training_does(tmp_path):
    Gemma2ForCausalLM(CAPPED).save_pretrained(tmp_path)
    model = _load_merged(Source(base=str(tmp_path), what="it"), torch.device("cpu"), torch.float32)
    ids = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    trained = load_policy(str(tmp_path), RLConfig(), dtype=torch.float32)
    torch.testing.assert_close(model.eval()(ids).logits, trained(ids).logits, atol=1e-6, rtol=0)


def test_attention_that_the_model_refuses_is_a_message():
    for asked, message in {
        "sdpa": "transformers has no sdpa for BloomForCausalLM",
        "flex_attention": "transformers has no flex_attention for BloomForCausalLM",
        "spda": "need one of auto, sdpa, eager",
    }.items():
        with pytest.raises(ValueError, match=rf"attn_implementation={asked}: {message}.*--attn_implementation auto"):
            attention_for(BloomConfig(), asked, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("flash_attention_2", "the package flash-attn is not installed"),
        ("flash_attention_3", "the package flash-attn-3 is not installed"),
        ("flex_attention", "its gradients are computed on a GPU only"),
        ("kernels-community/flash-attn3", "the package kernels, which loads it, is not installed"),
    ],
)
def test_attention_that_this_machine_cannot_run_is_refused_before_anything_is_loaded(tiny_folder, asked, message):
    with pytest.raises(ValueError, match=rf"attn_implementation={asked}: .*{message}.*--attn_implementation auto"):
        check_model(str(tiny_folder), attention=asked)


# Models for images and text


@pytest.mark.parametrize("use_lora", [False, True])
def test_of_a_model_for_images_the_language_model_is_trained(tmp_path, use_lora):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LLAMA_LIKE | {"head_dim": 16, "layer_types": ["full_attention"] * 2, "pad_token_id": 0}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_id=60, boi_token_id=61, eoi_token_id=62)
    save_tiny(config, tmp_path)
    check_model(str(tmp_path))
    assert "language model is trained, and the rest stays as it is" in describe_multimodal(config)
    settings = RLConfig(use_lora=use_lora, lora_r=4, lora_target_modules="self_attn.o_proj")
    policy = load_policy(str(tmp_path), settings, dtype=torch.float32)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert trained and all("language_model" in name or "lm_head" in name for name in trained)


def test_a_model_that_feeds_its_head_without_its_backbone_can_have_weights_in_bfloat16(rollouts, tmp_path):
    make("opt", tmp_path)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(token_logprobs(model, rollouts, 1.0)[0])
    assert (found[0] - found[1]).abs().mean() < 0.2
