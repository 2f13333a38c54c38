"""How the last process of a run ended: orderly, or without a word, as the out-of-memory killer ends it.

SIGKILL leaves no trace in the process that it ends. So a run keeps a small file as long as it lives, and removes it
when it ends in any other way; the next process finds it and says what was probably the matter. Only the main process
calls these functions, with the folder's lock held.
"""

import atexit
import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from common.host import host_memory, oom_kills
from common.runs.log import read_metrics
from common.runs.own_files import write_new

RECORD_FILE = ".running.json"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# Share of the limit that was in use at the end of a step from which on the next step may have gone over it: within a
# step, memory rises by what sampling and the backward pass need.
_NEAR = 0.75
_NO_LIMIT = 2**63
_GB = 2**30  # as in metrics.jsonl

_REMEDY = (
    "To need less: a smaller --max_tokens_per_microbatch, --gradient_checkpointing true, --use_lora true, or a "
    "smaller --vllm_memory_share; or start it with more memory."
)


def begin(folder: Path) -> str | None:
    """Note that this process works on a run, until `end` or until Python ends.

    Args:
        folder: the run's, before lines after its checkpoint are dropped.

    Returns:
        How the process before it ended, if that was without a word.
    """
    import torch  # not at the top: commands that only read a run's folder begin without it

    said = _last_end(folder)
    record = {
        "host": socket.gethostname(),
        "boot": _boot_id(),
        "limit": host_memory().total,
        "is_on_cpu": not torch.cuda.is_available(),
        "oom_kills": oom_kills(),
    }
    path = (folder / RECORD_FILE).absolute()
    with contextlib.suppress(OSError):  # without space, nothing but the guess is lost
        path.unlink(missing_ok=True)  # it may be a link, in a folder that came from elsewhere
        write_new(path, json.dumps(record).encode())
    with contextlib.suppress(OSError):
        _running[path] = path.lstat()  # on a full disk it stays empty, and is removed all the same
    return said


def end(folder: Path) -> None:
    """Note that this process ends its work on a run in an orderly way, also by an error or a signal."""
    _remove((folder / RECORD_FILE).absolute())


_running: dict[Path, os.stat_result] = {}  # records of this process


def _remove(path: Path) -> None:
    if path in _running:
        written = _running.pop(path)
        with contextlib.suppress(OSError):
            if os.path.samestat(path.lstat(), written):  # not that of a folder that took this one's place
                path.unlink()


@atexit.register
def _end_all() -> None:
    for path in list(_running):
        _remove(path)


os.register_at_fork(after_in_child=_running.clear)


def _last_end(folder: Path) -> str | None:
    path = folder / RECORD_FILE
    if path.is_symlink() or not path.is_file() or path.absolute() in _running:
        return None
    record, lines = _read(path), read_metrics(folder)
    when = f"during step {lines[-1]['step'] + 1}" if lines else "before its first step was done"
    ended = f"{folder}: the last process ended without a word {when}"
    if record is None:  # the power failed before it was on the disk
        return f"{ended}, as by a power cut."
    limit = record["limit"] / _GB
    used = lines[-1].get("memory/peak_gb" if record["is_on_cpu"] else "memory/host_gb") if lines else None
    used = used if isinstance(used, float) else 0.0
    shown = f"at most {limit:.3g} GB may be used"
    if used:
        shown = f"memory {used:.3g} of {limit:.3g} GB at the end of step {lines[-1]['step']}"
    is_here, counts = record["host"] == socket.gethostname(), oom_kills()
    has_restarted = record["boot"] != _boot_id()
    grew = any(counts.get(name, 0) > count for name, count in record["oom_kills"].items())
    if is_here and not has_restarted and grew:
        return f"{ended}: the kernel's out-of-memory killer has been at work since it began ({shown}). {_REMEDY}"
    if used > _NEAR * limit:
        return f"{ended}: probably the out-of-memory killer ({shown}). {_REMEDY}"
    if is_here and has_restarted:
        return f"{ended}: the machine has been started anew since ({shown})."
    return f"{ended}: it was killed (SIGKILL), or the power failed ({shown})."


def _read(path: Path) -> dict[str, Any] | None:
    """A process's record; None if it is damaged, or of someone else's making."""
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        record = json.loads(path.read_text(encoding="utf-8"))
        counts = [*record["oom_kills"].values(), record["limit"], record["is_on_cpu"]]
        if (
            record["boot"]
            and record["host"]
            and all(isinstance(count, int) and 0 <= count < _NO_LIMIT for count in counts)
        ):
            return record
    return None


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text(encoding="utf-8").strip()
    return "unknown"
