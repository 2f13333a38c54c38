"""Exporting the policy's weights: to the sampler, and into a plain checkpoint.

LoRA adapters are merged one tensor at a time into new tensors, so there is never a second model. The policy itself is
not changed: adding an adapter to its weights and subtracting it again leaves rounding errors, and the sampler, which
keeps tensors until it has all parts of a fused layer, would see the subtraction.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn

from common.logprobs import without_adapter
from common.models.quantization import in_floating_point

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def policy_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a causal language model under their checkpoint names, active LoRA adapters merged.

    Args:
        model: a transformers model, or one inside peft. It must not change before the last tensor was used.

    Yields:
        (name, tensor) in the order of the modules, without gradient; tied weights once. Tensors are the model's own,
        except where an adapter is merged.

    Raises:
        ValueError: if an adapter cannot be merged, or unties embeddings that the model's configuration ties.
    """
    base = without_adapter(model)
    head = base.get_output_embeddings()
    head_weight = next(f"{name}.weight" for name, module in base.named_modules() if module is head)
    tied = base.config.get_text_config().tie_word_embeddings
    known: set[nn.Parameter] = set()
    for name, tensor in merged_weights(base):
        if tensor in known:
            continue
        if tied and name == head_weight:
            raise ValueError(
                f"an adapter makes {name} differ from the input embeddings, but the model's configuration ties "
                "the two, so that a checkpoint has one tensor for both. Leave embeddings out of lora_target_modules."
            )
        if isinstance(tensor, nn.Parameter):  # not merged tensors, which would all stay in memory
            known.add(tensor)
            tensor = tensor.detach()
        yield name, tensor


def checkpoint_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a complete checkpoint, tied weights once, from a model without storage."""
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
    return {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}


def complete_weights(
    weights: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and raise if they are incomplete: vLLM would leave half a fused layer uninitialised."""
    missing = set(shapes)
    for name, tensor in weights:
        if name not in missing:
            problem = "comes twice" if name in shapes else "is not a weight of the model"
            raise ValueError(
                f"push of {name}: it {problem}, and vLLM would not load the policy. Push what "
                "policy_weights yields for the model that the engine was created for."
            )
        if tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"push of {name} with shape {tuple(tensor.shape)}: the engine's model has {shapes[name]}. Create "
                "the engine from the policy's own folder."
            )
        missing.remove(name)
        yield name, tensor.detach()
    if missing:
        raise ValueError(
            f"push without {len(missing)} of {len(shapes)} weights, such as {min(missing)}: vLLM would sample from "
            "uninitialised memory. Push all weights at once."
        )


def merged_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Weights of a module and its children under their own names, active LoRA adapters merged.

    Args:
        module: a model, or a part of one inside peft.
        prefix: put before each name.

    Yields:
        (name, tensor), tied weights as often as they occur.

    Raises:
        ValueError: if an adapter cannot be merged.
    """
    if _is_from_peft(module):
        yield from _merged_layer(module, prefix)
    else:
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, in_floating_point(parameter)
        for name, child in module.named_children():
            yield from merged_weights(child, f"{prefix}{name}.")


def _is_from_peft(module: nn.Module) -> bool:
    """Whether the module is peft's; importing peft takes seconds, and if nothing imported it, no module is."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _merged_layer(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """What merged_weights yields for a module that peft put in place of the model's own."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        trained = [name for name in module.active_adapters if name in module.modules_to_save]
        use_trained = trained and not module.disable_adapters
        yield from merged_weights(
            module.modules_to_save[trained[0]] if use_trained else module.original_module, prefix
        )
    elif isinstance(module, LoraLayer):
        layer = module.get_base_layer()
        yield f"{prefix}weight", _merged_weight(module, prefix)
        for name, parameter in layer.named_parameters(recurse=False):
            if name != "weight":
                yield prefix + name, parameter
    else:
        raise _cannot_merge(prefix, type(module).__name__)


@torch.no_grad()
def _merged_weight(module: LoraLayer, prefix: str) -> Tensor:
    """W + sum of scaling x B A over the active adapters, summed in float32 and rounded once; W itself without any."""
    weight = in_floating_point(module.get_base_layer().weight)
    adapters = [
        name for name in module.active_adapters if name in module.scaling and name not in module.merged_adapters
    ]
    if module.disable_adapters or not adapters:
        return weight
    merged = weight.to(torch.float32, copy=True)
    for adapter in adapters:
        if adapter in module.lora_variant:
            raise _cannot_merge(prefix, type(module.lora_variant[adapter]).__name__)
        if module.lora_bias[adapter]:
            raise _cannot_merge(prefix, "lora_bias")
        if not weight.is_floating_point():
            raise _cannot_merge(prefix, f"weights in {weight.dtype}")
        merged += module.get_delta_weight(adapter)
    return merged.to(weight.dtype)


def _cannot_merge(prefix: str, kind: str) -> ValueError:
    return ValueError(
        f"{prefix.removesuffix('.')} has {kind}: the sampler gets the policy with its adapter merged, and only "
        "plain LoRA can be merged. Use LoRA without variants on Linear and Embedding modules, or sampler=transformers."
    )
