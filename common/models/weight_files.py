"""The files with the weights of a checkpoint: which there are, the names in them, and whether they are whole.

Nothing here reads a weight, except to compare two that should be one. A sharded checkpoint on the hub is asked for
its index only.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from common.mistakes import first_line
from common.terminal import one_line

# In the order in which transformers looks for them.
FILE_NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
INDEX_NAMES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)
# Types of weights that can be trained, as safetensors names them.
REAL = ("F32", "BF16", "F16", "F64")
_NAMES_OF_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
# How a file begins that Git LFS has not downloaded.
_POINTER = b"version https://git-lfs"
# Rows that are compared at once.
_ROWS = 4096


def weight_names(model: str | Path) -> list[str] | None:
    """Names of the tensors that a checkpoint holds, from its index or its header.

    Args:
        model: hub id or folder.

    Returns:
        The names, sorted; None if the model has a configuration but no weights.

    Raises:
        ValueError: if the file with the names is damaged.
    """
    for name in FILE_NAMES:
        file = _find(model, name)
        if file is not None:
            return sorted(_weight_map(file) if name in INDEX_NAMES else _dtypes_in(file))
    return None


def shards(folder: Path) -> list[str]:
    """The files that the index of a checkpoint names; none if it has no index.

    Args:
        folder: of a local checkpoint.

    Raises:
        ValueError: if one of them is missing, or the index is damaged.
    """
    for name in FILE_NAMES:
        if not (folder / name).is_file():
            continue
        if name not in INDEX_NAMES:
            return []  # transformers takes this file, and no index beside it
        files = sorted(set(_weight_map(folder / name).values()))
        if missing := [file for file in files if not (folder / file).is_file()]:
            verb = "is" if len(missing) == 1 else "are"
            raise ValueError(
                f"model={str(folder)!r}: {', '.join(missing)} {verb} missing, which {name} lists: these weights would "
                "stay uninitialised. Download or write what is missing again."
            )
        return files
    return []


def check_weight_files(model: str | Path) -> None:
    """Refuse a folder with a weight file that is missing or damaged. Hub ids pass.

    Args:
        model: hub id or folder.

    Raises:
        ValueError: names the file.
    """
    if Path(model).is_dir():
        weight_dtypes(model)


def weight_dtypes(folder: str | Path) -> dict[str, str]:
    """The type of each tensor of a local checkpoint, as safetensors names types, by the tensor's name.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    return {name: dtype for file in _files(Path(folder)) for name, dtype in _dtypes_in(file).items()}


def are_equal(folder: str | Path, one: str, other: str) -> bool:
    """Whether two weights of modules have the same numbers, or a local checkpoint holds one of them only.

    Args:
        folder: of the checkpoint.
        one: name of a module; in the files it may have another beginning.
        other: likewise.
    """
    found = []
    for module in (one, other):
        end = f"{module.split('.')[-1]}.weight"
        for file in _files(Path(folder)):
            name = next((name for name in _dtypes_in(file) if f".{name}".endswith(f".{end}")), None)
            if name is not None and file.suffix == ".safetensors":
                found.append((file, name))
                break
    if len(found) < 2:
        return True
    with safe_open(found[0][0], "pt") as first, safe_open(found[1][0], "pt") as second:
        slices = first.get_slice(found[0][1]), second.get_slice(found[1][1])
        if slices[0].get_shape() != slices[1].get_shape():
            return False
        starts = range(0, slices[0].get_shape()[0], _ROWS)
        return all(torch.equal(*(part[start : start + _ROWS] for part in slices)) for start in starts)


def _files(folder: Path) -> list[Path]:
    """The files with the weights of a local checkpoint that transformers reads; none if there are none."""
    if names := shards(folder):
        return [folder / name for name in names]
    return [folder / name for name in FILE_NAMES if name not in INDEX_NAMES and (folder / name).is_file()][:1]


def _find(model: str | Path, name: str) -> Path | None:
    if Path(model).is_dir():
        file = Path(model) / name
        return file if file.is_file() else None
    found = cached_file(
        str(model),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        [file.casefold() for file in weight_map.values()]  # names of files
    except (UnicodeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, error) from error
    return weight_map


def _dtypes_in(file: Path) -> dict[str, str]:
    """Names and types of the tensors in one file, from its header."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {name: _NAMES_OF_TYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()}
    except Exception as error:  # a SafetensorError, or whatever a damaged pickle makes
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    with file.open("rb") as content:
        if content.read(len(_POINTER)) == _POINTER:
            return ValueError(
                f"model={str(file.parent)!r}: {file.name} is a pointer of Git LFS ({file.stat().st_size:,} bytes), "
                "not the file itself. Run git lfs pull in its repository."
            )
    if isinstance(error, pickle.UnpicklingError):  # torch advises to turn weights_only off: that executes the file
        return _no_weights(file, error)
    return ValueError(
        f"model={str(file.parent)!r}: {file.name} is damaged ({file.stat().st_size:,} bytes; {first_line(error)}): "
        "its weights cannot be read. Download or write this file again."
    )


def _no_weights(file: Path, error: pickle.UnpicklingError) -> ValueError:
    """For a pickle that torch refuses: one with objects or calls in it, or no pickle at all."""
    if found := re.search(r"(?i:unsupported) GLOBAL (\S+)|GLOBAL (\S+) was not", str(error)):
        what = f"holds more than weights, such as {one_line(found[1] or found[2])}"
    else:
        what = "is no file of weights, or holds more than weights"
    return ValueError(
        f"model={str(file.parent)!r}: {file.name} {what}, so it is not read: reading it could run code that it "
        "brings. Pass a model with .safetensors, or write its weights alone, as save_pretrained does."
    )
