"""Completions and log-probs of many architectures, against plain passes over whole sequences."""

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from common import logprobs
from common.logprobs import token_logprobs
from common.models.configs import why_not_causal
from common.models.decoding_support import decoding_of, why_not_decodable
from common.rollouts import PromptBatch, Rollouts
from common.sampling.protocol import SamplingSettings
from common.sampling.torch_sampler import decode

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
STATE = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
ALTERNATING = {"layer_types": ["linear_attention", "full_attention"]}

# Kind of model: settings beyond SIZES, and how it is decoded: padded, of one length together, or recomputed.
CASES = {
    "qwen2": ({}, "padded"),
    "mistral": ({"sliding_window": 8}, "padded"),
    "gemma2": ({"head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 8}, "padded"),
    "gemma3n_text": (
        {"head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96}
        | {
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": None,
            "sliding_window": 8,
        }
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        "padded",
    ),
    "minicpm3": ({"num_key_value_heads": 4, **LATENT}, "padded"),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 4.0}, "padded"),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 48, "do_layer_norm_before": False, "init_std": 0.2}, "padded"),
    "bloom": ({}, "one length"),
    "mpt": ({"d_model": 64, "n_heads": 4, "n_layers": 2}, "one length"),
    "mamba": ({"state_size": 8}, "one length"),
    "bamba": ({"attn_layer_indices": [1], **SSM}, "one length"),
    "falcon_h1": ({"mamba_d_ssm": 128, "lm_head_multiplier": 0.3, **SSM}, "one length"),
    "qwen3_next": (
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, **ALTERNATING, **STATE},
        "one length",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "one length"),
    "nemotron_h": (
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1}
        | {"ssm_state_size": 8, "head_dim": 16},
        "recomputed",
    ),
    "recurrent_gemma": ({"block_types": ["recurrent", "attention"], "lru_width": 64}, "recomputed"),
    "minimax": ({"head_dim": 16, "num_local_experts": 4, "block_size": 8, **ALTERNATING}, "recomputed"),
}


def tiny(kind: str) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are not at their neutral values."""
    own, _ = CASES[kind]
    known = dir(transformers.CONFIG_MAPPING[kind]())
    config = AutoConfig.for_model(kind, **({name: value for name, value in SIZES.items() if name in known} | own))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", CASES)
@torch.no_grad()
def test_completions_and_logprobs_are_those_of_plain_passes(kind):
    model = tiny(kind)
    how = decoding_of(model)
    name = "padded" if how.takes_padding else "one length" if how.cache_argument else "recomputed"
    assert name == CASES[kind][1]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 90, (length,), generator=generator).tolist() for length in (4, 13, 4, 7)]
    noise = torch.rand(8, 8, generator=generator, dtype=torch.float64)
    # Some completions end early, so that rows are left out.
    settings = SamplingSettings(temperature=0.7, max_tokens=8, stop_token_ids=tuple(range(5, 20)))
    completions = decode(model, prompts, settings, 2, noise)
    batch = PromptBatch(step=1, rows=[0, 1, 2, 3], prompt_ids=prompts, prompts=[""] * 4, columns={})
    rollouts = Rollouts.from_completions(batch, completions, [""] * 8, num_generations=2)
    found, _ = token_logprobs(model, rollouts, 0.7)
    for row, completion in enumerate(completions):
        prompt, tokens = prompts[row // 2], torch.tensor(completion.token_ids)
        logits = model(input_ids=torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=3e-5, rtol=0)
        torch.testing.assert_close(found[row, : len(tokens)], expected, atol=3e-5, rtol=0)


@torch.no_grad()
def test_a_soft_cap_that_does_not_show_yet_is_found(rollouts):
    model = tiny("gemma2")
    model.config.final_logit_softcapping = 50.0
    model.lm_head.weight.mul_(0.01)  # the cap changes such logits by less than float32 shows
    token_logprobs(model, rollouts, 1.0)
    assert logprobs._heads[model] is not logprobs._plain


def test_a_model_that_sees_later_tokens_is_refused(rollouts):
    torch.manual_seed(0)
    config = transformers.MegatronBertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        is_decoder=True,
    )
    assert "fills in masked tokens" in why_not_causal(config)
    with pytest.raises(ValueError, match="not causal"):
        token_logprobs(AutoModelForCausalLM.from_config(config).eval(), rollouts, 1.0)


@pytest.mark.parametrize("kind", ["xlnet", "cpmant", "moshi", "rwkv"])
def test_what_is_no_plain_decoder_is_refused_by_its_configuration(kind):
    assert kind in why_not_decodable(AutoConfig.for_model(kind))


@pytest.mark.parametrize("kind", ["roberta", "reformer"])
def test_what_fills_in_masked_tokens_is_refused_by_its_configuration(kind):
    assert kind in why_not_causal(AutoConfig.for_model(kind, is_decoder=True))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mamba", "gemma3", "deepseek_v3", "zamba2"])
def test_decoders_are_not_refused(kind):
    assert why_not_decodable(AutoConfig.for_model(kind)) is None
