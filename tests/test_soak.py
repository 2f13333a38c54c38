"""tools/soak.py: its plan, its comparison, its table; and a short soak of real runs."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from common.runs.checkpoints import save_checkpoint, save_final
from tests.toy import ROOT
from tools.soak_compare import difference
from tools.soak_plan import KINDS, event
from tools.soak_runs import ALGORITHMS, Process, is_alive
from tools.soak_table import Outcome, summary, table

# The plan


def test_the_same_seed_gives_the_same_plan_and_each_event_alone():
    plan = [event(3, number) for number in range(60)]
    assert plan == [event(3, number) for number in reversed(range(60))][::-1]
    assert plan != [event(4, number) for number in range(60)]


def test_every_kind_comes_before_one_comes_again_and_nothing_is_left_out():
    plan = [event(1, number) for number in range(3 * len(KINDS))]
    for turn in range(3):
        assert Counter(one.kind for one in plan[turn * len(KINDS) : (turn + 1) * len(KINDS)]) == Counter(KINDS)
    assert {one.setup.algorithm for one in plan} == {*ALGORITHMS}
    assert {one.setup.processes for one in plan} == {1, 2}
    assert len(plan) // 8 < sum(one.setup.sampler == "vllm" for one in plan) <= len(plan) // 6
    assert {one.save_every for one in plan} == {1, 2, 3, 4}
    assert {moment.aim for one in plan for moment in one.moments} > {None}


def test_only_what_may_be_drawn_is_drawn():
    drawn = {"kinds": ["kill", "SIGTERM"], "samplers": ["vllm"], "processes": [2], "algorithms": ["PPO"]}
    plan = [event(1, number, **drawn) for number in range(6)]
    assert Counter(one.kind for one in plan) == {"kill": 3, "SIGTERM": 3}
    assert {one.setup.name for one in plan} == {"PPO-vllm-2"}


# The comparison


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What a run of three steps leaves behind."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    folder.mkdir()
    lines = [{"step": step, "score": step / 3, "time/step": 0.1, "memory/peak_gb": 1.0} for step in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text('{"step": 1, "completion": "7"}\n{"step": 2, "completion": "8"}\n')
    (folder / "config.yaml").write_text("num_steps: 3\n")
    for step in (2, 3):
        writers = {
            "weights.safetensors": lambda path, step=step: path.write_bytes(b"weights" + bytes([step])),
            "policy_optimizer.pt": lambda path, step=step: path.write_bytes(b"moments" + bytes([step])),
        }
        save_checkpoint(folder, step, writers=writers, state={"best": None})
    save_final(folder, 3, fill=lambda path: (path / "model.safetensors").write_bytes(b"weights\3"))
    return folder


def change(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        content = (run / name).read_bytes()
        assert old in content
        (run / name).write_bytes(content.replace(old, new, 1))

    return apply


def delete(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def add(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(b"")


SAME = {
    "nothing": lambda run: None,
    "other seconds": change("metrics.jsonl", b'"time/step": 0.1', b'"time/step": 7.5'),
    "other memory": change("metrics.jsonl", b'"memory/peak_gb": 1.0', b'"memory/peak_gb": 2.0'),
    "fewer checkpoints": lambda run: (run / "checkpoint-2").rename(run.parent / "rotated"),
}
OTHER = {
    "a value": (change("metrics.jsonl", b"0.6666666666666666", b"0.6666666666666667"), "step 2: score is 0.66666666"),
    "a hole": (change("metrics.jsonl", b'{"step": 2', b'{"step": 3'), r"the steps \[1, 3, 3\] instead of \[1, 2, 3\]"),
    "a line of something else": (
        change("metrics.jsonl", b'{"step": 1', b'{"stop": 1'),
        "none of a run",
    ),
    "half a line": (change("metrics.jsonl", b'1.0}\n{"step": 3', b'\n{"step": 3'), "none of a run"),
    "one value more": (change("metrics.jsonl", b'"score": 0.3', b'"kl": 0.0, "score": 0.3'), "kl is 0.0 instead of"),
    "no metrics": (delete("metrics.jsonl"), "metrics.jsonl is missing"),
    "a sample": (change("samples.jsonl", b'"8"', b'"9"'), "samples.jsonl: line 2 differs"),
    "a sample less": (change("samples.jsonl", b'{"step": 1, "completion": "7"}\n', b""), "1 lines instead of 2"),
    "no samples": (delete("samples.jsonl"), "samples.jsonl is missing"),
    "a byte of final/": (
        change("final/model.safetensors", b"weights\3", b"weights\2"),
        "final/model.safetensors dif",
    ),
    "a file of final/": (add("final/extra.json"), r"final/ has other files: extra\.json"),
    "final/'s step": (change("final/trainer_state.json", b"3", b"2"), r"final/trainer_state\.json differs"),
    "a checkpoint's weights": (
        lambda run: (
            (run / "checkpoint-3").rename(run.parent / "away"),
            save_checkpoint(run, 3, writers={"weights.safetensors": lambda p: p.write_bytes(b"other")}, state={}),
        ),
        "checkpoint-3/policy_optimizer.pt is missing",
    ),
    "a damaged checkpoint": (
        change("checkpoint-2/policy_optimizer.pt", b"moments", b"Moments"),
        "checkpoint-2 is",
    ),
    "a leftover": (add("checkpoint-4.tmp-17"), r"left over: checkpoint-4\.tmp-17"),
    "no config": (delete("config.yaml"), r"missing or too many: config\.yaml"),
    "a file more": (add("notes.txt"), r"missing or too many: notes\.txt"),
}


@pytest.mark.parametrize("name", SAME)
def test_runs_that_differ_in_what_may_differ_are_equal(whole, tmp_path, name):
    SAME[name](shutil.copytree(whole, tmp_path / "run"))
    assert difference(tmp_path / "run", whole) is None


@pytest.mark.parametrize("name", OTHER)
def test_any_other_difference_is_named(whole, tmp_path, name):
    damage, message = OTHER[name]
    damage(shutil.copytree(whole, tmp_path / "run"))
    assert re.search(message, difference(tmp_path / "run", whole) or "no difference")


# The table


def test_the_table_counts_what_was_tried_by_kind_and_setup():
    one = event(1, 0, kinds=["kill"], samplers=["transformers"], processes=[1], algorithms=["PPO"])
    outcomes = [
        Outcome(event=one, verdict="equal", survived=True, equal=True, steps_lost=2, resume_seconds=3.0),
        Outcome(event=one, verdict="failed", survived=True, reason="line 2 differs", resume_seconds=4.25),
        Outcome(event=one, verdict="missed", reason="it was over before", steps_lost=9, resume_seconds=9.0),
        Outcome(event=replace(one, kind="metrics-cut"), verdict="said so", survived=True, reason="it says so"),
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(outcomes).splitlines()]
    assert rows[2] == ["kill", "transformers", "PPO", "1", "2", "2", "1", "1", "2", "4.2 s"]
    assert rows[3] == ["metrics-cut", "transformers", "PPO", "1", "1", "1", "0", "0", "0", ""]
    assert rows[4] == ["all", "", "", "", "3", "3", "1", "1", "2", "4.2 s"]
    assert summary(outcomes, 90).splitlines()[0] == ("3 events in 1.5 minutes: 1 equal, 1 said so, 1 missed, 1 failed")


# Processes


def test_what_a_run_leaves_behind_is_named_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.soak_runs.GRACE", 0.2)
    ended = Process(["bash", "-c", "sleep 321 & echo message >&2; kill -TERM $$"], tmp_path, "part").wait()
    assert (ended.status, ended.errors) == (128 + 15, "message\n")
    [left] = ended.left
    assert left.endswith("sleep 321")
    assert not psutil.pid_exists(pid := int(left.split(":")[0])) or not is_alive(psutil.Process(pid))


# A short soak


MORE = ["SIGTERM", "keeper-killed", "full-disk"]


# With these seeds, the kill has several checkpoints to be in the middle of, and the disk is full before the end.
@pytest.mark.slow
@pytest.mark.parametrize(("seed", "more"), [(302, []), pytest.param(2392, MORE, marks=pytest.mark.several)])
def test_runs_survive_a_short_soak(seed, more, tmp_path):
    kinds = ["kill-writing", *more[:2], "metrics-emptied", *more[2:]]
    places = ["--folder", str(tmp_path / "runs"), "--write", str(tmp_path / "outcomes.json")]
    drawn = ["--samplers", "transformers", "--processes", "1", "--algorithms", "GRPO", "--kinds", *kinds]
    limits = ["--seed", str(seed), "--events", str(len(kinds)), "--jobs", "2"]
    command = [sys.executable, "tools/soak.py", *limits, *places, *drawn]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None and not (tmp_path / f"runs/event-{len(kinds) - 1}").is_dir():
            time.sleep(0.05)
        process.terminate()  # what has begun is finished, and the table printed
        said = process.communicate(timeout=600)[0]
    assert process.returncode == 128 + 15, said
    verdicts = {one["event"]["kind"]: one["verdict"] for one in json.loads((tmp_path / "outcomes.json").read_text())}
    assert {*verdicts} == {*kinds}
    passed = {kind: verdict for kind, verdict in verdicts.items() if verdict in ("equal", "said so")}
    assert passed == verdicts or {**passed, "full-disk": "skipped"} == verdicts
    assert "| kill-writing | transformers | GRPO | 1 | 1 | 1 | 1 |" in said
