"""The work that both sides do, from one set of settings: `python -m benchmarks.against_trl.work` makes it.

Our own settings say everything; what TRL calls them is in theirs.py. The prompts of each step, and completions to
update on, are made once and written to a folder, so that both sides have the same.
"""

import json
import pickle
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from common.cli import parse_config
from common.config import RLConfig
from common.tasks import load_task
from common.trainer import OnPolicyTrainer

ALGORITHMS = ("GRPO", "RLOO")
UNUSED = ["--eval_every", "0", "--num_minibatches", "1", "--progress", "false", "--seed", "0"]


def configure(algorithm: str, arguments: list[str]) -> RLConfig:
    """The settings of a run, as its script reads them.

    Args:
        algorithm: one of ALGORITHMS.
        arguments: as on the script's command line.
    """
    script = vars(import_module(f"{algorithm}.{algorithm.lower()}"))
    more = {"embedded": script.get("EMBEDDED"), "script": script["__file__"]}
    return parse_config(script["SETTINGS"], **more, args=[*arguments, *UNUSED])


def make_trainer(algorithm: str, config: RLConfig) -> OnPolicyTrainer:
    """Our trainer of an algorithm."""
    return getattr(import_module(f"{algorithm}.{algorithm.lower()}_trainer"), f"{algorithm}Trainer")(config)


def write_work(algorithm: str, arguments: list[str], folder: Path, *, completions: bool = True) -> None:
    """Write the prompts of each step, and completions of the first step's, to work.json.

    Args:
        algorithm: one of ALGORITHMS.
        arguments: as on the script's command line.
        folder: for the file; the model and a run are made in it.
        completions: False leaves them out; sampling them takes as long as in a step.
    """
    made = [*arguments, "--sampler", "transformers", "--output_dir", str(folder / "made")]
    config = configure(algorithm, made)
    trainer = make_trainer(algorithm, config)
    steps = [trainer.training_prompts(step) for step in range(1, config.num_steps + 1)]
    trainer.current_step = 1
    sampled = []
    if completions:
        rollouts = trainer.sample(steps[0], num_generations=config.num_generations)
        rows = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
        sampled = [ids[mask].tolist() for ids, mask in rows]
    work = {
        "model": trainer.model_path,
        "steps": [
            [
                {"prompt": raw, **{name: values[i] for name, values in prompts.columns.items()}}
                for i, raw in enumerate(prompts.raw_prompts)
            ]
            for prompts in steps
        ],
        "prompt_ids": steps[0].prompt_ids,
        "completion_ids": sampled,
    }
    (folder / "settings.json").write_text(json.dumps(asdict(config), default=str), encoding="utf-8")
    _write_rewards(trainer, config, folder / "rewards.pickle")
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")


def _write_rewards(trainer: OnPolicyTrainer, config: RLConfig, file: Path) -> None:
    """The reward functions and their weights: TRL calls the same ones."""
    task = load_task(config, trainer.tokenizer)
    names = config.rewards or task.default_rewards or list(task.rewards)
    weights = config.reward_weights or [(task.reward_weights or {}).get(name, 1.0) for name in names]
    file.write_bytes(pickle.dumps(([task.rewards[name] for name in names], weights)))


if __name__ == "__main__":
    algorithm, folder, which, *arguments = sys.argv[1:]
    write_work(algorithm, arguments, Path(folder), completions=which == "with")
