"""Signals that ask a run to end: what is finished, what is saved, and that it goes on as if nothing had happened."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from common.runs.stopping import StepLeft, Stopping
from common.signals import ENDING, Stopped, raise_in_script
from common.trainer import OnPolicyTrainer
from tests import forked
from tests.toy import ROOT, metrics_of, samples_of, save_toy_policy, toy_trainer

SETTINGS = {"num_steps": 4, "eval_every": 2, "save_every": 100, "stop_grace": 1}

# Its arguments: model, folder, algorithm, settings; then where it signals itself: method, step, signals, and how long
# the method takes from there on.
RUN = """
import json, os, signal, sys, time
from pathlib import Path
from common.cli import run_script
from common.start import report
from tests.toy import toy_trainer

signal.signal(signal.SIGINT, signal.default_int_handler)
model, folder, algorithm, settings, *event = sys.argv[1:]

def main():
    trainer = toy_trainer(Path(model), Path(folder), algorithm=algorithm, **json.loads(settings))
    if event and os.environ.get("RANK", "0") == os.environ.get("SIGNALLED", "0"):
        path, step, signals, seconds = event
        *owners, name = path.split(".")
        owner = vars(trainer)[owners[0]] if owners else trainer
        method = getattr(owner, name)

        def slow(*args, **options):
            if trainer.current_step == int(step):
                setattr(owner, name, method)
                for each in signals.split(","):
                    os.kill(os.getpid(), getattr(signal, each))
                    time.sleep(1.2 if "," in signals else 0)
                time.sleep(float(seconds))
            return method(*args, **options)

        setattr(owner, name, slow)
    report(trainer)

run_script(main, interrupted="as said")
"""


@pytest.fixture(autouse=True)
def defaults():
    """A script's handlers stay to its end, also those of a test that ran one in this process."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING if number != signal.SIGINT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command_of(model: Path, folder: Path, *event: str, launch: tuple = (), algorithm: str = "GRPO", **more: object):
    script = folder.parent / "run.py"
    script.write_text(RUN)
    settings = json.dumps(SETTINGS | more)
    return [sys.executable, *launch, str(script), str(model), str(folder), algorithm, settings, *event]


def run(model: Path, folder: Path, *event: str, launch: tuple = (), algorithm: str = "GRPO", **more: object):
    command = command_of(model, folder, *event, launch=launch, algorithm=algorithm, **more.pop("settings", {}))
    if not launch:
        return forked.run(command[1:], timeout=200)
    environment = os.environ | ENVIRONMENT | more
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def same_run(folder: Path, whole: Path) -> bool:
    """Metrics, samples and every byte of final/."""
    files = [[(path.name, path.read_bytes()) for path in sorted(each.glob("final/*"))] for each in (folder, whole)]
    lines = metrics_of(folder) == metrics_of(whole), samples_of(folder) == samples_of(whole)
    return all(lines) and files[0] == files[1] and bool(files[0])


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("checkpoint-*")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, and the run that nobody stops."""
    folder = tmp_path_factory.mktemp("stopping")
    model = save_toy_policy(folder / "model")
    done = run(model, folder / "whole")
    assert done.returncode == 0, done.stderr
    return model, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "status", "saved"),
    [
        (("policy_sampler.sample", "3", "SIGINT", "60"), 130, ["checkpoint-2"]),
        (("policy_sampler.sample_for_evaluation", "2", "SIGHUP", "60"), 129, ["checkpoint-2"]),
        (("policy_sampler.policy_has_changed", "3", "SIGTERM", "2"), 143, ["checkpoint-3"]),
    ],
    ids=["left", "evaluation", "update"],
)
def test_a_run_that_a_signal_stops_goes_on_as_if_nothing_had_happened(whole, tmp_path, event, status, saved):
    model, uninterrupted = whole
    folder, name = tmp_path / "run", {"SIGINT": "Ctrl-C"}.get(event[2], event[2])
    stopped = run(model, folder, *event)
    assert stopped.returncode == status, stopped.stderr
    assert checkpoints(folder) == saved
    assert not list(folder.glob("*.tmp-*")) and "Traceback" not in stopped.stderr
    assert f"{name}: " in stopped.stderr and "leaves at once" in stopped.stderr
    assert stopped.stderr.endswith("interrupted: as said\n" if name == "Ctrl-C" else f"{name}: as said\n")
    assert run(model, folder).returncode == 0
    assert same_run(folder, uninterrupted)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once_and_save_every_0_keeps_no_checkpoint(whole, tmp_path):
    began = time.monotonic()
    event = ("policy_sampler.sample", "1", "SIGTERM,SIGTERM", "300")
    stopped = run(whole[0], tmp_path / "run", *event, settings={"stop_grace": 600, "save_every": 0})
    assert stopped.returncode == -signal.SIGTERM and time.monotonic() - began < 200
    assert "finishing step 1 (at most 600 s); save_every=0 keeps no checkpoint; a second" in stopped.stderr


@pytest.mark.slow
def test_processes_stop_at_the_end_of_the_same_step_though_one_got_the_signal(whole, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--local_addr", "127.0.0.1")
    event = ("policy_sampler.sample", "2", "SIGUSR1", "0")
    stopped = run(whole[0], tmp_path / "run", *event, launch=launch, SIGNALLED="1")
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"], stopped.stderr
    assert "SIGUSR1: left after step 2 of 4" in stopped.stderr


@pytest.mark.slow
def test_the_script_shown_for_slurm_passes_the_signal_on_and_queues_the_job_again(whole, tmp_path):
    model, uninterrupted = whole
    shown = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/running.md").read_text(), re.DOTALL)[1]
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "scontrol $@"\n')
    scontrol.chmod(0o755)
    environment = os.environ | ENVIRONMENT | {"SLURM_JOB_ID": "7", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    metrics = tmp_path / "run/metrics.jsonl"

    def submit(*event: str) -> tuple[int, str]:
        command = shlex.join(command_of(model, tmp_path / "run", *event))
        script = shown.replace("python GRPO/grpo.py --output_dir runs/mine", command)
        assert command in script
        job = subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
        while event and job.poll() is None and not (metrics.exists() and '{"step": 2,' in metrics.read_text()):
            time.sleep(0.05)
        if event:
            job.send_signal(signal.SIGUSR1)  # to the shell alone, as `--signal=B:USR1` does
        said, _ = job.communicate(timeout=200)
        return job.returncode, said

    status, said = submit("policy_sampler.sample", "3", "SIGCONT", "60")
    assert (status, "scontrol requeue 7" in said) == (138, True)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    status, said = submit()
    assert (status, "scontrol" in said) == (0, False)
    assert same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number"),
    [
        (["GRPO/grpo.py"], signal.SIGINT),
        (["-m", "common.evaluation"], signal.SIGTERM),
        (["-m", "common.merge"], signal.SIGINT),
    ],
)
def test_a_signal_during_the_imports_shows_no_traceback(script, number):
    def heed() -> None:  # a shell in the background lets its children ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "preexec_fn": heed}
    with subprocess.Popen([sys.executable, *script], **options) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in said and said.count("\n") <= 3


# Starts a script as a launcher does, and is killed while that imports torch.
LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
process = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_whose_launcher_is_killed_is_asked_to_end():
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "any"}
    launched = [sys.executable, "-c", LAUNCHER, "-m", "common.merge"]
    done = subprocess.run(launched, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, timeout=60)
    assert done.stderr.strip() == "SIGTERM: nothing had begun yet"  # of the script, whose end this has waited for


# Is sent Ctrl-C while it says what became of the first.
TWICE = """
import os, signal, time
from common.cli import run_script

def interrupted():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)

def main():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)

signal.signal(signal.SIGINT, signal.default_int_handler)
run_script(main, interrupted=interrupted)
"""


@pytest.mark.slow
def test_a_second_signal_while_the_first_is_reported_shows_no_traceback():
    done = subprocess.run([sys.executable, "-c", TWICE], stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


# A library's atexit, as tqdm, weakref and torch have, and the modules' own end after it.
LATE = """
import atexit, os, signal, sys, time, weakref
from common.cli import run_script

class Late:
    def __del__(self):
        signal_us()

def signal_us():
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(os.getpid(), number)
        time.sleep(0.01)

def main():
    atexit.register(signal_us)
    sys.last = Late()
    print("done")
    if sys.argv[1:]:
        raise SystemExit(int(sys.argv[1]))

run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 2])
def test_a_signal_while_python_ends_changes_nothing(status):
    command = [sys.executable, "-c", LATE, *([str(status)] if status else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "done\n", "")


# Without a run


@pytest.fixture
def stopping():
    with Stopping(600, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10) as stopping:
        yield stopping


def test_an_update_that_does_not_fit_into_the_grace_is_not_begun(stopping):
    stopping.begin_step(1)
    stopping.begin_update()  # nothing asks for a stop
    stopping.end_update()
    signal.raise_signal(signal.SIGUSR1)
    stopping.begin_step(2)
    stopping.begin_update()  # the last one took no time
    stopping.begin_update()  # the second learner's: it is no question any more
    stopping.end_update()
    stopping._update_seconds = 601
    stopping.begin_step(3)
    with pytest.raises(StepLeft):
        stopping.begin_update()


def test_leaving_is_raised_again_where_it_is_swallowed_and_never_in_an_update():
    with Stopping(0, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10) as stopping:
        stopping.begin_step(1)
        stopping.begin_update()
        signal.raise_signal(signal.SIGUSR1)
        time.sleep(1.5)
        swallowed = 0
        try:
            with stopping.window():
                while True:
                    try:
                        time.sleep(10)
                    except StepLeft:
                        swallowed += 1
        except StepLeft:
            pass
        assert not swallowed  # it was due when the window opened
        stopping._window = True
        for _ in range(2):
            with pytest.raises(StepLeft):
                time.sleep(10)
    assert isinstance(stopping.reason(), Stopped) and stopping.reason().code == 138


def test_a_signal_that_comes_while_another_process_is_heard_of_is_the_same_request():
    with Stopping(600, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10) as stopping:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            stopping._note(number)
    assert stopping.number == signal.SIGUSR1


def test_a_script_that_was_stopped_is_not_stopped_again_while_it_ends():
    raise_in_script()
    with Stopping(9, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL  # which ends it at once, and raises nothing


def test_handlers_of_others_and_ignored_signals_stay():
    def theirs(*_: object) -> None:
        pass

    signal.signal(signal.SIGTERM, theirs)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stopping(1, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10):
        assert signal.getsignal(signal.SIGTERM) is theirs
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_no_thread_waits_for_signals_that_others_answer():
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    before = {*threading.enumerate()}  # one of the test before may be about to end
    with Stopping(1, Accelerator(cpu=True), keeps_checkpoint=True, process_timeout=10):
        assert "grace of a stop" not in [thread.name for thread in {*threading.enumerate()} - before]


OWN_WORK = "import common, time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\n"
OWN_WORK += "except KeyboardInterrupt:\n    print('caught')\nfinally:\n    print('put away')\n"


@pytest.mark.parametrize(
    ("script", "number", "status", "said", "errors"),
    [
        ("import common, slow_module", signal.SIGINT, 130, "", "\nCtrl-C: nothing had begun yet\n"),
        ("import common, slow_module", signal.SIGTERM, 143, "", "\nSIGTERM: nothing had begun yet\n"),
        (OWN_WORK, signal.SIGINT, 0, "caught\nput away\n", ""),
        (OWN_WORK, signal.SIGTERM, -signal.SIGTERM, "", ""),
    ],
    ids=["Ctrl-C in an import", "SIGTERM in an import", "Ctrl-C in other work", "SIGTERM in other work"],
)
def test_a_signal_in_the_imports_is_one_line_and_in_other_work_what_it_is_everywhere(
    script, number, status, said, errors, tmp_path
):
    (tmp_path / "common").symlink_to(ROOT / "common")  # so that the script is one of this project's folder
    (tmp_path / "slow_module.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(60)")
    (tmp_path / "own.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, tmp_path / "own.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=30) == (said, errors)
    assert process.returncode == status


def test_ctrl_c_while_a_command_imports_the_first_of_its_own_modules_is_one_line(tmp_path):
    hook = "lambda event, args: args[0] == 'common.environment' and os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "sitecustomize.py").write_text(f"import os, signal, sys\nsys.addaudithook({hook})")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "common.samples", tmp_path]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "\nCtrl-C: nothing had begun yet\n")


@pytest.mark.parametrize(
    ("method", "step", "settings", "saved"),
    [
        ("policy_sampler.sample", 2, {}, ["checkpoint-2"]),
        ("policy_sampler.sample", 1, {"stop_grace": 0}, []),
        ("policy_sampler.sample", 2, {"save_every": 0}, []),
    ],
    ids=["", "in the first step", "without checkpoints"],
)
def test_a_trainer_in_a_python_program_raises_what_ends_it(tiny_folder, tmp_path, method, step, settings, saved):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", **{"num_steps": 3, "save_every": 9} | settings)
    signal_at(trainer, method, step)
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 138 and checkpoints(tmp_path / "run") == saved
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_run_that_only_writes_its_model_is_finished(tiny_folder, tmp_path):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", num_steps=2, stop_grace=0)
    signal_at(trainer, "run.finish", 2)
    trainer.train()
    assert (tmp_path / "run/final/model.safetensors").is_file()


def signal_at(trainer: OnPolicyTrainer, path: str, step: int) -> None:
    """Have a method send this process a signal when it is called in a step."""
    owner = vars(trainer)[path.split(".")[0]]
    method = getattr(owner, path.split(".")[1])

    def and_signal(*args: object, **options: object) -> object:
        if trainer.current_step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return method(*args, **options)

    setattr(owner, path.split(".")[1], and_signal)
