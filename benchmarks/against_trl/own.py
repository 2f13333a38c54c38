"""Our side: the real script, and the update alone. `python -m benchmarks.against_trl.own` is one process of it."""

import json
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.against_trl.work import UNUSED, configure, make_trainer
from common.advantages import group_relative, leave_one_out
from common.rollouts import Completion, Rollouts
from common.runs.log import METRICS_FILE

ROOT = Path(__file__).parents[2]


def command(algorithm: str, arguments: list[str], run: Path) -> list[str]:
    """The command of a run from start to end, without evaluation and checkpoints, as it would be typed."""
    script = str(ROOT / algorithm / f"{algorithm.lower()}.py")

    return [sys.executable, script, *arguments, *UNUSED, "--save_every", "0", "--output_dir", str(run)]


def read_run(run: Path, rows: int) -> dict:
    """Seconds by phase and tokens of a finished run, summed over its steps.

    Args:
        run: its folder.
        rows: completions per step.
    """
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    phases = {name: sum(line.get(f"time/{name}", 0.0) for line in lines) for name in ("sample", "update", "step")}
    return {
        **phases,
        "steps": len(lines),
        "tokens": round(sum(line["length"] for line in lines) * rows),
        "step_seconds": [line["time/step"] for line in lines],
    }


def time_update(algorithm: str, arguments: list[str], folder: Path, rounds: int) -> dict:
    """Seconds of updates on the completions of work.json: scores are read before, the learning rate is 0.

    Returns:
        seconds and CPU seconds of each, tokens of the completions, and the gradient's norm.
    """
    work = json.loads((folder / "work.json").read_text(encoding="utf-8"))
    with TemporaryDirectory() as run:
        zero = [
            "--learning_rate",
            "0",
            "--max_logprob_diff",
            "0",
            "--sampler",
            "transformers",
            "--output_dir",
            f"{run}/run",
        ]
        config = configure(algorithm, [*arguments, *zero])
        trainer = make_trainer(algorithm, config)
        trainer.current_step = 1
        completions = [Completion(ids, [0.0] * len(ids), False) for ids in work["completion_ids"]]
        texts = trainer.tokenizer.batch_decode(work["completion_ids"], skip_special_tokens=True)
        group = config.num_generations
        rollouts = Rollouts.from_completions(trainer.training_prompts(1), completions, texts, num_generations=group)
        scores = trainer.score(rollouts)
        if algorithm == "GRPO":
            advantages = group_relative(scores, group, scale_by_std=config.scale_by_std)
        else:
            advantages = leave_one_out(scores, group)
        rollouts.advantages = rollouts.spread(advantages)
        seconds, cpu = [], []
        for _ in range(rounds + 1):
            clock, used = time.perf_counter(), time.process_time()
            trainer.update(trainer.policy, rollouts, trainer.loss, average_over=config.average_over)
            seconds.append(time.perf_counter() - clock)
            cpu.append(time.process_time() - used)
            norm = trainer.metrics.reduce(trainer.accelerator)["policy/grad_norm"]
    return {
        "seconds": median(seconds[1:]),
        "cpu": median(cpu[1:]),
        "tokens": sum(map(len, work["completion_ids"])),
        "grad_norm": norm,
    }


if __name__ == "__main__":
    algorithm, folder, rounds, *arguments = sys.argv[1:]
    print(json.dumps(time_update(algorithm, arguments, Path(folder), int(rounds))))
