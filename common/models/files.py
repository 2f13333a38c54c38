"""Checks a model's files before anything is loaded from them: complete, undamaged, and of the model they should be.

Only headers are read, never weights. Models on the hub are checked when they are loaded.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from common.models.unread import check_companions, check_unexpected
from common.models.weight_files import FILE_NAMES, check_weight_files

_AGAIN = "Download or write the checkpoint again."


def check_files(path: str | Path) -> None:
    """Refuse a folder whose weights are not there, are damaged, or are those of another model.

    Args:
        path: hub id, which is not checked, or folder.

    Raises:
        ValueError: if a file is missing or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    check_generation_config(folder)
    check_companions(folder)
    if not any((folder / name).is_file() for name in FILE_NAMES):
        raise ValueError(
            f"model={str(path)!r}: has no weights. Need {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and the "
            f"files that it names. {_AGAIN}"
        )
    check_weight_files(folder)


def check_weights_fit(path: str | Path, auto_class: type, config: transformers.PreTrainedConfig) -> None:
    """Refuse a folder whose weights lack some of the model's, have other shapes, or are more than the model's.

    transformers itself fills the gaps with random numbers, and says so in a warning.

    Args:
        path: hub id, which is not checked, or folder.
        auto_class: such as AutoModelForCausalLM.
        config: of the model.

    Raises:
        ValueError: names one of them.
    """
    if not Path(path).is_dir():
        return
    label = f"model={str(path)!r}"
    try:
        with without_report():
            model, found = auto_class.from_pretrained(
                path,
                config=config,
                device_map={"": "meta"},  # names and shapes only
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever impossible sizes, or a package that it needs, make of a model
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{label}: the model cannot be built from its config.json: {reason}. Correct the file, or pass another "
            "model."
        ) from error
    check_report(found, label)
    check_unexpected(found, model, config, label)


def check_report(found: dict[str, Any], label: str) -> None:
    """Refuse a model that was not loaded completely.

    Args:
        found: what from_pretrained gives with output_loading_info.
        label: what the model is, for the message.

    Raises:
        ValueError: names one of its weights.
    """
    absent = sorted(found["missing_keys"])
    odd = sorted(str(name) for name, *_ in found["mismatched_keys"])
    if absent or odd:
        what = f"{len(absent)} of its weights are missing" if absent else f"{len(odd)} weights have another shape"
        raise ValueError(
            f"{label}: {what}, such as {(absent or odd)[0]}, by its config.json: they would be random numbers. The "
            f"weights may be another model's. {_AGAIN}"
        )


@contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers from printing a bar, and a table of missing weights, which becomes a message here."""
    before, has_bar = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if has_bar:
            transformers.utils.logging.enable_progress_bar()


def check_generation_config(folder: Path) -> None:
    """Refuse a generation_config.json whose end tokens cannot be read: transformers would go on without them.

    Args:
        folder: of the model; it may have no such file.

    Raises:
        ValueError: says what is wrong with it.
    """
    file = folder / GENERATION_CONFIG_NAME
    if not file.is_file():
        return
    remedy = f"Correct {file}, or delete it for the values of config.json."
    try:
        values = json.loads(file.read_bytes())
    except (UnicodeError, ValueError) as error:
        raise ValueError(f"model={str(folder)!r}: {file.name} is not readable as JSON: {error}. {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"model={str(folder)!r}: {file.name} holds no settings but {values!r:.40}. {remedy}")
    ends = values.get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and type(token) is not int:
            raise ValueError(
                f"model={str(folder)!r}: {file.name} has eos_token_id {ends!r:.60}; need the number of a token, or a "
                f"list of them, since a completion ends there. {remedy}"
            )
    try:
        transformers.GenerationConfig(**values)
    except Exception as error:  # whatever a value of the wrong type makes of its class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"model={str(folder)!r}: {file.name}: {reason}. {remedy}") from error
