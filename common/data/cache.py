"""Folders that are expensive to make, kept in a cache: complete or absent, never half written.

Those made of data are in the cache of the `datasets` library. They can be deleted at any time.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from common.caches import cache_home, temporary_cache

logger = logging.getLogger("nanorlhf")

DIGESTS = "digests.json"
_SAMPLE_BYTES, _NUM_SAMPLES = 4096, 64  # of a large file; a millisecond


def cached_folder(
    name: str, make: Callable[[Path], None], cache_dir: str | Path | None = None, *, by_content: bool = True
) -> Path:
    """Return a folder of the cache; make it first if it is missing or its files have changed.

    It is written under a temporary name and renamed when complete, with a digest of each file. A second process waits
    for the first.

    Args:
        name: of the folder; must change whenever the content changes.
        make: writes the files into the empty folder it is given.
        cache_dir: parent folder; None: ``nanorlhf`` in the user's cache folder.
        by_content: notice every changed byte; False: only another size and other samples of large files, which costs
            next to nothing. A file that lost its content when the power failed is noticed in both ways.

    Returns:
        The folder.

    Raises:
        OSError: the cache cannot be written.
    """
    parent = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    if parent is None:
        raise FileNotFoundError(errno.ENOENT, "this user has no home", "~")
    folder = parent / name
    if _is_intact(folder, by_content):  # also where nothing can be written, such as in a shared cache
        return folder
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_intact(folder, by_content):
            for leftover in [folder, *parent.glob(f".{name}-*")]:  # those of a process that was killed
                _remove(leftover)
            _remove_leftovers(parent)
            temporary = parent / f".{name}-{os.urandom(8).hex()}"
            temporary.mkdir()  # not by mkdtemp, whose folder no other user could read
            try:
                make(temporary)
                (temporary / DIGESTS).write_text(json.dumps(_digests(temporary, by_content)), encoding="utf-8")
                _flush(temporary)
                os.rename(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def default_cache_dir() -> Path | None:
    """Return ``nanorlhf`` in the user's cache folder; None: this user has no home."""
    home = cache_home()
    return None if home is None else home / "nanorlhf"


def folder_anywhere(name: str, make: Callable[[Path], None], *, what: str, beside: Path | None = None) -> Path:
    """A folder as `cached_folder` gives it, in the first place that can be written, which is said if it is another.

    Args:
        name: see `cached_folder`.
        make: see `cached_folder`; it may be called for several places.
        what: is made, for that line, such as "the policy".
        beside: a folder whose `.cache` comes after the user's cache folder, and before that of temporary files.

    Raises:
        ValueError: nothing can be written in any of them.
    """
    temporary = temporary_cache()
    places = [default_cache_dir(), beside and beside / ".cache", temporary and temporary / "nanorlhf"]
    reasons = [] if places[0] else ["this user has no home"]
    for place in filter(None, places):
        if reasons and place not in _said:
            logger.warning("%s: %s is kept in %s", reasons[-1], what, place)
            _said.add(place)
        try:
            return cached_folder(name, make, place)
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            reasons.append(f"{place} cannot be written ({getattr(error, 'strerror', None) or error})")
    raise ValueError(
        f"{'; '.join(reasons)}: there is no place for {what}, which is made once. Set XDG_CACHE_HOME to a folder with "
        "space that you may write to."
    )


def data_folder(name: str, make: Callable[[Path], None]) -> Path | None:
    """A folder as `cached_folder` gives it, in the cache of data; None, said once, if that cannot be written."""
    parent = data_cache_dir()
    try:
        return cached_folder(name, make, parent, by_content=False)
    except (OSError, NotImplementedError) as error:
        without_locks = type(error) is NotImplementedError  # Arrow's own are of another class
        if not without_locks and (not isinstance(error, OSError) or error.errno is None):
            raise  # no error of the file system
        if parent not in _said:
            logger.warning(
                "%s cannot be written (%s): data are prepared anew at every start, in main memory. Set "
                "HF_DATASETS_CACHE to a folder with space.",
                parent,
                error,
            )
        _said.add(parent)
        return None


_said: set[Path] = set()


def data_cache_dir() -> Path:
    """Return ``nanorlhf`` in $HF_DATASETS_CACHE, or in the folder that the `datasets` library uses without it."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "nanorlhf"


def content_digest(path: Path | str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(*content: object) -> str:
    """Sixteen hexadecimal digits that change when any of the content, which JSON can write, does."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@cache
def code_digest(*modules: str) -> str:
    """Changes with the source of modules: what other code has made is not used again."""
    files = [Path(sys.modules[name].__file__) for name in modules]
    return digest_of(*(file.read_text(encoding="utf-8") for file in files))


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left of folders of other names, which may never be made again."""
    for leftover in parent.glob(".*-*"):
        folder = parent / leftover.name[1:].rpartition("-")[0]
        lock = Path(f"{folder}.lock")
        with suppress(OSError, Timeout), FileLock(lock, timeout=0):  # else it is being made
            _remove(leftover)
            lock.unlink(missing_ok=True)  # who waits for it notices, and takes a new one


def _remove(leftover: Path) -> None:
    if leftover.is_file() or leftover.is_symlink():
        leftover.unlink()
    shutil.rmtree(leftover, ignore_errors=True)


def _is_intact(folder: Path, by_content: bool) -> bool:
    digests = folder / DIGESTS
    return digests.is_file() and digests.read_bytes() == json.dumps(_digests(folder, by_content)).encode()


def _digests(folder: Path, by_content: bool) -> dict[str, str]:
    files = sorted(path for path in folder.iterdir() if path.name != DIGESTS)
    return {path.name: (content_digest if by_content else sample_digest)(path) for path in files}


def sample_digest(path: Path, *, sample_bytes: int = _SAMPLE_BYTES, num_samples: int = _NUM_SAMPLES) -> str:
    """The size of a file, and a digest of up to num_samples parts of it, the first and the last among them."""
    size, digest = path.stat().st_size, hashlib.sha256()
    last = max(0, size - sample_bytes)
    count = min(num_samples, 1 + -(-last // sample_bytes))
    with open(path, "rb", buffering=0) as file:
        for number in range(count):
            file.seek(last * number // max(1, count - 1))
            digest.update(file.read(sample_bytes))
    return f"{size} {digest.hexdigest()[:16]}"


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk: a power cut leaves no folder whose files are empty."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
