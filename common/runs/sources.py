"""What a name means that a model is given by: a hub id, a folder, a run, one of its checkpoints, or a LoRA adapter.

Nothing is loaded here. What is damaged, incomplete or of another model is refused before any weight is read.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from common.embedded import check_model, is_embedded, resolve_model, skeleton
from common.mistakes import first_line
from common.models.bases import find_base, is_lost, is_there
from common.models.configs import ADAPTER_CONFIG
from common.models.weight_files import check_weight_files, shards
from common.runs.best import BEST_LINK, in_words
from common.runs.checkpoints import (
    FINAL_FOLDER,
    POLICY_FOLDER,
    STATE_FILE,
    damage_of,
    latest_checkpoint,
    load_state,
    step_of,
)
from common.runs.folder import CONFIG_FILE

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_ADAPTER_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.weight)?"
)
# For each part of an adapter: its axis that it shares with the weight, and that axis in (out, in) or (V, hidden).
_SHARED_AXES = {"A": (1, 1), "B": (0, 0), "embedding_A": (1, 0), "embedding_B": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a model is made of.

    Attributes:
        base: hub id or folder of a complete model.
        adapter: folder of the adapter that goes on top of it, or None.
        what: both in words, for messages.
    """

    base: str
    adapter: Path | None = None
    what: str

    @property
    def own(self) -> str:
        """Where tokenizer and end tokens are: the adapter's folder if there is one, since it may have its own."""
        return str(self.adapter or self.base)

    @property
    def own_tokenizer(self) -> str:
        """Where the tokenizer is: the adapter's folder if that has one, else the base."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if has_own else self.base


def commit_on_hub(model: str) -> str | None:
    """The commit of a hub id's model in the cache; None if it is not there."""
    cached = try_to_load_from_cache(model, CONFIG_NAME)
    return Path(cached).parent.name if isinstance(cached, str) else None


def find_model(model: str, adapter: str | None = None, *, trust_remote_code: bool = False) -> Source:
    """The complete model, or the base and its adapter, that a name means; checked but not loaded.

    Args:
        model: hub id, an embedded policy's name, or the folder of a model, an adapter, a run or a checkpoint of one.
        adapter: folder of an adapter of the model; None: none but that which `model` may mean.
        trust_remote_code: run Python files that come with the model.

    Raises:
        ValueError: there is no such model, it is no causal language model in floating point, or parts do not fit.
    """
    folder = Path(model)
    parts = (folder / name for name in (CONFIG_FILE, STATE_FILE, ADAPTER_CONFIG))  # of a run, a checkpoint, an adapter
    is_of_run = any(part.is_file() for part in parts) or is_best_of_run(folder)
    if adapter is None and ((folder / CONFIG_NAME).is_file() or not is_of_run):
        check_model(model, trust_remote_code=trust_remote_code, is_trained=False)
        return Source(base=model, what=model)
    source = find_source(model, adapter)
    check_model(source.base, trust_remote_code=trust_remote_code, is_trained=False)
    if source.adapter is not None:
        check_adapter(source.adapter, source.base)
    return source


def find_source(model: str | None, adapter: str | None) -> Source:
    """Find out what the two names refer to.

    Raises:
        ValueError: if there is nothing to merge.
    """
    if adapter is not None:
        recorded = _recorded_base(Path(adapter))
        base = model if model is not None else recorded
        base = resolve_model(base)
        return Source(base=base, adapter=Path(adapter), what=f"{_adapter_in_words(Path(adapter))} and its base {base}")
    if model is None:
        raise ValueError("neither model nor adapter: there is nothing to merge. Pass --model, --adapter or both.")
    folder = Path(model)
    if (folder / CONFIG_FILE).is_file():
        return _part_of_run(*_best_of_run(folder))
    if is_best_of_run(folder):
        return _part_of_run(*_linked_best(folder))
    if (folder / STATE_FILE).is_file() and folder.name != FINAL_FOLDER:
        return _part_of_run(folder, _checkpoint_in_words(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        return _part_of_run(folder, _adapter_in_words(folder))
    if shards(folder):
        return Source(base=model, what=f"the shards of {model}")
    if not folder.is_dir():
        raise ValueError(
            f"model={model}: there is no such folder, and a model on the hub has nothing to merge. Pass --model with "
            "an existing folder, or --adapter with an adapter of this model."
        )
    raise ValueError(
        f"model={model}: nothing to merge: the folder holds no adapter, no shards and no run. Pass --adapter with an "
        "adapter of this model; a model without one is used as it is."
    )


def _part_of_run(folder: Path, what: str) -> Source:
    """A model or an adapter, in the folder itself or, in a checkpoint, in the policy's folder.

    Raises:
        ValueError: if a file of it is not as it was saved.
    """
    if (folder / STATE_FILE).is_file() and (damage := damage_of(folder, read="")):
        raise ValueError(
            f"model={folder}: it is damaged: {damage}. What is merged must be what was trained. Pass another "
            "checkpoint of the run, or bring the file back."
        )
    if (folder / POLICY_FOLDER).is_dir():
        folder = folder / POLICY_FOLDER
    if not (folder / ADAPTER_CONFIG).is_file():
        check_weight_files(folder)
        return Source(base=str(folder), what=what)
    base = resolve_model(_recorded_base(folder))
    what = what if what.startswith("adapter ") else f"{what}, an adapter,"
    return Source(base=base, adapter=folder, what=f"{what} and its base {base}")


def _best_of_run(folder: Path) -> tuple[Path, str]:
    """The checkpoint with the best held-out metric if the run kept it; else the final or the last model."""
    latest, final = latest_checkpoint(folder), folder / FINAL_FOLDER
    best, other = load_state(latest).get("best") if latest else None, ""
    if best:
        checkpoint = folder / best["checkpoint"]
        if damage_of(checkpoint) is None:
            return checkpoint, _checkpoint_in_words(checkpoint)
        lost = "which is gone or damaged" if step_of(best["checkpoint"]) else "of which there is no checkpoint"
        other = f" (its best was {in_words(best)}, {lost})"
    if final.is_dir():
        return final, f"the last policy of {folder}, after step {load_state(final).get('step')}{other}"
    if latest:
        return latest, f"{latest.name} of {folder}, its last{other}"
    raise ValueError(
        f"model={folder}: this run has neither a checkpoint nor a final model yet. Wait for it, or pass another run."
    )


def is_best_of_run(folder: Path) -> bool:
    """Whether a path is that of a run's link to its best policy, which need not exist."""
    return folder.name == BEST_LINK and (folder.parent / CONFIG_FILE).is_file()


def _linked_best(link: Path) -> tuple[Path, str]:
    """The checkpoint that a run's link `best` points to."""
    policy = link.resolve()
    if not policy.is_dir():
        raise ValueError(
            f"model={link}: this run has no such folder: its best policy is the untrained one, or the checkpoint is "
            f"gone. Pass --model {link.parent} for the best that there is, or {link.parent / FINAL_FOLDER}."
        )
    return policy.parent, _checkpoint_in_words(policy.parent)


def _checkpoint_in_words(checkpoint: Path) -> str:
    """Which checkpoint it is of its run: the best, the last, or another."""
    run = checkpoint.parent
    latest = latest_checkpoint(run)
    best = load_state(latest).get("best") if latest else None
    is_best = bool(best) and best["checkpoint"] == checkpoint.name
    places = ["the best"] * is_best + ["the last checkpoint"] * (checkpoint == latest)
    return f"{in_words(best) if is_best else checkpoint.name} of {run}{''.join(f', {each}' for each in places)}"


def _adapter_in_words(folder: Path) -> str:
    """An adapter, and if it is a run's, the checkpoint or the final model that it belongs to."""
    whole = folder.resolve().parent
    if folder.resolve().name == POLICY_FOLDER and (whole / STATE_FILE).is_file():
        return f"adapter {folder} ({_checkpoint_in_words(whole)})"
    if whole.name == FINAL_FOLDER and (whole / STATE_FILE).is_file():
        return f"adapter {folder} (the last policy of {whole.parent}, after step {load_state(whole).get('step')})"
    return f"adapter {folder}"


def _recorded_base(adapter: Path) -> str:
    path = adapter / ADAPTER_CONFIG
    if not path.is_file():
        raise ValueError(
            f"adapter={adapter}: there is no {ADAPTER_CONFIG} in it, which names the base model. Pass --adapter with "
            "the folder that peft wrote."
        )
    return find_base(adapter, _name_of_base(adapter), is_embedded)


def _name_of_base(adapter: Path) -> str:
    return json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]


def check_adapter(adapter: Path, base: str) -> None:
    """Refuse an adapter of another base model: compare the model's name and the tensors' shapes.

    Raises:
        ValueError: if they differ; it names both models, or the tensor that does not fit.
    """
    recorded = _recorded_base(adapter)
    recorded = resolve_model(recorded)
    is_same = base == recorded or (is_there(base) and is_there(recorded) and os.path.samefile(base, recorded))
    if not is_same and not is_lost(adapter, _name_of_base(adapter)):  # then the shapes alone are compared
        raise ValueError(
            f"adapter={adapter}: it belongs to the base model {recorded}, but model={base} was given: on other "
            f"weights it gives another policy. Pass --model {recorded}. If {base} is the same model at another path, "
            f"write this path into base_model_name_or_path of {adapter / ADAPTER_CONFIG}."
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise ValueError(
            f"adapter={adapter}: there is no {ADAPTER_WEIGHTS} in it, which holds its weights. Pass --adapter with "
            "the folder that peft wrote."
        )
    modules = dict(skeleton(base).named_modules())
    for name, shape in shapes_in(adapter).items():
        found = _ADAPTER_TENSOR.fullmatch(name)
        if found is None:
            continue
        path = found["module"].replace(".base_layer", "")
        module = modules.get(path)
        axis, base_axis = _SHARED_AXES[found["part"]]
        base_shape = None if module is None else _weight_shape(module)
        if module is None or (base_shape and shape[axis] != base_shape[base_axis]):
            raise ValueError(
                f"adapter={adapter}: its {name} has the shape {shape}, which does not fit {path} of "
                f"{base} with {base_shape}: it was trained on another model. Pass --model with its base."
            )


def shapes_in(adapter: Path) -> dict[str, list[int]]:
    """Names and shapes of an adapter's tensors.

    Raises:
        ValueError: its file is damaged.
    """
    file = adapter / ADAPTER_WEIGHTS
    try:
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"adapter={adapter}: {file.name} is damaged ({file.stat().st_size:,} bytes; {first_line(error)}), so its "
            "weights cannot be read. Copy or save the adapter again."
        ) from error


def _weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Shape of a module's weight as (out, in) or (V, hidden); None for modules such as fused experts without one."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return None
    # GPT-2's layers keep (in, out).
    return tuple(weight.shape)[::-1] if isinstance(module, Conv1D) else tuple(weight.shape)
