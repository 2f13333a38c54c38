"""One folder that transformers and vLLM load: ``python -m common.merge --model M --adapter A --output FOLDER``.

It merges an adapter with its base, the shards of a checkpoint, or a model of a run: the best, the final or that of a
checkpoint. It overwrites nothing, and refuses what cannot be merged before it loads any weight.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import os
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.utils import GENERATION_CONFIG_NAME

from common.cli import parse_settings, run_script
from common.embedded import check_model
from common.models.bases import forget_origin
from common.models.files import check_report, without_report
from common.models.generation import AsShipped
from common.models.outputs import keep_outputs, use_plain_outputs
from common.models.saving import copied_weights, save_weights
from common.runs.checkpoints import temporary_path
from common.runs.disk import remove_folder, written
from common.runs.own_files import let_others_read
from common.runs.sources import Source, check_adapter, find_source
from common.runs.writable import check_folder

if TYPE_CHECKING:
    from peft import PeftModel

_SIZE = re.compile(r"\d+(KB|MB|GB|KiB|MiB|GiB)")


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


# Loading


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
