"""What really reaches Weights & Biases, read from the files of offline runs."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from common.runs.log import RunLog
from common.runs.trackers import WANDB_FILE, Trackers, WandbRun
from tests.toy import ROOT, metrics_of, samples_of, toy_trainer, train_until

BLOCK = 32768  # bytes; a .wandb file is cut into blocks, and a record into parts that end with one


def records(path: Path) -> Iterator:
    """The records of a .wandb file: 7 bytes, then parts of 4 bytes checksum, 2 length, 1 kind, and the content."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # too little for a header
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if at + 7 + length > len(content):  # it is being written
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def runs_of(folder: Path, last_step: int) -> list[tuple[str, bool, dict[int, dict]]]:
    """Of each start: the id, whether wandb may join it with another, and what was logged by step.

    A process of wandb's writes the files, also a moment after the run has ended: this waits for `last_step`.
    """
    end = time.monotonic() + 30
    while True:
        runs = [start for start in map(_start, sorted(folder.glob("wandb/offline-run-*/*.wandb"))) if start]
        if any(last_step in steps for _, _, steps in runs) or time.monotonic() > end:
            return runs
        time.sleep(0.1)


def _start(file: Path) -> tuple[str, bool, dict[int, dict]] | None:
    run, steps = None, {}
    for record in records(file):
        if record.WhichOneof("record_type") == "run":
            run = record.run
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(each.nested_key) or each.key: each.value_json for each in record.history.item}
            step = {name: json.loads(value) for name, value in items.items()}
            assert step["_step"] not in steps
            steps[step["_step"]] = step
    return run and (run.run_id, run.resume, steps)


def tables_of(folder: Path, step: dict) -> dict[str, list[dict]]:
    """The rows of each table of a step."""
    tables = {}
    for name, path in step.items():
        if name.endswith("/path"):
            (file,) = folder.glob(f"wandb/offline-run-*/files/{path}")
            table = json.loads(file.read_text())
            rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
            tables[name.removesuffix("/path")] = rows
    return tables


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


SETTINGS = {"report_to": ["wandb"], "eval_every": 2, "save_every": 2, "num_steps": 5}


@pytest.mark.slow
def test_training_and_evaluation_have_tables_of_their_own(toy_folder, tmp_path):
    folder = tmp_path / "run"
    toy_trainer(toy_folder, folder, **SETTINGS | {"num_steps": 2}).train()
    ((_, _, steps),) = runs_of(folder, 2)
    assert sorted(steps) == [0, 1, 2]
    seen = Counter()
    for number, step in steps.items():
        for name, rows in tables_of(folder, step).items():
            assert {f"samples/{row['split']}" for row in rows} == {name}
            seen |= Counter({(number, row["split"], row["completion"]): 0 for row in rows})
            seen.update((number, row["split"], row["completion"]) for row in rows)
    assert seen == Counter((row["step"], row["split"], row["completion"]) for row in samples_of(folder))
    assert [line["score"] for line in metrics_of(folder)[1:]] == [steps[1]["score"], steps[2]["score"]]


@pytest.mark.slow
def test_a_continued_run_goes_on_in_the_same_run_of_wandb_and_no_step_is_there_twice(toy_folder, tmp_path, caplog):
    folder = tmp_path / "run"
    train_until(toy_trainer(toy_folder, folder, **SETTINGS), 3)  # one step more than the checkpoint holds
    assert "W&B" not in caplog.text
    train_until(toy_trainer(toy_folder, folder, **SETTINGS), 3)  # nothing new
    assert "goes on from step 2. W&B cannot take a step back, so it keeps what it has of steps 3 to 3" in caplog.text
    toy_trainer(toy_folder, folder, **SETTINGS).train()
    runs = runs_of(folder, 5)
    assert len({name for name, _, _ in runs}) == 1 and all(may_join for _, may_join, _ in runs)
    assert [sorted(steps) for _, _, steps in runs] == [[0, 1, 2, 3], [], [4, 5]]
    together = {step: values for _, _, steps in runs for step, values in steps.items()}
    for line in metrics_of(folder):
        assert {name: together[line["step"]][name] for name in line} == line
    assert all("samples/train/path" in together[step] for step in range(1, 6))
    assert ["samples/eval/path" in together[step] for step in range(6)] == [True, False, True, False, True, True]


@pytest.mark.slow
def test_a_run_that_is_extended_says_which_steps_wandb_keeps_and_how_to_have_the_new_ones(
    toy_folder, tmp_path, caplog
):
    folder, schedule = tmp_path / "run", SETTINGS | {"lr_scheduler": "linear"}
    toy_trainer(toy_folder, folder, **schedule | {"save_every": 4}).train()
    before = metrics_of(folder)[5]
    longer = schedule | {"save_every": 4, "num_steps": 7, "resume": "extend"}
    train_until(toy_trainer(toy_folder, folder, **longer), 6)
    assert "it keeps what it has of steps 5 to 5; metrics.jsonl gets them anew" in caplog.text
    runs = runs_of(folder, 6)
    assert [sorted(steps) for _, _, steps in runs] == [[0, 1, 2, 3, 4, 5], [6]]
    after = metrics_of(folder)[5]
    assert runs[0][2][5]["lr"] == before["lr"] != after["lr"]
    (folder / WANDB_FILE).unlink()
    caplog.clear()
    toy_trainer(toy_folder, folder, **longer).train()
    assert "W&B" not in caplog.text
    # Those of one second are in any order.
    ((_, _, steps),) = [start for start in runs_of(folder, 7) if start[0] != runs[0][0]]
    assert sorted(steps) == [5, 6, 7] and steps[5]["lr"] == after["lr"]


def environment() -> dict[str, str]:
    """That of a process with a service of its own: wandb names the service of this one, of earlier tests, there."""
    kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return kept | {"PYTHONPATH": str(ROOT)}


KILLED = """
import os, pathlib, signal, sys, time
from accelerate import Accelerator
from common.runs.log import RunLog
folder = pathlib.Path(sys.argv[1])
log = RunLog(folder, Accelerator(cpu=True, log_with=["wandb"], project_dir=folder), {})
for step in range(3):
    log.samples(step, [{"completion": str(step)}])
    log.log(step, {"score": step / 2})
log.samples(3, [{"completion": "of a step that does not end"}])
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_was_logged_before_a_kill_is_there(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    ((name, _, steps),) = runs_of(tmp_path, 2)
    assert {step: values["score"] for step, values in steps.items()} == {0: 0, 1: 0.5, 2: 1}
    run = WandbRun(tmp_path, write=True)
    assert run.id == name and [run.takes(step) for step in (2, 3)] == [False, True]


def test_a_run_keeps_its_id_and_the_last_step_that_was_sent(tmp_path):
    first = WandbRun(tmp_path, write=True)
    assert first.arguments() == {"id": first.id, "resume": "allow"} and first.takes(0)
    first.sent(0)
    first.sent(1)
    assert first.takes(1)  # such as a table of the step that is being logged
    again = WandbRun(tmp_path, write=True)
    assert again.id == first.id and [again.takes(step) for step in range(3)] == [False, False, True]
    other = WandbRun(tmp_path / "other", write=False)
    assert other.id != first.id and not (tmp_path / "other").exists()


def test_an_id_from_the_environment_is_used_and_what_another_run_was_sent_does_not_count(tmp_path, monkeypatch):
    WandbRun(tmp_path, write=True).sent(7)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    run = WandbRun(tmp_path, write=True)
    assert run.id == "mine" and run.takes(1)
    assert json.loads((tmp_path / WANDB_FILE).read_text()) == {"id": "mine", "last_step": -1, "project": "nanoRLHF"}


SPOILED = ("", "\0\0\0", '{"id": "abc", "last', "[]", "7", "{}", '{"id": "abc"}', '{"id": "a/b", "last_step": 3}')
SPOILED += ('{"id": "", "last_step": 3}', '{"id": 5, "last_step": 3}', '{"id": "abc", "last_step": "3"}', "\udcff")


@pytest.mark.parametrize("content", SPOILED)
def test_a_spoiled_file_begins_a_new_run_of_wandb_and_says_why(tmp_path, monkeypatch, caplog, content):
    (tmp_path / WANDB_FILE).write_bytes(content.encode(errors="surrogateescape"))
    assert WandbRun(tmp_path, write=False).takes(0) and not caplog.text  # one process says it
    run = WandbRun(tmp_path, write=True)
    assert re.search(r"wandb.json: it (is not JSON|does not hold the id).*a new one begins.*WANDB_RUN_ID", caplog.text)
    assert run.id not in ("abc", "a/b", "") and run.takes(0)
    caplog.clear()
    assert WandbRun(tmp_path, write=True).id == run.id and not caplog.text
    (tmp_path / WANDB_FILE).write_bytes(content.encode(errors="surrogateescape"))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert WandbRun(tmp_path, write=True).id == "mine" and not caplog.text


def test_another_project_is_another_run_of_wandb(tmp_path, monkeypatch, caplog):
    (tmp_path / WANDB_FILE).write_text('{"id": "abc", "last_step": 3}')  # from before projects were kept
    first = WandbRun(tmp_path, write=True)
    assert (first.id, first.project) == ("abc", "nanoRLHF") and not first.takes(3)
    monkeypatch.setenv("WANDB_PROJECT", "thesis")
    run = WandbRun(tmp_path, write=True)
    assert run.id != "abc" and run.project == "thesis" and run.takes(0)
    assert "its run abc is in the project nanoRLHF, and this one is to be in thesis" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("project", ["thesis", None])
def test_the_project_is_that_of_the_environment(tmp_path, monkeypatch, project):
    if project:
        monkeypatch.setenv("WANDB_PROJECT", project)
    log = RunLog(tmp_path, Accelerator(cpu=True, log_with=["wandb"], project_dir=tmp_path), {})
    log.log(0, {"score": 0.5})
    log.close()
    runs_of(tmp_path, 0)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (run,) = (record.run for record in records(file) if record.WhichOneof("record_type") == "run")
    assert run.project == (project or "nanoRLHF")


def test_without_wandb_there_is_no_such_file(toy_folder, tmp_path):
    toy_trainer(toy_folder, tmp_path / "run", num_steps=1).train()
    assert not (tmp_path / "run" / WANDB_FILE).exists()


@pytest.mark.slow
def test_a_service_of_wandb_that_dies_never_ends_a_run_and_its_steps_count_as_not_sent(tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from accelerate import Accelerator
from common.processes import children
from common.runs.log import RunLog
folder = Path(sys.argv[1])
log = RunLog(folder, Accelerator(cpu=True, log_with=["wandb"], project_dir=folder), {})
log.log(0, {"score": 0.0})
[service] = [pid for pid in children() if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
os.kill(service, signal.SIGKILL)
for step in (1, 2, 3):
    log.samples(step, [{"completion": str(step)}])
    log.log(step, {"score": 1.0})
log.close()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("wandb failed, and gets nothing more of this run until it is started again") == 1
    assert [line["step"] for line in metrics_of(tmp_path)] == [0, 1, 2, 3]
    assert json.loads((tmp_path / WANDB_FILE).read_text())["last_step"] == 0


def test_a_tracker_that_cannot_begin_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_RUN_ID", "no/id")  # wandb refuses it
    log = RunLog(tmp_path, Accelerator(cpu=True, log_with=["wandb"], project_dir=tmp_path), {})
    log.log(1, {"score": 0.5})
    log.close()
    assert caplog.text.count("wandb failed") == 1 and "Run ID cannot contain" in caplog.text
    assert json.loads((tmp_path / WANDB_FILE).read_text())["last_step"] == -1
    assert [line["score"] for line in metrics_of(tmp_path)] == [0.5]


class Broken:
    """A tracker that raises whatever it is told to."""

    name = "broken"

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def log(self, values: dict, step: int) -> None:
        self.calls += 1
        raise self.error

    def finish(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ConnectionError("401"), SystemExit(1), Exception()])
def test_whatever_a_tracker_raises_is_one_warning(tmp_path, caplog, error):
    trackers = Trackers(tmp_path, Accelerator(cpu=True), {})
    broken = Broken(error)
    trackers._trackers.append(broken)
    for step in range(3):
        trackers.log(step, {"score": 0.5}, {})
    trackers.close()
    assert broken.calls == 1 and caplog.text.count("broken failed") == 1


def test_ctrl_c_within_a_tracker_is_no_failure_of_it(tmp_path):
    trackers = Trackers(tmp_path, Accelerator(cpu=True), {})
    trackers._trackers.append(Broken(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        trackers.log(1, {"score": 0.5}, {})
