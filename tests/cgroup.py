"""A real cgroup with a limit on its memory, where this user may make one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PARENTS = {  # version 1 and 2
    "memory.limit_in_bytes": Path("/sys/fs/cgroup/memory"),
    "memory.max": Path("/sys/fs/cgroup"),
}


@contextmanager
def limited_cgroup(limit: int) -> Iterator[Path]:
    """The folder of a cgroup of `limit` bytes, gone afterwards; skips the test where there is none."""
    for name, parent in _PARENTS.items():
        folder = parent / f"nanorlhf-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if not (folder / name).exists():
            folder.rmdir()
            continue
        try:
            (folder / name).write_text(str(limit), encoding="utf-8")
            yield folder
            return
        finally:
            _remove(folder)
    pytest.skip("this user may not make a cgroup with a limit on memory here")


def _remove(folder: Path) -> None:
    for _ in range(50):
        try:
            return folder.rmdir()
        except OSError:  # its last process is still on its way out
            time.sleep(0.1)
    folder.rmdir()


def enter(folder: Path) -> None:
    """Put this process into a cgroup."""
    (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
