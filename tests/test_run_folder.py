"""A run's folder while others are at it: files that are cut or deleted, links, a second run, a lost lock."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.runs.checkpoints import write_file
from common.runs.folder import prepare_run_folder
from common.runs.run import Run
from common.samples.page import write_page
from common.trainer import OnPolicyTrainer
from tests.toy import metrics_of, samples_of, toy_trainer, train_until

# A run of four steps with a checkpoint after the second, killed after the third.
SETTINGS = {"num_steps": 4, "save_every": 2, "eval_every": 2}
OWN_FILES = ["config.yaml", ".lock", "prompts.json", "metrics.jsonl", "samples.jsonl", "wandb.json"]


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a killed run and of the same run without interruption."""
    parent = tmp_path_factory.mktemp("runs")
    train_until(toy_trainer(tiny_folder, parent / "killed", **SETTINGS), 3)
    toy_trainer(tiny_folder, parent / "whole", **SETTINGS).train()
    return parent / "killed", parent / "whole"


@pytest.fixture
def run(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the killed run."""
    return shutil.copytree(runs[0], tmp_path / "run")


def before_step(trainer: OnPolicyTrainer, step: int, act: Callable[[], object]) -> OnPolicyTrainer:
    """Have something happen while the trainer is at a step."""
    whole = trainer.step

    def then(prompts: object) -> None:
        if trainer.current_step == step:
            act()
        whole(prompts)

    trainer.step = then
    return trainer


# Metrics that are shorter than the checkpoint

LINES = {
    "cut": lambda lines: [*lines[:1], lines[1][:30]],
    "cut within a character": lambda lines: [lines[0], b'{"step": 1, "text": "\xc3'],
    "emptied": lambda lines: [],
    "without a step": lambda lines: [lines[0].replace(b'"step"', b'"number"'), *lines[1:]],
    "zeros of a power cut": lambda lines: [lines[0], b"\0" * len(lines[1]), *lines[2:]],
    "twice": lambda lines: [lines[0], lines[1], lines[1], *lines[2:]],
    "in another order": lambda lines: [lines[1], lines[0], *lines[2:]],
    "edited": lambda lines: [lines[0], lines[1].replace(b'"score": ', b'"score": 1'), *lines[2:]],
    "nested too deeply": lambda lines: [b'{"step": 0, "x": ' + b"[" * 100_000, *lines[1:]],
    "one is missing": lambda lines: [lines[0], *lines[2:]],
}


@pytest.mark.parametrize("damage", [*LINES, "deleted"])
def test_metrics_that_the_checkpoint_knows_are_written_again(run, runs, tiny_folder, caplog, damage):
    path = run / "metrics.jsonl"
    before = path.read_bytes()
    path.unlink()
    if damage != "deleted":
        path.write_bytes(b"\n".join(LINES[damage](before.splitlines())) + b"\n")
    continued = toy_trainer(tiny_folder, run, **SETTINGS)
    assert path.read_bytes().startswith((run / "checkpoint-2" / "metrics.jsonl").read_bytes())
    assert "metrics.jsonl was not as the run had written it" in caplog.text
    assert "written again from the copy in checkpoint-2" in caplog.text
    if damage == "one is missing":
        continued.train()
        assert metrics_of(run) == metrics_of(runs[1])


def test_metrics_as_the_run_wrote_them_need_no_word(run, tiny_folder, caplog):
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "sco')  # cut off by the kill
    toy_trainer(tiny_folder, run, **SETTINGS)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_samples_that_the_checkpoint_knows_of_are_missed(run, tiny_folder, caplog):
    (run / "samples.jsonl").write_bytes(b"\n".join((run / "samples.jsonl").read_bytes().split(b"\n")[2:]))
    train_until(toy_trainer(tiny_folder, run, **SETTINGS), 2)
    assert "samples.jsonl has" in caplog.text and "somebody changed the file" in caplog.text


# Files that vanish while the run works


def test_metrics_that_are_changed_while_the_run_works_are_written_again(runs, tiny_folder, tmp_path, caplog):
    run = tmp_path / "run"
    trainer = toy_trainer(tiny_folder, run, **SETTINGS)
    before_step(
        trainer,
        2,
        (run / "metrics.jsonl").unlink,
    )
    before_step(trainer, 3, lambda: os.truncate(run / "metrics.jsonl", 10))
    before_step(trainer, 4, (run / "samples.jsonl").unlink)
    trainer.train()
    assert metrics_of(run) == metrics_of(runs[1])
    assert caplog.text.count("metrics.jsonl was changed while the run worked, and is written again") == 2
    assert "samples.jsonl was changed while the run worked" in caplog.text
    assert samples_of(run)[0]["step"] == 4


def test_settings_lock_and_prompts_that_are_deleted_are_written_again(tiny_folder, tmp_path, caplog):
    run, seen = tmp_path / "run", []
    trainer = toy_trainer(tiny_folder, run, **SETTINGS)
    names = ("config.yaml", "prompts.json", ".lock")
    before = {name: (run / name).read_bytes() for name in names}
    before_step(trainer, 2, lambda: [(run / name).unlink() for name in names])
    before_step(trainer, 3, lambda: seen.append(is_locked(run)))
    before_step(trainer, 4, lambda: shutil.rmtree(run / "checkpoint-2"))
    trainer.train()
    assert {name: (run / name).read_bytes() for name in names} == before
    assert seen == [True]
    assert all(f"{run / name} was deleted while the run worked, and is written again" in caplog.text for name in names)
    with pytest.raises(ValueError, match="has finished"):  # and not: a folder that is not a run's
        toy_trainer(tiny_folder, run, **SETTINGS)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("at", ["while it samples", "while it saves"])
def test_a_folder_that_vanishes_is_one_message(tiny_folder, tmp_path, monkeypatch, replaced, at):
    run, other = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    trainer = toy_trainer(tiny_folder, run, **SETTINGS)

    def vanish() -> None:
        shutil.rmtree(run)
        if replaced:
            run.mkdir()
            other.write_text('{"step": 1, "score": 1}\n')

    before_step(trainer, 2, vanish)
    if at == "while it saves":
        before_step(trainer, 2, lambda: None)
        trainer.step = type(trainer).step.__get__(trainer)
        monkeypatch.setattr("common.runs.run._save_trainable", lambda *_, **__: (vanish(), (run / "x" / "y").touch()))
    with pytest.raises(ValueError, match=r"the folder of this run was deleted or moved") as raised:
        trainer.train()
    assert ("Another folder has its name" in str(raised.value)) == replaced
    assert os.path.exists(run) == replaced
    if replaced:
        assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
        assert other.read_text() == '{"step": 1, "score": 1}\n'


# The lock

HOLD = """
import os, subprocess, sys, time
from common.runs.folder import prepare_run_folder
prepare_run_folder(sys.argv[1], {"num_steps": 4})
child = os.fork() or time.sleep(60)
other = subprocess.Popen(["sleep", "60"], close_fds=False)
print(child, other.pid, flush=True)
time.sleep(60)
"""


def is_locked(folder: Path) -> bool:
    """Whether another process is kept out."""
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", code, folder / ".lock"], capture_output=True, text=True)
    assert done.returncode == 0 or "BlockingIOError" in done.stderr
    return done.returncode != 0


def test_the_lock_survives_that_the_same_process_reads_the_file(tiny_folder, tmp_path):
    run, seen = tmp_path / "run", []
    trainer = toy_trainer(tiny_folder, run, **SETTINGS)

    def read() -> None:
        (run / ".lock").read_bytes()
        shutil.copytree(run, tmp_path / "copy")
        write_page([run])
        seen.append(is_locked(run))

    before_step(trainer, 2, read).train()
    assert seen == [True]
    assert not is_locked(run)  # the run has ended


def test_no_child_of_a_killed_run_keeps_its_lock(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    children = [int(number) for number in process.stdout.readline().split()]
    try:
        assert is_locked(run)
        process.kill()
        process.wait()
        for child in children:
            os.kill(child, 0)  # it is there
        assert not is_locked(run)
    finally:
        process.kill()
        for child in children:
            os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_trainer_does_not_train_in_a_child_that_was_forked_from_its_process(tiny_folder, tmp_path):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", num_steps=1)
    if (child := os.fork()) == 0:
        try:
            trainer.train()
        except ValueError as error:
            os._exit(7 if "this process was forked from the one that made the trainer" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    trainer.train()


def test_another_process_that_took_the_folder_without_its_lock_ends_the_first(tiny_folder, tmp_path):
    run = tmp_path / "run"
    trainer = toy_trainer(tiny_folder, run, **SETTINGS)
    others = []

    def take() -> None:
        (run / ".lock").unlink()
        code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); time.sleep(60)"
        others.append(subprocess.Popen([sys.executable, "-c", code, run / ".lock"]))
        while not (run / ".lock").exists() or not is_locked(run):
            time.sleep(0.01)

    try:
        with pytest.raises(ValueError, match="another process is working on this run"):
            before_step(trainer, 2, take).train()
    finally:
        others[0].kill()
        others[0].wait()


# Two runs in one process


def test_a_second_trainer_of_a_folder_is_refused_until_the_first_is_deleted(tiny_folder, tmp_path):
    first = toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in ("run", "link"):
        with pytest.raises(ValueError, match=r"another trainer of this process.*del trainer"):
            toy_trainer(tiny_folder, tmp_path / name, **SETTINGS)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    assert is_locked(tmp_path / "run")
    del first
    toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS).train()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_error_the_cell_of_a_notebook_is_run_again(runs, tiny_folder, tmp_path, error):
    def fail() -> None:
        raise error

    first = before_step(toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS), 3, fail)
    with pytest.raises(error):
        first.train()
    with pytest.raises(ValueError, match=r"has trained already.*Make a new trainer"):
        first.train()
    toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS).train()
    assert metrics_of(tmp_path / "run") == metrics_of(runs[1])


def test_a_trainer_that_could_not_be_made_is_not_in_the_way(tiny_folder, tmp_path, monkeypatch):
    made = []

    def fail(run: Run, *args: object, **options: object) -> None:
        made.append(run)  # as the traceback of a notebook keeps it
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "restore", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS)
    second = toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS)
    made.clear()  # which does not let go of what the second has
    assert is_locked(tmp_path / "run")
    second.train()


def test_a_folder_that_was_deleted_between_two_runs_is_a_new_one(tmp_path):
    for _ in range(2):
        prepare_run_folder(tmp_path / "run", {"num_steps": 4})
        assert is_locked(tmp_path / "run")
        shutil.rmtree(tmp_path / "run")


# Links


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", OWN_FILES)
def test_nothing_is_read_or_written_through_a_link(run, tiny_folder, tmp_path, name, dangling):
    outside = tmp_path / "outside"
    if not dangling:
        outside.write_text("oauth_token: SECRET\n")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside)
    content = sorted(path.name for path in run.iterdir())
    with pytest.raises(ValueError, match=rf"{name} in it is a link to '{outside}'") as raised:
        toy_trainer(tiny_folder, run, **SETTINGS)
    assert "SECRET" not in str(raised.value)
    assert sorted(path.name for path in run.iterdir()) == content
    assert outside.exists() != dangling and (dangling or outside.read_text() == "oauth_token: SECRET\n")


@pytest.mark.parametrize(("make", "kind"), [(os.mkdir, "a folder"), (os.mkfifo, "a pipe")])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_what_is_no_file_is_named_and_not_waited_for(run, tiny_folder, name, make, kind):
    (run / name).unlink()
    make(run / name)
    with pytest.raises(ValueError, match=f"{name} in it is {kind}"):
        toy_trainer(tiny_folder, run, **SETTINGS)


def test_a_link_that_comes_while_the_run_works_is_not_followed(tiny_folder, tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    trainer = toy_trainer(tiny_folder, run, **SETTINGS)

    def link() -> None:
        (run / "samples.jsonl").unlink()
        (run / "samples.jsonl").symlink_to(outside)

    with pytest.raises(ValueError, match=r"samples.jsonl: it is a link to .*nothing is written through"):
        before_step(trainer, 2, link).train()
    assert not outside.exists()


def test_a_run_folder_may_be_a_link_to_another_disk(tiny_folder, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    toy_trainer(tiny_folder, tmp_path / "run", **SETTINGS).train()
    assert len(metrics_of(tmp_path / "disk")) == 5


def test_a_page_is_written_without_what_links_lead_to(run, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("oauth_token: SECRET\n")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(outside)
    (run / f"samples.html.tmp-{os.getpid()}").symlink_to(outside)
    (run / "samples.html").symlink_to(tmp_path / "new")
    page = write_page([run]).read_text()
    assert "SECRET" not in page and "config.yaml is a link to" in page
    assert outside.read_text() == "oauth_token: SECRET\n" and not (tmp_path / "new").exists()
    (run / "samples.jsonl").unlink()
    (run / "samples.jsonl").symlink_to(outside)
    with pytest.raises(ValueError, match=r"samples.jsonl in it is a link"):
        write_page([run])


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "curves.png").symlink_to(tmp_path / "outside")
    write_file(tmp_path / "curves.png", b"picture")
    assert (tmp_path / "outside").read_text() == "mine"
    assert (tmp_path / "curves.png").read_bytes() == b"picture" and not (tmp_path / "curves.png").is_symlink()


def test_what_is_noted_of_a_damaged_checkpoint_goes_through_no_link(run, tiny_folder, tmp_path):
    checkpoint, outside = run / "checkpoint-2", tmp_path / "outside"
    weights = checkpoint / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (checkpoint / "damaged.txt").symlink_to(outside)
    with pytest.raises(ValueError, match="none of its checkpoints is whole"):
        toy_trainer(tiny_folder, run, **SETTINGS)
    assert not outside.exists() and "other contents" in (checkpoint / "damaged.txt").read_text()
