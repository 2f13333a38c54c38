"""How a model is decoded by transformers alone, and why some cannot be: from class and configuration, without weights.

What a forward pass takes, its signature says; what each layer keeps of earlier tokens, transformers' cache says, which
is made from the configuration.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import inspect
from dataclasses import dataclass

import transformers
from transformers import cache_utils

# Kinds of models that AutoModelForCausalLM makes and that are no plain decoders of text, as only their code tells.
_NO_DECODERS = {
    **dict.fromkeys(
        ("bert-generation", "cpmant", "moshi", "xlnet"),
        "without a mask each token of it sees the tokens after it, so that a log-prob would be that of a token which "
        "the model has seen",
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody", "trocr"), "it reads and writes more than one row of text tokens"),
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it drafts tokens for a larger model, whose hidden states it needs",
    ),
    "rwkv": "in evaluation mode it divides its weights in place, so that after sampling others would be saved",
}


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn from a model, one token per pass.

    Attributes:
        cache_argument: of the forward pass, for the state of earlier tokens; None: each pass reads the whole sequence.
        takes_padding: whether prompts of different lengths can go through one pass, padded on the left.
        takes_positions: whether a pass is told the position of each token.
        takes_last_only: whether a pass can leave out all logits but the last ones.
    """

    cache_argument: str | None
    takes_padding: bool
    takes_positions: bool
    takes_last_only: bool


def why_not_decodable(config: transformers.PreTrainedConfig) -> str | None:
    """Why neither log-probs nor completions of a model are right, with what to do; None if they are.

    Args:
        config: of a model that AutoModelForCausalLM loads.
    """
    if config.model_type in _NO_DECODERS:
        reason = _NO_DECODERS[config.model_type]
    elif config.model_type == "doge" and config.is_moe:
        # DogeDecoderLayer.forward (modeling_doge.py:489 of transformers 5.17) takes for a tensor what DogeCDMoE gives.
        # Once it does not, this can go.
        reason = "its layers of experts do not run in this version of transformers"
    else:
        return None
    return f"{config.model_type}: {reason}. Pass a decoder-only model, such as Qwen/Qwen2.5-0.5B."


def decoding_of(model: transformers.PreTrainedModel) -> Decoding:
    """How a model is decoded rightly, as fast as its forward pass allows.

    Args:
        model: with a language model's head; its weights are not read.
    """
    arguments = inspect.signature(type(model).forward).parameters
    cache_argument = next((name for name in ("past_key_values", "cache_params") if name in arguments), None)
    if cache_argument and not _has_usable_cache(model):
        cache_argument = None
    return Decoding(
        cache_argument=cache_argument,
        takes_padding=cache_argument is not None
        and {"attention_mask", "position_ids"} <= set(arguments)
        and not _is_recurrent(model),
        takes_positions="position_ids" in arguments,
        takes_last_only="logits_to_keep" in arguments,
    )


def new_cache(model: transformers.PreTrainedModel) -> transformers.DynamicCache:
    """An empty cache with a layer of the right kind for each layer of a model."""
    return transformers.DynamicCache(config=model.config.get_text_config(decoder=True))


def _has_usable_cache(model: transformers.PreTrainedModel) -> bool:
    """Whether a pass with the cache gives what a pass over the whole sequence gives, for rows that come and go."""
    # The state is an object of the model's own, which cannot be repeated for several completions.
    if not model._supports_default_dynamic_cache():
        return False
    layers = new_cache(model).layers
    # Layers of a kind of the model's own may keep more than is repeated.
    if any(type(layer).__module__ != cache_utils.__name__ for layer in layers):
        return False
    # The cache also keeps positions, which are not repeated (Qwen4ExpTextModel.forward, modeling_qwen4_exp.py:1452).
    if model.config.get_text_config().model_type == "qwen4_exp_text":
        return False
    # The state is in modules of the model: it belongs to the rows of the last pass.
    if model._is_stateful and not any(map(_is_linear, layers)):
        return False
    # transformers' Mamba 2 limits its time steps in passes over several tokens, and not in those over one token (see
    # mamba2_selective_state_update of modeling_nemotron_h.py in 5.17, which has no dt_limit). Once it has one, this
    # can go.
    limits = (vars(module)["time_step_limit"] for module in model.modules() if "time_step_limit" in vars(module))
    return all(tuple(limit) == (0.0, float("inf")) for limit in limits)


def _is_recurrent(model: transformers.PreTrainedModel) -> bool:
    """Whether a layer keeps a state that each token changes: then a token of padding would change it too."""
    return model._is_stateful or any(map(_is_linear, new_cache(model).layers))


def _is_linear(layer: object) -> bool:
    return isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin)
