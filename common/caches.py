"""Caches of the libraries, in a folder that can be written.

A container with `--user 1234` has no home, a job's home may be read-only, and a service has none: each library then
fails or warns in its own way, or makes a folder `~` where it was started. They read these variables at their import.
"""

import getpass
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

# Variable -> its folder in that of caches, and whether finished files in it are of use where nothing can be written.
_CACHES = {
    "HF_HOME": ("huggingface", True),
    "MPLCONFIGDIR": ("matplotlib", False),
    "VLLM_CACHE_ROOT": ("vllm", False),
    "VLLM_CONFIG_ROOT": ("vllm-config", False),
    "TRITON_HOME": ("triton", False),
}


def use_writable_caches() -> None:
    """Set the variables of caches that cannot be written to a folder for temporary files; those that are set stay."""
    _name_user()
    if (home := cache_home()) is not None and _can_be_written(home):
        return
    fallback = temporary_cache()
    if fallback is None:
        return
    for variable, (name, is_read) in _CACHES.items():
        is_of_use = home is not None and os.path.isdir(home / name) and (is_read or _can_be_written(home / name))
        if variable not in os.environ and not is_of_use:
            os.environ[variable] = str(fallback / name)


def cache_home() -> Path | None:
    """The user's folder of caches: $XDG_CACHE_HOME, or ~/.cache if that is not set; None: this user has no home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # HOME is not set, and the user is not in the list of users
        return None


def temporary_cache() -> Path | None:
    """This user's own folder among the temporary files, the same for every process; None: there is no place for it."""
    try:
        parent = Path(tempfile.gettempdir())
        folder = parent / f"nanorlhf-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        # Others may write among temporary files: a folder of theirs could hold a model of theirs.
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
        return Path(tempfile.mkdtemp(prefix="nanorlhf-", dir=parent))
    except OSError:
        return None


def _name_user() -> None:
    """Give a user without an entry in the list of users a name, which torch and Triton ask for."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError: from Python 3.13 on
        os.environ["USER"] = f"uid-{os.getuid()}"


def _can_be_written(folder: Path) -> bool:
    """Whether this user may write into a folder, or make it."""
    with suppress(OSError, ValueError):  # ValueError: a name with NUL
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    return False
