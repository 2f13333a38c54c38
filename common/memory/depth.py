"""A model with fewer layers: two depths of the same kinds of layers, from which memory at any depth follows."""

from __future__ import annotations

from copy import deepcopy

import transformers
from torch import nn

# Ends of the names of lists that are no settings of layers, however many layers there are.
_NOT_OF_LAYERS = ("multipliers", "token_id", "token_ids", "section", "architectures")


def two_depths(kinds: list[tuple]) -> list[int]:
    """Two depths with the same first layers that differ by one period, whole periods below the model's; or its own.

    Args:
        kinds: of each layer, see `layer_kinds`.
    """
    depth = len(kinds)
    found = _prefix_and_period(kinds)
    if found is None:
        return [depth]
    prefix, step = found
    # A single layer may free what two keep.
    first = prefix + (depth - prefix) % step + step * (2 if step == 1 else 1)
    return [first, first + step] if first + step < depth else [depth]


def _prefix_and_period(kinds: list[tuple]) -> tuple[int, int] | None:
    """How many layers come before those whose kinds repeat, and after how many they do; the fewest in all."""
    depth = len(kinds)
    for total in range(1, depth):
        for step in range(1, total + 1):
            prefix = total - step
            if prefix + 2 * step <= depth and all(kinds[i] == kinds[i - step] for i in range(total, depth)):
                return prefix, step
    return None


def layer_kinds(model: transformers.PreTrainedModel) -> list[tuple]:
    """Of each layer all that decides about its memory: its modules, shapes and switches, and what its settings say.

    Configurations have too many ways to say which layer is of which kind, so the layers themselves are compared.

    Args:
        model: without storage is enough.
    """
    text = model.config.get_text_config()
    depth = text.num_hidden_layers
    kinds: list[tuple] = [()] * depth
    named = [value for value in (vars(text).get("layer_types"), vars(text).get("layers_block_type")) if value]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    for each in (*named, *([_kind(layer) for layer in layers] for layers in lists)):
        kinds = [(*kind, more) for kind, more in zip(kinds, each, strict=False)]
    return kinds if len(kinds) == depth else [(index,) for index in range(depth)]


def _kind(layer: nn.Module) -> tuple:
    """What two layers must share to need the same memory."""
    return tuple(
        (name, type(module).__name__, *_shapes(module), *_switches(module)) for name, module in layer.named_modules()
    )


def _shapes(module: nn.Module) -> list[tuple]:
    return [(name, tuple(each.shape)) for name, each in module.named_parameters(recurse=False)]


def _switches(module: nn.Module) -> list[tuple]:
    """Attributes that are set to one of few values, such as is_sliding, layer_type or sliding_window."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | str) or (isinstance(value, int) and "window" in name)
    ]


def with_depth(config: transformers.PreTrainedConfig, depth: int) -> transformers.PreTrainedConfig:
    """A copy of a model's configuration with its first `depth` layers."""
    shorter = deepcopy(config)
    text = shorter.get_text_config()
    full = text.num_hidden_layers
    for name, value in vars(text).items():
        is_of_layers = isinstance(value, list | tuple) and len(value) == full and not name.endswith(_NOT_OF_LAYERS)
        if is_of_layers and full > depth:
            setattr(text, name, value[:depth])
        elif name.endswith("layer_ids") and isinstance(value, list):  # which layers are of a kind
            setattr(text, name, [index for index in value if index < depth])
    text.num_hidden_layers = depth
    return shorter
