"""Our training and TRL's, in turns, each in a process of its own: `python -m benchmarks.against_trl`.

End to end is from the start of the process to the end of the last step, imports, loading and the sampler's start
included. The update alone is on the same completions, after one that is not timed. `--help` shows the options; what
follows -- are settings of our script, which TRL's are made from.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.against_trl.problems import write_problems
from benchmarks.against_trl.processes import Used, run
from benchmarks.timing import machine

ROOT = Path(__file__).parents[2]
MODULE = "benchmarks.against_trl"
ALGORITHMS = ("GRPO", "RLOO")
SAMPLERS = ("transformers", "vllm")
GENERATION = ("transformers", "continuous", "vllm")
# What --setup sets before the settings after --. "gsm8k" is for a pretrained model: LoRA, and the problems of a data
# set in the form of GSM8K. "given" sets nothing.
PROBLEMS = "problems.jsonl"
SETUPS = {
    "embedded": {"preset": "cpu"},
    "given": {},
    "gsm8k": {
        "preset": "cpu",
        "task": "gsm8k",
        "num_eval_prompts": 1,
        "prompts_per_step": 8,
        "num_generations": 8,
        "max_prompt_length": 384,
        "max_completion_length": 128,
        "average_over": "tokens",
        "kl_coef": 0,
        "use_lora": "true",
        "lora_r": 16,
        "lora_alpha": 16,
        "dtype": "float32",
        "gradient_checkpointing": "false",
        "samples_every": 0,
    },
}


def main() -> None:
    """Measure, write the numbers after each round, print the table."""
    options = _options()
    report: dict[str, Any] = {
        "command": " ".join(["python", "-m", MODULE, *sys.argv[1:]]),
        "machine": machine() | {"threads": options.threads},
        "end to end": [],
        "update": [],
    }
    with TemporaryDirectory() as folder:
        rounds = Rounds(options, Path(folder))
        rounds.prepare()
        for name, measure, count in (
            ("end to end", rounds.end_to_end, options.rounds),
            ("update", rounds.update, options.update_rounds),
        ):
            for number in range(count):
                report[name].append(measure())
                sides = {side: round(each["seconds"], 1) for side, each in report[name][-1].items()}
                print(f"{name}, round {number + 1} of {count}, s: {sides}", file=sys.stderr, flush=True)
                _write(report, options.out)
    print(table(report, rounds.rows))


def _write(report: dict[str, Any], file: Path | None) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


class Rounds:
    """One round of each side after the other, on the same work.

    Args:
        options: of the command line.
        folder: for the work, runs and logs.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._arguments = ["--model", options.model, "--num_steps", str(options.steps)]
        for name, value in SETUPS[options.setup].items():
            self._arguments += [f"--{name}", str(value)]
        if options.setup == "gsm8k":
            data = options.dataset.resolve() if options.dataset else self._folder / PROBLEMS
            self._arguments += ["--dataset", str(data)]
        self._arguments += options.settings
        self._environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(options.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.rows = 0

    def prepare(self) -> None:
        """Make the model where it is missing, the prompts and the completions."""
        if self._options.setup == "gsm8k" and not self._options.dataset:
            write_problems(self._folder / PROBLEMS, 200)
        completions = "with" if self._options.update_rounds else "without"
        self._python(f"{MODULE}.work", self._options.algorithm, str(self._folder), completions, *self._arguments)
        settings = json.loads((self._folder / "settings.json").read_text(encoding="utf-8"))
        self.rows = settings["prompts_per_step"] * settings["num_generations"]

    def end_to_end(self) -> dict[str, dict[str, Any]]:
        """Both sides from start to end: what each used, its phases and tokens."""
        from benchmarks.against_trl import own  # imports torch, which the processes to time must do themselves

        place = self._folder / f"run-{time.monotonic_ns()}"
        command = own.command(self._options.algorithm, [*self._arguments, "--sampler", self._options.sampler], place)
        used = self._run(command)
        ours = used.as_dict() | own.read_run(place, self.rows)
        used, printed = self._theirs(replay=0)
        return {"ours": ours, "trl": printed | used.as_dict()}

    def update(self) -> dict[str, dict[str, Any]]:
        """Updates of both sides on the same completions."""
        count = self._options.updates
        own = self._python(f"{MODULE}.own", self._options.algorithm, str(self._folder), str(count), *self._arguments)
        used, printed = self._theirs(replay=count)
        theirs = {"seconds": printed["update"], "cpu": printed["update cpu"], "grad_norm": printed["grad_norm"]}
        return {
            "ours": json.loads(own[1].splitlines()[-1]) | {"peak_gb": own[0].peak_gb},
            "trl": theirs | {"tokens": printed["tokens"], "peak_gb": used.peak_gb},
        }

    def _theirs(self, *, replay: int) -> tuple[Used, dict[str, Any]]:
        choices = {"batch": self._options.trl_batch, "generation": self._options.trl_generation, "replay": replay}
        arguments = [self._options.algorithm, str(self._folder), json.dumps(choices)]
        used, printed = self._python(f"{MODULE}.theirs", *arguments)
        return used, json.loads(printed.splitlines()[-1])

    def _python(self, module: str, *arguments: str) -> tuple[Used, str]:
        return run([sys.executable, "-m", module, *arguments], self._environment, self._folder / "log")

    def _run(self, command: list[str]) -> Used:
        return run(command, self._environment, self._folder / "log")[0]


def table(report: dict[str, Any], rows: int) -> str:
    """The results as a Markdown table: medians of the rounds, and the median, lowest and highest ratio."""
    lines = ["| | ours | TRL | TRL / ours | lowest to highest |", "|---|---|---|---|---|"]

    def add(name: str, rounds: list[dict], value: Any, digits: int) -> None:
        pairs = [(value(each["ours"]), value(each["trl"])) for each in rounds]
        if not pairs:
            return
        ratios = sorted(theirs / own for own, theirs in pairs)
        own, theirs = (median(pair[side] for pair in pairs) for side in (0, 1))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        lines.append(f"| {name} | {own:.{digits}f} | {theirs:.{digits}f} | {median(ratios):.2f} | {spread} |")

    whole, update = report["end to end"], report["update"]
    add("end to end, s", whole, lambda side: side["seconds"], 1)
    add("end to end, CPU s", whole, lambda side: side["cpu"], 1)
    add("ms per completion, steps alone", whole, lambda side: 1e3 * side["step"] / rows / len(side["step_seconds"]), 1)
    add("ms per token, steps alone", whole, lambda side: 1e3 * side["step"] / side["tokens"], 2)
    add("CPU ms per token, end to end", whole, lambda side: 1e3 * side["cpu"] / side["tokens"], 2)
    add("ms per token, sampling", whole, lambda side: 1e3 * side["sample"] / side["tokens"], 3)
    add("ms per token, update", whole, lambda side: 1e3 * side["update"] / side["tokens"], 3)
    add("completion tokens", whole, lambda side: side["tokens"], 0)
    add("peak memory, GB", whole, lambda side: side["peak_gb"], 2)
    add("update alone, s", update, lambda side: side["seconds"], 2)
    add("update alone, CPU s", update, lambda side: side["cpu"], 2)
    add("update alone, peak memory, GB", update, lambda side: side["peak_gb"], 2)
    add("gradient's norm", update, lambda side: side["grad_norm"], 4)
    place = report["machine"]
    lines += ["", f"{place['cpu']}, {place['threads']} threads, load {place['load_average']:.1f}"]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, a folder or a hub id (default: tiny)")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="GRPO")
    parser.add_argument(
        "--setup",
        choices=SETUPS,
        default="embedded",
        help="gsm8k: for a pretrained model, with LoRA; given: only what follows --",
    )
    parser.add_argument("--dataset", type=Path, help="records of GSM8K for --setup gsm8k (default: made-up problems)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a run end to end (default: 3)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side end to end (default: 3)")
    parser.add_argument("--update-rounds", type=int, default=1, help="processes of each side (default: 1)")
    parser.add_argument("--updates", type=int, default=5, help="timed updates in each of them (default: 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of PyTorch (default: all)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="ours (default: transformers)")
    parser.add_argument("--trl-generation", choices=GENERATION, default="transformers", help="TRL's sampler")
    parser.add_argument("--trl-batch", type=int, default=64, help="rows of a forward pass of TRL (default: 64)")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("settings", nargs="*", help="after --: settings of our script")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)} ended with {error.returncode}:\n{error.stderr}")
