"""What vLLM can sample rightly: found from a model's configuration, before weights are loaded and an engine starts.

vLLM differs from transformers in some models. Where its own settings make it agree, `model_arguments` passes them;
where nothing does, `check_engine` refuses the model. Whoever trusts neither can sample with transformers.
"""

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from common.environment import process_unchanged
from common.models.configs import read_config
from common.sampling.vllm_trial import WAY_OUT, Refused, refused


def check_engine(model: str, *, dtype: str, max_model_len: int, trust_remote_code: bool = False) -> None:
    """Raise an error if vLLM would not run the model, or not rightly. Reads configurations, no weights.

    Args:
        model: hub id or folder.
        dtype: "float32", "bfloat16" or "float16".
        max_model_len: tokens of the longest prompt and its completion.
        trust_remote_code: run Python files that come with the model.

    Raises:
        ValueError: with the reason, and what to do.
    """
    config = read_config(model, trust_remote_code=trust_remote_code)
    check_configuration(config, max_model_len)
    arguments = {"model": model, "dtype": dtype, "max_model_len": max_model_len}
    with imported():
        supported_config(arguments | {"trust_remote_code": trust_remote_code} | model_arguments(config))


@contextmanager
def imported() -> Iterator[None]:
    """Import vllm and use it, leaving this process and transformers as they were."""
    with process_unchanged(), _transformers_unchanged():
        # Engine and trainer in one process: weights are passed by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Import in a thread: a module of vLLM keeps an exception, and with it every frame on the stack at import. The
        # trainer's local variables would stay in memory.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(lambda: importlib.import_module("vllm").LLM).result()
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # The only kernel for latent attention on the CPU takes heads of 576, and blocks of 16. The other way to
            # compute the same is for all sizes.
            os.environ["VLLM_MLA_DISABLE"] = "1"
        yield


@contextmanager
def _transformers_unchanged() -> Iterator[None]:
    """Undo what vLLM does to classes that the trainer's model shares."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # vLLM puts its own configuration classes in place of transformers', for which AutoModel knows no model.
    classes = dict(CONFIG_MAPPING._extra_content)
    try:
        yield
    finally:
        CONFIG_MAPPING._extra_content = classes


# ------------------------------------------------------------------------------------------------- from configurations


def check_configuration(config: PreTrainedConfig, max_model_len: int) -> None:
    """Raise a ValueError if vLLM computes something else for a configuration, and no setting of its own changes that.

    Args:
        config: of the model.
        max_model_len: tokens of the longest prompt and its completion.
    """
    _check_rope(config.get_text_config(), max_model_len)
    if config.model_type == "hrm_text" and config.prefix_lm:
        raise Refused(
            "hrm_text with prefix_lm=true: in vLLM the tokens of a prompt see those after them, in training they do "
            "not, so its log-probs would not be the policy's."
        )
    if config.model_type == "mimo_v2_flash" and config.routed_scaling_factor != 1:
        # vllm/model_executor/models/mimo_v2.py does not read it, in 0.31.
        raise Refused(
            f"mimo_v2_flash with routed_scaling_factor={config.routed_scaling_factor}: vLLM does not scale the sum of "
            "the experts, so its log-probs would not be the policy's."
        )


def _check_rope(text: PreTrainedConfig, max_model_len: int) -> None:
    """Raise a ValueError if rotary embeddings depend on the length in a way that vLLM does not follow."""
    for kind, rope in _rope_parameters(text).items():
        if kind == "dynamic" and "alpha" not in rope:  # alpha, of Hunyuan, makes it independent of the length
            # vllm/model_executor/layers/rotary_embedding/dynamic_ntk_scaling_rope.py, in 0.31: log-probs are NaN.
            raise ValueError(
                f'{text.model_type} with rope_type "dynamic": the model scales by the length of each sequence, vLLM '
                f"by the longest that is possible, and its log-probs can be NaN. {WAY_OUT}."
            )
        original = rope.get("original_max_position_embeddings")
        if kind == "longrope" and original and max_model_len > original:
            raise ValueError(
                f'{text.model_type} with rope_type "longrope" for prompts and completions of {max_model_len} tokens: '
                f"vLLM takes the long factors for every sequence, because some could exceed {original} tokens "
                "(original_max_position_embeddings); the model takes them for those that do. "
                f"Lower max_prompt_length and max_completion_length to {original} tokens in total. {WAY_OUT} if you "
                "need more."
            )


def _rope_parameters(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The parameters of rotary embeddings by rope_type; models with kinds of layers have some for each kind."""
    rope = config.to_dict().get("rope_parameters") or {}
    by_kind = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {each["rope_type"]: each for each in by_kind if "rope_type" in each}


def supported_config(arguments: dict[str, Any]) -> Any:
    """VLLM's ModelConfig for an engine, within `imported`.

    Args:
        arguments: of vLLM's LLM.

    Raises:
        ValueError: if vLLM would not run the model.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    with refused(arguments["model"], "run"), _said_what_is_missing():
        config = EngineArgs(**arguments | {"skip_tokenizer_init": True}).create_model_config()
    if current_platform.is_cpu():
        _check_state(config)
        if not config.is_attention_free:
            _check_head_size(config)
    return config


@contextmanager
def _said_what_is_missing() -> Iterator[None]:
    """Say which package a class of vLLM needs; vLLM says only that it could not look at the class.

    Raises:
        ModuleNotFoundError: instead of vLLM's error, if a package is missing.
    """
    try:
        yield
    except ValueError as error:
        named = re.search(r"\['(\w+)'.*failed to be inspected", str(error))
        if named:
            from vllm import ModelRegistry

            ModelRegistry.models[named.group(1)].load_model_cls()
        raise


def _check_state(config: Any) -> None:
    """Refuse states for which vLLM has no kernel on the CPU (0.31)."""
    named = config.hf_text_config.to_dict()
    if has_state(config) and ("time_step_rank" in named or "mamba_dt_rank" in named):  # only Mamba 1 has a rank
        missing = "its kernels for the CPU have no selective scan of Mamba 1"
    elif has_state(config) and "linear_num_value_heads" in named and config.dtype != torch.bfloat16:
        missing = f"its gated delta rule for the CPU is in bfloat16 only, not in {str(config.dtype).split('.')[1]}"
    else:
        return
    raise ValueError(f"{named['model_type']}: vLLM does not run it here, {missing}. {WAY_OUT}, or sample on a GPU.")


def _check_head_size(config: Any) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, known = config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ValueError(
            f"{config.hf_text_config.model_type} with attention heads of {size}: vLLM's kernels for the CPU take "
            f"heads of {', '.join(map(str, known))}. {WAY_OUT}, or sample on a GPU."
        )


def has_state(config: Any) -> bool:
    """Whether layers of a vLLM ModelConfig carry a state from token to token, as in Mamba, instead of a cache."""
    return config.is_hybrid or config.is_attention_free


# -------------------------------------------------------------------------------- where vLLM differs from transformers


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


def has_routing_bias(names: Iterable[str]) -> bool:
    """Whether experts are chosen with a bias; vLLM leaves it out of transformers' own classes (0.31).

    Args:
        names: of a model's weights.
    """
    return any(name.endswith("e_score_correction_bias") for name in names)


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


def check_built_model(model: nn.Module, config: PreTrainedConfig, max_model_len: int) -> None:
    """Raise a ValueError if vLLM built another model than the configuration describes: other windows, another head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    text = config.get_text_config()
    _check_windows(model, text.to_dict(), max_model_len)
    tables = [each for each in model.modules() if isinstance(each, VocabParallelEmbedding)]
    is_tied = len({id(each.weight) for each in tables}) < len(tables)  # the head is one too
    if is_tied and not text.tie_word_embeddings:
        raise ValueError(
            f"{text.model_type} with tie_word_embeddings=false: vLLM takes the input embeddings for the head, so its "
            f"log-probs would not be the policy's. {WAY_OUT}."
        )


def _check_windows(model: nn.Module, text: dict[str, Any], max_model_len: int) -> None:
    from vllm.model_executor.layers.attention import Attention

    window, kinds = text.get("sliding_window"), text.get("layer_types") or []
    if window is None or max_model_len <= window:
        return
    found = {layer.sliding_window for layer in model.modules() if isinstance(layer, Attention)} - {None}
    if found - {window} or ("sliding_attention" in kinds and not found):
        raise ValueError(
            f"{text['model_type']} with sliding_window={window}: vLLM's attention has {sorted(found) or 'no window'}, "
            f"so its log-probs would not be the policy's. {WAY_OUT}, or sequences of at most {window} tokens."
        )
