"""What lies in a model's folder and would be passed over in loading, or would change it, without a word."""

from __future__ import annotations  # for type hints whose import would take seconds

import re
from pathlib import Path
from typing import Any

import transformers

from common.models.configs import setting

# Of quantised checkpoints whose config.json says nothing: ModelOpt and AutoGPTQ.
_QUANTISED = ("hf_quant_config.json", "quantize_config.json")
# Buffers that older versions saved with the weights, and that a model computes itself: rotation, causal masks,
# positions, versions.
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|rope\.freqs|position_ids|version|embed_positions\.weights"
    r"|(attn|attention|crossattention|self_attention)\.(bias|masked_bias|causal_mask))$"
)
# Layers that predict the tokens after the next one, which no model of transformers has.
_LATER_TOKENS = re.compile(r"(^|\.)mtp(\.|_)")
_SHOWN = 3


def check_companions(folder: Path) -> None:
    """Refuse files beside the weights that make another model of them.

    Args:
        folder: of the model.

    Raises:
        ValueError: names the file.
    """
    if found := next((name for name in _QUANTISED if (folder / name).is_file()), None):
        raise ValueError(
            f"model={str(folder)!r}: by {found} its weights are quantised: they are rounded numbers that no gradient "
            "can change. Pass the model that it was made from. If its weights are plain numbers, remove that file."
        )


def check_unexpected(
    found: dict[str, Any], model: transformers.PreTrainedModel, config: transformers.PreTrainedConfig, label: str
) -> None:
    """Refuse weights that the model's class has no place for: without them it is another model.

    A model without the head of a language model may leave heads out, but nothing of its backbone; a language model
    without what reads images or sound may leave that out, but nothing of its own.

    Args:
        found: what from_pretrained gives with output_loading_info; it has left out what the class itself ignores.
        model: the loaded one, or one without storage.
        config: of the folder, which may be that of more than the model.
        label: what the model is, for the message.

    Raises:
        ValueError: names three of them.
    """
    if not found["unexpected_keys"]:
        return
    parts = {name for name, _ in model.named_modules()}
    left_out = sorted(name for name in found["unexpected_keys"] if not _may_be_left_out(name, model, config, parts))
    if left_out:
        named = ", ".join(left_out[:_SHOWN]) + (", ..." if len(left_out) > _SHOWN else "")
        what = "a weight" if len(left_out) == 1 else f"{len(left_out)} weights"
        raise ValueError(
            f"{label}: holds {what} for which {type(model).__name__} has no place by this config.json: {named}. They "
            "would be dropped, and another model be trained. Correct config.json (model_type, the number of layers, "
            "biases), or pass another model; weights named scale are of a quantised one."
        )


def _may_be_left_out(
    name: str, model: transformers.PreTrainedModel, config: transformers.PreTrainedConfig, parts: set[str]
) -> bool:
    text = config.get_text_config()
    if _COMPUTED.search(name) or _LATER_TOKENS.search(name) or _is_of_later_layer(name, text):
        return True
    is_whole = model.base_model is model
    name = name.removeprefix(f"{model.base_model_prefix}.") if is_whole else name
    first, _, rest = name.partition(".")
    if model.get_output_embeddings() is None:
        return first not in parts if is_whole else first != model.base_model_prefix
    if text is not config and type(model.config) is type(text):
        # Parts for images and sound are beside the language model, or beside its layers.
        return first not in parts or f"{first}.{rest.partition('.')[0]}" not in parts
    return False


def _is_of_later_layer(name: str, text: transformers.PreTrainedConfig) -> bool:
    """Whether a weight is of the layers after the last one, which predict later tokens in DeepSeek V3 and its like."""
    count, layer = setting(text, "num_nextn_predict_layers") or 0, re.search(r"(^|\.)layers\.(\d+)\.", name)
    return bool(count) and layer is not None and 0 <= int(layer[2]) - text.num_hidden_layers < count
