"""--watch writes the page again as a run writes completions, and lets it rest when the run has ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.cli import run_script
from common.runs.checkpoints import FINAL_FOLDER, save_final
from common.samples import watch as watching
from common.samples.command import main
from common.samples.watch import is_finished, watch
from common.signals import Stopped
from tests.test_samples import data_of, row, write_run

ROOT = Path(__file__).parent.parent


def append(folder, name, *lines):
    with open(folder / name, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def finish(folder, step=9, **state):
    save_final(folder, step, fill=lambda into: None, **state)


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def steps_on(page):
    return sorted({one["step"] for run in data_of(page)["runs"] for one in run["samples"]})


@pytest.fixture
def watched(monkeypatch):
    """Watches runs beside the test, looking often, at most until the test has ended."""
    ended = threading.Event()

    def sleep(seconds):
        if ended.wait(0.01):
            raise KeyboardInterrupt

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with ThreadPoolExecutor(1) as worker:
        yield lambda *given: worker.submit(watch, *given)
        ended.set()


def test_the_page_is_written_after_each_entry_and_rests_when_the_run_has_finished(tmp_path, watched):
    folder = write_run(tmp_path / "run", [row(1)])
    page, ended = folder / "samples.html", watched([folder])
    wait_for(page.exists)
    assert steps_on(page) == [1] and data_of(page)["refresh"] > 0
    for step in (2, 3):
        append(folder, "samples.jsonl", row(step))
        append(folder, "metrics.jsonl", {"step": step, "score": 0.5})
        wait_for(lambda step=step: steps_on(page)[-1] == step)
        assert data_of(page)["runs"][0]["metrics"]["step"][-1] == step
    finish(folder)
    ended.result(timeout=30)
    assert steps_on(page) == [1, 2, 3] and data_of(page)["refresh"] is None


def test_completions_of_a_step_are_shown_when_it_has_ended(tmp_path, watched):
    folder = write_run(tmp_path / "run", [row(1)])
    page, ended = folder / "samples.html", watched([folder])
    wait_for(page.exists)
    time.sleep(0.02)
    append(folder, "samples.jsonl", row(2, split="train"))
    time.sleep(0.3)
    assert steps_on(page) == [1]
    append(folder, "samples.jsonl", row(2))
    append(folder, "metrics.jsonl", {"step": 2})
    wait_for(lambda: steps_on(page) == [1, 2])
    assert len(data_of(page)["runs"][0]["samples"]) == 3
    finish(folder)
    ended.result(timeout=30)


def test_nothing_is_written_while_nothing_is_new(tmp_path, watched):
    folder = write_run(tmp_path / "run", [row(1)])
    page, ended = folder / "samples.html", watched([folder])
    wait_for(page.exists)
    first = page.stat().st_mtime_ns
    time.sleep(0.3)
    assert page.stat().st_mtime_ns == first
    finish(folder)
    ended.result(timeout=30)


def test_a_page_is_whole_at_every_moment_while_the_run_writes(tmp_path, watched):
    folder = write_run(tmp_path / "run", [row(1)])
    page, ended = folder / "samples.html", watched([folder])
    wait_for(page.exists)
    line = json.dumps(row(2, completion="x" * 5_000)).encode() + b"\n"
    for _ in range(40):
        with open(folder / "samples.jsonl", "ab") as file:
            file.write(line[:3_000])
            file.flush()
            os.utime(folder / "metrics.jsonl")  # as if the step had ended in the middle of a line
            assert steps_on(page)[0] == 1
            file.write(line[3_000:])
    finish(folder)
    ended.result(timeout=30)
    assert len(data_of(page)["runs"][0]["samples"]) == 41


def test_a_run_that_has_no_completions_yet_is_waited_for(tmp_path, watched, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("num_steps: 9\nsamples_every: 5\n")
    ended = watched([folder])
    time.sleep(0.1)
    assert not (folder / "samples.html").exists()
    assert capsys.readouterr().err == f"waiting for the first completions of {folder}\n"
    write_run(folder, [row(1)])
    wait_for((folder / "samples.html").exists)
    finish(folder)
    ended.result(timeout=30)
    assert capsys.readouterr().out == f"{folder / 'samples.html'}\n"


@pytest.mark.parametrize(
    ("config", "said"),
    [(None, "not the folder of a run"), ("samples_every: 0\neval_every: 0\n", "--samples_every 5")],
    ids=["no run", "no completions ever"],
)
def test_a_folder_without_completions_to_come_is_said_at_once(config, said, tmp_path, capsys):
    if config:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(SystemExit) as status:
        run_script(lambda: main([str(tmp_path), "--watch"]))
    out, err = capsys.readouterr()
    assert status.value.code == 2 and said in err and out == ""


def test_the_page_of_a_finished_run_is_written_once(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [row(1)])
    finish(folder)
    main([str(folder), "--watch"])
    assert capsys.readouterr().out == f"{folder / 'samples.html'}\n"
    assert data_of(folder / "samples.html")["refresh"] is None


def test_a_page_that_may_not_be_written_is_said_before_waiting(tmp_path):
    (tmp_path / "config.yaml").write_text("samples_every: 5")
    (tmp_path / "samples.html").write_text("mine")
    with pytest.raises(ValueError, match="overwrites nothing else"):
        watch([tmp_path])


def test_a_folder_that_goes_away_while_it_is_watched_is_said(tmp_path, watched):
    folder = write_run(tmp_path / "run", [row(1)])
    ended = watched([folder])
    wait_for((folder / "samples.html").exists)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="not the folder of a run"):
        ended.result(timeout=30)


@pytest.mark.parametrize(
    ("state", "num_steps", "finished"),
    [
        ({"step": 9}, 9, True),
        ({"step": 9}, 20, False),  # was made longer
        ({"step": 9, "stopped_early": True}, 20, True),
    ],
)
def test_a_run_has_finished_with_its_last_step_or_early(state, num_steps, finished, tmp_path):
    write_run(tmp_path, [row(1)], config=f"num_steps: {num_steps}\n")
    assert not is_finished(tmp_path)
    finish(tmp_path, **state)
    assert (tmp_path / FINAL_FOLDER).is_dir() and is_finished(tmp_path) == finished


def test_several_runs_are_watched_until_the_last_has_finished(tmp_path, watched):
    folders = [write_run(tmp_path / name, [row(1)]) for name in "ab"]
    page = tmp_path / "both.html"
    ended = watched(folders, page)
    wait_for(page.exists)
    finish(folders[0])
    append(folders[1], "samples.jsonl", row(2))
    append(folders[1], "metrics.jsonl", {"step": 2})
    wait_for(lambda: steps_on(page) == [1, 2])
    assert data_of(page)["refresh"] is not None
    finish(folders[1])
    ended.result(timeout=30)
    assert data_of(page)["refresh"] is None


def test_a_page_that_is_reloaded_again_and_again_holds_less(tmp_path, watched, monkeypatch):
    monkeypatch.setattr("common.samples.page.MAX_ROWS", 100)
    folder = write_run(tmp_path / "run", [row(step) for step in range(100)])
    page, ended = folder / "samples.html", watched([folder])
    wait_for(page.exists)
    assert len(steps_on(page)) == 20
    finish(folder)
    ended.result(timeout=30)
    assert len(steps_on(page)) == 100


def test_an_open_page_reloads_about_as_often_as_the_run_writes(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [row(1)])
    now, reloads = [0.0], []

    def sleep(seconds):
        """Between two looks, 40 seconds go by and an entry comes."""
        now[0] += 40
        reloads.append(data_of(folder / "samples.html")["refresh"])
        append(folder, "samples.jsonl", row(len(reloads) + 1))
        append(folder, "metrics.jsonl", {"step": len(reloads) + 1})
        if len(reloads) == 3:
            finish(folder)

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    watch([folder])
    assert reloads == [10, 40, 40]


def test_another_signal_ends_it_too_and_the_page_rests(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [row(1)])

    def sleep(seconds):
        assert data_of(folder / "samples.html")["refresh"] is not None
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(watching, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(Stopped):
        watch([folder])
    assert data_of(folder / "samples.html")["refresh"] is None


@pytest.mark.slow
def test_ctrl_c_ends_it_and_the_page_rests(tmp_path):
    folder = write_run(tmp_path / "run", [row(1)])
    command = [sys.executable, "-m", "common.samples", str(folder), "--watch"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = running.stdout.readline()  # not the file: it is there before its address is said
        assert data_of(folder / "samples.html")["refresh"] is not None
        running.send_signal(signal.SIGINT)
        rest, complained = running.communicate(timeout=60)
    finally:
        running.kill()
    assert (running.returncode, rest, complained) == (0, "", "") and said.strip() == str(folder / "samples.html")
    assert data_of(folder / "samples.html")["refresh"] is None
