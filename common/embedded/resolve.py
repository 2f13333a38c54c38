"""Resolves the value of `model` to what transformers and vLLM load. Slow imports happen only when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

NAMES = ("tiny", "tiny-r1")


def is_embedded(model: str) -> bool:
    """Whether a model is built on this machine, without a download."""
    return model in NAMES


def check_model(model: str) -> None:
    """Refuse a model that does not exist, before anything is loaded or built.

    Args:
        model: hub id, folder, or an embedded policy's name.

    Raises:
        ValueError: if there is no such model.
    """
    if is_embedded(model):
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model={model!r}: cannot be loaded: {reason}. Need a folder with a config.json or a hub id that this "
            "machine can reach. Pass --model with one, or --model tiny for the embedded policy."
        ) from error


def resolve_model(model: str) -> str:
    """Hub id or folder that transformers and vLLM load; an embedded policy is built on first use, in minutes."""
    if not is_embedded(model):
        return model
    from common.embedded.policy import TINY_POLICIES, tiny_policy

    return str(tiny_policy(TINY_POLICIES[model]))


def skeleton(model: str) -> transformers.PreTrainedModel:
    """The model's modules without their weights; an embedded policy is not built for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if is_embedded(model):
        from common.embedded.policy import TINY_POLICIES, build_tokenizer, policy_config

        config = policy_config(TINY_POLICIES[model], build_tokenizer())
    else:
        config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(model: str) -> transformers.PreTrainedTokenizerBase:
    """Load a model's tokenizer; a missing pad token needs no fix, since masks mark padding."""
    if is_embedded(model):
        from common.embedded.policy import build_tokenizer

        return build_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)
