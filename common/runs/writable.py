"""Folders that a command writes: whether one can be made is found out first, not after minutes of loading."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from common.runs.disk import reason
from common.runs.names import why_no_name

_MOST_SHOWN = 300  # characters of a name in a message


def check_folder(folder: str | Path, *, setting: str = "output_dir", is_replaced: bool = False) -> None:
    """Try out that a folder can be made and written to; nothing stays behind.

    Args:
        folder: which exists or not.
        setting: what the user named it with, for the message.
        is_replaced: a finished folder will take its place, so it cannot be the one that the user is in.

    Raises:
        ValueError: it is a file, a link to nothing, or below one, or this user or file system cannot write there.
    """
    folder = Path(folder)
    _check_name(folder, setting, is_replaced=is_replaced)
    if is_replaced and folder.resolve() == Path.cwd():
        raise ValueError(
            f"{setting}={folder}: it is the folder that you are in, and a finished folder takes its place. Pass "
            f"--{setting} with a folder in it."
        )
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    trial = folder / f".tmp-{secrets.token_hex(8)}"
    try:
        make_folder(folder, setting=setting)
        try:
            with open(trial, "xb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())  # where a quota or a disk on the network refuses it
        except OSError as error:  # on a full disk the file is there, and empty
            raise _refusal(folder, setting, error) from error
        finally:
            with suppress(OSError):  # a read-only file system refuses that too, whether the file is there or not
                trial.unlink()
    finally:
        for path in missing:
            with suppress(OSError, UnicodeError):
                path.rmdir()


def make_folder(folder: str | Path, *, setting: str = "output_dir") -> None:
    """Make a folder and those above it; one that exists is fine.

    Args:
        folder: which exists or not.
        setting: what the user named it with, for the message.

    Raises:
        ValueError: it cannot be made.
    """
    _check_name(Path(folder), setting)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (OSError, UnicodeError) as error:  # UnicodeError: under a locale such as C, a name may have no bytes
        raise _refusal(Path(folder), setting, error) from error


def _check_name(folder: Path, setting: str, *, is_replaced: bool = False) -> None:
    if why := why_no_name(folder, is_replaced=is_replaced):
        shown = str(folder).replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
        raise ValueError(f"{setting}={shown}: no folder can have this name: {why}. Pass --{setting} with another.")


def _refusal(folder: Path, setting: str, error: OSError | UnicodeError) -> ValueError:
    if isinstance(error, OSError) and error.errno is not None:
        why = reason(error.errno, next((path for path in (folder, *folder.parents) if os.path.isdir(path)), folder))
    else:
        why = str(error) if isinstance(error, OSError) else error.reason
    for path in map(str, (folder, *folder.parents)):
        it = "it" if path == str(folder) else path
        if os.path.islink(path) and not os.path.exists(path):
            why = f"{it} is a link to {os.readlink(path)}, which is not there"
        elif os.path.exists(path) and not os.path.isdir(path):
            why = f"{it} is a file, and a folder is needed"
    shown = str(folder).encode("utf-8", "backslashreplace").decode()
    return ValueError(
        f"{setting}={shown}: nothing can be written there: {why}. Pass --{setting} with a folder that you may "
        "write to."
    )
