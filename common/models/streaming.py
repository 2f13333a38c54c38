"""Writing weights as safetensors files one tensor at a time, in any order, by one process or by several.

`save_file` of safetensors takes all tensors of a file at once. Here the files' headers are written first, from names,
shapes and types alone, and each tensor goes to its place as soon as it is there. The bytes are the same. Of a model
that is spread over processes, each tensor is gathered by all of them and written by one.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

# As safetensors names and orders them: wider types come first in a file.
_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: place for place, dtype in enumerate(_TYPES)}
# Headers are filled up to a multiple of this many bytes.
_ALIGNMENT = 8


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in a file: its first byte, and the number of its bytes."""

    begin: int
    size: int


def write_weights(
    weights: Iterable[tuple[str, Tensor]],
    layout: dict[str, Tensor],
    folder: Path,
    *,
    max_file_size: int | str = "50GB",
    process: int = 0,
    num_processes: int = 1,
) -> None:
    """Write weights into the files that save_pretrained would write, by that many processes in turn.

    All processes go through all weights, which are gathered on the way; an error of the disk is raised after the last.

    Args:
        weights: (name, tensor), in any order.
        layout: all names, each with a tensor of the same shape and type, which needs no storage.
        folder: created if it does not exist; the same for all processes.
        max_file_size: bytes of a file, or a size such as "5GB"; a larger tensor has a file of its own.
        process: which one this is.
        num_processes: how many write.

    Raises:
        OSError: the disk does not take it.
    """
    # Of tensors that are views of one storage, its size would count for each.
    layout = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in layout.items()}
    split = split_torch_state_dict_into_shards(
        layout, filename_pattern="model{suffix}.safetensors", max_shard_size=max_file_size
    )
    own = [*split.filename_to_tensors][process::num_processes]
    headers = {file: _header({name: layout[name] for name in split.filename_to_tensors[file]}) for file in own}
    places = {name: (file, place) for file in own for name, place in headers[file][1].items()}
    failed, num_seen = None, 0
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name, tensor in weights:
            num_seen += 1
            assert tensor.shape == layout[name].shape and tensor.dtype == layout[name].dtype, name
            if failed is None and name in places:
                file, place = places.pop(name)
                try:
                    if file not in files:
                        folder.mkdir(parents=True, exist_ok=True)
                        files[file] = stack.enter_context(open(folder / file, "xb"))
                        files[file].write(headers[file][0])
                    _write(files[file], tensor, place)
                except Exception as error:  # others are gathering: this process goes on with them to the end
                    failed = error
            del tensor  # before the next one is made
        if failed is not None:
            raise failed
        assert not places and num_seen == len(layout), "weights are missing, and a file would have a hole"
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    if split.is_sharded and process == 0:
        # As save_pretrained counts parameters: tied ones once.
        metadata = {"total_parameters": sum(each.numel() for each in layout.values()), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, _Place]]:
    """The first bytes of a file, and the place of each tensor in it."""
    entries, places, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name in sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name)):
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _TYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
        places[name] = _Place(begin, end - begin)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    first = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: _Place(first + place.begin, place.size) for name, place in places.items()}


def _write(file: BinaryIO, tensor: Tensor, place: _Place) -> None:
    if not place.size:
        return
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    file.seek(place.begin)
    file.write(memoryview(content))
