"""A toy run for tests: an untrained policy of two layers, and a reward that any policy can learn in seconds."""

from pathlib import Path

from common.tasks import Task
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer


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


def toy_config(model: Path, output_dir: Path, **settings: object) -> GRPOConfig:
    """GRPO on the toy task with the transformers sampler, unless `settings` say otherwise."""
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
    return GRPOConfig(**(defaults | settings))


def toy_trainer(model: Path, output_dir: Path, **settings: object) -> GRPOTrainer:
    """Ready to train."""
    return GRPOTrainer(toy_config(model, output_dir, **settings), task=toy_task())
