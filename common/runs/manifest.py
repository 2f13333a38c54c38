"""What a folder must hold: the size and the SHA-256 of each of its files, to tell a whole folder from a damaged one.

The manifest is written last. Sizes are compared whenever folders are listed, which costs nothing. Contents are read
only of a folder that is about to be used, since they can be a hundred gigabytes.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.data.cache import content_digest
from common.runs.own_files import write_new

MANIFEST_FILE = "manifest.json"
# In a folder whose contents were found to be wrong although all sizes are right: one sentence that says so.
DAMAGE_FILE = "damaged.txt"

# Files that are read at the same time: the hash of one is slower than most disks.
_NUM_READERS = 4


def write_manifest(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write the size and the SHA-256 of every file in a folder, and below it, into its manifest.

    Args:
        folder: complete but for the manifest.
        known: digests that were made already, by the files' paths in the folder.
    """
    (folder / DAMAGE_FILE).unlink(missing_ok=True)
    names, known = names_of_files(folder), known or {}
    digests = known | digests_of(folder, [name for name in names if name not in known])
    pairs = ((name, digests[name]) for name in names)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digest} for name, digest in pairs}
    temporary = folder / f"{MANIFEST_FILE}.tmp"
    temporary.unlink(missing_ok=True)
    write_new(temporary, (json.dumps({"files": files}, indent=2) + "\n").encode())
    os.replace(temporary, folder / MANIFEST_FILE)


def names_of_files(folder: Path) -> list[str]:
    """The paths of all files in a folder and below it, without its manifest, sorted."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_FILE]
    return sorted(str(path.relative_to(folder)) for path in paths)


def digests_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of files by their paths in a folder."""
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return dict(zip(names, pool.map(lambda name: content_digest(folder / name), names), strict=True))


def find_damage(folder: Path, *, read: str | None = None) -> str | None:
    """What is wrong with a folder, in words that name the file; None if it is whole.

    A folder without a manifest, from before there were any, is whole if its tensor files can be opened.

    Args:
        folder: with a manifest.
        read: also compare the contents of all files whose path in the folder begins with this, such as "" or
            "policy/". None: only sizes, and what an earlier comparison found.
    """
    if not folder.is_dir():
        return "it is a link to nothing" if folder.is_symlink() else "it is not a folder"
    try:
        if not (folder / MANIFEST_FILE).is_file():
            return next(filter(None, map(_damage_of_tensors, sorted(folder.rglob("*")))), None)
        if read is None and (folder / DAMAGE_FILE).is_file():
            return (folder / DAMAGE_FILE).read_text("utf-8").strip()
        files = _read_manifest(folder)
        if files is None:
            return f"{MANIFEST_FILE} is not readable as a manifest"
        chosen = [name for name in files if read is not None and name.startswith(read)]
        wrong = [_damage_of_size(folder / name, name, size) for name, (size, _) in files.items()]
        if not any(wrong):
            with ThreadPoolExecutor(_NUM_READERS) as pool:
                digests = pool.map(lambda name: content_digest(folder / name), chosen)
                wrong = [
                    f"{name} has other contents than were saved"
                    for name, digest in zip(chosen, digests, strict=True)
                    if digest != files[name][1]
                ]
        return next(filter(None, wrong), None)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def note_damage(folder: Path, damage: str | None) -> None:
    """Keep what a comparison of contents has found for those who compare only sizes; None: nothing."""
    if damage is None:
        (folder / DAMAGE_FILE).unlink(missing_ok=True)
    elif find_damage(folder) is None:
        (folder / DAMAGE_FILE).unlink(missing_ok=True)  # a link to nothing
        write_new(folder / DAMAGE_FILE, f"{damage}\n".encode())


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and digest of each file by its path in the folder; None if it cannot be read."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))["files"]
        return {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _damage_of_size(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{name} has {found:,} bytes instead of {size:,}"


def _damage_of_tensors(path: Path) -> str | None:
    """What the structure of a file of tensors tells: both formats say where the file ends."""
    whole = True
    if path.suffix in (".pt", ".pth") and path.is_file():
        whole = zipfile.is_zipfile(path)
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with safe_open(path, "np"):
                pass
        except SafetensorError:
            whole = False
    return None if whole else f"{path.name} is cut off or holds no tensors"
