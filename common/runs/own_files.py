"""Files in a folder that may come from elsewhere: nothing in it is read or written through a link, or waited for.

A link to the folder itself, or to one above it, is the user's own choice and is followed.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from common.mistakes import CannotWrite

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def what_else(path: Path) -> str | None:
    """What is under a file's name if it is no regular file, such as "a link to /etc/passwd"; None: a file, or nothing.

    Args:
        path: the file.
    """
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):  # there is none, or its name cannot be one
        return None
    if stat.S_ISLNK(mode):
        return f"a link to {os.readlink(path)!r}"
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def check_own_files(folder: Path, names: tuple[str, ...], *, setting: str = "output_dir") -> None:
    """Refuse a folder in which another thing has the name of a file.

    Args:
        folder: which exists or not.
        names: of the files, which exist or not.
        setting: what the user named the folder with.

    Raises:
        ValueError: one of them is a link, a folder or a pipe.
    """
    for name in names:
        if found := what_else(folder / name):
            raise ValueError(
                f"{setting}={folder}: {name} in it is {found}. Such a file is read and written in the folder itself "
                "only, so that a folder from elsewhere cannot lead to other files. Put the file itself in its place, "
                f"or move it away, or pass another --{setting}."
            )


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist, not even as a link.

    Raises:
        OSError: it exists, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(path, "xb", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        file.write(content)


def let_others_read(folder: Path) -> None:
    """Give all files of a folder the permissions of new files: safetensors (0.8) lets nobody else read its own.

    So another user's vLLM, or one in a container, can load the model wherever the process's umask lets it.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def open_own(path: Path) -> BinaryIO:
    """Open a file to append to it and to read it, and make it if there is none.

    Raises:
        CannotWrite: it is a link.
        OSError: it cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        return open(path, "a+b", opener=lambda name, _: os.open(name, flags, 0o666))
    except OSError as error:
        failure = error
    if found := what_else(path):
        raise CannotWrite(
            f"{path}: it is {found}, and nothing is written through that. Put the file itself in its place, or move "
            "it away."
        )
    raise failure
