"""Settings of a configuration that change what a forward pass gives: training needs the plain ones.

Some models ship with others. A policy is saved with those that its folder had.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import transformers
from torch import nn
from transformers.utils import CONFIG_NAME

# With logits of routers the model adds a loss of its own, hidden states of all layers take memory, attention weights
# exist in eager attention only, and a tuple has no names.
_PLAIN = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}

# Model -> where in its configuration -> the settings that its folder has and training does not use.
_shipped: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], dict[str, Any]]] = WeakKeyDictionary()


def use_plain_outputs(config: transformers.PreTrainedConfig) -> None:
    """Change such settings of a configuration, in parts such as text_config too."""
    for _, part in parts(config):
        for name in _of(part):
            setattr(part, name, _PLAIN[name])


def keep_outputs(model: transformers.PreTrainedModel, config: transformers.PreTrainedConfig) -> None:
    """Remember for `restore_outputs` which settings a model was shipped with.

    Args:
        model: loaded with plain outputs.
        config: of its folder, unchanged; a wrapper's, if the language model was loaded alone.
    """
    originals = {type(part): _of(part) for _, part in parts(config)}
    found = {place: originals[type(part)] for place, part in parts(model.config)}
    _shipped[model] = {place: settings for place, settings in found.items() if settings}


def restore_outputs(model: nn.Module, folder: Path) -> None:
    """Write the settings that a model was shipped with into the config.json that was saved of it.

    Args:
        model: without peft around it; any other than one that `keep_outputs` has seen has none.
        folder: with its config.json.
    """
    kept = _shipped.get(model)
    if not kept:
        return
    file = folder / CONFIG_NAME
    saved = json.loads(file.read_bytes())
    for place, settings in kept.items():
        part = saved
        for name in place:
            part = part[name]
        part.update(settings)
    file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parts(
    config: transformers.PreTrainedConfig, place: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], transformers.PreTrainedConfig]]:
    """A configuration and those inside it, each with the names of the attributes that lead to it."""
    yield place, config
    for name, part in vars(config).items():
        if isinstance(part, transformers.PreTrainedConfig):
            yield from parts(part, (*place, name))


def _of(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The settings of a configuration that are not the plain ones."""
    settings = config.to_dict()
    return {name: settings[name] for name, plain in _PLAIN.items() if settings.get(name, plain) != plain}
