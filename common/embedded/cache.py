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
    """Give a folder of the cache; make it first if it is not there or its files are not as they were written.

    It is written aside and renamed when complete, with a digest of each file; a second process waits for the first.

    Args:
        name: of the folder; it has to change whenever the content would.
        make: writes the files into the empty folder it is given.
        cache_dir: where to keep it; ``nanorlhf`` in the user's cache folder if None.

    Returns:
        The folder.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with FileLock(f"{folder}.lock"):
        if not _is_intact(folder):
            shutil.rmtree(folder, ignore_errors=True)
            aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
            try:
                make(aside)
                (aside / DIGESTS).write_text(json.dumps(_digests(aside)))
                os.rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def default_cache_dir() -> Path:
    """Give ``nanorlhf`` in $XDG_CACHE_HOME or, where that is not set, in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanorlhf"


def _is_intact(folder: Path) -> bool:
    digests = folder / DIGESTS
    return digests.is_file() and digests.read_text() == json.dumps(_digests(folder))


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != DIGESTS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
