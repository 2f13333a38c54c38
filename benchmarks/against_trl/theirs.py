"""TRL's side, with its own trainers and the settings that mean the same: one process of it is
`python -m benchmarks.against_trl.theirs`.

Nothing that costs time and is not needed is on: no logging to trackers, no checkpoints, no gradient checkpointing.
"""

import json
import pickle
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

LOSS_TYPES = {"tokens": "dapo", "rows": "grpo", "constant": "dr_grpo"}
GENERATION = {
    "transformers": {},
    "continuous": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.4},
}


class Clock(TrainerCallback):
    """Seconds and CPU seconds of each step and of the phases in it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.norms: list[float] = []
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside to a phase."""
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        self._phases[name] += time.perf_counter() - clock
        self._phases[f"{name} cpu"] += time.process_time() - cpu

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """A step begins with its prompts."""
        self._phases = defaultdict(float)
        self._begin = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends with the optimizer's step."""
        clock, cpu = self._begin
        seconds = {"step": time.perf_counter() - clock, "step cpu": time.process_time() - cpu}
        self.steps.append({**seconds, **self._phases})

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """The gradient's norm, to compare it with ours."""
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def timed(trainer_class: type, given: list[list[int]] | None) -> type:
    """A trainer of TRL whose phases are timed.

    Args:
        trainer_class: GRPOTrainer or RLOOTrainer.
        given: completions to use instead of sampling; None: it samples.
    """

    class Timed(trainer_class):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            # GRPOTrainer's also returns log-probs, RLOOTrainer's does not.
            replayed = (given, None) if trainer_class is trl.GRPOTrainer else given
            with self.clock.phase("sample"):
                found = replayed if given else super()._generate_single_turn(*args, **kwargs)
            self.tokens.append(sum(map(len, found[0] if isinstance(found, tuple) else found)))
            return found

        def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
            with self.clock.phase("rollouts"):
                return super()._generate_and_score_completions(inputs)

    return Timed


def arguments(algorithm: str, config: dict, folder: Path, *, batch: int, generation: str) -> Any:
    """TRL's configuration.

    Args:
        algorithm: GRPO or RLOO.
        config: our settings.
        folder: for what it writes.
        batch: rows of a forward pass.
        generation: a key of GENERATION.
    """
    rows = config["prompts_per_step"] * config["num_generations"]
    passes = max(rows // batch, 1)
    settings = {
        "output_dir": str(folder),
        "max_steps": config["num_steps"],
        "per_device_train_batch_size": rows // passes,
        "gradient_accumulation_steps": passes,
        "num_generations": config["num_generations"],
        "max_completion_length": config["max_completion_length"],
        "temperature": config["temperature"],
        "learning_rate": config["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": config["warmup_steps"],
        "adam_beta1": config["adam_beta1"],
        "adam_beta2": config["adam_beta2"],
        "weight_decay": config["weight_decay"],
        "max_grad_norm": config["max_grad_norm"],
        "beta": config["kl_coef"],
        "epsilon": config["clip_range"],
        "gradient_checkpointing": config["gradient_checkpointing"],
        "bf16": in_bfloat16(config),
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": config["num_steps"],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **GENERATION[generation],
    }
    if generation == "vllm":
        settings["vllm_max_model_length"] = config["max_prompt_length"] + config["max_completion_length"]
    if algorithm == "GRPO":
        settings |= {"loss_type": LOSS_TYPES[config["average_over"]]}
        settings |= {"scale_rewards": "group" if config["scale_by_std"] else "none"}
    return getattr(trl, f"{algorithm}Config")(**settings)


def in_bfloat16(config: dict) -> bool:
    """Whether passes are in bfloat16: as with ours, on a GPU unless float32 is asked for."""
    return config["dtype"] == "bfloat16" or (config["dtype"] == "auto" and torch.cuda.is_available())


def train(algorithm: str, folder: Path, options: dict) -> dict:
    """Train on the work of a folder; see write_work.

    Args:
        algorithm: GRPO or RLOO.
        folder: with work.json, rewards.pickle and settings.json.
        options: `batch`, `generation`; `replay`: update on the given completions as often, with a learning rate of 0.
    """
    work, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("work.json", "settings.json"))
    functions, weights = pickle.loads((folder / "rewards.pickle").read_bytes())
    steps = work["steps"]
    if options["replay"]:
        steps = steps[:1] * (options["replay"] + 1)
        config |= {"learning_rate": 0.0, "num_steps": len(steps)}
    tuned = arguments(algorithm, config, folder / "trl", batch=options["batch"], generation=options["generation"])
    tuned.reward_weights = weights
    if options["replay"]:
        tuned.logging_steps = 1  # the gradient's norm is in the log
    functions = [reading_text(function) for function in functions]
    # Weights that are trained are in float32, the frozen base of an adapter is as passes need it; as with ours.
    dtype = "bfloat16" if config["use_lora"] and in_bfloat16(config) else "float32"
    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype, trust_remote_code=False)
    trainer = timed(getattr(trl, f"{algorithm}Trainer"), work["completion_ids"] if options["replay"] else None)(
        model=model,
        reward_funcs=functions,
        args=tuned,
        train_dataset=Dataset.from_list([row for step in steps for row in step]),
        processing_class=AutoTokenizer.from_pretrained(work["model"], padding_side="left", trust_remote_code=False),
        peft_config=adapter(config),
    )
    trainer.clock, trainer.tokens = Clock(), []
    trainer.add_callback(trainer.clock)
    trainer.train()
    measured = trainer.clock.steps[1:] if options["replay"] else trainer.clock.steps
    updates = [step["step"] - step["rollouts"] for step in measured]
    return {
        "sample": sum(step["sample"] for step in measured),
        "update": median(updates) if options["replay"] else sum(updates),
        "update cpu": median(step["step cpu"] - step["rollouts cpu"] for step in measured),
        "step": sum(step["step"] for step in measured),
        "step_seconds": [step["step"] for step in measured],
        "tokens": trainer.tokens[0] if options["replay"] else sum(trainer.tokens),
        "grad_norm": trainer.clock.norms[-1] if trainer.clock.norms else None,
    }


def reading_text(function: Any) -> Any:
    """A reward function that is given text where TRL has chat messages; TRL also asks it for a name."""

    def reward(prompts: list, completions: list, **columns: Any) -> list[float]:
        texts = [
            [row if isinstance(row, str) else row[-1]["content"] for row in rows] for rows in (prompts, completions)
        ]
        return function(prompts=texts[0], completions=texts[1], **columns)

    reward.__name__ = getattr(function, "func", function).__name__
    return reward


def adapter(config: dict) -> Any:
    """LoRA's settings, or None."""
    if not config["use_lora"]:
        return None
    from peft import LoraConfig

    modules = config["lora_target_modules"]
    return LoraConfig(
        r=config["lora_r"], lora_alpha=config["lora_alpha"], target_modules=modules, task_type="CAUSAL_LM"
    )


if __name__ == "__main__":
    print(json.dumps(train(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))))
