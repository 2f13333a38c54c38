"""Reads a model's configuration, and tells from it alone why a model cannot be trained. Loads no weights.

Every function takes a configuration or a path. What is wrong comes back as a reason, None if nothing is; `read_config`
and the checks of common/models/files.py raise.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

logger = logging.getLogger("nanorlhf")

# What a user does about a model that cannot be found.
REMEDY = (
    "Need a folder with a config.json or a hub id that this machine can reach. Pass --model with one, or --model tiny "
    "for the embedded policy."
)
_TRUST = "Read the .py files in its repository, then pass --trust_remote_code true, or pass another model."
# Ends of the names of classes whose weights hold no language model head.
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "ForRewardModel",
)


def read_config(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    label: str | None = None,
    remedy: str = REMEDY,
    own_code_remedy: str = _TRUST,
) -> transformers.PreTrainedConfig:
    """Read config.json of a folder or of the hub.

    A configuration whose class is in the model's folder is read with trust_remote_code only. Its classes are then
    registered with the Auto classes of transformers, so that everything else in this process loads them too.

    Args:
        path: hub id or folder.
        trust_remote_code: run Python files that come with the model.
        label: what the path is, for messages; None: the setting `model`.
        remedy: what to do about a model that is not there.
        own_code_remedy: what to do about one with code of its own.

    Raises:
        ValueError: there is none, it is damaged, nobody knows its architecture, or it needs code of its own.
    """
    label = label or f"model={str(path)!r}"
    folder = Path(path)
    if folder.is_dir() and not (folder / transformers.utils.CONFIG_NAME).is_file():
        raise ValueError(f"{label}: the folder has no config.json, which says what the model is. {remedy}")
    if not folder.is_dir() and (folder.is_absolute() or str(path).startswith((".", "~")) or folder.is_file()):
        raise ValueError(f"{label}: cannot be loaded: there is no such folder. {remedy}")
    try:
        with _one_line_without_a_network(str(path)):
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # also what classes of configurations raise for values of the wrong type
        raise ValueError(f"{label}: {_why_unreadable(error, remedy, own_code_remedy)}") from error
    if trust_remote_code:
        _register(config, str(path))
    return config


def why_not_trainable(config: transformers.PreTrainedConfig) -> str | None:
    """Why a model cannot be trained as a causal language model, in a sentence or two; None if it can.

    Args:
        config: of the model.
    """
    return why_quantized(config) or why_not_causal(config)


def why_quantized(config: transformers.PreTrainedConfig) -> str | None:
    """That the weights in the checkpoint are quantised, with what to do; None if they are not.

    Args:
        config: of the model.
    """
    settings = config.to_dict().get("quantization_config") or config.get_text_config().to_dict().get(
        "quantization_config"
    )
    if not settings:
        return None
    method = settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "an unnamed method")
    return (
        f"its weights are quantised ({method}): they are rounded numbers that no gradient can change and no push to "
        "the sampler can hold. Pass the model that it was made from; --use_lora true --load_in_4bit true needs little "
        "memory for that one."
    )


def why_not_causal(config: transformers.PreTrainedConfig) -> str | None:
    """Why a model is no causal language model, with what to do; None if it is one.

    Args:
        config: of the model.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        return (
            f"{kind} is an encoder-decoder model, and a prompt and its completion are one sequence here. Pass a "
            "decoder-only model, such as Qwen/Qwen2.5-0.5B."
        )
    is_decoder = config.to_dict().get("is_decoder", True)
    if type(config) in transformers.AutoModelForMaskedLM._model_mapping and not is_decoder:
        return (
            f"{kind} is an encoder: each token sees those after it, so it cannot write a completion. Pass a causal "
            "language model, such as Qwen/Qwen2.5-0.5B."
        )
    named = next(iter(config.architectures or ()), "")
    if named.endswith(_OTHER_HEADS):
        return (
            f"its weights are those of {named}, without the head of a language model, which would be random. Pass a "
            "causal language model; a model with one label can be a reward: --rewards."
        )
    if model_class(config) is not None:
        return None
    if (
        type(config) in transformers.AutoModelForImageTextToText._model_mapping
        or config.get_text_config() is not config
    ):
        return (
            f"AutoModelForCausalLM does not know {kind}, a model for images and text, so its language model cannot "
            "be loaded alone. Pass a model for text of the same family."
        )
    return (
        f"transformers {transformers.__version__} has no causal language model of the kind {kind}. Pass one that "
        "AutoModelForCausalLM loads."
    )


def model_class(
    config: transformers.PreTrainedConfig, auto_class: type | None = None
) -> type[transformers.PreTrainedModel] | None:
    """The class that an Auto class makes of a configuration; None if there is none.

    Args:
        config: of the model.
        auto_class: such as AutoModel; None: AutoModelForCausalLM.
    """
    auto_class = auto_class or transformers.AutoModelForCausalLM
    if type(config) not in auto_class._model_mapping:
        return None
    found = auto_class._model_mapping[type(config)]
    if not isinstance(found, tuple):
        return found
    by_name = {each.__name__: each for each in found}
    return by_name.get(next(iter(config.architectures or ()), ""), found[0])


def describe_multimodal(config: transformers.PreTrainedConfig) -> str | None:
    """What becomes of a model that also takes images or sound, in a line; None for a model of text alone.

    Args:
        config: of a model that is trainable.
    """
    if config.get_text_config() is config:
        return None
    is_text_alone = model_class(config).config_class is type(config.get_text_config())
    rest = "final/ holds the language model alone" if is_text_alone else "the rest stays as it is"
    return f"{config.model_type} also takes other inputs than text: its language model is trained, and {rest}"


def setting(config: transformers.PreTrainedConfig, *names: str) -> Any:
    """The first of several names that a configuration gives a value, as an entry or as a property; else None.

    Names differ between architectures, and entries of config.json are attributes of the object, so that only asking
    for them tells.
    """
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _why_unreadable(error: Exception, remedy: str, own_code_remedy: str) -> str:
    """The first line of an error of transformers, or our own words for the common ones, with what to do."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if "trust_remote_code" in str(error):
        return (
            f"its architecture is Python code that comes with the model, which is not run unasked. {own_code_remedy}"
        )
    if "does not recognize this architecture" in str(error) or "Unrecognized model" in str(error):
        return (
            f"transformers {transformers.__version__} does not know its architecture (model_type in config.json). "
            "Pass another model, or install a version that knows it and the vLLM that fits."
        )
    return f"cannot be loaded: {reason}. {remedy}"


def _register(config: transformers.PreTrainedConfig, path: str) -> None:
    """Let the Auto classes load a model with code of its own by its model_type, as their own models."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = config.to_dict().get("auto_map") or {}
    if "AutoConfig" not in places or type(config).__module__.startswith("transformers.models."):
        return
    transformers.AutoConfig.register(config.model_type, type(config), exist_ok=True)
    for auto_class in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        name = auto_class.__name__
        if name in places:
            found = get_class_from_dynamic_module(places[name], path)
            found.config_class = type(config)
            found.register_for_auto_class(name)  # its file is saved with the model
            auto_class.register(type(config), found, exist_ok=True)


@contextmanager
def _one_line_without_a_network(path: str) -> Iterator[None]:
    """Replace the hub's messages about each failed attempt, of which there are eleven in 25 s, by one at the first."""
    attempts = logging.getLogger("huggingface_hub.utils._http")
    said = []

    def say_once(record: logging.LogRecord) -> bool:
        if not said:
            logger.info("%s: huggingface.co does not answer; trying again for half a minute ...", path)
            said.append(record)
        return False

    attempts.addFilter(say_once)
    try:
        yield
    finally:
        attempts.removeFilter(say_once)
