"""A process that ended without a word is guessed at by the next one; an orderly end leaves nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.host import host_memory
from common.runs import ended
from tests.cgroup import enter, limited_cgroup
from tests.toy import ROOT, toy_trainer

GB = 2**30


def works_on(folder: Path, then: str, prepare: object = None) -> subprocess.CompletedProcess[str]:
    """A process of its own that begins to work on a run, says how the one before ended, and goes on with some code."""
    code = f"from common.runs import ended; import os, sys; from pathlib import Path\nfolder = Path({str(folder)!r})\n"
    code += f"print(ended.begin(folder), flush=True)\n{then}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, preexec_fn=prepare
    )


def write_metrics(folder: Path, memory: float) -> None:
    """Two steps, with `memory` as a share of what this process may use."""
    used = memory * host_memory().total / GB
    lines = [{"step": step, "memory/peak_gb": used, "memory/host_gb": used} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (0.95, "during step 3: probably the out-of-memory killer (memory"),
        (0.1, "during step 3: it was killed (SIGKILL), or the power failed (memory"),
        (None, "before its first step was done: it was killed (SIGKILL), or the power failed (at most"),
    ],
)
def test_a_kill_is_said_by_the_next_process_once(memory, expected, tmp_path):
    assert works_on(tmp_path, "os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    if memory:
        write_metrics(tmp_path, memory)
    said = ended.begin(tmp_path)
    assert expected in said and ("To need less" in said) == (memory == 0.95)
    ended.end(tmp_path)
    assert ended.begin(tmp_path) is None
    ended.end(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("then", ["ended.end(folder)", "sys.exit(2)", "raise RuntimeError", "os.fork() or sys.exit()"])
def test_an_orderly_end_leaves_nothing(then, tmp_path):
    assert works_on(tmp_path, then).stdout == "None\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_out_of_memory_kill_is_known_for_certain(tmp_path):
    grow = "kept = []\nwhile True:\n    kept.append(bytearray(os.urandom(2**20)) * 8)"
    with limited_cgroup(700 * 2**20) as folder:
        assert works_on(tmp_path, grow, lambda: enter(folder)).returncode == -signal.SIGKILL
        said = works_on(tmp_path, "", lambda: enter(folder)).stdout
    assert "the kernel's out-of-memory killer has been at work since it began (at most 0.684 GB may be used)" in said


def test_what_cannot_be_a_record_is_no_error(tmp_path):
    path = tmp_path / ended.RECORD_FILE
    huge = '{"oom_kills": {}, "limit": 1%s, "is_on_cpu": true, "host": "a", "boot": "b"}' % ("0" * 400)
    for content in (
        "",
        "{",
        "[]",
        huge,
        "[" * 100_000,
        '{"oom_kills": 3}',
        '{"oom_kills": {}, "limit": "x", "is_on_cpu": 1}',
        "\0",
    ):
        path.write_text(content, encoding="utf-8")
        assert ended.begin(tmp_path).endswith("before its first step was done, as by a power cut.")
        ended.end(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "memory/peak_gb": "\\u001b"}\n', encoding="utf-8")
    record = {"oom_kills": {}, "limit": 10**9, "is_on_cpu": True, "host": "elsewhere", "boot": "x"}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert ended.begin(tmp_path).endswith("or the power failed (at most 0.931 GB may be used).")
    ended.end(tmp_path)


def test_a_machine_that_has_been_started_anew(tmp_path):
    ended.begin(tmp_path)
    path = tmp_path / ended.RECORD_FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    ended.end(tmp_path)
    path.write_text(json.dumps(record | {"boot": "another"}), encoding="utf-8")
    assert "the machine has been started anew since" in ended.begin(tmp_path)
    ended.end(tmp_path)


def test_nothing_is_written_or_read_through_a_link(tmp_path):
    (tmp_path / "other").write_text("mine", encoding="utf-8")
    (tmp_path / ended.RECORD_FILE).symlink_to("other")
    assert ended.begin(tmp_path) is None
    assert (tmp_path / "other").read_text(encoding="utf-8") == "mine"
    ended.end(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_run_keeps_its_record_while_it_lives(tiny_folder, tmp_path, caplog):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", num_steps=1, save_every=1)
    record = tmp_path / "run" / ended.RECORD_FILE
    assert record.is_file()
    content = record.read_bytes()
    trainer.train()
    assert not record.exists()
    record.write_bytes(content)  # as if it had been killed
    toy_trainer(tiny_folder, tmp_path / "run", num_steps=2, save_every=1, resume="extend").train()
    assert "the last process ended without a word during step 2" in caplog.text
    assert not record.exists()


def test_a_record_that_a_full_disk_left_empty_is_removed(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        ended.begin(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ended.end(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_record_of_a_folder_that_took_the_place_of_this_one_stays(tmp_path):
    here, other = tmp_path / "run", tmp_path / "other"
    for folder in (other, here):
        folder.mkdir()
    ended.begin(here)
    (other / ".running.json").write_text("{}", encoding="utf-8")
    here.rename(tmp_path / "moved")
    other.rename(here)
    ended.end(here)
    assert (here / ".running.json").read_text(encoding="utf-8") == "{}"
