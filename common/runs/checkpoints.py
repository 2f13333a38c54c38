"""A run's checkpoints: written complete or not at all, found whole or named as damaged.

Everything is first written under a temporary name, with `.tmp-` in it, and then renamed, so that a process killed at
any moment leaves the last complete state behind. The trainer decides what a checkpoint contains (it passes one writer
per part) and when to save. Only the main process calls these functions; where all processes write, it begins the
folder that they write into, and completes it after them.
"""

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.runs.disk import check_room, free_bytes, remove_folder, reported, written
from common.runs.manifest import MANIFEST_FILE, find_damage, note_damage, write_manifest
from common.runs.own_files import let_others_read, write_new

FINAL_FOLDER, POLICY_FOLDER, STATE_FILE = "final", "policy", "trainer_state.json"

logger = logging.getLogger("nanorlhf")

# A checkpoint that takes more than some seconds to read.
_MANY_BYTES = 4 * 10**9

_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
_LEFTOVER_NAME = re.compile(r"(checkpoint-\d+|final|best|[a-z]+\.(yaml|jsonl?|png|html))?\.tmp-.*")


@reported
def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it: a reader sees the old content or the new, never a part."""
    temporary = temporary_path(path)
    try:
        write_new(temporary, content)
        _sync(temporary)
    except BaseException:  # a full disk
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    _sync(path.parent)


@reported
def _write_folder(target: Path, fill: Callable[[Path], None], state: dict[str, Any]) -> None:
    """Fills a temporary folder, its state and then its manifest last, and renames it; an existing one is replaced."""
    temporary = temporary_path(target)
    try:
        temporary.mkdir()
        fill(temporary)
        _seal(temporary, state)
    except BaseException:  # a full disk or Ctrl-C: the incomplete folder is useless and may be large
        remove_folder(temporary)
        raise
    _put(temporary, target)


def _seal(folder: Path, state: dict[str, Any], known: dict[str, str] | None = None) -> None:
    """Write a filled folder's state and then its manifest, and have all of it on the disk."""
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    write_manifest(folder, known)
    let_others_read(folder)
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _put(complete: Path, target: Path) -> None:
    """Give a complete folder its name; what had that name is removed only after it has."""
    before = _set_aside(target) if os.path.lexists(target) else None
    try:
        os.replace(complete, target)
    except OSError:
        if before is not None:
            os.replace(before, target)
        raise
    _sync(target.parent)
    if before is not None:
        with suppress(OSError):  # the next start tries again
            _delete(before)


def temporary_path(path: Path) -> Path:
    """Where a file or folder is written before it gets its name; `remove_leftovers` knows these names.

    Nobody can guess the name, and put a link there.
    """
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a folder or a file, or a link and not what it points to.

    It is renamed before it is emptied, so that a half-deleted folder never has a valid name.
    """
    _delete(_set_aside(path))


def _set_aside(path: Path) -> Path:
    """Renames what is to be deleted; a link itself, not what it points to."""
    aside = temporary_path(path)
    os.replace(path, aside)
    return aside


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """True for what a killed process had started to write or to delete."""
    return _LEFTOVER_NAME.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes had started to write or to delete in a run's folder.

    A complete `final` that had not got its name yet gets it, if what has the name is none or from before it. What
    cannot be deleted is a warning, because the run does not need that.

    Raises:
        CannotWrite: `final` cannot get its name.
    """
    leftovers = list(filter(is_leftover, folder.iterdir()))
    finals = [path for path in leftovers if path.name.startswith(f"{FINAL_FOLDER}.") and not path.is_symlink()]
    whole = [path for path in finals if (path / MANIFEST_FILE).is_file() and damage_of(path, read="") is None]
    target = folder / FINAL_FOLDER
    if whole:
        newest = max(whole, key=_step_in)
        if damage_of(target) is not None or _step_in(target) < _step_in(newest):
            written(target, lambda: _put(newest, target))
    for path in leftovers:
        try:
            _delete(path)
        except OSError as error:
            logger.warning("%s is of no use, and could not be deleted: %s", path, error.strerror)


def _step_in(folder: Path) -> int:
    step = (_read_state(folder) or {}).get("step")
    return step if isinstance(step, int) else 0


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
        The checkpoint's folder. If it already exists and is whole, it stays: it contains the same. A damaged one is
        replaced.
    """

    def fill(folder: Path) -> None:
        for name, write in writers.items():
            write(folder / name)

    target = Path(folder) / f"checkpoint-{step}"
    if damage_of(target, read="") is not None:
        _write_folder(target, fill, {"step": step, **state})
    return target


def begin_checkpoint(folder: Path, step: int) -> Path | None:
    """Make the folder that all processes write a checkpoint into.

    Args:
        folder: the run's folder.
        step: number of finished steps.

    Returns:
        The folder under its temporary name, for `complete_checkpoint`; None if the checkpoint is there and whole.
    """
    target = Path(folder) / f"checkpoint-{step}"
    return None if damage_of(target, read="") is None else _begin(target)


def complete_checkpoint(
    temporary: Path,
    step: int,
    *,
    writers: dict[str, Callable[[Path], None]],
    state: dict[str, Any],
    digests: dict[str, str],
) -> None:
    """Give a folder from `begin_checkpoint` what is left to write and its name, once all processes have written.

    Args:
        temporary: the folder.
        step: as in save_checkpoint.
        writers: as in save_checkpoint, of what the main process writes alone.
        state: as in save_checkpoint.
        digests: of files that are there, as far as they are known.
    """
    for name, write in writers.items():
        write(temporary / name)
    _seal(temporary, {"step": step, **state}, digests)
    _put(temporary, temporary.with_name(f"checkpoint-{step}"))


def begin_final(folder: Path) -> Path:
    """Make the folder that all processes write `final` into, under its temporary name."""
    return _begin(Path(folder) / FINAL_FOLDER)


def complete_final(temporary: Path, step: int, *, digests: dict[str, str], **state: Any) -> None:
    """Give a folder from `begin_final` its state and its name, once all processes have written.

    Args:
        temporary: the folder.
        step: as in save_final.
        digests: of files that are there, as far as they are known.
        state: as in save_final.
    """
    _seal(temporary, _state_of_final(step) | state, digests)
    _put(temporary, temporary.with_name(FINAL_FOLDER))


def _begin(target: Path) -> Path:
    temporary = temporary_path(target)
    temporary.mkdir()
    return temporary


def save_final(folder: Path, step: int, *, fill: Callable[[Path], None], **state: Any) -> Path:
    """Writes `final`, complete or not at all; replaces the one from before the run was made longer.

    Args:
        folder: the run's folder.
        step: number of finished steps.
        fill: receives an empty folder and writes model and tokenizer into it.
        state: what else to store, as JSON. `stopped_early`: the run ended before num_steps because evaluations did
            not get better.
    """
    _write_folder(Path(folder) / FINAL_FOLDER, fill, _state_of_final(step) | state)
    return Path(folder) / FINAL_FOLDER


def _state_of_final(step: int) -> dict[str, Any]:
    return {"step": step, "policy": "last", "stopped_early": False}


def step_of(checkpoint: Path | str) -> int:
    """The step in a checkpoint's name."""
    return int(Path(checkpoint).name.split("-")[1])


def damage_of(folder: Path, *, read: str | None = None) -> str | None:
    """What is wrong with a checkpoint or with `final`, in words that name the file; None if it is whole.

    Args:
        folder: its folder, or a link to it.
        read: as in `find_damage`.
    """
    damage = find_damage(folder, read=read)
    if damage is not None or not folder.is_dir():
        return damage
    state = _read_state(folder)
    if state is None:
        return f"{STATE_FILE} is {'empty or not readable' if (folder / STATE_FILE).is_file() else 'missing'}"
    if _CHECKPOINT_NAME.fullmatch(folder.name) and state.get("step", step_of(folder)) != step_of(folder):
        return f"{STATE_FILE} is that of step {state['step']}"
    if _CHECKPOINT_NAME.fullmatch(folder.name) and "step" in state and not (folder / MANIFEST_FILE).is_file():
        # From before there were manifests: the parts that every algorithm's checkpoint has.
        parts = (f"{POLICY_FOLDER}/*.safetensors", f"{POLICY_FOLDER}/*config.json", f"{POLICY_FOLDER}_optimizer.pt")
        return next((f"{part} is missing" for part in parts if not any(folder.glob(part))), None)
    return None


def _read_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / STATE_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def named_checkpoints(folder: Path) -> list[Path]:
    """Whatever has the name of a checkpoint, whole or not, oldest first."""
    return sorted((path for path in Path(folder).iterdir() if _CHECKPOINT_NAME.fullmatch(path.name)), key=step_of)


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run as far as sizes tell, oldest first."""
    return [path for path in named_checkpoints(folder) if damage_of(path) is None]


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step among those that are whole as far as sizes tell, or None."""
    return next(reversed(list_checkpoints(folder)), None)


def find_whole_checkpoint(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint of which every file is as it was saved, and what is wrong with those after it, by name.

    It reads the checkpoint that it returns. What it finds is kept, so that `list_checkpoints` knows it too.
    """
    damaged = {}
    for checkpoint in reversed(named_checkpoints(folder)):
        num_bytes = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        if num_bytes > _MANY_BYTES:  # tells why the next seconds are silent
            logger.info("comparing %s (%.1f GB) with its manifest ...", checkpoint.name, num_bytes / 1e9)
        damage = damage_of(checkpoint, read="")
        if checkpoint.is_dir():
            with suppress(OSError):  # a folder that cannot be written to is read anew the next time
                note_damage(checkpoint, damage)
        if damage is None:
            return checkpoint, damaged
        damaged[checkpoint.name] = damage
    return None, damaged


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What was stored with a checkpoint or with `final`, its step under "step".

    Raises:
        ValueError: if the folder is not a complete checkpoint.
    """
    state = _read_state(Path(checkpoint))
    if state is None:
        raise ValueError(
            f"{checkpoint}: not a complete checkpoint: it has no {STATE_FILE} that can be read. Pass a folder "
            "checkpoint-N of a run."
        )
    return state


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Deletes old checkpoints, and damaged ones that the run has passed; of a link, only the link.

    One that cannot be deleted, such as the place where another disk is mounted, is a warning.

    Args:
        folder: the run's folder.
        keep: how many of the latest stay, at least 1; damaged ones do not count.
        best: name of a checkpoint that stays in any case, for example "checkpoint-40", or None.
    """
    for checkpoint in _passed(folder, keep, best):
        try:
            _remove(checkpoint)
        except OSError as error:
            message = "%s could not be deleted: %s. So this old checkpoint stays, or what is left of it."
            logger.warning(message, checkpoint, error.strerror)


def _passed(folder: Path, keep: int, best: str | None) -> list[Path]:
    """The checkpoints that a run does not need, oldest first: see `rotate`."""
    assert keep >= 1, "a run needs its latest checkpoint to be resumed"
    kept = list_checkpoints(folder)[-keep:]
    passed = [path for path in named_checkpoints(folder) if kept and step_of(path) < step_of(kept[-1])]
    return [
        path
        for path in passed
        if path not in kept
        and path.name != best
        and any((path / name).is_file() for name in (STATE_FILE, MANIFEST_FILE))
    ]


def make_room(folder: Path, step: int, *, needed: int, largest: int, best: str | None, drop_oldest: bool) -> None:
    """Makes sure that the next checkpoint fits before it is begun.

    Args:
        folder: the run's folder.
        step: of the next checkpoint.
        needed: its bytes.
        largest: bytes of its largest file.
        best: as in `rotate`.
        drop_oldest: if it does not fit, delete old checkpoints first: all but the latest whole one and the best, and
            only if it fits then.

    Raises:
        CannotWrite: it does not fit.
    """
    target = folder / f"checkpoint-{step}"
    if damage_of(target) is None:  # it is there already
        return
    sizes = {path: _size(path) for path in _passed(folder, 1, best) if not path.is_symlink()}
    would_fit = free_bytes(folder) < needed <= free_bytes(folder) + sum(sizes.values())
    if would_fit and drop_oldest:
        for path in sizes:
            if free_bytes(folder) < needed:
                logger.info("%s is dropped to make room for %s", path.name, target.name)
                written(path, lambda path=path: _remove(path))
    hint = " Or pass --save_drop_oldest_first true, and older checkpoints make room." if would_fit else ""
    check_room(target, needed, largest=largest, hint="" if drop_oldest else hint)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """Writes tensors and plain Python values, for example an optimizer's `state_dict()`, bit for bit."""
    import torch

    with open(path, "wb") as file:  # torch's own files do not say why they could not be written
        torch.save(state, file)


def load_tensors(path: Path, *, in_place: bool = False) -> dict[str, Any]:
    """What `save_tensors` wrote, with all tensors on the CPU; torch refuses a file that holds anything but data.

    Args:
        path: of the file.
        in_place: tensors stay in the file until they are read, for a process that needs parts of them.
    """
    import torch

    return torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
