"""One folder that transformers and vLLM load: ``python -m common.merge --model M --adapter A --output FOLDER``.

It merges an adapter with its base, the shards of a checkpoint, or a model of a run: the best, the final or that of a
checkpoint. It overwrites nothing, and refuses what cannot be merged before it loads any weight.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import json
import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from common.cli import parse_settings, run_script
from common.embedded import check_model, is_embedded, resolve_model, skeleton
from common.mistakes import first_line
from common.models.bases import find_base, forget_origin, is_lost, is_there
from common.models.configs import ADAPTER_CONFIG
from common.models.files import check_report, without_report
from common.models.generation import AsShipped
from common.models.outputs import keep_outputs, use_plain_outputs
from common.models.saving import copied_weights, save_weights
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
    temporary_path,
)
from common.runs.disk import remove_folder, written
from common.runs.folder import CONFIG_FILE
from common.runs.own_files import let_others_read
from common.runs.writable import check_folder

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_SIZE = re.compile(r"\d+(KB|MB|GB|KiB|MiB|GiB)")
_ADAPTER_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.weight)?"
)
# For each part of an adapter: its axis that it shares with the weight, and that axis in (out, in) or (V, hidden).
_SHARED_AXES = {"A": (1, 1), "B": (0, 0), "embedding_A": (1, 0), "embedding_B": (0, 1)}


@dataclass(kw_only=True)
class MergeSettings:
    """What to merge, and where to."""

    output: str
    """A new or empty folder."""
    model: str | None = None
    """Base model of the adapter; or a sharded checkpoint, a run's folder, or one of its checkpoints."""
    adapter: str | None = None
    """Folder of a LoRA adapter; without --model its own base is used."""
    trust_remote_code: bool = False
    """Run Python files that come with the model; without it such a model is refused."""
    max_shard_size: str = "50GB"
    """Larger models are written in several files."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the merged model is made of.

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


def merge(settings: MergeSettings) -> Source:
    """Write the merged model with tokenizer, chat template and generation configuration into one folder.

    Adapters are added in float32; the result has the precision of the base.

    Args:
        settings: what to merge, and where to.

    Returns:
        What was merged.

    Raises:
        ValueError: if parts are missing, do not fit or need no merge, or the output folder is not empty.
    """
    output = Path(settings.output)
    check_folder(output, setting="output", is_replaced=True)
    if output.is_symlink():
        output = output.resolve()  # the model replaces a folder, not a link to one
    if any(output.iterdir() if output.exists() else ()):
        raise ValueError(f"output={output}: it is not empty, and nothing is overwritten. Pass another --output.")
    if not _SIZE.fullmatch(settings.max_shard_size):
        raise ValueError(f"max_shard_size={settings.max_shard_size!r}: need a size. Pass --max_shard_size 5GB.")
    source = find_source(settings.model, settings.adapter)
    check_model(source.base, trust_remote_code=settings.trust_remote_code, is_trained=False)
    if source.adapter is not None:
        check_adapter(source.adapter, source.base)
    model = load(source)
    weights = copied_weights(model)
    base = model if source.adapter is None else model.get_base_model()
    written(output, lambda: _write(output, source, base, weights, settings))
    return source


def _write(
    output: Path,
    source: Source,
    base: transformers.PreTrainedModel,
    weights: dict[str, torch.Tensor],
    settings: MergeSettings,
) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(output)
    try:
        save_weights(base, dict(weights), temporary, max_shard_size=settings.max_shard_size)
        has_tokenizer = (Path(source.own) / "tokenizer_config.json").exists()
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.own if has_tokenizer else source.base, trust_remote_code=settings.trust_remote_code
        )
        forget_origin(tokenizer).save_pretrained(temporary)
        let_others_read(temporary)
        os.replace(temporary, output)
    except BaseException:  # a full disk or Ctrl-C
        remove_folder(temporary)
        raise


# Finding the parts


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


# Checks and loading


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
    for name, shape in _shapes_in(adapter).items():
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


def _shapes_in(adapter: Path) -> dict[str, list[int]]:
    """Names and shapes of an adapter's tensors."""
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


def load(source: Source, **options: str) -> transformers.PreTrainedModel | PeftModel:
    """Load the base in its own precision on the CPU, and the adapter on top of it.

    Args:
        source: what is merged.
        options: of from_pretrained, such as attn_implementation.

    Raises:
        ValueError: if the checkpoint lacks weights.
    """
    config = transformers.AutoConfig.from_pretrained(source.base, trust_remote_code=False)
    plain = deepcopy(config)
    use_plain_outputs(plain)
    with without_report():
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            source.base,
            config=plain,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_report names them
            trust_remote_code=False,
            **options,
        )
    check_report(found, f"model={source.base!r}")
    keep_outputs(model, config)
    has_own = (Path(source.own) / GENERATION_CONFIG_NAME).is_file()
    model.generation_config = AsShipped.read(source.own) if has_own else AsShipped.of(model.generation_config)
    if source.adapter is None:
        return model
    from common.models.lora import load_adapter

    return load_adapter(model, source.adapter)


def main(args: list[str] | None = None) -> None:
    """Merge as the command line says."""
    settings = parse_settings(MergeSettings, args)
    source = merge(settings)
    files = sorted(path.name for path in Path(settings.output).glob("*.safetensors"))
    print(f"merged: {source.what}\nmodel: {Path(settings.output).resolve()} ({', '.join(files)})")


if __name__ == "__main__":
    run_script(main, interrupted="nothing was written; the same command starts again")
