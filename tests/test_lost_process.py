"""A process that dies or hangs: what the others say, how they end, and that a launcher's restart goes on as before."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from common import others
from common.environment import why_restarts_fail
from common.others import LOST_PROCESS, LostProcess, Others, Place, means_lost, own_place
from common.processes import process_state
from common.runs import alike
from common.runs.stopping import Stopping
from common.signals import Stopped
from tests.toy import ROOT, metrics_of, toy_config, toy_trainer

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.mark.slow
def test_a_run_one_of_whose_processes_is_killed_says_so_once_and_goes_on_by_itself(tiny_folder, tmp_path):
    settings = {"num_steps": 3, "save_every": 1}
    command = [*LAUNCH, "--nproc_per_node=2", "--max-restarts=1", "tests/lost_process.py"]
    run = [str(tiny_folder), str(tmp_path / "run"), json.dumps(settings), "60", "SIGKILL:1:3:update"]
    options = {"cwd": ROOT, "env": os.environ | ENVIRONMENT, "capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run([*command, *run], **options)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^error: .*\n.*\n.*\n.*$", done.stderr, re.MULTILINE)
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    what, where, again, restart = said[0].splitlines()
    assert re.match(r"error: process 1 of 2 \(pid \d+ on \S+\) is gone: it was killed, or", what)
    assert where == f"run: {tmp_path / 'run'}: the same command continues from checkpoint-2"
    assert "--max-restarts=1 tests/lost_process.py" in again and again.endswith("SIGKILL:1:3:update")
    assert restart == "torchrun starts all processes again (restart 1 of 1)."
    toy_trainer(tiny_folder, tmp_path / "one", **settings).train()
    for line, other in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "one"), strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, abs=1e-5)


# Two processes that differ: what each is told. No model is loaded.
UNLIKE = """
import json, os, sys
from pathlib import Path
import common
from common.mistakes import UnlikeProcesses
from common.runs import alike
from common.runs.stopping import Stopping
from common.trainer import OnPolicyTrainer
from tests.toy import toy_trainer

model, folder = map(Path, sys.argv[1:])
rank = int(os.environ["RANK"])
(folder / str(rank)).mkdir()
os.chdir(folder / str(rank))  # as on two machines
alike._PATIENCE, said = 1.0, {}
OnPolicyTrainer._load_models = lambda *_: sys.exit("it loads")
digest = alike._digest_of_code

def refuse(name, trainer):
    try:
        trainer()
    except UnlikeProcesses as error:
        said[name] = str(error)

refuse("settings", lambda: toy_trainer(model, folder / "run", learning_rate=1e-3 * (1 + rank), seed=rank))
alike._digest_of_code = lambda trainer: digest(trainer) + str(rank)
refuse("code", lambda: toy_trainer(model, folder / "run"))
alike._digest_of_code = digest
refuse("folder", lambda: toy_trainer(model, Path("run")))
(folder / f"{rank}.json").write_text(json.dumps(said))
"""


@pytest.mark.slow
def test_processes_with_other_settings_code_or_another_folder_are_refused_before_models_are_loaded(
    tiny_folder, tmp_path
):
    (tmp_path / "unlike.py").write_text(UNLIKE)
    command = [*LAUNCH, "--nproc_per_node=2", str(tmp_path / "unlike.py"), str(tiny_folder), str(tmp_path)]
    options = {"env": os.environ | ENVIRONMENT, "capture_output": True, "text": True, "timeout": 400}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    said, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert said == other  # all raise it, so that none waits
    has = "has learning_rate=0.002, on process 0 0.001; seed=1, on process 0 0. All"
    assert re.match(r"process 1 \(on \S+\) ", said["settings"]) and has in said["settings"]
    assert "has the code='" in said["code"]
    assert re.match(r"output_dir=run: process 1 \(on \S+\) does not find there what process 0", said["folder"])
    assert said["folder"].endswith(f"that of process 0 is {tmp_path / '0/run'}.")
    assert not list(tmp_path.rglob(".tmp-*")) and not (tmp_path / "1/run").exists()


def test_a_file_that_comes_late_on_a_network_disk_is_seen(tmp_path):
    file = tmp_path / "run" / ".tmp-token"

    def write() -> None:
        file.parent.mkdir()
        file.write_text(file.name)

    late = threading.Timer(0.3, write)
    late.start()
    assert alike._sees(file)
    late.join()


# What one process sees of others


@pytest.fixture
def child():
    """A process that lives until the test ends."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


@pytest.fixture
def two(child, monkeypatch):
    """This process and the child are the processes of a run, also for the module."""
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    for name in ("_UNTIL_GONE", "_UNTIL_LOWEST_SPOKE"):
        monkeypatch.setattr(others, name, 0.1)
    found = Others(1 / 60, Path("/runs/mine"), lambda: "the same command continues from checkpoint-7")
    place = own_place()
    found.meet([place, place._replace(pid=child.pid, started=process_state(child.pid).started)], 0)
    monkeypatch.setattr(others, "_others", found)
    return found


def wait_for_state(child: subprocess.Popen, state: str) -> None:
    while process_state(child.pid).state != state:
        time.sleep(0.01)


def test_a_process_that_is_stopped_or_gone_is_named(two, child):
    assert (two.gone, two.stopped) == ([], [])
    child.send_signal(signal.SIGSTOP)
    wait_for_state(child, "T")
    assert (two.gone, two.stopped) == ([], [1])
    said = two.message().splitlines()
    assert said[0].startswith(f"process 1 of 2 (pid {child.pid} on ") and "is stopped by a signal (SIGSTOP)" in said[0]
    assert said[1] == "run: /runs/mine: the same command continues from checkpoint-7"
    child.kill()
    wait_for_state(child, "Z")  # nobody has waited for it
    assert (two.gone, two.stopped) == ([1], [])
    child.wait()
    assert two.gone == [1] and "is gone" in two.message()


def test_where_all_live_or_the_other_is_on_another_machine_only_what_is_known_is_said(two, child):
    late = two.message(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))
    assert late.startswith("a process of 2 did not answer within ") and "--process_timeout" in late
    assert "live" in late and "is gone:" not in late
    two.meet([own_place(), Place("another", "elsewhere", child.pid, 0)], 0)
    assert not two.gone
    assert two.message(RuntimeError("Connection closed by peer")).startswith(
        "the connection to a process of 2 is lost"
    )


def test_one_process_of_a_machine_speaks(two, child):
    place = two._places[0]
    second = Others(1.0, Path("run"), str)
    second.meet([place._replace(pid=child.pid, started=process_state(child.pid).started), place], 1)
    assert two.says() and not second.says()
    two._spoken.close()
    assert second.says()  # the first did not: it hangs
    second._spoken.close()


def test_the_thread_ends_a_process_that_waits_where_no_error_comes():
    script = """
import sys, time
from pathlib import Path
from common import others
from common.processes import process_state
child = int(sys.argv[1])
found = others.Others(0.01, Path("run"), lambda: "goes on")
own = others.own_place()
found.meet([own, own._replace(pid=child, started=process_state(child).started)], 0)
others._PATIENCE, others._EVERY = 0.5, 0.1
with found.watched(lambda: False, leave=lambda: print("left", flush=True)):
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", script, str(child.pid)], **options) as process:
            process.stdout.readline()
            time.sleep(1.5)  # for longer than the process may be at one place without a word
            child.kill()
            child.wait()
            done, said = process.communicate(timeout=60)
    assert done == "left\n"
    assert process.returncode == LOST_PROCESS
    assert "process 0 has been at <string>, line 13, in <module> for 0.0" in said
    assert f"error: process 1 of 2 (pid {child.pid} on " in said and "run: " in said


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7"


def raised(text: str, file: str, kind: str = "RuntimeError") -> BaseException:
    """An error from a line of this file."""
    with pytest.raises(BaseException) as caught:
        exec(compile(f"raise {kind}({text!r})", file, "exec"))
    return caught.value


TORCH = "/lib/site-packages/torch/distributed/distributed_c10d.py"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ((GLOO, "x.py"), True),
        (("Application timeout caused pair closure", TORCH), True),
        (("wait timeout after 3000ms, keys: /a", TORCH), True),
        (("Timed out waiting for the judge", "reward.py"), False),
        (("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 40 vs 16", TORCH), False),
        (("Cannot use ReduceOp.PREMUL_SUM with Gloo", TORCH), False),
        (("connection closed", TORCH, "ValueError"), False),
    ],
)
def test_only_an_unanswered_operation_of_several_processes_means_that_one_is_lost(two, error, expected):
    assert means_lost(raised(*error)) is expected


def test_a_signal_of_the_launcher_does_not_hide_the_error_it_came_after(two, monkeypatch):
    error = Stopped(signal.SIGTERM)
    assert not means_lost(error) and means_lost(LostProcess())
    error.__context__ = raised(GLOO, "x.py")
    assert means_lost(error)
    monkeypatch.setattr(others, "_others", None)  # alone
    assert not means_lost(error)


def test_restarts_that_would_find_the_dead_processes_are_warned_of(monkeypatch):
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert why_restarts_fail() is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert why_restarts_fail().startswith("--max-restarts 3 without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert "Pass --rdzv_backend c10d" in why_restarts_fail()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert why_restarts_fail() is None


def test_the_end_of_another_process_is_no_loss_once_the_last_step_is_done():
    with Stopping(600, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10) as stopping:
        assert not stopping.is_away()
        stopping.begin_end()  # one sends the model to the hub, which takes long
        assert stopping.is_away() and not stopping.is_leaving


@pytest.mark.parametrize("minutes", [0.5, 0, -1, 1e7, float("inf"), float("nan")])
def test_a_timeout_that_no_run_can_have_is_refused(tmp_path, minutes):
    with pytest.raises(ValueError, match=r"process_timeout=.*at least 1.*Pass --process_timeout 10"):
        toy_config(tmp_path / "model", tmp_path / "run", process_timeout=minutes)
