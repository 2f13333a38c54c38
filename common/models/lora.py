"""Which modules of a model get a LoRA adapter: names become modules, and names that cannot work are refused.

peft itself takes any list of names and adapts what matches: a misspelt name would be left out without a word. Its
all-linear takes routers and experts as well where transformers 4 had linear layers, and they cannot be merged.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import inspect
import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import distributed, nn

from common.config import RLConfig
from common.sharding import whole
from common.values import ALL_LINEAR

if TYPE_CHECKING:
    from peft import PeftModel

# What plain LoRA can be added to, and merged into, see merged_weights.
_LINEAR = (nn.Linear, transformers.pytorch_utils.Conv1D)
_ADAPTABLE = (*_LINEAR, nn.Embedding)
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
            f"{odd[0]} of the model is {_a(modules[odd[0]])}, and LoRA is added to linear layers and "
            f"embeddings. The model has {_available(model)}",
        )
    obstacles = _obstacles(model)
    if unfit := [name for name in chosen if name in obstacles]:
        raise _refusal(
            config, f"{unfit[0]} of the model cannot be adapted: {obstacles[unfit[0]]}. Leave {names_in(unfit)} out"
        )
    if names == [ALL_LINEAR] and not chosen:
        raise _refusal(config, "nothing in the model can be adapted: it has no linear layers that are used as such")
    tied = _tied_names(model)
    if untied := [name for name in chosen if name in tied]:
        raise _refusal(
            config,
            f"the model ties {' and '.join(sorted(tied))}: they are one weight, and an adapter on "
            f"{' and '.join(untied)} would make two of it, which no checkpoint of this model can hold. Leave it out",
        )


def targets(config: RLConfig, model: transformers.PreTrainedModel, *, headless: bool = False) -> list[str]:
    """What peft gets as target_modules.

    Args:
        config: lora_target_modules is read.
        model: what the adapter is added to.
        headless: it lacks the policy's head, as a value model's backbone does. Its modules have shorter names,
            layers.0 instead of model.layers.0, and a name of the head is left out.

    Raises:
        ValueError: a name matches nothing in the model without a head.
    """
    names = _names(config)
    if names == [ALL_LINEAR]:
        return _matching(model, ALL_LINEAR)  # peft's own all-linear would take what cannot be adapted too
    if not headless:
        return names
    names = [name.removeprefix(f"{model.base_model_prefix}.") for name in names]
    unmatched = [name for name in names if not _matching(model, name)]
    _refuse_unmatched(model, config, [name for name in unmatched if name.split(".")[-1] not in _HEADS])
    if len(unmatched) == len(names):
        raise _refusal(
            config, f"a value model has no {', '.join(names)}, so nothing of it would learn. Add names of its layers"
        )
    return [name for name in names if name not in unmatched]


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter alone, with the same bytes in every process: peft writes its set of names in any order.

    One that is spread over processes is written whole: it is small, and peft and vLLM load nothing else.

    Args:
        model: with an adapter.
        folder: created if it does not exist.
        weights: from gathered_adapter, if the model is spread over processes.
    """
    settings = model.peft_config["default"]
    names = settings.target_modules
    if isinstance(names, set):
        settings.target_modules = sorted(names)
    try:
        model.save_pretrained(folder, selected_adapters=["default"], state_dict=weights)
    finally:
        settings.target_modules = names


def gathered_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of an adapter that is spread over processes, which all call this; none in others than the first.

    Args:
        model: with an adapter.

    Returns:
        Tensors on the CPU, by the names that they have in the model.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if ".default" in name:  # peft's name of it
            tensor = whole(parameter.detach())
            if distributed.get_rank() == 0:
                weights[name] = tensor.cpu()
            del tensor  # before the next one is made
    return weights


def load_adapter(base: transformers.PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """Add an adapter that was saved.

    Its tensors are under the names that the modules have in memory. peft 0.21 takes them for names of a checkpoint and
    renames them as transformers renames those, and `shared_experts` of Laguna, which matches the pattern of a
    checkpoint's `shared_expert.`, is then found nowhere. So whatever has a module's own name is copied to it. Remove
    this when convert_peft_adapter_state_dict_for_transformers leaves such names as they are.

    Args:
        base: the model that the adapter was trained on.
        folder: that peft wrote.
        is_trainable: otherwise it is frozen.

    Raises:
        ValueError: if the file lacks weights of the adapter.
    """
    from peft import PeftModel
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
    model.peft_config["default"].base_model_name_or_path = base.name_or_path  # it may lie elsewhere by now
    saved = load_peft_weights(str(folder), device="cpu")
    parameters = dict(model.named_parameters())
    own = {f"{name.removesuffix('.weight')}.default" + ".weight" * name.endswith(".weight"): name for name in saved}
    with torch.no_grad():
        for name in own.keys() & parameters.keys():
            parameters[name].copy_(saved[own[name]])
    # An adapter of transformers 4 has other names, and a tensor for each expert: more than there are in memory.
    wanted = [name for name in parameters if ".default" in name]
    if len(saved) < len(wanted):
        raise ValueError(
            f"adapter={folder}: it holds {len(saved)} of the {len(wanted)} tensors that its configuration asks for, "
            f"and not {next(name for name in wanted if name not in own)}. Copy the adapter's folder again."
        )
    return model


def describe_adapter(model: PeftModel, config: RLConfig) -> str:
    """A line that says which modules are adapted, how many parameters train, and what all-linear leaves out.

    Args:
        model: with its adapter.
        config: lora_target_modules is read.
    """
    from peft.tuners.lora import LoraLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    counts = Counter(name.split(".")[-1] for name in adapted)
    kinds = ", ".join(f"{name} {count}" for name, count in counts.items())
    trained, total = model.get_nb_trainable_parameters()
    modules = "module" if len(adapted) == 1 else "modules"
    line = f"LoRA: {len(adapted)} {modules} adapted ({kinds}), {trained:,} of {total:,} parameters train"
    return line + describe_left_out(model.get_base_model(), config)


def describe_left_out(model: transformers.PreTrainedModel, config: RLConfig) -> str:
    """What all-linear leaves out, and why, to be added to a line; empty if it is nothing, or names were given.

    Args:
        model: without its adapter; one without storage is enough.
        config: lora_target_modules is read.
    """
    if _names(config) != [ALL_LINEAR]:
        return ""
    left_out: dict[str, list[str]] = {}
    for name, reason in _obstacles(model).items():
        left_out.setdefault(reason, []).append(name)
    reasons = [f"{names_in(names)} ({reason})" for reason, names in left_out.items()]
    return f"; left out: {'; '.join(reasons)}" if reasons else ""


def names_in(modules: list[str]) -> str:
    """The last parts of modules' names, each once."""
    return ", ".join(dict.fromkeys(name.split(".")[-1] for name in modules))


def _a(module: nn.Module) -> str:
    """The name of a module's class with its article."""
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"


def _names(config: RLConfig) -> list[str]:
    return config.lora_target_modules.split(",")


def _matching(model: nn.Module, name: str) -> list[str]:
    """Names of the modules that peft adapts for a name: the whole name of a module, or the end of it after a dot."""
    if name == ALL_LINEAR:
        head, obstacles = model.get_output_embeddings(), _obstacles(model)
        linear = (each for each, module in model.named_modules() if isinstance(module, _LINEAR) and module is not head)
        return [each for each in linear if each not in obstacles]
    return [each for each, _ in model.named_modules() if each and f".{each}".endswith(f".{name}")]


def _obstacles(model: transformers.PreTrainedModel) -> dict[str, str]:
    """Modules with matrices that no adapter can be added to, by name, each with the reason."""
    found = {}
    for_experts, width = _names_of_experts(model), model.config.get_text_config().hidden_size
    language_model = _language_model(model)
    for name, module in model.named_modules():
        own = [parameter.shape for parameter in module.parameters(recurse=False)]
        if isinstance(module, _LINEAR):
            if not _is_plain(module):
                found[name] = f"{_a(module)}, which returns more than the product with its weight"
            elif name.split(".")[-1] in for_experts:
                found[name] = "peft takes the name for the experts'"
            elif not name.startswith(language_model):
                found[name] = "no part of the language model"
        elif not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)) and any(
            len(shape) > 1 and width in shape and min(shape) > 1 for shape in own
        ):
            found[name] = f"{_a(module)}, no linear layer"
    for name in read_by_kernels(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        found[name] = f"{_a(owner)} reads its weight without calling it"
    head = model.get_output_embeddings()
    return {name: reason for name, reason in found.items() if model.get_submodule(name) is not head}


def read_by_kernels(model: nn.Module) -> list[str]:
    """Names of linear layers whose weight is read by their parent, which does not call them.

    Args:
        model: without storage is enough.
    """
    return [
        f"{name}.{child}".lstrip(".")
        for name, module in model.named_modules()
        for child in _read_directly(type(module))
        if isinstance(module._modules.get(child), _LINEAR)
    ]


def _language_model(model: transformers.PreTrainedModel) -> str:
    """What the names of the part that sees text begin with; all of it, except in a multimodal model."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer returns the product with its weight and nothing else.

    Some routers derive from nn.Linear and return indices too, and some layers multiply in groups. What peft puts in
    their place would add to a tuple, or be merged into another product.
    """
    kind = type(linear)
    if not kind.__module__.startswith("transformers.models.") or kind.forward is nn.Linear.forward:
        return True
    rows = torch.zeros(2, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            product = linear(rows)
    except (RuntimeError, ValueError, IndexError):  # it expects rows of another shape
        return False
    return isinstance(product, torch.Tensor) and product.shape == (2, linear.out_features)


@cache
def _read_directly(kind: type[nn.Module]) -> frozenset[str]:
    """Children whose weight a class hands to a kernel itself, as the mixers of state-space models do.

    An adapter beside such a child would be passed over. A slice of a weight is read only to repeat how Bloom was
    trained, if its configuration asks for it.
    """
    if not kind.__module__.startswith("transformers"):  # also models with remote code, transformers_modules
        return frozenset()
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if base.__module__ == kind.__module__)
    return frozenset(re.findall(r"\bself\.(\w+)\.weight\b(?!\[|\.(?:dtype|device)\b)", source))


def _names_of_experts(model: transformers.PreTrainedModel) -> set[str]:
    """Last parts of names that peft reads as experts and routers of transformers 4, whatever has them now.

    peft 0.21 makes of such a target one on the experts' tensors, so that a shared expert's gate_proj cannot be meant.
    Remove this when LoraConfig can say that its names are those of the model (peft/utils/
    transformers_weight_conversion.py, _convert_peft_config_moe).
    """
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    # Importing peft takes a second, also in a run without an adapter, of which a memory plan knows the size.
    if model.config.model_type not in {*_MODEL_TO_CONVERSION_PATTERN, "mixtral"}:
        return set()  # peft adds mixtral to those of transformers
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


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
    tied |= set(_obstacles(model))
    found = (name for name, module in model.named_modules() if isinstance(module, _ADAPTABLE) and name not in tied)
    return ", ".join(dict.fromkeys(name.split(".")[-1] for name in found)) or "no linear layers"


def _tied_names(model: nn.Module) -> set[str]:
    """Modules whose weight is another module's too, and the two embeddings that the configuration ties."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, _ADAPTABLE)}
    users = Counter(module.weight for module in modules.values())
    ends = []
    if (
        model.config.get_text_config().to_dict().get("tie_word_embeddings")
        and model.get_output_embeddings() is not None
    ):
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {name for name, module in modules.items() if users[module.weight] > 1 or any(module is end for end in ends)}


def _refusal(config: RLConfig, reason: str) -> ValueError:
    return ValueError(
        f"lora_target_modules={config.lora_target_modules}: {reason}. Pass --lora_target_modules with other names, "
        "separated by commas, or all-linear."
    )


def adapted_modules(model: nn.Module, config: RLConfig) -> list[str]:
    """Names of the modules that get an adapter; names that match nothing are left out.

    Args:
        model: the policy; one without storage is enough.
        config: lora_target_modules is read.
    """
    return list(dict.fromkeys(each for name in _names(config) for each in _matching(model, name)))
