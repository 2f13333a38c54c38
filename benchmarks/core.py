"""Speed and memory of the core, as ratios to the bare work: `python -m benchmarks.core`, `--help` for more.

Generation against direct calls of vLLM and the update against a bare forward and backward, both in turns within one
process; peak memory; skewed lengths with and without the token budget; and where the time of a real run's steps goes.
Nothing is tested here: slowness may come from other users of the machine.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.generation import compare_generation
from benchmarks.memory import compare_memory
from benchmarks.phases import split_of_step
from benchmarks.shapes import SHAPES, save_shape
from benchmarks.timing import CLOCKS, machine
from benchmarks.updates import BareLoop, budget_microbatches, compare_batching, compare_update, sampled_rollouts
from common.cli import parse_config, run_script
from common.embedded import resolve_model
from GRPO.grpo import EMBEDDED, SETTINGS
from GRPO.grpo_trainer import GRPOTrainer

PARTS = ("phases", "generation", "update", "skewed", "memory")


def main() -> None:
    """Measure, write the numbers, print the table."""
    options = _options()
    with TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    report = {
        "command": " ".join(["python", "-m", "benchmarks.core", *sys.argv[1:]]),
        "machine": machine(),
        **results,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))


def measure(options: argparse.Namespace, folder: Path) -> dict:
    """Do all measurements.

    Args:
        options: of the command line.
        folder: for temporary models and runs.
    """
    arguments = _arguments(options, _model(options, folder))
    config = parse_config(SETTINGS, embedded=EMBEDDED, args=arguments)
    config.learning_rate = 0.0  # every round starts from the same weights
    config.output_dir = str(folder / "run")
    parts, results = options.parts, {}
    if "phases" in parts:
        results["phases"] = split_of_step(arguments, folder / "phases")
    trainer = GRPOTrainer(config)
    trainer.current_step = 1
    turns = {"rounds": options.rounds, "clock": CLOCKS[options.clock]}
    rollouts = sampled_rollouts(trainer)
    if "generation" in parts:
        results["generation"] = compare_generation(trainer, **turns)
    bare = BareLoop(config)
    if "update" in parts:
        results["update"] = compare_update(trainer, bare, rollouts, **turns)
    if "skewed" in parts:
        results["skewed"] = compare_batching(trainer, bare, **turns)
    microbatches = [microbatch.to("cpu") for microbatch in budget_microbatches(trainer, rollouts)]
    del trainer, bare  # the next processes need their memory
    if "memory" in parts:
        results["memory"] = compare_memory(config, rollouts, microbatches)
    return results


def table(report: dict) -> str:
    """The results as a short table.

    Args:
        report: as written to the file.
    """
    ratios = {
        "generation / bare vLLM": report.get("generation"),
        "update / bare loop": report.get("update"),
        "skewed: update / fixed rows": report.get("skewed", {}).get("update"),
        "skewed: token budget / fixed rows": report.get("skewed", {}).get("batching"),
    }
    lines = [f"{'':34} {'tokens/s':>10} {'against':>10} {'ratio':>6}   lowest to highest round"]
    for name, part in ((name, part) for name, part in ratios.items() if part):
        own, other, ratio = part["tokens_per_second"][part["of"]], part["tokens_per_second"][part["to"]], part["ratio"]
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        lines.append(f"{name:34} {own:10.0f} {other:10.0f} {ratio['median']:6.2f}   {spread}")
    if memory := report.get("memory"):
        own, other = memory["update"], memory["bare"]
        lines.append(
            f"memory of an update, GB: {own['growth']:.2f}, bare loop {other['growth']:.2f}, ratio "
            f"{memory['ratio']:.2f} (peaks {own['peak']:.2f} and {other['peak']:.2f})"
        )
    if phases := report.get("phases"):
        shares = ", ".join(f"{name} {share:.1%}" for name, share in phases["median_share"].items())
        lines.append(f"a step takes {phases['seconds_per_step']:.2f} s: {shares}")
    machine = report["machine"]
    lines.append(
        f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"load {machine['load_average']:.1f}"
    )
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.core", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="tiny", help="tiny, a folder or a hub id (default: tiny)")
    which.add_argument("--shape", choices=SHAPES, help="random weights, mini or in the size of Qwen2.5-0.5B or -1.5B")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of forward passes")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed (default: 5)")
    parser.add_argument("--completion-length", type=int, default=240, help="longest completion (default: 240)")
    parser.add_argument("--tokens", type=int, default=8192, help="padded tokens of a micro-batch (default: 8192)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of the seconds; cpu suits a busy machine")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("settings", nargs="*", help="after --: settings of grpo.py, such as --use_lora true")
    options = parser.parse_args()
    if options.rounds < 1:
        raise ValueError(f"rounds={options.rounds}: need at least one to take a median of. Pass --rounds 5.")
    return options


def _model(options: argparse.Namespace, folder: Path) -> str:
    """The value of `model`; a folder as absolute path, since the script runs in another folder."""
    if options.shape:
        return str(save_shape(options.shape, folder / "model"))
    resolve_model(options.model)  # fails at once if there is no such model
    return str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model


def _arguments(options: argparse.Namespace, model: str) -> list[str]:
    """The embedded default's settings with another model, as on the command line of grpo.py."""
    settings = {
        "preset": "cpu",
        "model": model,
        "task": "countdown",  # made on the spot
        "kl_coef": 0,  # the bare loop has no reference
        "dtype": options.dtype,
        "max_completion_length": options.completion_length,
        "max_tokens_per_microbatch": options.tokens,
        # The embedded tokenizer needs 16 tokens for a prompt, others need more.
        "max_prompt_length": 16 if options.shape or options.model == "tiny" else 256,
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))] + options.settings


if __name__ == "__main__":
    run_script(main)
