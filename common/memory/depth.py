"""A model with fewer layers: two depths of the same kinds of layers, from which memory at any depth follows."""

from __future__ import annotations

from copy import deepcopy

import transformers


def period(config: transformers.PreTrainedConfig) -> int:
    """After how many layers the kinds of layers repeat; 1 where all are alike."""
    kinds = layer_kinds(config)
    depth = len(kinds)
    return next(p for p in range(1, depth + 1) if all(kinds[i] == kinds[i - p] for i in range(p, depth)))


def layer_kinds(config: transformers.PreTrainedConfig) -> list[str]:
    """The kind of each layer, as far as a configuration says."""
    text = config.get_text_config()
    return list(vars(text).get("layer_types") or ["layer"] * text.num_hidden_layers)


def two_depths(config: transformers.PreTrainedConfig) -> list[int]:
    """Two depths that differ by one period from each other and by whole periods from the model's; or its own alone."""
    depth, step = config.get_text_config().num_hidden_layers, period(config)
    first = depth % step + step * (2 if step == 1 else 1)
    return [first, first + step] if first + step < depth else [depth]


def with_depth(config: transformers.PreTrainedConfig, depth: int) -> transformers.PreTrainedConfig:
    """A copy of a model's configuration with its first `depth` layers."""
    shorter = deepcopy(config)
    text = shorter.get_text_config()
    full = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == full and full > depth:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return shorter
