"""Each process reads its own part of a model's weights, so that no process holds a whole model at any time.

from_pretrained makes the model without storage and checks names and shapes. Here its parameters become DTensors, split
by rows as FSDP2 splits them, and each process reads its rows from the files. `spread` hands them to FSDP2.

What has fewer rows than there are processes, such as the head of a value model, is whole in each until then. Of
experts that transformers stacks while it loads, each process reads its own. Other weights that it fuses, splits or
reorders (common/models/layout.py) are made one group at a time in every process, which keeps its rows. A
pytorch_model.bin of torch before 1.6 can only be read whole.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import logging
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from common.config import RLConfig
from common.models.layout import from_checkpoint, is_converter, stacks_rows
from common.sharding import of_all, own_part, rows_of, shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger("nanorlhf")

# Attribute of a parameter that was read in parts and is not FSDP2's yet.
_IS_READ_PART = "is_read_part"
# By which transformers knows what from_pretrained has loaded: its initialisation leaves that alone.
_IS_LOADED = "_is_hf_initialized"
# from_pretrained with this makes a model without storage.
WITHOUT_STORAGE = {"device_map": {"": "meta"}}


def is_spread(config: RLConfig) -> bool:
    """Whether the models of this run are spread over its processes.

    Args:
        config: `shard` is read.
    """
    distributed = torch.distributed
    return config.shard == "full" and distributed.is_initialized() and distributed.get_world_size() > 1


def read_parts(model: transformers.PreTrainedModel, path: str | Path, device: torch.device) -> None:
    """Give a model without storage its weights: of each parameter, the rows of this process. All call it together.

    Buffers are whole, and those that no checkpoint holds are made anew, as from_pretrained makes them.

    Args:
        model: from from_pretrained(path, ..., **WITHOUT_STORAGE), whose report was checked; its parameters become
            DTensors.
        path: hub id or folder.
        device: where the model's passes will run, and the rows are kept.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    places, loaded = _places(model), set()
    with ExitStack() as files:
        tensors = _tensors_in(model, path, files)
        for name, tensor in _read(model, tensors, mesh):
            module, _, key = name.rpartition(".")
            owner = model.get_submodule(module)
            old = owner._parameters.get(key)
            if old is None:
                _put(tensor, places[id(owner._buffers[key])])
            else:
                _put(_parameter(tensor, old, mesh), places[id(old)])
            loaded.add(name)
    _tie(model, loaded)
    _make_others(model)


def spread(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Spread a model over all processes, in place: one that is whole, or one that was read in parts.

    Args:
        model: as for `shard`. Parameters that were added since it was read are whole.
        device: where its passes run.
        dtype: as for `shard`.

    Returns:
        The same model.
    """
    if not any(_is_read_part(parameter) for parameter in model.parameters()):
        return shard(model.to(device), device, dtype)
    from torch.distributed.tensor import DTensor

    parts = []
    for places in _places(model).values():
        owner, key, _ = places[0]
        parameter = owner._parameters.get(key)
        if parameter is not None and _is_read_part(parameter):
            parts.append((places, parameter.to_local()))
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            _put(nn.Parameter(empty, requires_grad=parameter.requires_grad), places)
    del parameter
    shard(model, device, dtype)  # what is whole is moved there and split; what is on meta stays there
    while parts:
        places, local = parts.pop()
        owner, key, _ = places[0]
        empty = owner._parameters[key]
        options = {"run_check": False, "shape": empty.shape, "stride": empty.stride()}
        part = DTensor.from_local(local, empty.device_mesh, empty.placements, **options)
        part = nn.Parameter(part, requires_grad=empty.requires_grad)
        for owner, key, _ in places:
            # A hook of FSDP2 takes it over from here.
            owner.load_state_dict({key: part}, strict=False, assign=True)
    return model


# A module, the name of a tensor in it, and where the module keeps it.
_Place = tuple[nn.Module, str, dict[str, Tensor | None]]


def _places(model: nn.Module) -> dict[int, list[_Place]]:
    """Where each parameter and buffer of a model is, by the tensor's id: tied ones are in several places."""
    places: dict[int, list[_Place]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    places.setdefault(id(tensor), []).append((module, key, tensors))
    return places


def _put(tensor: Tensor, places: list[_Place]) -> None:
    for _, key, tensors in places:
        tensors[key] = tensor


def _is_read_part(parameter: Tensor) -> bool:
    return _IS_READ_PART in vars(parameter)


def _parameter(tensor: Tensor, old: Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter in the place of one without storage, from its rows of this process or from all of it."""
    from torch.distributed.tensor import DTensor, Shard

    is_part = not _is_whole(old, mesh.size())
    if is_part:
        form = torch.empty(old.shape, device="meta")  # rows are contiguous, whatever the conversion made of `old`
        options = {"run_check": False, "shape": form.shape, "stride": form.stride()}
        tensor = DTensor.from_local(tensor.to(mesh.device_type), mesh, [Shard(0)], **options)
    parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    setattr(parameter, _IS_LOADED, True)
    if is_part:
        setattr(parameter, _IS_READ_PART, True)
    return parameter


def _is_whole(tensor: Tensor, num_processes: int) -> bool:
    """Whether a parameter is read whole: with fewer rows than processes, some would have none."""
    return tensor.dim() == 0 or len(tensor) < num_processes


def _tensors_in(model: transformers.PreTrainedModel, path: str | Path, files: ExitStack) -> dict[str, Any]:
    """What from_pretrained reads, by name: slices of safetensors, or tensors, both still in the files.

    Args:
        model: of which from_pretrained has found the files.
        path: hub id or folder.
        files: closes them.
    """
    from transformers.modeling_utils import _get_resolved_checkpoint_files, load_state_dict

    names, _ = _get_resolved_checkpoint_files(
        str(path),
        variant=None,
        gguf_file=None,
        use_safetensors=None,
        user_agent=None,
        is_remote_code=False,
        transformers_explicit_filename=getattr(model.config, "transformers_weights", None),
        download_kwargs={"commit_hash": model.config._commit_hash},
    )
    tensors: dict[str, Any] = {}
    for name in names:
        if name.endswith(".safetensors"):
            file = files.enter_context(safe_open(name, framework="pt"))
            tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            continue
        if not zipfile.is_zipfile(name) and torch.distributed.get_rank() == 0:
            logger.warning(
                "%s is in the format of torch before 1.6, which cannot be read in parts: every process reads it whole "
                "before it keeps its part. Load and save the model once with transformers to avoid that.",
                name,
            )
        tensors |= load_state_dict(name)
    return tensors


def _read(
    model: transformers.PreTrainedModel, tensors: dict[str, Any], mesh: DeviceMesh
) -> Iterator[tuple[str, Tensor]]:
    """(Name in memory, this process's rows or all of it): new tensors in the types that the model has."""
    own, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    process, num_processes = mesh.get_local_rank(), mesh.size()

    def part_of(name: str, source: Any) -> Tensor:
        form = own[name]
        if name in buffers or _is_whole(form, num_processes):
            return torch.empty(form.shape, dtype=form.dtype).copy_(source[...])
        first, end = rows_of(len(form), process, num_processes)
        part = torch.empty((end - first, *form.shape[1:]), dtype=form.dtype)
        return part.copy_(source[first:end]) if end > first else part

    for name, conversion, origins in from_checkpoint(model, tensors):
        if not is_converter(conversion):
            [(origin, _)] = origins[:1]
            yield name, part_of(name, tensors[origin])
            continue
        form = own[name]
        rows = None if _is_whole(form, num_processes) else rows_of(len(form), process, num_processes)
        is_part, chosen = False, origins
        if rows is not None and stacks_rows(conversion):
            is_part, chosen = _of_rows(origins, len(form), *rows)
        if not chosen:  # fewer experts than this process would need to have one
            yield name, torch.empty((0, *form.shape[1:]), dtype=form.dtype)
            continue
        for origin, pattern in chosen:
            conversion.add_tensor(name, origin, pattern, partial(_all_of, tensors[origin], form.dtype))
        converted = conversion.convert(name, model=model, config=model.config)
        if is_part:
            [tensor] = converted.values()
            yield name, torch.empty(tensor.shape, dtype=form.dtype).copy_(tensor)
            continue
        while converted:
            made = next(iter(converted))
            tensor = converted.pop(made)
            yield made, part_of(made, tensor[0] if isinstance(tensor, list) else tensor)
            del tensor


def _of_rows(origins: list[tuple[str, str]], count: int, first: int, end: int) -> tuple[bool, list[tuple[str, str]]]:
    """Of the tensors that are stacked into `count` rows, those of some rows; all if there is not one for each row.

    Args:
        origins: (name in the checkpoint, pattern that it stands for).
        count: rows of the whole.
        first: of these rows.
        end: after the last.

    Returns:
        Whether there is one for each row, and the origins.
    """
    by_pattern: dict[str, list[tuple[str, str]]] = {}
    for origin in origins:
        by_pattern.setdefault(origin[1], []).append(origin)
    if any(len(each) != count for each in by_pattern.values()):
        return False, origins
    return True, [origin for each in by_pattern.values() for origin in each[first:end]]


def _all_of(source: Any, dtype: torch.dtype) -> Tensor:
    return source[...].to(dtype)


def _tie(model: transformers.PreTrainedModel, loaded: set[str]) -> None:
    """Tie weights that the checkpoint has twice if they are equal, as from_pretrained does; without storage it cannot.

    Those that it has once are tied already.
    """
    tied = model.all_tied_weights_keys
    pairs = [(name, source) for name, source in tied.items() if {name, source} <= loaded]
    if not pairs:
        return
    weights = [(model.get_parameter(name), model.get_parameter(source)) for name, source in pairs]
    equal = [one.shape == other.shape and torch.equal(own_part(one), own_part(other)) for one, other in weights]
    places = _places(model)
    for (name, _), (one, other), *verdicts in zip(pairs, weights, *of_all(equal), strict=True):
        if all(verdicts):
            _put(other, places[id(one)])
        else:
            del tied[name]


def _make_others(model: transformers.PreTrainedModel) -> None:
    """Make what no checkpoint holds, such as the buffers of rotary embeddings, by the model's own initialisation."""
    others: set[nn.Module] = set()
    for places in _places(model).values():
        _, key, tensors = places[0]
        old = tensors[key]
        if old.is_meta:
            new = torch.empty_like(old, device="cpu")
            _put(nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new, places)
            others |= {module for module, *_ in places}
        else:
            setattr(old, _IS_LOADED, True)
    for module in model.modules():
        # A module's initialisation may reach into those inside it.
        setattr(module, _IS_LOADED, others.isdisjoint(module.modules()))
    model.initialize_weights()
