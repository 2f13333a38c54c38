"""The bytes of one micro-batch of a model, above its weights, gradients and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers

from common.memory.fake import measured
from common.memory.formulas import formula


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """What decides about the memory of a pass, beside the model and the number of tokens.

    Attributes:
        kind: "policy" (log-probs), "value" (a value model's values) or "score" (a reward model, never trained).
        method: "full", "lora" or "qlora".
        weights: dtype of the model's own weights.
        compute: dtype of forward passes; below that of the weights it is autocast's.
        checkpointing: recompute each layer's activations in the backward pass.
        lora_r: rank of the adapter.
        lora_target_modules: as the setting of this name.
        attention: "flash": what CUDA allocates; otherwise transformers' implementation on the CPU.
        spread: all weights are trained and spread over processes, so that no gradient is there when a pass begins, and
            those of a layer leave it at once.
    """

    kind: str = "policy"
    method: str = "lora"
    weights: torch.dtype = torch.bfloat16
    compute: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    lora_r: int = 64
    lora_target_modules: str | tuple[str, ...] = "all-linear"
    attention: str = "flash"
    spread: bool = False


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """Bytes above the resident weights, gradients and optimizer.

    Attributes:
        training: peak of a forward and a backward pass.
        forward: peak of a forward pass without gradients.
        source: "formula" or "fake layers".
        phases: peak of each phase of the pass with a backward pass; empty: not known apart.
    """

    training: int
    forward: int
    source: str
    phases: dict[str, int] = field(default_factory=dict)


def pass_bytes(
    config: transformers.PreTrainedConfig,
    settings: PassSettings,
    *,
    rows: int,
    row_tokens: int,
    completion_tokens: int,
) -> PassBytes:
    """Predict what one micro-batch needs above the model's weights, gradients and optimizer.

    Args:
        config: of the model.
        settings: how it is trained.
        rows: of the micro-batch.
        row_tokens: prompt and completion of each row.
        completion_tokens: of each row, at most row_tokens - 1.

    Raises:
        ValueError: the model cannot be predicted.
    """
    tokens, completions = rows * row_tokens, rows * completion_tokens
    if known := formula(config, settings, tokens=tokens, completion_tokens=completions):
        training, forward = known
        most = max(training.values())
        return PassBytes(training=most, forward=forward, source="formula", phases=training)
    found = measured(config, settings, rows=rows, row_tokens=row_tokens, completion_tokens=completion_tokens)
    return PassBytes(training=found.training, forward=found.forward, source="fake layers", phases=found.phases)
