"""The runs of tools/soak.py: a tiny policy, seven algorithms, real commands, and the processes that they leave behind.

A run is what a user starts, a script in a process of its own, one or two of them. It takes seconds, most of which are
imports. Nothing here knows why a run ends.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import psutil
import transformers
import yaml

from common.embedded.policy import save_untrained
from common.runs.log import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent
SHORT_TIMEOUT = ROOT / "tools/soak_short_timeout.py"
ALGORITHMS = ("GRPO", "PPO", "RLOO", "ReMax", "RAFT", "Reinforce", "VinePPO")
NUM_STEPS = 8
# A run that takes longer hangs. With vLLM on a busy machine, one takes a minute.
PATIENCE = 300.0
# What else may a run's processes do after it has ended? Nothing: they have this long to be gone.
GRACE = 5.0

# The share of digits, in the rule's process. Its sleep makes a step last long enough for something to happen in it;
# while there is a file `slow` beside the run, a step lasts long enough for two things.
SLOW_FILE = "slow"
REWARD = """
import os, time
from common.rewards.rules import rule

@rule
def digits(prompts, completions, **columns):
    time.sleep(0.6 if os.path.exists(os.environ["SOAK_SLOW"]) else 0.005)
    return [sum(c in "0123456789" for c in text) / max(len(text), 1) for text in completions]
"""
# Heads that are wide enough for vLLM on a CPU, and weights that are large enough for completions to differ.
SIZES = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2},
}
SETTINGS = {
    "task": "prompts",
    "num_eval_prompts": 4,
    "num_steps": NUM_STEPS,
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_prompt_length": 16,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "use_lora": False,
    "gradient_checkpointing": False,
    "eval_every": 2,
    "samples_every": 1,
    "save_total_limit": 3,
    "progress": False,
}
SHORT_FIT = {"prompts": 10, "generations": 2, "epochs": 1, "minibatches": 2}
OF_ALGORITHM = {
    "PPO": {"value_backbone": "own"} | {f"value_init_{name}": number for name, number in SHORT_FIT.items()},
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is run: an algorithm, a sampler, and how many processes."""

    algorithm: str = "GRPO"
    sampler: str = "transformers"
    processes: int = 1

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.sampler}-{self.processes}"


class Runs:
    """Starts runs in a folder, and keeps an uninterrupted one of each setup.

    Args:
        folder: gets the policy, the data and the references.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inputs = self._inputs = folder / "inputs"
        shutil.rmtree(folder / "references", ignore_errors=True)  # perhaps of other code
        inputs.mkdir(parents=True, exist_ok=True)
        transformers.logging.disable_progress_bar()
        save_untrained(inputs / "policy", **SIZES)
        rows = [{"prompt": f"{a} {b} make {a + b}\n"} for a in range(1, 6) for b in range(1, 6)]
        (inputs / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (inputs / "reward.py").write_text(REWARD, encoding="utf-8")
        common = SETTINGS | {"model": str(inputs / "policy"), "dataset": str(inputs / "prompts.jsonl")}
        common |= {"rewards": [f"{inputs / 'reward.py'}:digits"]}
        for name in ALGORITHMS:
            (inputs / f"{name}.yaml").write_text(yaml.safe_dump(common | OF_ALGORITHM.get(name, {})), encoding="utf-8")
        self._locks = {}
        self._lock = Lock()

    def command(self, setup: Setup, output_dir: Path, *, restarts: int = 0, **more: float) -> list[str]:
        """The command of a run with more settings; the same one continues it.

        Args:
            setup: of the run.
            output_dir: its folder.
            restarts: how often a launcher may start the processes again; then settings may be what users cannot pass.
            more: settings.
        """
        config = self._inputs / f"{setup.algorithm}.yaml"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(setup.processes)]
        script = [str(ROOT / setup.algorithm / f"{setup.algorithm.lower()}.py")]
        if restarts:
            launcher, script = [*launcher, "--max-restarts", str(restarts)], [str(SHORT_TIMEOUT), *script]
        options = {"config": config, "sampler": setup.sampler, "output_dir": output_dir, **more}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [sys.executable, *(launcher if setup.processes > 1 else []), *script, *words]

    def reference(self, setup: Setup) -> "Ended":
        """A run of this setup that nothing interrupts, with a checkpoint after each step; run at the first call.

        Raises:
            RuntimeError: if it fails, which is no matter of interruptions.
        """
        with self._lock:
            lock = self._locks.setdefault(setup, Lock())
        with lock:
            case = self.folder / "references" / setup.name
            command = self.command(setup, case / "run", save_every=1, save_total_limit=NUM_STEPS)
            if (case / "ended.json").is_file():
                return Ended(**json.loads((case / "ended.json").read_text(encoding="utf-8")))
            ended = Process(command, case, "whole").wait()
            if ended.status != 0:
                raise RuntimeError(f"an uninterrupted run of {setup.name} fails, see {case}:\n{ended.errors[-1000:]}")
            (case / "ended.json").write_text(json.dumps(vars(ended)), encoding="utf-8")
            return ended


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: exit status, as a shell would say it: 128 and the signal's number after one.
        seconds: from its start.
        errors: what it wrote to stderr.
        left: its processes that were still there GRACE seconds later, and are ended now.
    """

    status: int
    seconds: float
    errors: str
    left: list[str]


class Process:
    """A run, started.

    Args:
        command: as a list of words.
        case: a folder that gets what it prints, under `name`.
        name: of this part of the case.
    """

    def __init__(self, command: list[str], case: Path, name: str) -> None:
        case.mkdir(parents=True, exist_ok=True)
        self._output, self._errors = case / f"{name}.stdout", case / f"{name}.stderr"
        self._begun = time.monotonic()
        self._family: set[psutil.Process] = set()
        # Threads of several runs on few cores would wait for each other.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        environment["SOAK_SLOW"] = str(case / SLOW_FILE)
        with open(self._output, "wb") as output, open(self._errors, "wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._begun

    @property
    def output(self) -> str:
        """What it has written to stdout."""
        return self._output.read_text(errors="replace", encoding="utf-8")

    def said(self, pattern: re.Pattern) -> bool:
        """Whether it has written this to stderr."""
        return bool(pattern.search(self._errors.read_text(errors="replace", encoding="utf-8")))

    def send(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process or, as a queue does, also to all that it has started, in whatever session."""
        self.note_family()
        for pid in [self.pid, *(each.pid for each in self._family if group)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def note_family(self) -> None:
        """Remember the processes that this one has started, to find them after its end."""
        self._family |= {*_children(self.pid, recursive=True)}

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Wait until it has ended and its processes with it; what is left is killed and named."""
        last = time.monotonic() + patience
        hangs = []
        while self.running:
            if time.monotonic() > last:
                hangs = [f"{self.pid}: it hangs"]
                self.note_family()
                os.killpg(self.pid, signal.SIGKILL)
                self._process.wait()
            time.sleep(0.01)
        seconds, last = self.seconds, time.monotonic() + GRACE
        while (left := self._left()) and time.monotonic() < last:
            time.sleep(0.05)
        names = [f"{pid}: {words_of(pid)[:200]}" for pid in left]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for_group(GRACE)
        status = self._process.returncode
        status = 128 - status if status < 0 else status
        return Ended(status, seconds, self._errors.read_text(errors="replace", encoding="utf-8"), hangs + names)

    def wait_for_group(self, patience: float) -> None:
        """Wait until the processes of its group have ended too, which a launcher that was killed does not do."""
        last = time.monotonic() + patience
        while self._left() and time.monotonic() < last:
            time.sleep(0.05)

    def _left(self) -> list[int]:
        return sorted(each.pid for each in {*self._family, *_members(self.pid)} if is_alive(each))


# Processes, which may end at any moment


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that only has not been waited for, or whose number another one has, does not."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def _children(parent: int, *, recursive: bool = False) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return list(filter(is_alive, psutil.Process(parent).children(recursive=recursive)))
    return []


def _members(session: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session:
                yield process


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    return [each.pid for each in _children(parent)]


def words_of(pid: int) -> str:
    """A process's command line."""
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def ranks(launcher: int) -> list[int]:
    """The training processes of a launcher, which is the only one if it has started none of its own kind."""
    if "torch.distributed.run" not in words_of(launcher):
        return [launcher]
    return [pid for pid in children(launcher) if "--output_dir" in words_of(pid)]


def last_step(folder: Path) -> int:
    """The last step in metrics.jsonl; -1 without one."""
    try:
        lines = (folder / METRICS_FILE).read_bytes().splitlines()
    except OSError:
        return -1
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
    return -1
