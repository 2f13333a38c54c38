"""The files with the weights of a checkpoint: which there are, the names in them, and whether they are whole.

Nothing here reads a weight. A sharded checkpoint on the hub is asked for its index only.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

# In the order in which transformers looks for them.
FILE_NAMES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
INDEX_NAMES = (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)


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
            return sorted(_weight_map(file) if name in INDEX_NAMES else _names_in(file))
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
            raise ValueError(
                f"model={str(folder)!r}: {', '.join(missing)} of {len(files)} files is missing, which {name} lists: "
                "these weights would stay uninitialised. Download or write the missing files again."
            )
        return files
    return []


def check_weight_files(model: str | Path) -> None:
    """Refuse a folder with a weight file that is missing or cut off; no weight is read. Hub ids pass.

    Args:
        model: hub id or folder.

    Raises:
        ValueError: names the file.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    files = shards(folder) or [SAFE_WEIGHTS_NAME]
    for file in files:
        if file.endswith(".safetensors") and (folder / file).is_file():
            _names_in(folder / file)


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
        weight_map.values()
    except (UnicodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from error
    return weight_map


def _names_in(file: Path) -> list[str]:
    """Names in one file, from its header."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as tensors:
                return list(tensors.keys())
        except SafetensorError as error:
            raise _damaged(file, error) from error
    return list(torch.load(file, map_location="meta", weights_only=True))


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"model={str(file.parent)!r}: {file.name} is damaged ({file.stat().st_size:,} bytes; {error}): its weights "
        "cannot be read. Download or write this file again."
    )
