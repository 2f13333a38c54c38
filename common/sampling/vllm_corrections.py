"""Where vLLM differs from transformers, and what makes it agree: its settings, its kernels, and corrected classes.

Each correction names its cause, and the version of vLLM that has it. What nothing here makes right, vllm_support.py or
vllm_trial.py refuses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def model_arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of vLLM's LLM with which it computes what transformers computes for a configuration."""
    arguments = {"hf_overrides": _overrides(config)}
    if config.model_type == "gemma3n_text" and not torch.cuda.is_available():
        # vLLM's own class gives NaN on the CPU (0.31).
        arguments["model_impl"] = "transformers"
    return arguments


def _overrides(config: PreTrainedConfig) -> dict[str, Any]:
    """Values of the configuration for vLLM alone; most are names that vLLM reads and transformers does not write."""
    kind = config.model_type
    if kind in ("cohere2", "cohere2_moe") and config.sliding_window is not None:
        # Windows of Cohere 2 are one token wider in vLLM, which takes that for the convention of its training
        # (vllm/model_executor/models/commandr.py, cohere2_moe.py). `check_built_model` notices when that changes.
        return {"sliding_window": config.sliding_window - 1}
    if kind == "deepseek_v3":  # transformers has no other routing; without the names, vLLM has another
        return {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    if kind == "minimax_m2":
        rotated = config.rope_parameters.get("partial_rotary_factor", 1.0)
        routing = {"scoring_func": "sigmoid", "use_routing_bias": True}
        return routing | {"rotary_dim": int(config.head_dim * rotated)}
    if kind == "mimo_v2_flash":
        return _mimo(config)
    if kind == "hy_v3":
        num_dense = config.mlp_layer_types.count("dense")
        return {"expert_hidden_dim": config.moe_intermediate_size, "first_k_dense_replace": num_dense, "qk_norm": True}
    if kind == "phi":
        return {"n_inner": config.intermediate_size}
    if kind == "phimoe":  # Microsoft's name; under transformers' own, vLLM finds no class
        return {"architectures": ["PhiMoEForCausalLM"]}
    if kind == "lfm2":  # of Liquid AI's own first configuration
        return {"conv_dim": config.hidden_size, "block_dim": config.hidden_size}
    return {}


def _mimo(config: PreTrainedConfig) -> dict[str, Any]:
    """Names of Xiaomi's own configuration of MiMo-V2-Flash."""
    whole, windowed = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    return {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config.layer_types],
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "layernorm_epsilon": config.rms_norm_eps,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_num_key_value_heads": 2 * config.num_key_value_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "sliding_window_size": config.sliding_window,
        "add_swa_attention_sink_bias": True,
        "rope_theta": whole["rope_theta"],
        "swa_rope_theta": windowed["rope_theta"],
        "partial_rotary_factor": whole.get("partial_rotary_factor", 0.334),
    }


@contextmanager
def kernels_for(dtype: str) -> Iterator[None]:
    """Let vLLM on the CPU take kernels that exist for a dtype, while weights are prepared or the model runs.

    For convolutions of state-space models, it takes kernels of bfloat16 whenever the CPU has them, and fails for
    another dtype: "causal_conv1d_fwd_kernel_impl" not implemented for 'Float' (vLLM 0.31).
    """
    supported = torch.cpu._is_avx512_bf16_supported
    if dtype != "bfloat16":
        torch.cpu._is_avx512_bf16_supported = lambda: False
    try:
        yield
    finally:
        torch.cpu._is_avx512_bf16_supported = supported


def correct_classes(config: PreTrainedConfig) -> None:
    """Correct classes of vLLM that differ from transformers', before an engine makes their objects."""
    from vllm.model_executor.layers.fused_moe.router import router_factory
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        RotaryEmbedding.forward_cpu = _rotate
        router_factory.CPURouter = _router
    _use_bias_of_head()
    if config.model_type == "bloom":
        from vllm.model_executor.layers.activation import get_act_fn
        from vllm.model_executor.models import bloom

        # Bloom was trained with the tanh approximation; vLLM has the exact function (0.31): 8e-4 in log-probs.
        bloom.get_act_fn = lambda name: get_act_fn("gelu_pytorch_tanh" if name == "gelu" else name)
    if config.model_type == "hrm_text":
        from vllm.model_executor.layers.attention import Attention
        from vllm.model_executor.models import hrm_text

        # A prompt's tokens see those after them, always; transformers has that for tokens marked as a prefix only, and
        # nothing marks any here.
        hrm_text.PrefillPrefixLMAttention = Attention
    if config.model_type == "phimoe":
        from vllm.model_executor.models import phimoe

        # Which experts are close enough to be chosen; vLLM always has 0.01 (0.31).
        phimoe.sparsemixer.__defaults__ = (config.router_jitter_noise,)
    if config.model_type == "apertus":
        from vllm.model_executor.layers.activation import XIELU
        from vllm.model_executor.models import apertus

        # Its parameters are in bfloat16 whatever the model's dtype (0.31): 4e-4 in log-probs.
        apertus.XIELU = lambda: XIELU(dtype=torch.get_default_dtype())


def _use_bias_of_head() -> None:
    """Let a head's bias count in every model; PhiMoE's is loaded and not used (vLLM 0.31)."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    apply = LogitsProcessor._apply_head
    if apply.__module__ == __name__:  # for an earlier engine
        return

    def apply_with_bias(processor: Any, head: Any, hidden_states: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and isinstance(head, ParallelLMHead):  # not the embeddings of a tied model, which have none
            bias = head.bias
        return apply(processor, head, hidden_states, bias)

    LogitsProcessor._apply_head = apply_with_bias


def _rotate(rotary: Any, positions: Tensor, query: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """RotaryEmbedding.forward_cpu; its kernel rotates only the first head of (tokens, heads, size) (vLLM 0.31)."""
    if query.dim() == 3:
        return rotary.forward_native(positions, query, key)
    from vllm import _custom_ops

    cache = rotary._match_cos_sin_cache_dtype(query)
    _custom_ops.rotary_embedding(positions, query, key, rotary.head_size, cache, rotary.is_neox_style)
    return query, key


def _router(**options: Any) -> Any:
    """A CPURouter; without groups of experts, it would leave out their bias and know no sigmoid (vLLM 0.31)."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    scoring = options["scoring_func"]
    is_left_out = options["e_score_correction_bias"] is not None or scoring == "sigmoid"
    is_plain = scoring in ("softmax", "sigmoid") and options["custom_routing_function"] is None
    if is_left_out and is_plain and not options["use_grouped_topk"]:
        options |= {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
    return CPURouter(**options)
