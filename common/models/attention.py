"""Which of transformers' attention functions computes a model's own attention.

sdpa, the fastest that is everywhere, has no place for a cap on the attention's logits and leaves it out without a word
(Gemma 2: log-probs off by 0.7). Models with sinks or biases that it cannot take refuse it themselves.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import inspect
import re

import torch
import transformers
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available

from common.models.configs import model_class

# Settings such as attn_logit_softcapping: attention logits become cap * tanh(logits / cap).
_CAP = re.compile(r"att(n|ention)_.*(soft_?cap|logit_cap)")
# Of transformers, apart from those for whole kinds of hardware.
IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
# What a model's class says of an implementation, by the start of its name.
_FLAGS = {
    "sdpa": lambda cls: cls._supports_sdpa,
    "flash_attention": lambda cls: cls._supports_flash_attn,
    "flex_attention": lambda cls: cls._supports_flex_attn,
}


def attention_for(
    config: transformers.PreTrainedConfig,
    asked: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    cls: type[transformers.PreTrainedModel] | None = None,
) -> tuple[str, str | None]:
    """The implementation to load a model with, and why it is not the usual one.

    Args:
        config: of the model.
        asked: the setting attn_implementation; "auto" chooses sdpa where it is right, else what is.
        device: where the model runs.
        dtype: of forward passes; flash attention has none for float32.
        cls: of the model; None: the causal language model's.

    Returns:
        A value for from_pretrained's attn_implementation, and a reason if "auto" is not sdpa, else None.

    Raises:
        ValueError: the model's class refuses what was asked for, or it would leave out a part of the model.
    """
    cls = cls or model_class(config)
    if asked != "auto":
        check_attention(config, asked, cls=cls, dtype=dtype)
        return asked, None
    reason = why_not("sdpa", config, cls)
    if reason is None:
        return "sdpa", None
    return _instead_of_sdpa(config, cls, device, dtype), reason


def check_attention(
    config: transformers.PreTrainedConfig,
    asked: str,
    *,
    cls: type[transformers.PreTrainedModel] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse an implementation that would not compute the model's own attention.

    Args:
        config: of the model.
        asked: the setting attn_implementation.
        cls: of the model; None: the causal language model's.
        dtype: of forward passes; None: not known.

    Raises:
        ValueError: says why.
    """
    cls = cls or model_class(config)
    if asked == "auto":
        return
    reason = why_not(asked, config, cls) or _why_not_here(asked)
    if asked not in IMPLEMENTATIONS and "/" not in asked:
        reason = f"need one of auto, {', '.join(IMPLEMENTATIONS)}, or the hub id of a kernel"
    elif asked.startswith("flash_attention") and dtype == torch.float32:
        reason = "it takes numbers of 16 bits, and passes are in float32, unless you pass --dtype bfloat16"
    if reason is not None:
        raise ValueError(f"attn_implementation={asked}: {reason}. Pass --attn_implementation auto.")


def why_not(implementation: str, config: transformers.PreTrainedConfig, cls: type | None) -> str | None:
    """Why an implementation does not compute a model's own attention; None if it does.

    Args:
        implementation: such as "sdpa", or a name on the hub, of which nothing is known.
        config: of the model.
        cls: of the model; None: not known, such as of an architecture that is refused anyway.
    """
    if cls is not None and not all(has(cls) for start, has in _FLAGS.items() if implementation.startswith(start)):
        return f"transformers has no {implementation} for {cls.__name__}"
    if reason := _fault(implementation, config):
        return reason
    cap = soft_cap(config)
    if cap is None or implementation == "eager":
        return None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # importing it takes seconds

    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    if function is None or "softcap" in inspect.signature(function).parameters:
        return None
    return f"it leaves out {cap[0]}={cap[1]:g}, the cap on the model's attention logits"


def _why_not_here(implementation: str) -> str | None:
    """Why this machine cannot run an implementation; None if it can."""
    is_there = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if implementation in is_there and not is_there[implementation]():
        package = "flash-attn" if implementation == "flash_attention_2" else "flash-attn-3"
        return f"the package {package} is not installed, or there is no CUDA GPU"
    if implementation == "flex_attention" and not torch.cuda.is_available():
        return "its gradients are computed on a GPU only, and there is none here"
    if "/" in implementation and not is_kernels_available():
        return "it is a kernel on the hub, and the package kernels, which loads it, is not installed"
    return None


def _fault(implementation: str, config: transformers.PreTrainedConfig) -> str | None:
    """What transformers 5.17 computes wrongly with an implementation, though the class takes it; None if nothing.

    Falcon with ALiBi: FalconModel.forward (modeling_falcon.py:783) puts the biases into the mask, whatever the
    implementation, and FalconAttention.forward (line 405) adds them again in eager: logits are off by 0.3.
    Doge: the mask is left out where sdpa or flash attention knows that it is causal, but DogeAttention.forward
    (modeling_doge.py:302) makes a mask of its own of it, which is then not causal. Each can go once its class asks
    for the implementation, or for a mask.
    """
    if config.model_type == "falcon" and config.alibi and implementation != "sdpa":
        return f"falcon with alibi adds its biases right in sdpa only, in {implementation} twice or not at all"
    if config.model_type == "doge" and implementation != "eager":
        return f"doge makes no causal mask for {implementation}, so that a token would see those after it"
    return None


def soft_cap(config: transformers.PreTrainedConfig) -> tuple[str, float] | None:
    """Name and value of the setting that caps attention logits, of the part that reads text; None without one.

    Args:
        config: of the model.
    """
    settings = config.get_text_config().to_dict()
    return next(((name, value) for name, value in settings.items() if _CAP.search(name) and value), None)


def _instead_of_sdpa(
    config: transformers.PreTrainedConfig, cls: type, device: torch.device, dtype: torch.dtype
) -> str:
    """Eager, which holds the logits of all pairs of tokens; on a GPU, one that need not."""
    if device.type != "cuda":
        return "eager"
    # FlashAttention 2 takes a cap, but no sinks, which are why the classes that have them refuse sdpa.
    is_16_bit = dtype in (torch.bfloat16, torch.float16)
    has_flash = is_flash_attn_2_available() and is_16_bit and soft_cap(config) is not None
    candidates = ["flash_attention_2"] * has_flash + ["flex_attention"]
    return next((name for name in candidates if why_not(name, config, cls) is None), "eager")
