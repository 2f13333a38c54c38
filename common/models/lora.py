"""Which modules of a model get a LoRA adapter: names become modules, and names that cannot work are refused.

peft itself takes any list of names and adapts what matches: a misspelt name would be left out without a word.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from collections import Counter
from typing import TYPE_CHECKING

import transformers
from torch import nn

from common.config import RLConfig
from common.values import ALL_LINEAR

if TYPE_CHECKING:
    from peft import PeftModel

# What plain LoRA can be added to, and merged into, see merged_weights.
_ADAPTABLE = (nn.Linear, nn.Embedding, transformers.pytorch_utils.Conv1D)
# The last part of the output head's name. A value model has no such head, so it leaves these names out.
_HEADS = ("lm_head", "embed_out")


def check_targets(model: transformers.PreTrainedModel, config: RLConfig) -> None:
    """Refuse names in lora_target_modules that cannot be adapted as they are written.

    Args:
        model: the policy; one without storage is enough.
        config: lora_target_modules is read.

    Raises:
        ValueError: a name matches nothing, or a module that LoRA cannot be added to, or an adapter would untie
            weights that the model ties.
    """
    names = _names(config)
    matches = {name: _matching(model, name) for name in names}
    _refuse_unmatched(model, config, [name for name, found in matches.items() if not found])
    modules = dict(model.named_modules())
    chosen = dict.fromkeys(module for found in matches.values() for module in found)
    if odd := [name for name in chosen if not isinstance(modules[name], _ADAPTABLE)]:
        raise _refusal(
            config,
            f"{odd[0]} of the model is a {type(modules[odd[0]]).__name__}, and LoRA is added to linear layers and "
            f"embeddings. The model has {_available(model)}",
        )
    tied = _tied_names(model)
    if untied := [name for name in chosen if name in tied]:
        raise _refusal(
            config,
            f"the model ties {' and '.join(sorted(tied))}: they are one weight, and an adapter on "
            f"{' and '.join(untied)} would make two of it, which no checkpoint of this model can hold. Leave it out",
        )


def targets(config: RLConfig, headless: transformers.PreTrainedModel | None = None) -> str | list[str]:
    """What peft gets as target_modules.

    Args:
        config: lora_target_modules is read.
        headless: a model without the policy's head, such as a value model's backbone; None: the policy. Its modules
            have shorter names, layers.0 instead of model.layers.0, and a name of the head is left out.

    Raises:
        ValueError: a name matches nothing in the model without a head.
    """
    names = _names(config)
    if names == [ALL_LINEAR]:
        return ALL_LINEAR
    if headless is None:
        return names
    names = [name.removeprefix(f"{headless.base_model_prefix}.") for name in names]
    unmatched = [name for name in names if not _matching(headless, name)]
    _refuse_unmatched(headless, config, [name for name in unmatched if name.split(".")[-1] not in _HEADS])
    if len(unmatched) == len(names):
        raise _refusal(
            config, f"a value model has no {', '.join(names)}, so nothing of it would learn. Add names of its layers"
        )
    return [name for name in names if name not in unmatched]


def describe_adapter(model: PeftModel) -> str:
    """A line that says which modules are adapted, and how many parameters train."""
    from peft.tuners.lora import LoraLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    counts = Counter(name.split(".")[-1] for name in adapted)
    kinds = ", ".join(f"{name} {count}" for name, count in counts.items())
    trained, total = model.get_nb_trainable_parameters()
    return f"LoRA: {len(adapted)} modules adapted ({kinds}), {trained:,} of {total:,} parameters train"


def _names(config: RLConfig) -> list[str]:
    return config.lora_target_modules.split(",")


def _matching(model: nn.Module, name: str) -> list[str]:
    """Names of the modules that peft adapts for a name: the whole name of a module, or the end of it after a dot."""
    if name == ALL_LINEAR:
        head = model.get_output_embeddings()
        linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
        return [each for each, module in model.named_modules() if isinstance(module, linear) and module is not head]
    return [each for each, _ in model.named_modules() if each and f".{each}".endswith(f".{name}")]


def _refuse_unmatched(model: nn.Module, config: RLConfig, unmatched: list[str]) -> None:
    if unmatched:
        raise _refusal(
            config,
            f"nothing in the model is called {' or '.join(unmatched)}, and every name must match a module, or less "
            f"would be trained than was asked for. The model has {_available(model)}",
        )


def _available(model: nn.Module) -> str:
    """The last parts of the names of what can be adapted."""
    tied = _tied_names(model)
    found = (name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE) and name not in tied)
    return ", ".join(dict.fromkeys(name.split(".")[-1] for name in found)) or "no linear layers"


def _tied_names(model: nn.Module) -> set[str]:
    """Modules whose weight is another module's too, and the two embeddings that the configuration ties."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)}
    users = Counter(module.weight for module in modules.values())
    ends = []
    if model.config.get_text_config().tie_word_embeddings and model.get_output_embeddings() is not None:
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name for name, module in modules.items() if users[module.weight] > 1 or any(module is end for end in ends)}


def _refusal(config: RLConfig, reason: str) -> ValueError:
    return ValueError(
        f"lora_target_modules={config.lora_target_modules}: {reason}. Pass --lora_target_modules with other names, "
        "separated by commas, or all-linear."
    )
