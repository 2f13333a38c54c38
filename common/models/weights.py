"""Exporting the policy's weights: to the sampler, and into a plain checkpoint.

LoRA adapters are merged one tensor at a time into new tensors, so there is never a second model. The policy itself is
not changed: adding an adapter to its weights and subtracting it again leaves rounding errors, and the sampler, which
keeps tensors until it has all parts of a fused layer, would see the subtraction.

Of a policy that is spread over processes, each process merges and rounds its own rows before they are gathered, one
tensor at a time. Every process must then ask for all of them, together with the others.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor, nn

from common.logprobs import has_adapter, without_adapter
from common.models.layout import in_checkpoint_layout, use_layout_of
from common.models.quantization import in_floating_point, scales_of
from common.sharding import is_part, own_rows, rows_of, whole

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from torch.distributed.tensor import DTensor

# Bytes of a tensor that are gathered at once: gloo and NCCL take as much again meanwhile.
GATHERED_AT_ONCE = 2**25

# Has the tensors that it is called with on the device within its context.
OnDevice = Callable[[Sequence[Tensor]], AbstractContextManager]


def policy_weights(
    model: nn.Module, on_device: OnDevice | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint of a causal language model holds, active LoRA adapters merged.

    These are the names and shapes of the checkpoint that the model was loaded from, which transformers may have
    renamed, fused or split for use in memory.

    Args:
        model: a transformers model, or one inside peft. It must not change before the last tensor was used.
        on_device: has what a weight is made from, with its scales and adapters, on the device meanwhile; None: all of
            it is where it is wanted.
        dtype: matrices that are spread over processes are rounded to it before they are gathered; None: as they are.

    Yields:
        (name, tensor) in the order of the modules, without gradient: parameters, and buffers that belong to the
        model; tied weights once. Tensors are the model's own or views of them, or new ones: where an adapter is
        merged, with `on_device`, and what is spread over processes.

    Raises:
        ValueError: if an adapter cannot be merged, or unties embeddings that the model's configuration ties.
    """
    base = without_adapter(model)
    weights = _without_tied(base)
    values = (weight.named_value(on_device, dtype) for weight in weights)
    yield from in_checkpoint_layout(base, [weight.name for weight in weights], values)


def weights_layout(model: nn.Module) -> dict[str, Tensor]:
    """What policy_weights will yield, without gathering or merging anything: tensors of that shape and type.

    Args:
        model: as in policy_weights.

    Returns:
        Names, each with a tensor without storage, in that order.
    """
    base = without_adapter(model)
    weights = _without_tied(base)
    values = ((weight.name, _empty(weight.tensor)) for weight in weights)
    return dict(in_checkpoint_layout(base, [weight.name for weight in weights], values))


def weights_in_memory(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What policy_weights yields, under the names that the model's own state_dict has, for load_state_dict."""
    for weight in _without_tied(without_adapter(model)):
        yield weight.name, weight.value()


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights with NaN or infinite numbers, as the model's own state_dict has them; adapters by their own.

    Args:
        model: a transformers model, or one inside peft; of a sharded one, all processes must ask.
    """
    bad = (name for name, weight in model.named_parameters() if not whole(weight.detach().isfinite()).all())
    if not has_adapter(model):
        return list(bad)
    return [name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in bad]


def checkpoint_shapes(model: str, config: transformers.PreTrainedConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a complete checkpoint, tied weights once, from a model without storage.

    Args:
        model: hub id or folder. If it holds weights, the layout is theirs, else that of a new checkpoint.
        config: of the model; None: read it.
    """
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(
            config or transformers.AutoConfig.from_pretrained(model, trust_remote_code=False), trust_remote_code=False
        )
    use_layout_of(skeleton, model)
    return {name: tuple(tensor.shape) for name, tensor in policy_weights(skeleton)}


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
        del tensor  # before the next one is made
    if missing:
        raise ValueError(
            f"push without {len(missing)} of {len(shapes)} weights, such as {min(missing)}: vLLM would sample from "
            "uninitialised memory. Push all weights at once."
        )


def merged_weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a module and its children under their own names, active adapters merged.

    Args:
        module: a model, or a part of one inside peft.
        prefix: put before each name.

    Yields:
        (name, tensor) without gradient, tied weights as often as they occur.

    Raises:
        ValueError: if an adapter cannot be merged.
    """
    for weight in _weights(module, prefix):
        yield weight.name, weight.value()


def merged_layout(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """What merged_weights will yield, as weights_layout says it of policy_weights."""
    return {weight.name: _empty(weight.tensor) for weight in _weights(module, prefix)}


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """One weight of the model, not yet merged.

    Attributes:
        name: in the model's own state_dict, without peft's parts.
        tensor: the model's own.
        layers: those of peft with an active adapter on it.
    """

    name: str
    tensor: Tensor
    layers: tuple[LoraLayer, ...] = ()

    @property
    def identity(self) -> Hashable:
        """The same for two weights that are one, with the same adapters."""
        return (id(self.tensor), *map(id, self.layers))

    @property
    def parts(self) -> list[Tensor]:
        """All tensors that `value` reads."""
        parts = [self.tensor, *scales_of(self.tensor)]
        for layer in self.layers:
            for kind in map(layer.get_submodule, layer.adapter_layer_names):
                for adapter in (each for each in _active(layer) if each in kind):
                    parts += kind[adapter].parameters() if isinstance(kind[adapter], nn.Module) else [kind[adapter]]
        return list(dict.fromkeys(parts))

    def named_value(self, on_device: OnDevice | None, dtype: torch.dtype | None) -> tuple[str, Tensor]:
        """Its name, and its value made on the device."""
        with nullcontext() if on_device is None else on_device(self.parts):
            return self.name, self.value(dtype)

    @torch.no_grad()
    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """W + sum of scaling x B A over the active adapters, summed in float32 and rounded once; else W itself.

        Args:
            dtype: as in policy_weights.
        """
        if is_part(self.tensor):
            return gathered(self._merged(self.tensor.to_local(), _own_rows_of_product), self.tensor, dtype)
        return self._merged(in_floating_point(self.tensor), _product)

    def _merged(self, weight: Tensor, product: Callable[[LoraLayer, str, Tensor], Tensor]) -> Tensor:
        """The weight, or rows of it, with what `product` gives for each active adapter."""
        if not self.layers:
            return weight.detach()
        if not weight.is_floating_point():
            raise _cannot_merge(self.name, f"weights in {weight.dtype}")
        merged = weight.to(torch.float32, copy=True)
        for layer in self.layers:
            for adapter in _active(layer):
                if adapter in layer.lora_variant:
                    raise _cannot_merge(self.name, type(layer.lora_variant[adapter]).__name__)
                if layer.lora_bias[adapter]:
                    raise _cannot_merge(self.name, "lora_bias")
                merged += product(layer, adapter, self.tensor)
        return merged.to(weight.dtype)


def gathered(rows: Tensor, like: DTensor, dtype: torch.dtype | None = None) -> Tensor:
    """A whole tensor from the rows of all processes, which must all call this.

    Beside the result it takes this process's part and GATHERED_AT_ONCE bytes.

    Args:
        rows: of this process, as FSDP2 splits a tensor: the last processes may have fewer, or none.
        like: the tensor that they are rows of, whose own numbers may be others.
        dtype: matrices are rounded to it first; None: as they are. Vectors are no traffic, and samplers keep some of
            them in float32.

    Returns:
        A new tensor of the shape of `like`, contiguous.
    """
    mesh = like.device_mesh
    assert mesh.ndim == 1 and [each.is_shard(0) for each in like.placements] == [True], like.placements
    if dtype is None or like.dim() < 2 or not rows.is_floating_point():
        dtype = rows.dtype
    _, most = rows_of(len(like), 0, mesh.size())
    part = rows.contiguous() if rows.dtype == dtype and len(rows) == most else None
    if part is None:
        part = torch.empty((most, *like.shape[1:]), dtype=dtype, device=rows.device)
        part[: len(rows)].copy_(rows)
    full = part.new_empty((mesh.size(), *part.shape))
    at_once = max(1, GATHERED_AT_ONCE * most // max(1, full.nbytes))  # rows of each process
    for first in range(0, most, at_once):
        piece = slice(first, first + at_once)
        torch.distributed.all_gather([each[piece] for each in full], part[piece], group=mesh.get_group())
    return full.flatten(0, 1)[: len(like)]


def _product(layer: LoraLayer, adapter: str, _: Tensor) -> Tensor:
    """Scaling x B A, in the shape of the layer's weight."""
    return whole(layer.get_delta_weight(adapter))


def _own_rows_of_product(layer: LoraLayer, adapter: str, weight: DTensor) -> Tensor:
    """This process's rows of scaling x B A. All processes call this together, for A has to be whole.

    Of linear layers only these rows are computed. Of others, whose product peft transposes or takes apart, all are.
    """
    from peft.tuners.lora import Linear

    is_plain = isinstance(layer, Linear) and not layer.fan_in_fan_out
    with _plain_adapter(layer, adapter, own_rows_of=("lora_B",) if is_plain else ()):
        product = layer.get_delta_weight(adapter)
    return product if is_plain else product[own_rows(weight)]


@contextmanager
def _plain_adapter(layer: LoraLayer, adapter: str, own_rows_of: Sequence[str]) -> Iterator[None]:
    """Within it an adapter has plain tensors for those that are spread: whole ones, or this process's rows.

    Args:
        layer: with the adapter.
        adapter: its name.
        own_rows_of: kinds of weights, such as lora_B, that are not gathered.
    """
    replaced = []
    try:
        for name in layer.adapter_layer_names:
            kind = layer.get_submodule(name)
            if adapter not in kind:
                continue
            is_module = isinstance(kind[adapter], nn.Module)
            for owner in kind[adapter].modules() if is_module else [kind]:
                for key in list(owner._parameters) if is_module else [adapter]:
                    part = owner._parameters[key]
                    if part is not None and is_part(part):
                        rows = part.to_local()
                        plain = rows if name in own_rows_of else gathered(rows, part)
                        replaced.append((owner, key, part))
                        owner._parameters[key] = nn.Parameter(plain.detach(), requires_grad=False)
        yield
    finally:
        for owner, key, part in replaced:
            owner._parameters[key] = part


def _without_tied(model: transformers.PreTrainedModel) -> list[_Weight]:
    """The weights that a checkpoint has: of those that are one, the one that transformers saves.

    Raises:
        ValueError: if an adapter makes weights differ that the configuration ties.
    """
    weights = {weight.name: weight for weight in _weights(model)}
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if {name, source} <= weights.keys()}
    for name, source in tied.items():
        if weights[name].identity != weights[source].identity:
            raise ValueError(
                f"an adapter makes {name} differ from {source}, but the model's configuration ties the two, so that "
                "a checkpoint has one tensor for both. Leave embeddings out of lora_target_modules."
            )
    return [weight for name, weight in weights.items() if name not in tied]


def _weights(module: nn.Module, prefix: str = "") -> Iterator[_Weight]:
    """The weights of a module and its children, in their order."""
    adapted: dict[str, list[LoraLayer]] = {}
    if _is_from_peft(module):
        module, adapted = _inside(module, prefix)
    own = dict(module.named_parameters(recurse=False))
    # Which buffers a checkpoint holds; state_dict() reads the same set.
    persistent = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
    own |= {name: module._buffers[name] for name in persistent if module._buffers[name] is not None}
    if adapted.keys() - own.keys():
        raise _cannot_merge(prefix, f"an adapter on {type(module).__name__}")
    for name, tensor in own.items():
        layers = tuple(layer for layer in adapted.get(name, ()) if _active(layer))
        yield _Weight(name=prefix + name, tensor=tensor, layers=layers)
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


def _is_from_peft(module: nn.Module) -> bool:
    """Whether the module is peft's; importing peft takes seconds, and if nothing imported it, no module is."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _inside(module: nn.Module, prefix: str) -> tuple[nn.Module, dict[str, list[LoraLayer]]]:
    """The module that peft wrapped, or a trained copy of it, and the LoRA layers around it by parameter."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.other import ModulesToSaveWrapper

    adapted: dict[str, list[LoraLayer]] = {}
    while _is_from_peft(module):
        if isinstance(module, ModulesToSaveWrapper):
            trained = [name for name in module.active_adapters if name in module.modules_to_save]
            use_trained = trained and not module.disable_adapters
            module = module.modules_to_save[trained[0]] if use_trained else module.original_module
        elif isinstance(module, LoraLayer):
            # Layers on parameters, such as fused experts, are inside each other: one for each parameter.
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            adapted.setdefault(parameter, []).append(module)
            module = module.base_layer
        else:
            raise _cannot_merge(prefix, type(module).__name__)
    return module, adapted


def _active(layer: LoraLayer) -> list[str]:
    """Adapters of a layer that act and are not yet part of its weight."""
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.scaling and name not in layer.merged_adapters]


def _cannot_merge(name: str, kind: str) -> ValueError:
    return ValueError(
        f"{name.removesuffix('.weight').removesuffix('.')} has {kind}: the sampler gets the policy with its adapter "
        "merged, and only plain LoRA can be merged. Use LoRA without variants on Linear and Embedding modules, or "
        "sampler=transformers."
    )
