"""A toy run for tests: an untrained policy of two layers, and a reward that any policy can learn in seconds."""

import contextlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import GenerationConfig

from common.config import RLConfig
from common.embedded.policy import save_untrained
from common.rollouts import PromptBatch, Rollouts
from common.tasks import Task
from common.trainer import OnPolicyTrainer
from common.update.learner import Learner

ROOT = Path(__file__).parent.parent

LORA = {"use_lora": True, "lora_r": 4}
# Several optimizer steps on one rollout, after which the clip acts.
SEVERAL = {"num_minibatches": 2, "num_update_epochs": 3, "learning_rate": 1e-2, "num_steps": 1}
# The settings of every clipped algorithm: other settings with which they act, and the value to change them to.
CLIP = {"clip_range": (SEVERAL, 0.01), "clip_range_high": (SEVERAL, 0.001)}
# A sampler that differs from the trainer shows what these do: tests/test_algorithms.py.
CLIP |= {"importance_correction": None, "importance_cap": None}
# Where the KL acts, and by which estimator.
IN_LOSS = SEVERAL | {"kl_coef": 1.0, "kl_place": "loss"}
KL_PLACE = {"kl_place": (SEVERAL | {"kl_coef": 1.0}, "loss"), "kl_estimator": (IN_LOSS, "k2")}


@dataclass(frozen=True)
class Algorithm:
    """An algorithm folder: its settings, its trainer and its files."""

    config: type[RLConfig]
    trainer: type[OnPolicyTrainer]
    script: Path
    trainer_file: Path


@cache
def algorithms() -> dict[str, Algorithm]:
    """Every folder `Name` of the repository with a `name_trainer.py`, by name."""
    found = {}
    for file in sorted(ROOT.glob("*/*_trainer.py")):
        name = file.parent.name
        if file.stem == f"{name.lower()}_trainer":
            module = vars(importlib.import_module(f"{name}.{file.stem}"))
            script = file.with_name(f"{name.lower()}.py")
            found[name] = Algorithm(module[f"{name}Config"], module[f"{name}Trainer"], script, file)
    return found


@cache
def facts(name: str) -> dict:
    """What the tests in an algorithm's folder, `Name/test_name.py`, say about it; empty if there is no such file.

    TOY_SETTINGS: settings in which its toy run differs from its defaults; a value may be a function of the folder of
    the toy policy, which makes what the setting names. VARIANTS: more runs, by name, for every test of whole runs.
    ACTS: for each of its own settings, other settings with which it acts, and the value to change it to; None if its
    effect has a test there. VALUES: more values of its own settings, for runs with drawn settings.
    LOGPROBS_ARE_REWARDS: its step makes them of the log-probs of the policy that sampled.
    """
    module = f"{name}.test_{name.lower()}"
    return vars(importlib.import_module(module)) if importlib.util.find_spec(module) else {}


def share_of_digits(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The share of characters that are digits."""
    return [sum(c in "0123456789" for c in text) / max(len(text), 1) for text in completions]


def ends_with_sum(prompts: list[str], completions: list[str], total: list[int], **columns: list) -> list[float]:
    """1 if the completion's last characters are the row's total."""
    return [float(text.endswith(str(t))) for text, t in zip(completions, total, strict=True)]


def toy_task() -> Task:
    """Twelve prompts to train on, four held out, two rewards."""
    rows = [{"prompt": f"{a} {b} make {a + b}\n", "total": a + b} for a in range(1, 5) for b in range(1, 5)]
    return Task(
        train=rows[:12],
        eval=rows[12:],
        rewards={"digits": share_of_digits, "sum": ends_with_sum},
        reward_weights={"digits": 1.0, "sum": 0.5},
        accuracy="sum",
    )


def toy_config(model: Path, output_dir: Path, *, algorithm: str = "GRPO", **settings: object) -> RLConfig:
    """An algorithm on the toy task with the transformers sampler, unless `settings` say otherwise."""
    defaults = {
        "model": str(model),
        "output_dir": str(output_dir),
        "sampler": "transformers",
        "num_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_prompt_length": 32,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "eval_every": 0,
        "save_every": 0,
        "samples_every": 1,
        "progress": False,
    }
    chosen = defaults | facts(algorithm).get("TOY_SETTINGS", {}) | settings
    made = {name: value(Path(model)) if callable(value) else value for name, value in chosen.items()}
    return algorithms()[algorithm].config(**made)


def toy_trainer(model: Path, output_dir: Path, *, algorithm: str = "GRPO", **settings: object) -> OnPolicyTrainer:
    """A trainer of the toy task, ready to train."""
    config = toy_config(model, output_dir, algorithm=algorithm, **settings)
    return algorithms()[algorithm].trainer(config, task=toy_task())


def save_toy_policy(folder: Path, **sizes: float) -> Path:
    """An untrained policy for which every eighth token is an end token: completions end at all lengths."""
    save_untrained(folder, **({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2} | sizes))
    generation = GenerationConfig.from_pretrained(folder)
    generation.eos_token_id = list(range(3, 400, 8))
    generation.save_pretrained(folder)
    return folder


def shift_weights(file: Path, offset: int) -> None:
    """Have the weights of a safetensors file begin `offset` bytes, a multiple of 8, after a multiple of 64."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")  # of the header, which may end in blanks
    header = content[8 : 8 + size].rstrip(b" ")
    header += b" " * ((offset - 8 - len(header)) % 64)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def metrics_of(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without time and memory, which depend on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def samples_of(folder: Path) -> list[dict]:
    """Lines of samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def learners_of(trainer: OnPolicyTrainer) -> list[Learner]:
    """The policy's learner and any other learner of the algorithm."""
    return [part for part in vars(trainer).values() if isinstance(part, Learner)]


def weights_of(trainer: OnPolicyTrainer) -> torch.Tensor:
    """All weights that the trainer trains, in one vector; meant for offload "never" or "auto" on the CPU."""
    return torch.cat([p.detach().flatten().clone() for learner in learners_of(trainer) for p in learner.parameters])


def trained_weights(trainer: OnPolicyTrainer) -> torch.Tensor:
    """All trained weights in one vector, after training."""
    trainer.train()
    return weights_of(trainer)


def scored_trainer(model: Path, output_dir: Path, accuracies: list[float], **settings: object) -> OnPolicyTrainer:
    """A toy GRPO run whose evaluation at step N gives accuracies[N], a multiple of 1/4, whatever was trained."""
    holder: list = []

    def scripted(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        if len(completions) != 4:  # a training batch
            return [0.0] * len(completions)
        return [float(row < round(4 * accuracies[holder[0].current_step])) for row in range(4)]

    task = toy_task()
    task.rewards["sum"] = scripted
    config = toy_config(model, output_dir, **({"num_steps": 4, "save_every": 1, "eval_every": 1} | settings))
    holder.append(algorithms()["GRPO"].trainer(config, task=task))
    return holder[0]


class Killed(BaseException):
    """What no part of a run catches."""


def train_until(trainer: OnPolicyTrainer, step: int) -> None:
    """Train as far as the line and the checkpoint of `step`, and leave the folder as a killed process would."""
    whole = trainer.step

    def until(prompts: PromptBatch) -> None:
        if trainer.current_step > step:
            raise Killed
        whole(prompts)

    trainer.step = until
    with contextlib.suppress(Killed):
        trainer.train()


def updates_of(trainer: OnPolicyTrainer) -> list[tuple[Learner, Rollouts]]:
    """The arguments of each call of `update`, in a list that fills while the trainer runs; updates still happen."""
    seen, update = [], trainer.update

    def recorded(learner: Learner, rollouts: Rollouts, *args: object, **kwargs: object) -> None:
        seen.append((learner, rollouts))
        update(learner, rollouts, *args, **kwargs)

    trainer.update = recorded
    return seen


def described_by(trainer: OnPolicyTrainer) -> list[tuple[Rollouts, torch.Tensor]]:
    """The arguments of each call of `describe`, all rows and their advantages, in the same way."""
    seen, describe = [], trainer.describe

    def recorded(rollouts: Rollouts, advantages: torch.Tensor, **options: object) -> None:
        seen.append((rollouts, advantages))
        describe(rollouts, advantages, **options)

    trainer.describe = recorded
    return seen
