"""From weights in memory to those of a checkpoint: transformers renames, fuses and splits weights while it loads.

Mixtral's experts are one tensor in memory and three per expert in a checkpoint, for example. vLLM and everybody who
opens a checkpoint expect the names and shapes of the checkpoint. transformers has the way back only for a whole model
at once (`revert_weight_conversion`), which with merged adapters would be a second model in memory; here each group of
weights that belong together goes back as soon as it is complete.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import transformers
from torch import Tensor

from common.models.weight_files import weight_names

# The rest of transformers.core_model_loading is imported where it is used: it takes over a second.
if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

# Where from_pretrained keeps the conversions that the checkpoint needed, for save_pretrained.
_CONVERSIONS = "_weight_conversions"


# Model -> the conversions and names that a plan was made for, and what `_plan` gave.
_plans: WeakKeyDictionary[transformers.PreTrainedModel, tuple] = WeakKeyDictionary()


@dataclass
class _Group:
    """Weights in memory that one conversion turns into weights of a checkpoint.

    Attributes:
        converter: from memory to checkpoint.
        patterns: name in memory -> the pattern of the converter that it matches, in the order it takes them.
        waiting: those that have come so far.
    """

    converter: WeightConverter
    patterns: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, Tensor] = field(default_factory=dict)


def in_checkpoint_layout(
    model: transformers.PreTrainedModel, names: Sequence[str], weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Give weights the names and shapes that they have in a checkpoint of this model.

    Args:
        model: the model; one that was loaded goes back to the layout of its own checkpoint.
        names: all names that `weights` will yield.
        weights: (name in memory, tensor).

    Yields:
        (name in a checkpoint, tensor): in the order of `weights`, untouched where there is nothing to convert; a
        group of weights once its last one has come. Split weights are views of the fused ones.
    """
    new_names, groups = _plan_of(model, names)
    for name, tensor in weights:
        new_name = new_names[name]
        group = groups.get(new_name)
        if group is None:
            yield new_name, tensor
            del tensor  # before the next one is made
            continue
        group.waiting[name] = tensor
        if len(group.waiting) == len(group.patterns):
            del tensor, groups[new_name]
            yield from _converted(group, new_name, model)


def _plan_of(model: transformers.PreTrainedModel, names: Sequence[str]) -> tuple[dict[str, str], dict[str, _Group]]:
    """What `_plan` gives, made once for the names of a model: a push comes after each step. Groups are new ones."""
    loaded = vars(model).get(_CONVERSIONS)
    known = _plans.get(model)
    if known is None or known[0] is not loaded or known[1] != names:
        # Of a model that was not loaded the conversions are looked up, and may be others the next time.
        known = (loaded, list(names), *_plan(model, names))
        if loaded is not None:
            _plans[model] = known
    *_, new_names, groups = known
    return new_names, {name: _Group(group.converter, dict(group.patterns)) for name, group in groups.items()}


def _plan(model: transformers.PreTrainedModel, names: Iterable[str]) -> tuple[dict[str, str], dict[str, _Group]]:
    """The new name of each weight, and for each new name that needs more than that, its group.

    It does what revert_weight_conversion of transformers does with names.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    reverse = [conversion.reverse_transform() for conversion in _conversions(model)[::-1]]
    renamings, converters = _by_kind(reverse)
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    new_names: dict[str, str] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings act only after a weight that sorts before
        new_names[name], pattern = rename_source_key(name, renamings, converters, reverse=True)
        if pattern is not None:
            group = groups.setdefault(new_names[name], _Group(by_pattern[pattern]))
            group.patterns[name] = pattern
    return new_names, groups


def _converted(group: _Group, new_name: str, model: transformers.PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What a complete group becomes; it keeps none of its tensors."""
    converter = deepcopy(group.converter)  # it collects what it converts
    for name, pattern in group.patterns.items():
        converter.add_tensor(new_name, name, pattern, group.waiting.pop(name))
    converted = converter.convert(new_name, model=model, config=model.config)
    del converter
    while converted:
        name = next(iter(converted))
        tensor = converted.pop(name)
        yield name, tensor[0] if isinstance(tensor, list) else tensor


def use_layout_of(model: transformers.PreTrainedModel, path: str | Path) -> None:
    """Give a model that was not loaded the conversions that loading it from `path` would need.

    Args:
        model: made from a configuration, such as one without storage.
        path: hub id or folder of its checkpoint. Without weights in it the layout is that of a new checkpoint.

    Raises:
        ValueError: if the file with the names of the weights is damaged.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    names = weight_names(path)
    if names is None:
        return
    conversions = get_model_conversion_mapping(model)
    renamings, converters = _by_kind(conversions)
    own = model.state_dict()
    for name in sorted(names, key=dot_natural_key):
        rename_source_key(name, renamings, converters, model.base_model_prefix, own)
    setattr(model, _CONVERSIONS, [conversion for conversion in conversions if conversion.was_used()])


def from_checkpoint(
    model: transformers.PreTrainedModel, names: Iterable[str]
) -> list[tuple[str, WeightTransform, list[tuple[str, str]]]]:
    """Which weights of a checkpoint make which of a model, as from_pretrained decides it.

    Args:
        model: without storage is enough.
        names: of the checkpoint's weights. Those that the model has no place for are left out.

    Returns:
        For each conversion: the name in memory, the first of several if it splits; the conversion, which has no
        tensors yet; and what goes into it, as (name in the checkpoint, pattern that it stands for).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

    renamings, converters = _by_kind(get_model_conversion_mapping(model))
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[WeightTransform, list[tuple[str, str]]]] = {}
    for name in sorted(names, key=dot_natural_key):  # the order in which converters stack experts
        new_name, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if new_name not in own and name in own:
            new_name, pattern = rename_source_key(name, [], [], prefix, own)
        if new_name in own:
            new = WeightRenaming(name, new_name) if pattern is None else deepcopy(by_pattern[pattern])
            found.setdefault(new_name, (new, []))[1].append((name, name if pattern is None else pattern))
    return [(new_name, *conversion) for new_name, conversion in found.items()]


def is_converter(conversion: WeightTransform) -> bool:
    """Whether a conversion makes other tensors, and does not only rename one.

    Args:
        conversion: from `from_checkpoint`.
    """
    return bool(_by_kind([conversion])[1])


def stacks_rows(conversion: WeightTransform) -> bool:
    """Whether row i of what a conversion makes is made of the i-th tensors alone, as experts are stacked.

    Args:
        conversion: from `from_checkpoint`.
    """
    from transformers.core_model_loading import Concatenate, MergeModulelist

    first, *others = conversion.operations
    stacks = isinstance(first, MergeModulelist) and first.dim == 0
    return stacks and all(isinstance(each, Concatenate) and each.dim > 0 for each in others)


def _conversions(model: transformers.PreTrainedModel) -> list[WeightTransform]:
    """From checkpoint to memory, in the order of loading, as save_pretrained chooses them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    loaded = vars(model).get(_CONVERSIONS)
    if loaded is not None:
        return loaded
    # Only loading can tell whether a checkpoint has an optional prefix; a new one has none.
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]


def _by_kind(conversions: Iterable[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    conversions = list(conversions)
    return (
        [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)],
        [conversion for conversion in conversions if isinstance(conversion, WeightConverter)],
    )
