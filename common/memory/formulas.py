"""The bytes of a pass in closed form, for shapes and settings to which it was fitted.

Each phase of a pass (`fake.Phases`) is a sum of sizes, such as tokens times hidden size, with a coefficient each.
`fit` finds the coefficients from passes without numbers and writes them into formulas.json.
Only architectures and settings that are there have a formula.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import transformers

if TYPE_CHECKING:
    from common.memory.passes import PassSettings

FILE = Path(__file__).with_name("formulas.json")
# What a formula is fitted to. Others keep more of each layer, and are predicted from fake layers.
MODEL_TYPES = ("qwen2",)
# Hidden sizes that lie between those of the models it was fitted to, and not far beyond.
HIDDEN = range(768, 8193)
# Tokens that trl's fused head takes at a time: TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py.
HEAD_CHUNK = 4096


def sizes(
    config: transformers.PreTrainedConfig, settings: PassSettings, *, tokens: int, completion_tokens: int
) -> dict[str, float]:
    """What the memory of a phase is a sum of, by name.

    Args:
        config: of a model of MODEL_TYPES.
        settings: the rank of the adapter is read.
        tokens: of the micro-batch.
        completion_tokens: of the micro-batch, among them.
    """
    lora_r = 0 if settings.method == "full" else settings.lora_r
    hidden, inner, depth = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    head = config.vocab_size * hidden
    layer = hidden * (2 * hidden + 2 * keys + 3 * inner)
    return {
        "tokens": tokens,
        "tokens x hidden": tokens * hidden,
        "tokens x inner": tokens * inner,
        "tokens x keys": tokens * keys,
        "tokens x heads": tokens * config.num_attention_heads,
        "tokens x rank": tokens * lora_r,
        "tokens x hidden x layers": tokens * hidden * depth,
        "completion": completion_tokens,
        "completion of a chunk": min(completion_tokens, HEAD_CHUNK),
        "completion x hidden": completion_tokens * hidden,
        "head, tied": head if config.tie_word_embeddings else 0,
        "head, own": 0 if config.tie_word_embeddings else head,
        "hidden x inner": hidden * inner,
        "layers": layer * depth,
        "adapter": lora_r * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner)) * depth,
        "one": 2**20,
    }


def key(settings: PassSettings) -> str:
    """The name of settings in formulas.json."""
    dtypes = (str(each).removeprefix("torch.") for each in (settings.weights, settings.compute))
    kept = "checkpointing" if settings.checkpointing else "kept"
    spread = ("spread",) if settings.spread else ()
    return " ".join((settings.kind, settings.method, *dtypes, kept, settings.attention, *spread))


def formula(
    config: transformers.PreTrainedConfig, settings: PassSettings, *, tokens: int, completion_tokens: int
) -> tuple[dict[str, int], int] | None:
    """Bytes of a pass with gradients, by phase, and of one without; None if there is no formula for these.

    Args:
        config: of the model.
        settings: how it is trained.
        tokens: of the micro-batch.
        completion_tokens: of the micro-batch, among them.
    """
    fitted = coefficients().get(key(settings))
    is_known = config.model_type in MODEL_TYPES and config.hidden_size in HIDDEN
    if fitted is None or not is_known or settings.lora_target_modules != "all-linear":
        return None
    found = sizes(config, settings, tokens=tokens, completion_tokens=completion_tokens)
    training, forward = (
        {phase: round(sum(by * found[name] for name, by in sums.items())) for phase, sums in fitted[kind].items()}
        for kind in ("training", "forward")
    )
    return training, max(forward.values())


@cache
def coefficients() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Of each size, by settings, pass and phase."""
    return json.loads(FILE.read_text(encoding="utf-8"))
