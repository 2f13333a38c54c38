"""Sharding: a model's tensors spread over all processes, by FSDP2 (docs.pytorch.org, torch.distributed.fsdp).

Each process keeps a part of every tensor. A layer is gathered when its forward or backward pass begins, and let go
after it; gradients are summed while they are spread again. There is no wrapper: a sharded model is of its own class,
and its parameters are DTensors. Whatever needs a whole tensor is a collective: all processes must do it together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Name of the method by which a function runs as the forward pass of a sharded model.
_AS_FORWARD = "run_as_forward"


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread a model's tensors over all processes, in place.

    Args:
        model: a transformers model, that inside peft and not peft's own, since hooks hang on what is called; or any
            module that is called as a whole and has its layers in lists. Its gradient checkpointing is on already, if
            it is to be.
        device: where its passes run.

    Returns:
        The same model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in (*blocks(model), model):
        if not isinstance(part, FSDPModule):
            # The root too: left whole after a pass without gradient, it would miss the next optimizer step.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # token weights have made the mean already
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
    setattr(model, _AS_FORWARD, MethodType(_run, model))
    register_fsdp_forward_method(model, _AS_FORWARD)
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: what is in the outermost lists of modules, each once."""
    found: dict[nn.Module, None] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (inside and name.startswith(inside)):
            inside += (f"{name}.",)
            found |= dict.fromkeys(each for each in module if any(True for _ in each.parameters()))
    return list(found)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, without peft, is spread over processes."""
    return _AS_FORWARD in vars(model)


def as_forward(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """`function(model, *args)`; of a sharded model it runs as its forward pass, so that its own tensors are whole.

    Args:
        model: what `shard` was given, without peft; any other model is just passed on.
        function: uses parts of the model without calling the whole of it.
        args: its other arguments.
    """
    run = vars(model).get(_AS_FORWARD)
    return function(model, *args) if run is None else run(function, *args)


def _run(model: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    return function(model, *args)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is this process's part of one that is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from all processes, which must all ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor
