"""Checks a model's files before anything is loaded from them: complete, undamaged, and of the model they should be.

Only headers are read, never weights. Models on the hub are checked when they are loaded.
"""

from __future__ import annotations  # for type hints whose import would take seconds

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from common.mistakes import first_line
from common.models.configs import is_of_own_code, read_settings
from common.models.unread import check_companions, check_unexpected
from common.models.weight_files import FILE_NAMES, REAL, are_equal, check_weight_files, weight_dtypes

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
        other = next((file.name for file in sorted(folder.glob("*.gguf"))), None)
        what = f"no weights that transformers loads; {other} is of llama.cpp" if other else "no weights"
        raise ValueError(
            f"model={str(path)!r}: has {what}. Need {SAFE_WEIGHTS_NAME}, or {SAFE_WEIGHTS_INDEX_NAME} and the files "
            f"that it names. {_AGAIN}"
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
                trust_remote_code=False,
            )
    except ImportError as error:
        raise ValueError(f"{label}: {first_line(error)}. Install the package, or pass another model.") from error
    except Exception as error:  # whatever impossible sizes make of a model
        what = "its own code fails" if is_of_own_code(error) else "the model cannot be built from its config.json"
        reason = _unknown_value(error, config) or first_line(error)
        raise ValueError(f"{label}: {what}: {reason}. Correct the file, or pass another model.") from error
    check_report(found, label)
    check_unexpected(found, model, config, label)
    check_values(path, model)


def _unknown_value(error: Exception, config: transformers.PreTrainedConfig) -> str | None:
    """The setting whose value transformers looks up in vain; None if the error is another."""
    values = config.to_dict()
    groups = [values, *(value for value in values.values() if isinstance(value, dict))]
    if not isinstance(error, KeyError):
        return None
    found = ((name, value) for group in groups for name, value in group.items() if value in error.args)
    return next((f"transformers knows no {name} {value!r}" for name, value in found), None)


def check_report(found: dict[str, Any], label: str) -> None:
    """Refuse a model that was not loaded completely.

    Args:
        found: what from_pretrained gives with output_loading_info.
        label: what the model is, for the message.

    Raises:
        ValueError: names one of its weights.
    """
    absent = sorted(found["missing_keys"])
    odd = sorted((str(name), tuple(there), tuple(needed)) for name, there, needed in found["mismatched_keys"])
    if absent:
        what = "weight is" if len(absent) == 1 else "weights are"
        raise ValueError(
            f"{label}: {len(absent)} {what} missing, such as {absent[0]}, by its config.json: they would be random "
            f"numbers. The files, or config.json, may be another model's. {_AGAIN}"
        )
    if odd:
        name, there, needed = odd[0]
        what = "weight has" if len(odd) == 1 else "weights have"
        raise ValueError(
            f"{label}: {len(odd)} {what} another shape than its config.json says, such as {name}: {there} in the "
            f"file, {needed} by config.json. They would be random numbers. Correct config.json if it was changed. "
            f"Otherwise: {_AGAIN[0].lower()}{_AGAIN[1:]}"
        )


def check_values(path: str | Path, model: transformers.PreTrainedModel) -> None:
    """Refuse weights that are no real values, and two different matrices where the configuration ties them to one.

    Args:
        path: folder of the model.
        model: without storage.

    Raises:
        ValueError: names a weight.
    """
    label = f"model={str(path)!r}"
    parts = {name.split(".")[-1] for name, each in model.named_parameters() if each.is_floating_point()} - {
        "bias"
    }  # GPT-2 has a mask of this name
    for name, dtype in weight_dtypes(path).items():
        if name.split(".")[-1] in parts and dtype not in REAL:
            raise ValueError(
                f"{label}: {name} is of type {dtype}, and config.json has no quantization_config: rounded numbers "
                f"without their scales would be taken for real values. Need weights of {', '.join(REAL)}. Pass the "
                "model that it was made from."
            )
    config = model.config.get_text_config()
    if not config.to_dict().get("tie_word_embeddings") or model.get_output_embeddings() is None:
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for end in ends for name, module in model.named_modules() if module is end]
    if len(names) == 2 and not are_equal(path, *names):
        raise ValueError(
            f"{label}: config.json has tie_word_embeddings true, which makes one matrix of embeddings and head, and "
            f"the files hold two different ones, {names[0]} and {names[1]}. Set tie_word_embeddings to false in "
            "config.json if the model was trained with both."
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
    label, remedy = f"model={str(folder)!r}", f"Correct {file}, or delete it for the values of config.json."
    values = read_settings(file, label, remedy)
    ends = values.get("eos_token_id")
    for token in ends if isinstance(ends, list) else [ends]:
        if token is not None and type(token) is not int:
            raise ValueError(
                f"{label}: {file.name} has eos_token_id {ends!r:.60}; need the number of a token, or a "
                f"list of them, since a completion ends there. {remedy}"
            )
    try:
        transformers.GenerationConfig(**values)
    except Exception as error:  # whatever a value of the wrong type makes of its class
        raise ValueError(f"{label}: {file.name}: {first_line(error)}. {remedy}") from error
