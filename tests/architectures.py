"""Tiny random models of the architectures that vLLM and transformers share, made on the spot.

Two layers or as few as show every kind of layer, float32, one tokenizer for all. No weight is at a neutral value,
where leaving it out would not show: norms, biases, biases of routers and persistent buffers are moved, and soft caps,
windows, multipliers and kinds of rope are switched on. Each folder is as a real model ships: with a chat template,
several end tokens, and a generation_config.json whose sampling values training must not use.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>", "<stop1>", "<stop2>", "<image>", "<video>"]
# What a real folder says to generate(), and a run's sampler must not take from it.
GENERATION = {
    **{"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    **{"pad_token_id": 0, "suppress_tokens": [40, 41, 42], "eos_token_id": [1, 4, 5]},
}
# Moves a weight off its neutral value.
NOISE = 0.2
# Shorter than every prompt.
WINDOW = 24

# What every configuration gets of this, if its class has such a setting.
SMALL: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32},
    **{"num_key_value_heads": 1, "max_position_embeddings": 1024, "initializer_range": 0.15, "init_std": 0.15},
    **{"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False},
    # Must be off in training: it would make two passes differ.
    **{"attention_dropout": 0.1, "resid_pdrop": 0.1, "hidden_dropout": 0.1, "router_jitter_noise": 0.3},
    # Experts.
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32},
    **{"n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "num_dense_layers": 1, "routed_scaling_factor": 1.5, "route_scale": 1.5},
    # Latent attention.
    **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32},
    # State spaces and linear attention.
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"state_size": 16, "mamba_d_state": 16, "ssm_state_size": 16, "mamba_chunk_size": 16, "chunk_size": 16},
    **{"time_step_rank": 8, "mamba_dt_rank": 8, "n_groups": 1, "mamba_n_groups": 1},
    # Scalings that are 1 or off by default.
    **{"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 4.0},
    **{"logit_scale": 0.25, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    **{"query_pre_attn_scalar": 16, "sliding_window": WINDOW},
    **{"output_router_logits": False, "num_nextn_predict_layers": 0},
}
TIED = {"tie_word_embeddings": True}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 32, "rope_theta": 5e5},
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [3.0] * 16, "rope_theta": 1e4}
LATENT = {"num_key_value_heads": 2}  # as many as heads: keys come from the latent vector
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 1024}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
QWEN_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
QWEN_IMAGES = {"image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 2, "vision_end_token_id": 3}

# Architecture -> (model_type, settings beside the small ones). A setting "text_config" is a configuration of its own.
# Some settings are unknown to transformers: vLLM reads them, and the real folders have them.
# fmt: off
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # Dense models.
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", TIED),
    "qwen2_padded": ("qwen2", {"vocab_size": 464}),
    "qwen3": ("qwen3", TIED),
    "qwen3_yarn": ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 256}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "qwen3_bias": ("qwen3", {"attention_bias": True}),
    "llama_linear": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear",
        "factor": 4.0, "rope_theta": 10000.0}}),
    "llama_dynamic_long": ("llama", {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "dynamic",
        "factor": 4.0, "rope_theta": 10000.0}}),
    "llama_dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {}),
    "ministral3": ("ministral3", {"sliding_window": None}),
    "gemma": ("gemma", TIED),
    "gemma2": ("gemma2", TIED),
    "gemma3_text": ("gemma3_text", TIED | SLIDING),
    "gemma3n_text": ("gemma3n_text", TIED | {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16, "laurel_rank": 8, "layer_types": SLIDING["layer_types"] * 2,
        "vocab_size_per_layer_input": 264, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "intermediate_size":
        [96] * 4}),
    "gemma4_text": ("gemma4_text", TIED | SLIDING | {"hidden_size_per_layer_input": 16, "global_head_dim": 64,
        "vocab_size_per_layer_input": 264}),
    "vaultgemma": ("vaultgemma", TIED | SLIDING),
    "phi": ("phi", {"num_key_value_heads": 2}),
    "phi3": ("phi3", {}),
    # Sequences shorter than the original length, in an engine whose longest is not.
    "phi3_short": ("phi3", {"original_max_position_embeddings": 640, "rope_parameters": LONGROPE}),
    "phi3_long": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "olmo": ("olmo", {"clip_qkv": 1.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", SLIDING),
    "granite": ("granite", TIED),
    "granite_swa": ("granite_swa", TIED | SLIDING),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm_qk": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", GPT2 | TIED),
    "gpt2_scaled": ("gpt2", GPT2 | TIED | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt_bigcode": ("gpt_bigcode", GPT2 | TIED),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "cohere": ("cohere", TIED),
    "cohere_qk": ("cohere", TIED | {"use_qk_norm": True}),
    "cohere2": ("cohere2", TIED | SLIDING),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "falcon": ("falcon", TIED | {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 1, "alibi": False}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt_projected": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "bloom": ("bloom", TIED | {"n_layer": 2, "n_head": 2}),
    "starcoder2": ("starcoder2", {}),
    "exaone4": ("exaone4", SLIDING),
    "ernie4_5": ("ernie4_5", {}),
    "nanochat": ("nanochat", {}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.25}),
    "minicpm3": ("minicpm3", LATENT | {"scale_emb": 3, "dim_model_base": 32}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True}),
    "nemotron": ("nemotron", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "jais2": ("jais2", {"num_key_value_heads": 2}),
    "cwm": ("cwm", SLIDING | {"rope_parameters": LLAMA3, "bos_token_id": 2}),
    "hrm_text": ("hrm_text", {"num_layers_per_stack": 1, "num_hidden_layers": 4, "L_cycles": 1, "L_bp_cycles": [1],
        "prefix_lm": False}),
    # Experts.
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {"sliding_window": None, "num_hidden_layers": 2, "mlp_only_layers": [0]}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}),
    "olmoe": ("olmoe", {}),
    "flex_olmo": ("flex_olmo", {}),
    "phimoe": ("phimoe", {"attention_bias": True, "lm_head_bias": True, "sliding_window": None}),
    "granitemoe": ("granitemoe", {}),
    "granitemoeshared": ("granitemoeshared", {}),
    "granitemoe_swa": ("granitemoe_swa", SLIDING),
    "gpt_oss": ("gpt_oss", SLIDING),
    "deepseek_v2": ("deepseek_v2", LATENT | {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"n_routed_experts": 8, "n_group": 2}),
    "deepseek_v32": ("deepseek_v32", LATENT | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 16}),
    "glm4_moe": ("glm4_moe", {"n_routed_experts": 8, "use_qk_norm": True, "head_dim": 32}),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT | {"mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1}),
    "glm_moe_dsa": ("glm_moe_dsa", LATENT | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 16}),
    "dbrx": ("dbrx", {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 1024, "attn_config": {"kv_n_heads": 1,
        "clip_qkv": 1.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4,
        "moe_top_k": 2, "hidden_size": 64}}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 1}),
    "exaone_moe": ("exaone_moe", SLIDING | {"mlp_layer_types": ["dense", "sparse"], "sliding_windows": [WINDOW,
        None]}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}),
    "minimax_m2": ("minimax_m2", {"rotary_dim": 16}),
    "mimo_v2_flash": ("mimo_v2_flash", SLIDING | {"routed_scaling_factor": 1.0}),
    "mellum": ("mellum", SLIDING),
    "afmoe": ("afmoe", SLIDING | {"mup_enabled": True}),
    "axk1": ("axk1", LATENT),
    "cohere2_moe": ("cohere2_moe", TIED | SLIDING),
    "hy_v3": ("hy_v3", {}),
    "hy_v4": ("hy_v4", LATENT | {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 16}),
    "laguna": ("laguna", SLIDING),
    "llama4_text": ("llama4_text", {"intermediate_size_mlp": 96, "attention_chunk_size": 128, "num_experts_per_tok": 1,
        "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2}),
    "longcat_flash": ("longcat_flash", LATENT | {"num_layers": 1, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
        "zero_expert_num": 2, "zero_expert_type": "identity"}),
    "inkling_text": ("inkling_text", {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 32,
        "sliding_window_size": WINDOW, "d_rel": 8, "rel_extent": 64, "local_layer_ids": [0]}),
    "deepseek_v4": ("deepseek_v4", {"o_groups": 1, "o_lora_rank": 32, "index_n_heads": 2, "index_head_dim": 32,
        "index_topk": 16, "num_key_value_heads": 1, "hc_mult": 2}),
    # State spaces and linear attention.
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {"num_heads": 4, "head_dim": 32}),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_h1": ("falcon_h1", MAMBA2 | {"mamba_d_ssm": 128, "lm_head_multiplier": 0.3}),
    "bamba": ("bamba", MAMBA2 | {"attn_layer_indices": [1]}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "zamba2": ("zamba2", TIED | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"],
        "n_mamba_heads": 4, "hybrid_layer_ids": [2], "mamba_ngroups": 1, "adapter_rank": 8, "attention_hidden_size":
        128, "attention_head_dim": 64, "mamba_headdim": 32, "kv_channels": 32, "num_query_groups": 2,
        "num_key_value_heads": 2, "use_mamba_kernels": False}),
    "nemotron_h": ("nemotron_h", {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 4, "mamba_head_dim": 32, "moe_shared_expert_intermediate_size": 32, "use_mamba_kernels":
        False, "sliding_window": None}),
    "granitemoehybrid": ("granitemoehybrid", MAMBA2 | {"layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope"}),
    "lfm2": ("lfm2", TIED | {"layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("qwen3_next", LINEAR),
    "qwen3_5_text": ("qwen3_5_text", LINEAR),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", LINEAR),
    "olmo_hybrid": ("olmo_hybrid", LINEAR),
    "kimi_linear": ("kimi_linear", LATENT | LINEAR | {"linear_head_dim": 16, "linear_num_heads": 4, "q_lora_rank":
        None, "mlp_layer_types": ["dense", "sparse"]}),
    "qwen4_exp_text": ("qwen4_exp_text", LINEAR | {"hc_count": 2, "hc_lowrank": 16, "ple_embed_dim": 16,
        "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 32, "indexer_budget": 32, "indexer_compress_ratio": 8}),
    # Language models inside multimodal ones.
    "gemma3": ("gemma3", TIED | {"text_config": {"model_type": "gemma3_text", **SLIDING}, "vision_config": VISION |
        {"image_size": 28}, "mm_tokens_per_image": 4, "image_token_index": 6, "boi_token_index": 2, "eoi_token_index":
        3}),
    "qwen2_vl": ("qwen2_vl", {"text_config": {"model_type": "qwen2_vl_text", "rope_parameters": MROPE,
        "sliding_window": None}, "vision_config": QWEN_VISION, **QWEN_IMAGES}),
}
# fmt: on
# One of each kind, which `make test` trains: dense and tied, experts, a state space, renamed weights, a soft cap, and
# one that vLLM runs through transformers.
OF_EACH_KIND = ("qwen3", "qwen3_moe", "mamba", "gpt_neox", "gemma2", "smollm3")


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes and a few special tokens, with a chat template."""
    known = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(known)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def configuration(name: str) -> transformers.PreTrainedConfig:
    """The tiny configuration of an architecture."""
    model_type, settings = ARCHITECTURES[name]
    if "text_config" in settings:
        inner = settings["text_config"]
        settings = settings | {"text_config": _small(inner["model_type"], inner)}
    return transformers.AutoConfig.for_model(model_type, **_small(model_type, settings))


def _small(model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a configuration: the small ones that its class has, and its own."""
    default = transformers.AutoConfig.for_model(model_type)
    names = default.attribute_map  # n_embd and hidden_size may be one setting
    known, own = set(default.to_dict()) | set(names), {names.get(key, key) for key in settings}
    small = SMALL | {"vocab_size": len(tokenizer())}
    return {key: value for key, value in small.items() if key in known and names.get(key, key) not in own} | settings


def make(name: str, folder: Path) -> transformers.PreTrainedModel:
    """Write a tiny random model with its tokenizer.

    Args:
        name: key of ARCHITECTURES.
        folder: created.

    Returns:
        The model, float32, in eval mode.
    """
    torch.manual_seed(0)
    config = configuration(name)
    auto = transformers.AutoModelForCausalLM
    if config.model_type not in CAUSAL:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    move_off_neutral(model)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=1))
    return model


@torch.no_grad()
def move_off_neutral(model: torch.nn.Module) -> None:
    """Add noise to whatever is constant, a vector or a persistent buffer."""
    saved = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, tensor in (*model.named_parameters(), *buffers.items()):
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        if not tensor.isfinite().all() or tensor.abs().max() > 1e3:  # never initialised by its class
            tensor.copy_(0.15 * torch.randn_like(tensor))
        elif tensor.ndim == 1 or tensor.std() == 0 or name in buffers:
            tensor.add_(NOISE * torch.randn_like(tensor))
