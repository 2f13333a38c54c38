"""What a model is, from its configuration and its modules without weights: the rows of `python -m common.check_model`.

Nothing is loaded, and nothing is refused here except weights that no memory of this machine can hold. What a sampler,
an attention or LoRA cannot do is decided where they are.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math
from collections import Counter
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from common.config import RLConfig
from common.host import host_memory
from common.models.chat import why_no_chat
from common.models.configs import setting
from common.models.loading import compute_dtype, end_token_ids
from common.models.positions import context_length

# Bytes of a trained parameter: weight, gradient and two moments of Adam, all in float32.
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8
GB = 1e9

# How configurations name the experts of a layer, and how many of them see a token.
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
# Layers of these types keep a state of fixed size in place of keys and values.
_RECURRENT = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid")
# vLLM fills vocabularies up to a multiple of this (0.25 to 0.32).
_VOCABULARY_STEP = 64


@dataclass(frozen=True, kw_only=True)
class Size:
    """Parameters of a model.

    Attributes:
        total: each tied weight once.
        active: those that a token passes through; below `total` for a mixture of experts.
    """

    total: int
    active: int

    @classmethod
    def of(cls, model: nn.Module, config: transformers.PreTrainedConfig) -> Size:
        """Count the parameters of a model.

        Args:
            model: without storage is enough.
            config: of its language model.
        """
        total = sum(parameter.numel() for parameter in model.parameters())
        experts, chosen = setting(config, *_NUM_EXPERTS), setting(config, *_EXPERTS_PER_TOKEN)
        if not (isinstance(experts, int) and isinstance(chosen, int) and 0 < chosen < experts):
            return cls(total=total, active=total)
        of_experts = sum(parameter.numel() for parameter in _expert_parameters(model, experts))
        return cls(total=total, active=total - of_experts + of_experts * chosen // experts)


def _expert_parameters(model: nn.Module, num_experts: int) -> set[nn.Parameter]:
    """Parameters of which a token uses a share: (experts, rows, columns) in one module, or a list of modules."""
    found: set[nn.Parameter] = set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        is_list = isinstance(module, nn.ModuleList) and len(module) == num_experts and _are_alike(module)
        is_stack = any(each.dim() == 3 and len(each) == num_experts for each in own)
        if is_stack and not isinstance(module, nn.modules.conv._ConvNd):
            found.update(own)
        elif is_list:
            found.update(module.parameters())
    return found


def _are_alike(modules: nn.ModuleList) -> bool:
    """Whether a list is of feed-forward blocks: layers of a model, whose number may be the same, have attention."""
    return not any("attention" in type(each).__name__.lower() for module in modules for each in module.modules())


def describe_model(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    config: RLConfig,
    device: torch.device,
) -> dict[str, str]:
    """The rows of the table that concern the model itself, by their names.

    Args:
        model: without storage, with its generation configuration.
        tokenizer: its tokenizer.
        config: lengths, attention, dtype, load_in_4bit and trust_remote_code are read.
        device: where models are used.
    """
    from common.models.configs import describe_multimodal

    whole, text = model.config, model.config.get_text_config()
    return {
        "architecture": f"{type(model).__name__}, model_type {whole.model_type}, a causal language model",
        "code": "the model's own, run with trust_remote_code" if _is_remote(model) else "of transformers",
        "wrapper": describe_multimodal(whole) or "none",
        "parameters": _parameters(model, text),
        "layers": _layers(text),
        "heads": _heads(text),
        "attention": _attention(model, config, device),
        "experts": _experts(text),
        "recurrent state": _recurrent(model, text),
        "sliding window": _window(text),
        "rope": _rope(text),
        "logits": _logits(text),
        "quantisation": "the frozen base in 4 bits" if config.load_in_4bit else "none",
        "decoding": _decoding(model),
        "vocabulary": _vocabulary(text, tokenizer),
        "context": _context(text, config),
        "chat template": _chat_template(tokenizer),
        "end tokens": _end_tokens(model, tokenizer),
    }


def _chat_template(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return "none: prompts have to be plain text"
    reason = why_no_chat(tokenizer)
    return "yes" if reason is None else f"of no use, so that prompts have to be plain text: {reason}"


def _is_remote(model: nn.Module) -> bool:
    return not type(model).__module__.startswith("transformers.")


def _attention(model: transformers.PreTrainedModel, config: RLConfig, device: torch.device) -> str:
    from common.models.attention import attention_for

    if setting(model.config.get_text_config(), "num_attention_heads") is None:
        return "none"
    asked, dtype = config.attn_implementation, compute_dtype(config, device)
    try:
        chosen, reason = attention_for(model.config, asked, device, dtype=dtype, cls=type(model))
    except ValueError as error:
        return f"refused: {error}"
    return f"{chosen}{'' if asked == 'auto' else ', as asked'}{f'; not sdpa: {reason}' if reason else ''}"


def _decoding(model: transformers.PreTrainedModel) -> str:
    from common.models.decoding_support import decoding_of

    if decoding_of(model).cache_argument is None:
        return "with transformers each token is a pass over the whole sequence: slow"
    return "with transformers one token per pass, from its cache"


def _parameters(model: nn.Module, text: transformers.PreTrainedConfig) -> str:
    size = Size.of(model, text)
    active = f", {size.active:,} active per token" if size.active < size.total else ""
    tied = setting(text, "tie_word_embeddings") or setting(model.config, "tie_word_embeddings")
    return f"{size.total:,}{active}; embeddings and head are {'one weight (tied)' if tied else 'two weights'}"


def _layers(text: transformers.PreTrainedConfig) -> str:
    count = setting(text, "num_hidden_layers")
    kinds = Counter(setting(text, "layer_types") or ())
    named = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    return f"{count}, hidden size {setting(text, 'hidden_size')}" + (f": {named}" if len(kinds) > 1 else "")


def _heads(text: transformers.PreTrainedConfig) -> str:
    heads = setting(text, "num_attention_heads")
    if heads is None:
        return "none: a model without attention"
    latent = setting(text, "qk_nope_head_dim")
    size = setting(text, "head_dim") or setting(text, "hidden_size") // heads
    if latent is not None:
        return f"{heads} of {latent} + {setting(text, 'qk_rope_head_dim')} (latent attention)"
    return f"{heads} of {size}, {setting(text, 'num_key_value_heads') or heads} of keys and values"


def _experts(text: transformers.PreTrainedConfig) -> str:
    experts, chosen = setting(text, *_NUM_EXPERTS), setting(text, *_EXPERTS_PER_TOKEN)
    if not experts:
        return "none"
    shared = setting(text, "n_shared_experts")
    return f"{experts} in a layer, {chosen} for a token" + (f", and {shared} for all tokens" if shared else "")


def _recurrent(model: transformers.PreTrainedModel, text: transformers.PreTrainedConfig) -> str:
    kinds = [kind for kind in dict.fromkeys(setting(text, "layer_types") or ()) if kind in _RECURRENT]
    if kinds:
        return f"yes, in layers of {', '.join(kinds)}"
    return "yes" if type(model)._is_stateful or setting(text, "num_attention_heads") is None else "none"


def _window(text: transformers.PreTrainedConfig) -> str:
    window = setting(text, "sliding_window")
    if not window:
        return "none"
    kinds = Counter(setting(text, "layer_types") or ())
    number = kinds["sliding_attention"] if kinds else setting(text, "num_hidden_layers")
    return f"{window:,} tokens in {number} of {setting(text, 'num_hidden_layers')} layers" if number else "none"


def _rope(text: transformers.PreTrainedConfig) -> str:
    rope = setting(text, "rope_parameters") or {}
    by_kind = rope if rope and all(isinstance(each, dict) for each in rope.values()) else {"": rope}
    parts = []
    for kind, values in by_kind.items():
        if values and "rope_type" in values:
            kind_of = f"{kind} " if kind else ""
            factor = f", factor {values['factor']:g}" if values.get("factor") else ""
            parts.append(f"{kind_of}{values['rope_type']}, theta {values.get('rope_theta', 0):g}{factor}")
    return "; ".join(parts) or "none"


def _logits(text: transformers.PreTrainedConfig) -> str:
    names = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
    names += ("output_multiplier", "lm_head_multiplier")
    found = [(name, setting(text, name)) for name in names]
    return ", ".join(f"{name} {value:g}" for name, value in found if value not in (None, 1)) or "unchanged"


def _vocabulary(text: transformers.PreTrainedConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    known, size = max(tokenizer.get_vocab().values()) + 1, setting(text, "vocab_size")
    if size > known:
        return f"{size:,} tokens, of which the tokenizer has {known:,}; sampling one of the others ends a completion"
    return f"{size:,} tokens" + (
        f"; the tokenizer has {known:,}, and prompts may use none of the rest" * (known > size)
    )


def _context(text: transformers.PreTrainedConfig, config: RLConfig) -> str:
    longest, needed = context_length(text), config.max_prompt_length + config.max_completion_length
    room = "without a limit" if longest is None else f"{longest:,} tokens"
    return f"{room}; max_prompt_length {config.max_prompt_length:,} + max_completion_length " + (
        f"{config.max_completion_length:,} = {needed:,}"
        + (", which is more" if longest is not None and needed > longest else "")
    )


def _end_tokens(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    try:
        ids = end_token_ids(model, tokenizer)
    except ValueError as error:
        return f"none: {error}"
    return ", ".join(f"{token} {tokenizer.convert_ids_to_tokens(token)}" for token in ids)


# Memory


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that training holds besides activations: a rough bound.

    Attributes:
        weights: of the policy.
        training: gradients and moments of Adam.
        sampler: vLLM's own copy of the weights.
        reference: a frozen copy for the KL.
    """

    weights: int
    training: int
    sampler: int
    reference: int

    @classmethod
    def of(cls, num_parameters: int, num_adapter: int, config: RLConfig, device: torch.device) -> Memory:
        """Estimate the memory of a run.

        Args:
            num_parameters: of the model.
            num_adapter: of the LoRA adapter; not read without LoRA.
            config: the run's.
            device: where models are used.
        """
        width = compute_dtype(config, device).itemsize
        trained = num_adapter if config.use_lora else num_parameters
        frozen = num_parameters * width // (4 if config.load_in_4bit else 1) if config.use_lora else 0
        return cls(
            weights=frozen + _WEIGHT * trained,
            training=(_GRADIENT + _MOMENTS) * trained,
            sampler=num_parameters * width if config.sampler == "vllm" else 0,
            reference=_WEIGHT * num_parameters if config.kl_coef and not config.use_lora else 0,
        )

    def __str__(self) -> str:
        """The parts in GB, and their sum."""
        parts = {
            "weights": self.weights,
            "gradients and Adam": self.training,
            "vLLM's copy": self.sampler,
            "reference": self.reference,
        }
        named = ", ".join(f"{name} {size / GB:.3g}" for name, size in parts.items() if size)
        return f"{sum(parts.values()) / GB:.3g} GB and activations: {named}"


def adapter_parameters(model: nn.Module, names: list[str], rank: int) -> int:
    """Parameters of a LoRA adapter: two matrices beside each weight.

    Args:
        model: without storage is enough.
        names: of the modules that are adapted.
        rank: of the adapter.
    """
    return sum(rank * sum(model.get_submodule(name).weight.shape) for name in names)


def memory_there(device: torch.device) -> tuple[int, int]:
    """Bytes of memory that is free, and that there is in total, where models are used."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    there = host_memory()
    return there.available, there.total


def check_memory(model: nn.Module, config: RLConfig, device: torch.device) -> None:
    """Refuse a model whose weights alone are larger than all memory; what else a run needs depends on its lengths.

    Args:
        model: the policy, without storage.
        config: the run's.
        device: where models are used.

    Raises:
        ValueError: names both sizes.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    weights, (_, total) = Memory.of(count, 0, config, device).weights, memory_there(device)
    if weights > total:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else host_memory().source
        raise ValueError(
            f"model={config.model}: its {count:,} parameters take {weights / GB:.1f} GB "
            f"{'frozen' if config.use_lora else 'in float32, which training needs'}, and {where} has "
            f"{total / GB:.1f} GB in total, so it cannot be loaded. Pass --model with a smaller one"
            + ("." if config.load_in_4bit else ", or --use_lora true --load_in_4bit true.")
        )


def why_no_parts(config: transformers.PreTrainedConfig, size: int) -> str | None:
    """What of a model vLLM cannot divide into equal parts, in words; None: nothing that its configuration tells.

    Args:
        config: of the model's text part.
        size: number of parts.
    """
    heads, keys = setting(config, "num_attention_heads"), setting(config, "num_key_value_heads")
    if isinstance(heads, int) and heads % size:
        return f"{heads} attention heads, no multiple of {size}"
    has_latent = setting(config, "qk_nope_head_dim") is not None  # all heads share one latent vector
    if isinstance(keys, int) and not has_latent and keys % size and size % keys:  # fewer heads than parts are copied
        return f"{keys} heads of keys and values, neither a multiple nor a divisor of {size}"
    for name in ("intermediate_size", "moe_intermediate_size"):
        width = setting(config, name)
        if isinstance(width, int) and width % size:
            return f"{name} {width}, no multiple of {size}"
    vocabulary = setting(config, "vocab_size") or 0
    rows = math.ceil(vocabulary / _VOCABULARY_STEP) * _VOCABULARY_STEP
    return (
        f"a vocabulary of {vocabulary}, which vLLM fills up to {rows}, no multiple of {size}" if rows % size else None
    )
