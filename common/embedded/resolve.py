"""Resolves the value of `model` to what transformers and vLLM load. Slow imports happen only when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import transformers

NAMES = ("tiny", "tiny-r1")


def is_embedded(model: str) -> bool:
    """Whether a model needs no download, since it comes with the repository or is trained here."""
    return model in NAMES


def check_model(
    model: str, *, trust_remote_code: bool = False, attention: str = "auto", is_trained: bool = True
) -> None:
    """Refuse a model that does not exist or cannot be trained, before anything is loaded or built.

    Args:
        model: hub id, folder, or an embedded policy's name.
        trust_remote_code: the setting; once it is given here, the model's code is known to this process.
        attention: the setting attn_implementation.
        is_trained: what to do about quantised weights includes settings of a run.

    Raises:
        ValueError: if there is no such model, its files are incomplete or damaged, or it is no causal language model
            with weights in floating point, or attention would be computed wrongly.
    """
    if is_embedded(model):
        return
    from transformers import AutoModelForCausalLM

    from common.models.attention import check_attention
    from common.models.configs import read_config, why_not_trainable, why_quantized
    from common.models.decoding_support import why_not_decodable
    from common.models.files import check_files, check_weights_fit

    config = read_config(model, trust_remote_code=trust_remote_code)
    reason = why_not_trainable(config) or why_not_decodable(config)
    if reason is not None:
        if is_trained and why_quantized(config):
            reason += " It needs little memory with --use_lora true --load_in_4bit true."
        raise ValueError(f"model={model!r}: {reason}")
    check_attention(config, attention)
    check_files(model)
    check_weights_fit(model, AutoModelForCausalLM, config)


def resolve_model(model: str, *, beside: Path | None = None) -> str:
    """Hub id or folder that transformers and vLLM load; an embedded policy is made on first use; "tiny-r1" in minutes.

    Args:
        model: hub id, folder, or an embedded policy's name.
        beside: a folder in which that policy may be kept if the user's cache cannot be written.

    Raises:
        ValueError: it can be kept nowhere.
    """
    if not is_embedded(model):
        return model
    from common.embedded.policy import TINY_POLICIES, tiny_policy

    return str(tiny_policy(TINY_POLICIES[model], beside=beside))


def skeleton(model: str) -> transformers.PreTrainedModel:
    """The model's modules without their weights; an embedded policy is not built for it."""
    import torch
    from transformers import AutoModelForCausalLM

    from common.models.configs import read_config

    if is_embedded(model):
        from common.embedded.policy import TINY_POLICIES, build_tokenizer, policy_config

        config = policy_config(TINY_POLICIES[model], build_tokenizer())
    else:
        config = read_config(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> transformers.PreTrainedTokenizerBase:
    """Load a model's tokenizer; a missing pad token needs no fix, since masks mark padding.

    Args:
        model: hub id, folder, or an embedded policy's name.
        trust_remote_code: run a tokenizer's own Python file.

    Raises:
        ValueError: if it has none.
    """
    if is_embedded(model):
        from common.embedded.policy import build_tokenizer

        return build_tokenizer()
    from transformers import AutoTokenizer

    from common.mistakes import first_line
    from common.models.bases import forget_origin

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        reason = None
    except Exception as error:  # a damaged file, or a library that it needs
        reason = first_line(error)
    # transformers makes an empty tokenizer for a folder without its files.
    if reason is None and set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        reason = "there is none"
    if reason is not None:
        raise ValueError(
            f"model={model!r}: its tokenizer cannot be loaded: {reason}. Prompts have to become tokens. Put the "
            "tokenizer's files, such as tokenizer.json, into the model's folder."
        )
    return forget_origin(tokenizer)
