"""What all processes of a run write into a checkpoint if its models are spread over them, by torch's own checkpoints.

Each process writes its parts of the tensors into safetensors files, whose headers say which rows they hold, so that
any number of processes, or one alone, can read them; no pickle is among them, which reading would run. The rest of a
state, such as counters and groups, is small and written by the main process, with the name of a tensor in its place.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from common.sharding import is_part, own_part, own_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PARTS_FOLDER = "parts"
_DESCRIPTION = "parts.json"
# Raised when a checkpoint is laid out in another way, which earlier versions cannot read.
_LAYOUT = 1
# Keys of what stands in the rest of a state for a tensor.
_NAME, _PARAMETER = "tensor in parts", "of the parameter"
# torch builds the bytes of a file in main memory.
_MOST_BYTES_OF_A_FILE = 2**30


@dataclass(frozen=True, kw_only=True)
class Description:
    """What parts.json says.

    Attributes:
        num_processes: that wrote the parts.
        shapes: of the trained parameters, by learner and by the parameters' names.
    """

    num_processes: int
    shapes: dict[str, dict[str, list[int]]]


def write_description(folder: Path, shapes: dict[str, dict[str, list[int]]], num_processes: int) -> None:
    """Say in a checkpoint's parts.json what its parts belong to.

    Args:
        folder: of the parts.
        shapes: see Description.
        num_processes: likewise.
    """
    folder.mkdir(exist_ok=True)  # without a gradient so far, there are no parts
    content = {"layout": _LAYOUT, "processes": num_processes, "parameters": shapes}
    (folder / _DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_description(checkpoint: Path) -> Description | None:
    """What a checkpoint's parts belong to; None if it has no parts: one process wrote it.

    Raises:
        ValueError: they are laid out as another version of nanoRLHF does.
    """
    file = checkpoint / PARTS_FOLDER / _DESCRIPTION
    if not file.is_file():
        return None
    content = json.loads(file.read_text("utf-8"))
    if content.get("layout") != _LAYOUT:
        raise ValueError(
            f"{file}: its parts have layout {content.get('layout')}, and this version of nanoRLHF reads layout "
            f"{_LAYOUT}: another version wrote them, and they would be taken for something else. Continue the run "
            f"with that version, or remove {checkpoint.name} and it goes on from an earlier checkpoint."
        )
    return Description(num_processes=content["processes"], shapes=content["parameters"])


def check_same_model(checkpoint: Path, learner: str, shapes: Mapping[str, Sequence[int]], model: str) -> None:
    """Refuse a checkpoint whose parts belong to another model, from names and shapes alone.

    Args:
        checkpoint: to continue from; one without parts passes.
        learner: whose parameters are compared.
        shapes: of the model's parameters, of which only some may be trained.
        model: what it is called in a message.

    Raises:
        ValueError: names a parameter that the model does not have, or has in another shape.
    """
    description = read_description(checkpoint)
    for name, saved in (description.shapes.get(learner, {}) if description else {}).items():
        found = shapes.get(name)
        if found is None or [*found] != saved:
            other = "no such parameter" if found is None else f"it with the shape {[*found]}"
            raise ValueError(
                f"{checkpoint}: it holds the {learner}'s {name} with the shape {saved}, and model={model} has "
                f"{other}. It was trained on another model, and its moments fit no other. Pass the --model that the "
                "run began with, or another --output_dir for a new run."
            )


# ------------------------------------------------------------------------------------------ the state of an optimizer


def split_state(state: Any, parameters: Mapping[str, Tensor], prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """A state without the tensors that are spread over processes, and these by name.

    Args:
        state: an optimizer's `state_dict()`: dicts and lists, in which a number says which parameter is meant. Its
            tensors are spread as the parameters are, or plain ones of this process's rows.
        parameters: by name, in the order of the numbers.
        prefix: of the tensors' names.

    Returns:
        The same with names in place of tensors, and the tensors.
    """
    tensors: dict[str, Tensor] = {}
    names = [*parameters]

    def visited(value: Any, path: str, parameter: str = "") -> Any:
        if isinstance(value, Tensor) and parameter and value.ndim and is_part(parameters[parameter]):
            tensors[path] = value if is_part(value) else _as_part(value, parameters[parameter])
            return {_NAME: path, _PARAMETER: parameter}
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list) and any(isinstance(each, Tensor) for each in value):
            items = enumerate(value)
        else:
            return value
        found = {}
        for key, each in items:
            of = names[key] if isinstance(key, int) else parameter
            found[key] = visited(each, f"{path}.{of if isinstance(key, int) else key}", of)
        return found if isinstance(value, dict) else [*found.values()]

    return visited(state, prefix), tensors


def names_in(rest: Any) -> dict[str, str]:
    """The names that stand for tensors in what `split_state` has left, each with that of its parameter."""
    if isinstance(rest, dict) and _NAME in rest:
        return {rest[_NAME]: rest[_PARAMETER]}
    inside = rest.values() if isinstance(rest, dict) else rest if isinstance(rest, list) else ()
    return {name: parameter for each in inside for name, parameter in names_in(each).items()}


def joined_state(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The whole state again: tensors in place of their names."""
    if isinstance(rest, dict):
        if _NAME in rest:
            return tensors[rest[_NAME]]
        return {key: joined_state(each, tensors) for key, each in rest.items()}
    return [joined_state(each, tensors) for each in rest] if isinstance(rest, list) else rest


def spread_state(state: dict[str, Any], parameters: Sequence[Tensor], *, plain: bool) -> dict[str, Any]:
    """The part of this process in an optimizer's state that one process has saved.

    Args:
        state: an optimizer's `state_dict()` with whole tensors.
        parameters: spread over processes, in the order of the numbers.
        plain: as plain tensors of this process's rows.
    """

    def of(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if plain:  # in main memory, where the file is read
            return value[own_rows(parameter)].clone(memory_format=torch.contiguous_format)
        return spread_like(value, parameter)

    moments = {
        number: {name: of(value, parameters[number]) for name, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    spread = state | {"state": moments}
    if "masters" in state:
        spread["masters"] = [
            of(value, parameter) for value, parameter in zip(state["masters"], parameters, strict=True)
        ]
    return spread


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes have, in memory of its own.

    Args:
        tensor: whole, such as from a file.
        parameter: of the same shape, spread over processes.
    """
    part = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
    part.to_local().copy_(tensor[own_rows(parameter)])
    return part


def _as_part(rows: Tensor, parameter: Tensor) -> Tensor:
    """A plain tensor of this process's rows as part of one that is spread as a parameter is; it stays where it is."""
    from torch.distributed.tensor import DTensor

    mesh, stride = parameter.device_mesh, torch.empty(parameter.shape, device="meta").stride()
    if mesh.device_type != rows.device.type:
        mesh = _mesh_on(rows.device.type, mesh.size())
    options = {"run_check": False, "shape": parameter.shape, "stride": stride}
    return DTensor.from_local(rows, mesh, parameter.placements, **options)


@cache
def _mesh_on(device: str, size: int) -> DeviceMesh:
    """All processes, for tensors that they never exchange: without it, moments on the host would go to the device."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device, (size,))


# ------------------------------------------------------------------------------------------------- writing and reading


def write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's parts; all processes call this together, and all raise what is raised in one of them.

    Args:
        folder: of the parts; it is made.
        tensors: by name, all of them spread over processes.

    Raises:
        OSError: the disk does not take what this process or another writes.
    """
    if not tensors:
        return
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException

    files, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size() // distributed.get_world_size()
        if size and size + num_bytes > _MOST_BYTES_OF_A_FILE:
            number, size = number + 1, 0
        files[name], size = number, size + num_bytes
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        checkpoint.save(tensors, storage_writer=writer)
    except CheckpointException as error:  # no Exception, and it says more than a reader can use
        failed, _ = error.failures[min(error.failures)]
        raise failed from error


def read_parts(folder: Path, into: dict[str, Tensor]) -> None:
    """Read tensors from the parts that any number of processes have written; each process for itself.

    Args:
        folder: of the parts.
        into: by name, whole or spread over processes; filled.
    """
    if not into:
        return
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is not asked for
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        checkpoint.load(into, storage_reader=reader, no_dist=True)


def read_state(
    rest: dict[str, Any], folder: Path, parameters: Mapping[str, Tensor], *, plain: bool = False
) -> dict[str, Any]:
    """A state from what `split_state` has left of it, and the parts in a folder.

    Args:
        rest: with names in place of tensors.
        folder: of the parts.
        parameters: by name; tensors of the state are spread, or whole, as they are.
        plain: of what is spread, as plain tensors on the host, of this process's rows.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    names = names_in(rest)
    types = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata if names else {}
    tensors = {}
    for name, of in names.items():
        parameter, dtype = parameters[of], types[name].properties.dtype
        if plain and is_part(parameter):
            tensors[name] = _as_part(torch.empty(parameter.to_local().shape, dtype=dtype), parameter)
        else:
            options = {"dtype": dtype, "memory_format": torch.contiguous_format}
            tensors[name] = torch.empty_like(parameter, requires_grad=False, **options)
    read_parts(folder, tensors)
    if plain:
        tensors = {name: own_part(each) for name, each in tensors.items()}
    return joined_state(rest, tensors)
