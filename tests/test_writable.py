"""A folder that cannot be written is refused before anything is loaded, and trying leaves nothing behind."""

import os
import re
import resource
from pathlib import Path

import pytest

from common.runs.writable import check_folder, make_folder
from tests import forked
from tests.toy import ROOT


def test_a_folder_is_tried_out_and_nothing_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("there")
    for name in ("there", "link", "there/new", "new/below/new"):
        check_folder(tmp_path / name)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        *("link", "there", "there/notes.txt"),
    ]
    make_folder(tmp_path / "new" / "below")
    make_folder(tmp_path / "new" / "below")
    assert (tmp_path / "new" / "below").is_dir()


@pytest.mark.parametrize("action", [check_folder, make_folder])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file", "it is a file, and a folder is needed"),
        ("file/below", "{}/file is a file, and a folder is needed"),
        ("dangling", "it is a link to nowhere, which is not there"),
        ("dangling/below", "{}/dangling is a link to nowhere"),
        ("x" * 300, "File name too long"),
        ("circle", "it is a link to circle, which is not there"),
    ],
)
def test_what_cannot_be_a_folder_is_refused_with_the_reason(action, name, reason, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(os.listdir(tmp_path))
    reason = re.escape(reason.format(tmp_path))
    with pytest.raises(ValueError, match=rf"^output={re.escape(str(tmp_path))}.*{reason}.* Pass --output with a"):
        action(tmp_path / name, setting="output")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\0b", r"a\\0b: no folder can have this name: a name cannot hold the character NUL"),
        ("a\ud800b", r"a\\ud800b: no folder can have this name: it is not UTF-8"),
        (
            "/".join(["y" * 210] * 19),
            r"y\.\.\.: .* its path has \d+ bytes, and with the files in it, more than the 4096",
        ),
    ],
)
@pytest.mark.parametrize("action", [check_folder, make_folder])
def test_names_that_cannot_hold_a_run_are_refused_at_its_start(action, name, reason, tmp_path):
    with pytest.raises(
        ValueError, match=rf"^output={re.escape(str(tmp_path))}/{'.*' if 'y' in name else ''}{reason}.*"
    ):
        action(tmp_path / name, setting="output")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_written_under_a_longer_name_has_room_for_it(tmp_path):
    check_folder(tmp_path / ("x" * 240))
    with pytest.raises(ValueError, match="its name has 240 bytes, and while it is written, up to 21 more"):
        check_folder(tmp_path / ("x" * 240), is_replaced=True)


def test_a_file_system_that_takes_no_folders_is_refused():
    with pytest.raises(ValueError, match="output_dir=/proc/new: nothing can be written there: No such file"):
        check_folder("/proc/new")
    with pytest.raises(ValueError, match="output_dir=/proc: nothing can be written there"):
        check_folder("/proc")


def test_a_folder_without_room_for_a_byte_is_refused_and_left_as_it_was(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))  # the file can be made, and not be filled
    try:
        with pytest.raises(ValueError, match="nothing can be written there: File too large"):
            check_folder(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_someone_else_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_folder(tmp_path / "new")
    with pytest.raises(ValueError, match="Permission denied"):
        check_folder(tmp_path)
    tmp_path.chmod(0o700)


def refused(command: list[str], folder: Path) -> list[str]:
    """What a command says that cannot write its folder."""
    done = forked.run([word.format(folder) for word in command], cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()


COMMANDS = {
    "an evaluation": ["-m", "common.evaluation", "--model", "MODEL", "--task", "countdown", "--output_dir", "{}"],
    "merging": ["-m", "common.merge", "--model", "MODEL", "--output", "{}"],
    "a run": ["GRPO/grpo.py", "--output_dir", "{}"],
    "sft": ["examples/sft/sft.py", "--model", "tiny", "--dataset", "gone.jsonl", "--output_dir", "{}"],
    "a reward model": ["examples/reward_model/reward_model.py", "--model", "tiny", "--output_dir", "{}"],
    "a comparison": [
        "examples/compare_algorithms/compare_algorithms.py",
        "--output_dir",
        "{}",
        "--algorithms",
        "GRPO",
    ],
    "a pipeline": ["examples/pipeline/pipeline.py", "--output_dir", "{}"],
    "records": ["examples/pipeline/records.py", "--output_dir", "{}"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_a_folder_that_cannot_be_made(name, tiny_folder, tmp_path):
    (tmp_path / "gone").symlink_to("nowhere")
    command = [str(tiny_folder) if word == "MODEL" else word for word in COMMANDS[name]]
    said = refused(command, tmp_path / "gone" / "run")
    assert len(said) <= 8 and "is a link to nowhere, which is not there" in said[-1]


def test_the_folder_that_one_is_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path, "../" + tmp_path.name):
        check_folder(name)
        with pytest.raises(ValueError, match="it is the folder that you are in"):
            check_folder(name, is_replaced=True)
