"""Where vLLM differs from transformers, and what makes it agree: its settings, its kernels, and corrected classes.

Each correction names its cause, and the version of vLLM that has it. What nothing here makes right, vllm_support.py or
vllm_trial.py refuses.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def model_arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of vLLM's LLM with which it computes what transformers computes for a configuration."""
    arguments = {"hf_overrides": _as_transformers_reads(config)}
    values = config.to_dict()
    assumed = _ASSUMED.get(config.model_type, {})
    has_nan = config.model_type == "gemma3n_text" and not torch.cuda.is_available()  # on the CPU (0.31)
    if has_nan or any(values[name] != value for name, value in assumed.items()):
        arguments["model_impl"] = "transformers"
    if "attn_temperature_tuning" in values:
        # Llama 4's class takes it from the generation settings, and puts off there what the configuration says.
        tuning = {"attn_temperature_tuning": values["attn_temperature_tuning"]}
        arguments["override_generation_config"] = tuning
    return arguments


# By model_type: values of a configuration that vLLM's own class takes for granted (0.31). With others, vLLM runs
# transformers' class.
_ASSUMED: dict[str, dict[str, Any]] = {
    "gpt2": {"scale_attn_weights": True},
    "gpt_bigcode": {"scale_attn_weights": True},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
}


def _as_transformers_reads(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], PreTrainedConfig]:
    """The function that changes a configuration, which vLLM has read itself, into what transformers' model computes.

    vLLM asks every configuration for windows, soft caps and the like. Where the class does not declare such a key,
    transformers' model does without it, so vLLM must not see it.
    """
    texts = {_class_name(each): undeclared(each) for each in (config, config.get_text_config())}
    return partial(_changed, values=_overrides(config), texts=texts, whole_heads=_rotates_whole_heads(config))


def _changed(
    theirs: PreTrainedConfig, *, values: dict[str, Any], texts: dict[str, set[str]], whole_heads: bool
) -> PreTrainedConfig:
    """A configuration of vLLM, changed in place; a function of the module, so that a server can pickle it."""
    for each in {id(each): each for each in (theirs, theirs.get_text_config())}.values():
        for name in texts.get(_class_name(each), set()) & vars(each).keys():
            delattr(each, name)
        rope = vars(each).get("rope_parameters")
        if rope and _class_name(each) in texts:
            if whole_heads:
                rope.pop("partial_rotary_factor", None)
            rope |= _scale_of_longrope(each)
    theirs.update(values)
    return theirs


def _class_name(config: PreTrainedConfig) -> str:
    return f"{type(config).__module__}.{type(config).__qualname__}"


def undeclared(config: PreTrainedConfig) -> set[str]:
    """Names that vLLM reads and that come from config.json alone: the class has no such field and sets none itself.

    Args:
        config: of a class of transformers; for another, which may take any names, the result is empty.
    """
    if not type(config).__module__.startswith("transformers."):
        return set()
    try:
        without_file = type(config)()
    except Exception:  # its defaults do not fit together
        return set()
    return (vars(config).keys() & _ASKED_OF_ALL) - vars(without_file).keys() - config.attribute_map.keys()


# What vLLM reads in any configuration. Other keys that a class does not declare may count all the same: models of
# transformers ask for some with a default, such as GLM-4 MoE for head_dim.
_ASKED_OF_ALL = frozenset(
    (
        *("sliding_window", "use_sliding_window", "max_window_layers", "interleaved_sliding_window"),
        *("sliding_window_pattern", "layer_types", "attention_chunk_size", "is_causal", "use_bidirectional_attention"),
        *("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling"),
        *("partial_rotary_factor", "rotary_pct"),
    )
)


def _rotates_whole_heads(config: PreTrainedConfig) -> bool:
    """Whether transformers' model rotates all of each head although rope parameters name a part, as Llama's does."""
    text = config.get_text_config()
    rope = vars(text).get("rope_parameters") or {}
    if rope.get("partial_rotary_factor") in (None, 1) or not vars(text).get("head_dim"):
        return False
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    sizes = {2 * len(buffer) for name, buffer in skeleton.named_buffers() if name.endswith("inv_freq")}
    return sizes == {text.head_dim}


def _scale_of_longrope(config: PreTrainedConfig) -> dict[str, float]:
    """Names under which vLLM takes the scale that transformers gives rotary embeddings of type "longrope".

    vLLM computes it from other numbers, and lets short_mscale and long_mscale decide, which transformers ignores.
    """
    if config.rope_parameters.get("rope_type") != "longrope":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, scale = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    return {"short_mscale": scale, "long_mscale": scale}


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
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put something else in the place of a module's or class's own attribute, inside.

    One that it lacks, as in another version of vLLM, it lacks again afterwards.
    """
    is_there, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_there:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def kernels_for(dtype: str) -> Iterator[None]:
    """Let vLLM on the CPU take kernels that exist for a dtype, while weights are prepared or the model runs.

    For convolutions of state-space models, it takes kernels of bfloat16 whenever the CPU has them, and fails for
    another dtype: "causal_conv1d_fwd_kernel_impl" not implemented for 'Float' (vLLM 0.31).
    """
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        if dtype != "bfloat16" and current_platform.is_cpu():
            stack.enter_context(replaced(torch.cpu, "_is_avx512_bf16_supported", lambda: False))
        yield


@contextmanager
def corrected_classes(config: PreTrainedConfig) -> Iterator[None]:
    """Correct classes of vLLM that differ from transformers', while an engine makes its objects of them."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
    from vllm.platforms import current_platform

    with ExitStack() as stack:
        if current_platform.is_cpu():
            from vllm.model_executor.layers.fused_moe.router import router_factory

            # Objects keep the method that they have when they are made.
            stack.enter_context(replaced(RotaryEmbedding, "forward_cpu", _rotate))
            stack.enter_context(replaced(router_factory, "CPURouter", _router))
        if config.model_type in _CORRECTIONS:
            module, name, value = _CORRECTIONS[config.model_type](config)
            stack.enter_context(replaced(module, name, value))
        yield


def _bloom(config: PreTrainedConfig) -> tuple[Any, str, Any]:
    from vllm.model_executor.layers.activation import get_act_fn
    from vllm.model_executor.models import bloom

    # Bloom was trained with the tanh approximation; vLLM has the exact function (0.31): 8e-4 in log-probs.
    return bloom, "get_act_fn", lambda name: get_act_fn("gelu_pytorch_tanh" if name == "gelu" else name)


def _hrm_text(config: PreTrainedConfig) -> tuple[Any, str, Any]:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models import hrm_text

    # A prompt's tokens see those after them, always; transformers has that for tokens marked as a prefix only, and
    # nothing marks any here.
    return hrm_text, "PrefillPrefixLMAttention", Attention


def _phimoe(config: PreTrainedConfig) -> tuple[Any, str, Any]:
    from vllm.model_executor.models import phimoe

    def route(hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        # Which experts are close enough to be chosen; vLLM always has 0.01 (0.31).
        return phimoe.sparsemixer(gating_output, jitter_eps=config.router_jitter_noise)

    return phimoe, "phimoe_routing_function", route


def _apertus(config: PreTrainedConfig) -> tuple[Any, str, Any]:
    from vllm.model_executor.layers.activation import XIELU
    from vllm.model_executor.models import apertus

    # Its parameters are in bfloat16 whatever the model's dtype (0.31): 4e-4 in log-probs.
    return apertus, "XIELU", lambda: XIELU(dtype=torch.get_default_dtype())


# By model_type: the module, the name in it, and what takes its place.
_CORRECTIONS = {"bloom": _bloom, "hrm_text": _hrm_text, "phimoe": _phimoe, "apertus": _apertus}


def use_bias_of_head(model: nn.Module) -> None:
    """Let a head's bias count in every model of vLLM; PhiMoE's is loaded and not used (0.31)."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    for module in model.modules():
        if isinstance(module, LogitsProcessor):
            module.register_forward_pre_hook(_with_bias, with_kwargs=True)


def _with_bias(processor: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Arguments of LogitsProcessor.forward(lm_head, hidden_states, embedding_bias)."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    head = args[0] if args else options["lm_head"]
    is_given = len(args) > 2 or options.get("embedding_bias") is not None
    if not is_given and isinstance(head, ParallelLMHead):  # not the embeddings of a tied model, which have none
        return args, options | {"embedding_bias": head.bias}
    return None


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
