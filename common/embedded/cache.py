"""Folders that are expensive to make, kept in the user's cache folder: complete or absent, never half written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

DIGESTS = "digests.json"


def cached_folder(name: str, make: Callable[[Path], None], cache_dir: str | Path | None = None) -> Path:
    """Return a folder of the cache; make it first if it is missing or its files have changed.

    It is written under a temporary name and renamed when complete, with a digest of each file. A second process waits
    for the first.

    Args:
        name: of the folder; must change whenever the content changes.
        make: writes the files into the empty folder it is given.
        cache_dir: parent folder; None: ``nanorlhf`` in the user's cache folder.

    Returns:
        The folder.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(f"{folder}.lock"):
        if not _is_intact(folder):
            shutil.rmtree(folder, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            try:
                make(temporary)
                (temporary / DIGESTS).write_text(json.dumps(_digests(temporary)))
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def default_cache_dir() -> Path:
    """Return ``nanorlhf`` in $XDG_CACHE_HOME, or in ~/.cache if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanorlhf"


def _is_intact(folder: Path) -> bool:
    digests = folder / DIGESTS
    return digests.is_file() and digests.read_text() == json.dumps(_digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != DIGESTS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
