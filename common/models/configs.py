"""Reads a model's configuration, and tells from it alone why a model cannot be trained. Loads no weights.

Every function takes a configuration or a path. What is wrong comes back as a reason, None if nothing is; `read_config`
and the checks of common/models/files.py raise.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.constants import ENDPOINT
from transformers.utils.hub import HF_MODULES_CACHE

from common.mistakes import first_line

logger = logging.getLogger("nanorlhf")

# What a user does about a model that cannot be found.
MAX_JSON = 64 * 2**20  # bytes of a file of settings
REMEDY = (
    "Need a folder with a config.json or a hub id that this machine can reach. Pass --model with one, or --model tiny "
    "for the embedded policy."
)
_TRUST = "Read the .py files in its repository, then pass --trust_remote_code true, or pass another model."
# Only the folder of a LoRA adapter has it.
ADAPTER_CONFIG = "adapter_config.json"
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
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{label}: the folder holds a LoRA adapter, which is no model without its base, and which transformers "
            f"would load into one. Run python -m common.merge --model {folder} --output FOLDER to make a model of "
            "both, and pass FOLDER; or move the adapter's files elsewhere to train the model beside them without it."
        )
    if reason := _why_no_config(path):
        raise ValueError(f"{label}: {reason} {remedy}")
    if folder.is_dir():
        _check_config_file(folder, label)
    try:
        with _one_line_without_a_network(str(path)):
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            has_own_code = trust_remote_code and not type(config).__module__.startswith("transformers.models.")
            if has_own_code and not _has_class_for(config.model_type):
                _register(config, str(path))
    except Exception as error:  # also what classes of configurations raise for values of the wrong type
        if folder.is_dir():
            remedy = f"Correct {folder / transformers.utils.CONFIG_NAME}, or pass another model."
        raise ValueError(f"{label}: {_why_unreadable(error, remedy, own_code_remedy)}") from error
    if has_own_code and _has_class_for(config.model_type):
        raise ValueError(
            f"{label}: its own code defines the model_type {config.model_type}, for which transformers "
            f"{transformers.__version__} has a class. It would take that class's place for every other model of this "
            "run, and vLLM would not use it. Leave out --trust_remote_code, or rename model_type in config.json and "
            "in the code."
        )
    return config


def why_not_trainable(config: transformers.PreTrainedConfig) -> str | None:
    """Why a model cannot be trained as a causal language model, in a sentence or two; None if it can.

    Args:
        config: of the model.
    """
    return why_quantized(config) or why_not_causal(config) or _why_no_room(config)


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
        "the sampler can hold. Pass the model that it was made from."
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
    if type(config) in transformers.AutoModelForMaskedLM._model_mapping:
        return (
            f"{kind} is of a family that fills in masked tokens (AutoModelForMaskedLM). In such models a token can "
            "see those after it, also in some that are set up as decoders, so none is taken here. Pass a "
            "decoder-only model, such as Qwen/Qwen2.5-0.5B."
        )
    named = next(iter(config.architectures or ()), "")
    if named.endswith(_OTHER_HEADS):
        return (
            f"its weights are those of {named}, without the head of a language model, which would be random. Pass a "
            "causal language model; a model with one label can be a reward: --rewards."
        )
    if model_class(config) is not None:
        return _why_another_class(config)
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


def _why_no_room(config: transformers.PreTrainedConfig) -> str | None:
    """That a model has no positions for a prompt and a completion; None if it has."""
    name = "max_position_embeddings"
    context = setting(config.get_text_config(), name)
    if context is None or context > 1:
        return None
    return (
        f"config.json has {name} {context}: need room for a prompt and its completion, two tokens at least. Correct "
        "config.json."
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


def is_of_own_code(error: Exception) -> bool:
    """Whether an error comes from the Python files of a model.

    Args:
        error: that was caught.
    """
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).is_relative_to(HF_MODULES_CACHE) for frame in frames)


def _why_another_class(config: transformers.PreTrainedConfig) -> str | None:
    """That config.json names the class of another kind of model than its model_type; None if it does not.

    transformers goes by model_type and vLLM by architectures, so they would make two different models of the weights.
    """
    # Of names alone: the Auto classes would import every model to name its class.
    from transformers.models.auto import modeling_auto

    named, made = next(iter(config.architectures or ()), None), model_class(config)
    classes_by_kind = (  # of models that can write text; one kind may have a class in several
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    kinds = {
        kind
        for names in classes_by_kind
        for kind, found in names.items()
        if named in (found if isinstance(found, tuple) else (found,))
    }
    own = {config.model_type, config.get_text_config().model_type, made.config_class.model_type}
    if not kinds or kinds & own or named == made.__name__:
        return None
    return (
        f"config.json has model_type {config.model_type!r}, of which transformers makes {made.__name__}, and "
        f"architectures [{named!r}], of which vLLM makes another model: the two would compute different log-probs. "
        "Correct the one that is wrong in config.json."
    )


def _why_no_config(path: str | Path) -> str | None:
    """Why a path leads to no config.json; None if it does, or is a hub id."""
    folder = Path(path)
    if not str(path).strip():
        return "it is empty."
    if folder.is_file():
        return "it is a file, not a folder."
    if not folder.is_dir():
        is_path = folder.is_absolute() or str(path).startswith((".", "~"))
        return "cannot be loaded: there is no such folder." if is_path else None
    if not (folder / transformers.utils.CONFIG_NAME).is_file():
        return "the folder has no config.json, which says what the model is."
    return None


def read_settings(file: Path, label: str, remedy: str) -> dict[str, Any]:
    """The settings in a JSON file of a model.

    Args:
        file: such as config.json.
        label: what the model is, for messages.
        remedy: what to do about a file that cannot be read.

    Raises:
        ValueError: it is not readable, or holds something else.
    """
    if (size := file.stat().st_size) > MAX_JSON:
        raise ValueError(f"{label}: {file.name} has {size / 2**20:.0f} MB; settings have a few kB. {remedy}")
    try:
        values = json.loads(file.read_bytes())
    except (UnicodeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise ValueError(f"{label}: {file.name} is not readable as JSON: {reason}. {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{label}: {file.name} holds no settings but {json.dumps(values):.40}. {remedy}")
    return values


def _check_config_file(folder: Path, label: str) -> None:
    """Refuse what the classes of transformers fail on without saying where."""
    file = folder / transformers.utils.CONFIG_NAME
    remedy = f"Correct {file}, or download it again."
    quantization = read_settings(file, label, remedy).get("quantization_config")
    if quantization is not None and not (isinstance(quantization, dict) and quantization):
        raise ValueError(
            f"{label}: {file.name} has quantization_config {json.dumps(quantization):.40}; need a group of settings "
            f"that says how weights are quantised, or none if they are not. {remedy}"
        )


def _why_unreadable(error: Exception, remedy: str, own_code_remedy: str) -> str:
    """The useful line of an error of transformers, or our own words for the common ones, with what to do."""
    reason = first_line(error)
    if isinstance(error, ImportError):
        return f"cannot be loaded: {reason}. Install the package, or pass another model."
    if isinstance(error, SyntaxError) or is_of_own_code(error):
        return f"its own code cannot be run: {reason}. Correct it, or pass another model."
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


def _has_class_for(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _register(config: transformers.PreTrainedConfig, path: str) -> None:
    """Let the Auto classes load a model with code of its own by its model_type, as their own models."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    places = config.to_dict().get("auto_map") or {}
    if "AutoConfig" not in places:
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
        text = record.getMessage()
        if not ("' thrown while requesting" in text or (said and text.startswith("Retrying in "))):
            return True  # an answer, such as that there were too many requests
        if not said:
            logger.info("%s: %s does not answer; trying again for half a minute ...", path, ENDPOINT)
            said.append(record)
        return False

    attempts.addFilter(say_once)
    try:
        yield
    finally:
        attempts.removeFilter(say_once)
