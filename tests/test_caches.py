"""What is kept in a cache finds a place where the user has none, and nobody else's folder is used for it."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from common.caches import cache_home, temporary_cache
from common.data.cache import cached_folder, folder_anywhere
from tests.toy import ROOT


def make(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1")


def a_file(home: Path) -> None:
    home.write_text("", encoding="utf-8")


def a_dangling_link(home: Path) -> None:
    home.symlink_to("nowhere")


@pytest.mark.parametrize("prepare", [a_file, a_dangling_link])
def test_without_a_cache_the_folder_beside_the_run_is_used_and_said(prepare, tmp_path, monkeypatch, caplog):
    prepare(tmp_path / "home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        folder = folder_anywhere("name", make, what="the policy", beside=tmp_path)
    assert folder == tmp_path / ".cache" / "name" and (folder / "weights").is_file()
    [said] = caplog.messages
    assert re.search(rf"home/nanorlhf cannot be written \(.*\): the policy is kept in {tmp_path}/.cache", said)


def test_the_last_place_is_that_of_temporary_files_and_then_there_is_none(tmp_path, monkeypatch):
    a_file(tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = folder_anywhere("name", make, what="the policy", beside=tmp_path / "file")
    assert folder == tmp_path / f"nanorlhf-{os.getuid()}" / "nanorlhf" / "name"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"there is no place for the policy, .* Set XDG_CACHE_HOME"):
        folder_anywhere("name", make, what="the policy", beside=tmp_path / "file")


def test_a_temporary_folder_that_others_could_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = temporary_cache()
    assert own == temporary_cache() and own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert temporary_cache() != own
    own.rmdir()
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to("elsewhere")
    assert temporary_cache() != own


def test_what_killed_makers_left_is_removed_unless_it_is_being_made(tmp_path):
    from filelock import FileLock

    for name in (".old-abc_1", ".busy-abc_1", ".name-abc_1"):
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    with FileLock(tmp_path / "busy.lock"):
        cached_folder("name", make, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [".busy-abc_1", "name"]
    assert not (tmp_path / "old.lock").exists()


def as_another_user(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code as a user without an entry in the list of users, and without a home."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be another user, with setpriv")
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.defpath, "TMPDIR": str(folder)} | variables
    other = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    running = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    reads = f"open({str(ROOT / 'common/__init__.py')!r})"
    if subprocess.run([*other, sys.executable, "-c", reads], **running).returncode:
        pytest.skip("another user may not run this Python, or not read this repository")
    done = subprocess.run([*other, sys.executable, "-c", code], **running)
    return done


@pytest.fixture
def open_folder(tmp_path_factory) -> Path:
    """A folder that every user may write to, below folders that every user may enter."""
    folder = tmp_path_factory.mktemp("open")
    for path in folder.parents:
        if path.stat().st_uid == os.getuid() and path.is_relative_to(tempfile.gettempdir()):
            path.chmod(path.stat().st_mode | 0o011)
    folder.chmod(0o777)
    return folder


NOBODY = """
import common, getpass, os
print(getpass.getuser(), os.environ.get("HF_HOME"), os.environ.get("VLLM_CACHE_ROOT"))
"""


def test_a_user_without_a_home_gets_places_and_a_name(open_folder):
    done = as_another_user(NOBODY, open_folder)
    place = open_folder / "nanorlhf-12345"
    assert done.stdout.split() == ["uid-12345", f"{place}/huggingface", f"{place}/vllm"], done.stderr
    assert [path.name for path in open_folder.iterdir()] == ["nanorlhf-12345"]  # no folder "~"


def test_variables_that_are_set_and_finished_downloads_stay(open_folder):
    (open_folder / "home/.cache/huggingface").mkdir(parents=True)
    (open_folder / "home").chmod(0o755)
    done = as_another_user(NOBODY, open_folder, HOME=str(open_folder / "home"), VLLM_CACHE_ROOT="mine", USER="me")
    assert done.stdout.split() == ["me", "None", "mine"], done.stderr


def test_a_finished_cache_of_another_user_is_read(open_folder):
    cached_folder("name", make, open_folder / "home/.cache/nanorlhf")
    code = "from common.data.cache import *\nprint(folder_anywhere('name', None, what='x'))"
    done = as_another_user(code, open_folder, HOME=str(open_folder / "home"))
    assert done.stdout.strip() == str(open_folder / "home/.cache/nanorlhf/name") and not done.stderr


def test_a_home_of_ones_own_is_used(tmp_path, monkeypatch: pytest.MonkeyPatch):
    read: Callable[[], Path | None] = cache_home
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read() == tmp_path
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read() == tmp_path / ".cache"
