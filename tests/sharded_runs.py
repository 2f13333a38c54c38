"""Toy runs whose models are spread over processes; test_sharded_checkpoints.py starts it in two and three.

Arguments: model folder, folder of the runs, and what to do, in this order: names of functions here.
"""

import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

import common  # noqa: F401
from common.mistakes import CannotWrite
from common.signals import Stopped
from common.trainer import OnPolicyTrainer
from tests.own_copy import use_own_copies
from tests.toy import LORA, toy_trainer

RUNS = {
    "grpo": {"kl_coef": 0.1, "eval_every": 2},
    "lora": {**LORA, "kl_coef": 0.1},
    "ppo": {"algorithm": "PPO"},
    "host": {"optimizer": "adamw_host"},
}
# Steps of these runs, and the step whose checkpoint they are continued from.
NUM_STEPS, STEP = 3, 2


def main() -> None:
    """Do one after the other, each in all processes."""
    model, folder, *names = sys.argv[1:]
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_own_copies(monkeypatch)
        for name in names:
            kind, _, run = name.partition(":")
            trainer = globals()[kind](Path(model), Path(folder), *filter(None, [run]))
    # Threads of a process group that are still there when Python ends can abort the process.
    trainer.accelerator.state.destroy_process_group()


def trainer_of(model: Path, folder: Path, run: str, **settings: object) -> OnPolicyTrainer:
    """One of the runs, in that folder, with a checkpoint of each step."""
    defaults = {"sampler": "vllm", "shard": "full", "num_steps": NUM_STEPS, "save_every": 1, "prompts_per_step": 6}
    return toy_trainer(model, folder, **(defaults | RUNS[run] | settings))


def whole(model: Path, folder: Path, run: str) -> OnPolicyTrainer:
    """A run that is not interrupted."""
    trainer = trainer_of(model, folder / run, run)
    trainer.train()
    return trainer


def again(model: Path, folder: Path, run: str) -> OnPolicyTrainer:
    """The rest of a run, from its checkpoint of STEP, as all these processes do it."""
    num_processes = int(os.environ["WORLD_SIZE"])
    if os.environ["RANK"] == "0":
        copy_until(folder / run, folder / f"{run} on {num_processes}")
    return rest(model, folder, f"{run} on {num_processes}")


def rest(model: Path, folder: Path, copy: str) -> OnPolicyTrainer:
    """The rest of a run whose folder, which begins with its name, was copied by the first process or before."""
    trainer = trainer_of(model, folder / copy, copy.split()[0])
    trainer.train()
    return trainer


def copy_until(run: Path, copy: Path) -> None:
    """The folder of a run as it was after the checkpoint of STEP."""
    later = [f"checkpoint-{step}" for step in range(STEP + 1, NUM_STEPS + 1)]
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(*later, "final", "best"), symlinks=True)


def full_disk(model: Path, folder: Path) -> OnPolicyTrainer:
    """A run whose last process may write no file of more than 100 kB when it comes to a checkpoint."""
    trainer = trainer_of(model, folder / "full disk", "grpo", num_steps=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    update = trainer.update

    def limited(*args: object, **kwargs: object) -> None:
        update(*args, **kwargs)
        if trainer.accelerator.is_last_process:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))

    trainer.update = limited
    with pytest.raises(CannotWrite) as caught:
        trainer.train()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (folder / f"full disk {trainer.accelerator.process_index}.txt").write_text(str(caught.value))
    return trainer


def stopped(model: Path, folder: Path) -> OnPolicyTrainer:
    """A run whose last process is sent SIGTERM while it samples for its second step."""
    trainer = trainer_of(model, folder / "stopped", "grpo", save_every=100, stop_grace=0)
    sample = trainer.policy_sampler.sample

    def interrupted(*args: object, **kwargs: object) -> object:
        if trainer.current_step == 2 and trainer.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    trainer.policy_sampler.sample = interrupted
    with pytest.raises(Stopped):
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
