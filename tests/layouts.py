"""Tiny random models whose weights in memory differ from those of their checkpoints, for tests of the layout."""

import copy
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

SIZES = {
    **{"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1},
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROUTED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GEMMA3 = {
    "text_config": SIZES | {"head_dim": 16, "model_type": "gemma3_text"},
    "vision_config": VISION | {"image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4,
}
CONFIGS = {
    "mixtral": SIZES | {"num_local_experts": 4},  # experts are fused
    "gpt_neox": SIZES,  # the head has another name
    "deepseek_v3": SIZES | LATENT | ROUTED,  # and a buffer of the router that is part of the model
    "glm4_moe": SIZES | ROUTED | {"head_dim": 16},
    "kimi_linear": SIZES | LATENT | ROUTED,  # three convolutions become one
    "olmo_hybrid": SIZES | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "hrm_text": SIZES | {"num_layers_per_stack": 1, "head_dim": 16},  # parts in memory are one in a checkpoint
    "gemma4_text": SIZES | {"head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 8},
    "gemma3": GEMMA3,  # the language model is inside another, and embeddings are tied
    "gpt2": {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},  # nothing to convert
}
BUFFERS = {
    "deepseek_v3": "e_score_correction_bias",
    "glm4_moe": "e_score_correction_bias",
    "gemma4_text": "layer_scalar",
}


def small_model(kind: str, **changes) -> transformers.PreTrainedModel:
    """A model with numbers of its own everywhere, in evaluation mode."""
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(CONFIGS[kind] | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias") or "norm" in name or "layer_scalar" in name:
                tensor += 0.1 * torch.randn(tensor.shape)
    return model


def with_lora(model: transformers.PreTrainedModel, targets: str | list[str] = "all-linear") -> PeftModel:
    """The model with an adapter that changes it; "all-linear" of peft includes fused experts."""
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    return adapted.eval()


def saved(model: transformers.PreTrainedModel, folder: Path, **options) -> dict[str, torch.Tensor]:
    """The tensors of the folder that transformers writes."""
    model.save_pretrained(folder, **options)
    return on_disk(folder)


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of one row of tokens."""
    return model(input_ids=torch.arange(5, 45)[None], use_cache=False).logits


def loaded(folder: Path) -> transformers.PreTrainedModel:
    """The model of a folder, which must have exactly the weights that the model has."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()
