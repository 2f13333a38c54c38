"""What vLLM can sample rightly: found from a model's configuration, before weights are loaded and an engine starts.

vLLM differs from transformers in some models. Where something makes it agree, it is in vllm_corrections.py; where
nothing does, the model is refused here. Whoever trusts neither can sample with transformers.
"""

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from common.environment import process_unchanged
from common.models.configs import read_config
from common.sampling.vllm_corrections import undeclared
from common.sampling.vllm_startup import EngineSettings, engine_arguments
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
    settings = EngineSettings(
        model=model, dtype=dtype, max_model_len=max_model_len, trust_remote_code=trust_remote_code
    )
    with imported():
        supported_config(engine_arguments(settings, config))


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
    _check_measured(config)
    if config.model_type == "mimo_v2_flash" and config.routed_scaling_factor != 1:
        # vllm/model_executor/models/mimo_v2.py does not read it, in 0.31.
        raise Refused(
            f"mimo_v2_flash with routed_scaling_factor={config.routed_scaling_factor}: vLLM does not scale the sum of "
            "the experts, so its log-probs would not be the policy's."
        )


def _check_measured(config: PreTrainedConfig) -> None:
    """Raise a Refused for models that vLLM builds, and that were measured to differ (float32, CPU, vLLM 0.31)."""
    kind = config.model_type
    rounding = "where rounding explains 1e-5."
    if kind == "zamba2" and not torch.cuda.is_available():  # on a GPU, where it has other kernels, nothing is known
        raise Refused(f"zamba2: on the CPU, vLLM's log-probs differ from the policy's by 1e-3, {rounding}")
    if kind == "falcon" and config.alibi:
        # transformers rounds ALiBi's positions to bfloat16 (build_alibi_tensor of modeling_falcon.py, in 5.17).
        raise Refused(
            f"falcon with alibi=true: vLLM's log-probs differ from the policy's by 1e-3, {rounding} transformers "
            "rounds the biases of attention to bfloat16, vLLM does not."
        )
    if kind == "gpt_bigcode" and not config.multi_query:
        raise Refused(f"gpt_bigcode with multi_query=false: vLLM's log-probs differ by 0.5, {rounding}")
    if kind in ("jetmoe", "minimax"):  # within vLLM, in transformers' class
        raise Refused(f"{kind}: vLLM's log-probs differ from the policy's by 0.5 and more, {rounding}")


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
    has_rank = "time_step_rank" in named or "mamba_dt_rank" in named
    if has_state(config) and has_rank and "chunk_size" not in named:  # Mamba 1 has a rank, Mamba 2 has chunks
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


def has_routing_bias(names: Iterable[str]) -> bool:
    """Whether experts are chosen with a bias; vLLM leaves it out of transformers' own classes (0.31).

    Args:
        names: of a model's weights.
    """
    return any(name.endswith("e_score_correction_bias") for name in names)


def check_built_model(model: nn.Module, config: PreTrainedConfig, max_model_len: int) -> None:
    """Raise a Refused if vLLM built another model than the configuration describes: other windows, another head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    text = config.get_text_config()
    ignored = undeclared(text)
    declared = {name: value for name, value in text.to_dict().items() if name not in ignored}
    _check_windows(model, declared, max_model_len)
    _check_activations(model, declared)
    tables = [each for each in model.modules() if isinstance(each, VocabParallelEmbedding)]
    is_tied = len({id(each.weight) for each in tables}) < len(tables)  # the head is one too
    if is_tied and not text.tie_word_embeddings:
        raise Refused(
            f"{text.model_type} with tie_word_embeddings=false: vLLM takes the input embeddings for the head, so its "
            f"log-probs would not be the policy's."
        )


def _check_activations(model: nn.Module, text: dict[str, Any]) -> None:
    """Compare activations, which vLLM's class may take from another key or take for granted."""
    from vllm.model_executor.layers.activation import GeluAndMul
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    named = text.get("hidden_act")
    found = set()
    for module in model.modules():
        if isinstance(module, GeluAndMul):
            found.add(_EXACT if module.approximate == "none" else "gelu_pytorch_tanh")
        elif isinstance(module, RoutedExperts) and module.activation.value in ("silu", _EXACT, "gelu_tanh"):
            found.add({"gelu_tanh": "gelu_pytorch_tanh"}.get(module.activation.value, module.activation.value))
    if named in ("silu", _EXACT, "gelu_pytorch_tanh") and found - {named}:
        raise Refused(
            f"{text['model_type']} with hidden_act={named}: vLLM computes {', '.join(sorted(found - {named}))}, so "
            "its log-probs would not be the policy's."
        )


_EXACT = "gelu"


def _check_windows(model: nn.Module, text: dict[str, Any], max_model_len: int) -> None:
    from vllm.model_executor.layers.attention import Attention

    window, kinds = text.get("sliding_window"), text.get("layer_types") or []
    if window is None or max_model_len <= window:
        return
    layers = [layer.sliding_window for layer in model.modules() if isinstance(layer, Attention)]
    found = set(layers) - {None}
    windowed = kinds.count("sliding_attention")
    num_found = len(layers) - layers.count(None)
    is_other = len(kinds) == len(layers) and num_found != windowed
    if found - {window} or (windowed and not found) or is_other:
        raise Refused(
            f"{text['model_type']} with sliding_window={window}: vLLM's attention has {sorted(found) or 'no window'} "
            f"in {num_found} of {len(layers)} layers, so its log-probs would not be the policy's.",
            f"{WAY_OUT}, or sequences of at most {window} tokens.",
        )
