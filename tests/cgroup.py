"""A real cgroup with a limit, where this user may make one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limited_cgroup(limit: int) -> Iterator[Path]:
    """The folder of a cgroup of `limit` bytes of memory, gone afterwards; skips the test where there is none."""
    with _cgroup({"memory/memory.limit_in_bytes": str(limit), "memory.max": str(limit)}) as folder:
        yield folder


@contextmanager
def one_cpu_cgroup() -> Iterator[Path]:
    """The folder of a cgroup that has a quota of one processor; skips the test where there is none."""
    with _cgroup({"cpu/cpu.cfs_quota_us": "100000", "cpu.max": "100000 100000"}) as folder:
        yield folder


@contextmanager
def _cgroup(limits: dict[str, str]) -> Iterator[Path]:
    """A cgroup with the first of some limits that there is: those of version 1 and 2."""
    for name, limit in limits.items():
        folder = (_ROOT / name).parent / f"nanorlhf-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        file = folder / Path(name).name
        if not file.exists():
            folder.rmdir()
            continue
        try:
            file.write_text(limit, encoding="utf-8")
            yield folder
            return
        finally:
            _remove(folder)
    pytest.skip("this user may not make such a cgroup here")


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
