"""Sharding: a model's tensors spread over all processes, by FSDP2 (docs.pytorch.org, torch.distributed.fsdp).

Each process keeps a part of every tensor. A layer is gathered when its forward or backward pass begins, and let go
after it; gradients are summed while they are spread again. There is no wrapper: a sharded model is of its own class,
and its parameters are DTensors. Whatever needs a whole tensor is a collective: all processes must do it together.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from common.config import RLConfig

Result = TypeVar("Result")

# Name of the method by which a function runs as the forward pass of a sharded model.
_AS_FORWARD = "run_as_forward"

# The sharded models, each with the precision in which its weights are gathered.
_sharded: WeakKeyDictionary[nn.Module, torch.dtype] = WeakKeyDictionary()


def check_sharding(config: RLConfig, num_processes: int) -> None:
    """Refuse settings that cannot work on shards, before anything is loaded.

    Args:
        config: the run's.
        num_processes: of the run; alone, a process keeps its models whole.

    Raises:
        ValueError: which setting it is, why, and what to pass.
    """
    if config.shard == "full" and num_processes > 1 and (reason := why_not_spread(config, num_processes)):
        raise ValueError(f"shard=full on {num_processes} processes, {reason}, or --shard none.")


def why_not_spread(config: RLConfig, num_processes: int) -> str | None:
    """The setting that cannot work on shards, why, and what to pass instead; None: models may be spread.

    Args:
        config: the run's, whatever its `shard`.
        num_processes: at least two.
    """
    if config.sampler == "transformers":
        return (
            "sampler=transformers: it runs the policy once per token, and each pass gathers the policy from all "
            "processes, which end their completions at different tokens and would wait for each other forever. Pass "
            "--sampler vllm"
        )
    if config.load_in_4bit:
        return (
            "load_in_4bit=true: packed weights and their scales cannot be spread row by row. Pass --load_in_4bit "
            f"false, with which each process holds one part in {num_processes} of the base"
        )
    if config.optimizer == "adamw_8bit":
        return (
            "optimizer=adamw_8bit: 256 moments in a row have one scale, and the parts of a tensor cut those rows "
            "elsewhere, so the number of processes would change the result. Pass --optimizer adamw, which needs "
            f"{8 / num_processes:.3g} bytes per weight for its moments here"
        )
    if shared := [model.name for model in config.other_models if model.shares_base]:
        return (
            f"the {shared[0]} model on the policy's base: its adapter would come into layers that are spread already. "
            f"Pass --{shared[0]}_backbone own, which takes one part in {num_processes} of the base more"
        )
    return None


def describe_sharding(config: RLConfig, num_processes: int) -> list[str]:
    """What a run says at its start if shard=full finds nobody to share with."""
    if config.shard != "full" or num_processes > 1:
        return []
    return [
        "shard=full on one process: there is nobody to share with, so models stay whole, and nothing else changes; "
        "`torchrun --nproc_per_node 2` starts two processes"
    ]


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Spread a model's tensors over all processes, in place.

    Args:
        model: a transformers model, that inside peft and not peft's own, since hooks hang on what is called; or a
            module that has one in it, and is called as a whole. Its gradient checkpointing is on already, if it is to
            be. Its parameters are on the device.
        device: where its passes run.
        dtype: precision in which a transformers model's weights are gathered, unless it keeps some in float32, as
            some routers are. Parts are kept as they are, and gradients are summed in float32. Below float32, autocast
            alone would keep a rounded copy of every gathered layer for the backward pass, a whole model in each
            process.

    Returns:
        The same model.

    Raises:
        ValueError: if tensors of the model cannot be spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    dtype = torch.float32 if _keeps_float32(model) else dtype
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    # What has that precision already stays as it is, also a base that is loaded in bfloat16.
    rounded = exact
    if dtype != torch.float32:
        rounded = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    heads = _heads(model)
    for part in (*heads, *blocks(model), model):
        precision = exact if part in heads else rounded
        if not isinstance(part, FSDPModule):
            _check_tensors(part, model)
            # The root too: left whole after a pass without gradient, it would miss the next optimizer step.
            part.register_forward_hook(lambda *called: _without_views(called[-1]))
            fully_shard(part, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)  # token weights have made the mean already
        part.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
    if _knows_unused(model):
        # Experts without a token on one process only: its part of the sum is 0.
        model.set_reduce_scatter_unused_params(True)
    setattr(model, _AS_FORWARD, MethodType(_run, model))
    register_fsdp_forward_method(model, _AS_FORWARD)
    _sharded[model] = dtype
    return model


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered one at a time: what is in the outermost lists of modules, each once.

    A layer that has a parameter together with something outside of it is left out: it is gathered with the model's
    other tensors.
    """
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[nn.Module, None] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (inside and name.startswith(inside)):
            inside += (f"{name}.",)
            for layer in _called(module):
                own = Counter(parameter for _, parameter in layer.named_parameters(remove_duplicate=False))
                if own and all(count == uses[parameter] for parameter, count in own.items()):
                    found[layer] = None
    return list(found)


def _called(modules: nn.ModuleList) -> Iterator[nn.Module]:
    """The modules in a list, also in lists and dicts in it, which are never called themselves."""
    for module in modules:
        if isinstance(module, nn.ModuleList):
            yield from _called(module)
        elif isinstance(module, nn.ModuleDict):
            yield from _called(nn.ModuleList(module.values()))
        else:
            yield module


def _heads(model: nn.Module) -> list[nn.Module]:
    """What a module adds to the transformers model in it, such as a value head: it computes in its own precision."""
    from transformers import PreTrainedModel  # importing it takes seconds

    def is_within(module: nn.Module) -> bool:
        return any(isinstance(each, PreTrainedModel) for each in module.modules())

    if isinstance(model, PreTrainedModel) or not is_within(model):
        return []
    return [child for child in model.children() if not is_within(child) and any(True for _ in child.parameters())]


def _keeps_float32(model: nn.Module) -> bool:
    """Whether a transformers model asks to have some of its weights in float32 whatever the others are."""
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kept = {name for each in models for name in each._keep_in_fp32_modules_strict or ()}
    return any(f".{name}." in f".{parameter}." for parameter, _ in model.named_parameters() for name in kept)


def _check_tensors(part: nn.Module, model: nn.Module) -> None:
    """Refuse tensors that FSDP2 cannot spread or gather, by their names.

    Raises:
        ValueError: if there is one.
    """
    trained = {}
    for name, parameter in part.named_parameters():
        if is_part(parameter):
            continue
        if parameter.ndim == 0:
            raise ValueError(
                f"shard=full: {type(model).__name__} has the parameter {name}, a single number without a dimension, "
                "which cannot be spread. Pass --shard none."
            )
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
        if parameter.requires_grad:
            trained.setdefault(parameter.dtype, name)
    if len(trained) > 1:
        (one, first), (other, second) = [*trained.items()][:2]
        raise ValueError(
            f"shard=full: {type(model).__name__} trains {first} in {one} and {second} in {other}, and gradients of "
            "one layer are summed in one type. Pass --optimizer adamw, which trains all weights in float32, or "
            "--shard none."
        )


def _knows_unused(model: nn.Module) -> bool:
    """Whether this torch can sum gradients that not all processes have: from 2.13 on."""
    return "set_reduce_scatter_unused_params" in dir(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or one inside it such as inside peft, is spread over processes."""
    return _root(model) is not None


def gathered_dtype(model: nn.Module, parameter: Tensor) -> torch.dtype:
    """The precision that a parameter of a model has in passes, before autocast.

    Args:
        model: a transformers model, sharded or not.
        parameter: of it.
    """
    root = _root(model) if is_part(parameter) else None
    return parameter.dtype if root is None else min(parameter.dtype, _sharded[root], key=lambda each: each.itemsize)


def as_forward(model: nn.Module, function: Callable[[], Result]) -> Result:
    """What a function gives that uses parts of a model without calling the whole of it.

    Of a sharded model it runs as its forward pass, so that the model's own tensors are whole. If it raises, all
    processes must go on alike: nothing stays gathered.

    Args:
        model: in peft or not; one that is not sharded plays no part.
        function: calls layers, or the model below its head.
    """
    root = _root(model)
    if root is None:
        return function()
    try:
        return getattr(root, _AS_FORWARD)(function)
    except Exception:
        reset(root)
        raise


def _run(model: nn.Module, function: Callable[[], Result]) -> Result:
    return _without_views(function())


def _without_views(outputs: Result) -> Result:
    """The outputs of a model, views copied: FSDP2 warns of those, since nothing may change them in place."""
    from torch.utils._pytree import tree_map_only

    def copied(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor

    return tree_map_only(Tensor, copied, outputs)


def reset(model: nn.Module) -> None:
    """Between passes: a sharded model has nothing gathered, also after an error, and nothing noted.

    FSDP2 notes the layers of each forward pass until a backward pass, and so forever if there is none.

    Args:
        model: in peft or not; one that is not sharded stays as it is.
    """
    root = _root(model)
    if root is None:
        return
    for part in _parts(root):
        part.reshard()
    if "reset_iter_state" in dir(root):  # from torch 2.13 on; before, the next backward pass does the rest
        root.reset_iter_state()


def _root(model: nn.Module) -> nn.Module | None:
    """The sharded model that a module is, or has in it."""
    if not _sharded:
        return None
    return next((module for module in model.modules() if module in _sharded), None)


def _parts(root: nn.Module) -> Iterator[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in root.modules() if isinstance(module, FSDPModule))


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is this process's part of one that is spread over processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from all processes, which must all ask for it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """The tensor itself, or what this process has of it, in the same memory and without gradient."""
    return tensor.to_local() if is_part(tensor) else tensor


def rows_of(count: int, process: int, num_processes: int) -> tuple[int, int]:
    """Which rows of a tensor a process keeps, as torch.chunk splits them: the last processes may have fewer, or none.

    Args:
        count: rows of the whole tensor.
        process: number of the process.
        num_processes: of all.

    Returns:
        The first row, and the one after the last.
    """
    most = math.ceil(count / num_processes)
    first = min(process * most, count)
    return first, min(first + most, count)


def own_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor are this process's part.

    Args:
        tensor: spread over processes, as `shard` spreads it.
    """
    mesh = tensor.device_mesh
    return slice(*rows_of(len(tensor), mesh.get_local_rank(), mesh.size()))


def of_all(mine: Result) -> list[Result]:
    """What each process gives, in their order; all call it together."""
    everyone = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
