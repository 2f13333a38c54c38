"""How many tokens a model has positions for, and up to which length its rotary embeddings stay the same.

From the configuration alone.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from typing import Any

import transformers

from common.config import RLConfig
from common.models.configs import setting


def context_length(config: transformers.PreTrainedConfig) -> int | None:
    """Tokens that a model has room for; None if its configuration names no limit.

    Args:
        config: of the model.
    """
    return setting(config.get_text_config(), "max_position_embeddings")


def check_room(model: transformers.PreTrainedModel, config: RLConfig, *, setting: str = "model") -> None:
    """Refuse lengths for which the model has no positions, or other ones in training than in sampling.

    A model with rotary embeddings computes something beyond its context too, but vLLM refuses to; where the embeddings
    are scaled, vLLM says how far they reach. Some are scaled by the length of the longest row: a token that was
    sampled in a short row is then trained in a longer one, at other angles.

    Args:
        model: the policy, or a model that judges its completions, without storage.
        config: sampler, max_prompt_length and max_completion_length are read.
        setting: that names the model.

    Raises:
        ValueError: names the model's context, or the length up to which its angles stay the same.
    """
    context, needed = context_length(model.config), config.max_prompt_length + config.max_completion_length
    kinds, name = _rope_by_type(model.config.get_text_config()), vars(config)[setting]
    for kind, length_name, length in _changes_of_angles(model.config.get_text_config()):
        if needed > length:
            raise ValueError(
                f"max_prompt_length={config.max_prompt_length} and max_completion_length="
                f"{config.max_completion_length}: {name} has rope_type {kind!r}, so that all angles change "
                f"once a row is longer than {length:,} tokens ({length_name}). Completions grow token by token in "
                "sampling and are trained as a whole: their log-probs would be those of another model. Pass lengths "
                f"of {length:,} tokens in total, such as --max_prompt_length "
                f"{min(config.max_prompt_length, length // 2)} --max_completion_length "
                f"{min(config.max_completion_length, length // 2)}, or another --{setting}."
            )
    # Who is not sampled from would have to judge tokens beyond all that it was trained on.
    is_judge = setting != "model"
    is_refused = not kinds or ((config.sampler != "transformers" or is_judge) and set(kinds) == {"default"})
    if context is not None and needed > context and is_refused:
        raise ValueError(
            f"max_prompt_length={config.max_prompt_length} and max_completion_length={config.max_completion_length}: "
            f"{name} has room for {context:,} tokens in total, prompt and completion. Pass smaller ones, such "
            f"as --max_prompt_length {min(config.max_prompt_length, context // 2)} --max_completion_length "
            f"{min(config.max_completion_length, context // 2)}."
        )


def _rope_by_type(text: transformers.PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The parameters of rotary embeddings by rope_type; models with kinds of layers have some for each kind."""
    rope = setting(text, "rope_parameters") or {}
    return {
        each["rope_type"]: each for each in (rope, *rope.values()) if isinstance(each, dict) and "rope_type" in each
    }


def _changes_of_angles(text: transformers.PreTrainedConfig) -> list[tuple[str, str, int]]:
    """Types of rotary embeddings that depend on the length, with the setting that says beyond which, and its value."""
    found, original = _rope_by_type(text), "original_max_position_embeddings"
    changes = []
    if "dynamic" in found and context_length(text) is not None:
        changes.append(("dynamic", "max_position_embeddings", context_length(text)))
    if found.get("longrope", {}).get(original):
        changes.append(("longrope", original, found["longrope"][original]))
    return changes
