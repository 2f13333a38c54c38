"""What only a GPU can show, in less than nine minutes: `python -m benchmarks.gpu`, `--help` for more.

A step of GRPO with LoRA at Qwen2.5-1.5B's sizes (random weights, so completions are as long as allowed): seconds per
prompt, the share of pushes and moves, and the memory of each phase against the plan. Then the same training by TRL,
with vLLM in its process too. What there is no time for is left out and named. Without a GPU it runs as well, to try:
`--shape mini --prompts 4 --length 16 --trl-prompts 2`.

With `--recipe NAME` it runs some steps of a recipe of docs/recipes.md instead, in `--minutes`, and keeps what they
took for that page. To try it without a GPU: `--recipe countdown-3b --weights random --shape mini --sampler
transformers --prompts 2 --length 16 --minutes 3`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.estimates import row
from benchmarks.gpu import recipe
from benchmarks.recipes import RECIPES
from benchmarks.shapes import SHAPES, save_shape
from benchmarks.timing import machine

ROOT = Path(__file__).parents[2]
RESULTS = Path("benchmarks/results")
# The embedded tokenizer needs no more for a problem of Countdown.
PROMPT_LENGTH = 16


def main() -> None:
    """Measure, write the numbers, print them."""
    options = _options()
    if options.recipe:
        sys.exit(_recipe(options))
    ends = time.monotonic() + options.seconds
    report: dict[str, Any] = {"command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])}
    report |= {"machine": machine(), "shape": options.shape, "left_out": {}}
    out = options.out or RESULTS / f"gpu-{options.shape}.json"
    with TemporaryDirectory() as folder:
        model = save_shape(options.shape, Path(folder) / "model")
        parts = {"own": _own, "against_trl": _against_trl}
        for name, part in parts.items():
            if name == "against_trl" and not options.trl_prompts:
                continue
            try:
                report[name] = part(options, model, Path(folder), ends - time.monotonic())
            except subprocess.TimeoutExpired:
                report["left_out"][name] = f"more than {options.seconds} seconds"
            except subprocess.CalledProcessError as error:
                report["left_out"][name] = error.stderr.strip().splitlines()[-1]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(text(report))
    print(f"all numbers: {out}")


def _recipe(options: argparse.Namespace) -> int:
    """Measure a recipe, keep it if it was on a GPU or a file is named, and print it; gives the status."""
    with TemporaryDirectory() as folder:
        try:
            found = recipe.measure(options, Path(folder))
        except ValueError as error:
            return _say(f"error: {error}")
        except subprocess.TimeoutExpired:
            return _say(f"no step ended within {options.minutes:g} minutes; pass more --minutes or fewer --prompts")
        except subprocess.CalledProcessError as error:
            return _say(f"the script ended with status {error.returncode}:\n{error.stderr}")
    print(recipe.text(found))
    if not found["gpu"]:
        print("\nno line for docs/recipes.md: there was no GPU")
    elif found["rates"]:
        print(f"\nthe line of docs/recipes.md:\n{row(found['recipe'], found['gigabytes'], found['rates'], [found])}")
    else:
        print("\nno line for docs/recipes.md: how fast this card could be is not known; name one like it with --card")
    if path := options.out or (found["gpu"] and recipe.MEASURED):
        recipe.keep(found, path)
        print(f"kept in {path}; python -m tools.recipes writes the page")
    return 0


def _say(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


def settings(options: argparse.Namespace, model: Path, prompts: int) -> list[str]:
    """Settings of our script, which TRL's are made from."""
    chosen = {
        "model": model,
        "task": "countdown",
        "num_eval_prompts": 1,
        "prompts_per_step": prompts,
        "num_generations": options.generations,
        "max_prompt_length": PROMPT_LENGTH,
        "max_completion_length": options.length,
        "average_over": "tokens",
        "kl_coef": 0,
        "use_lora": "true",
        "max_tokens_per_microbatch": "auto",
        "vllm_memory_share": "auto",
        "sampler": options.sampler,
        "samples_every": 0,
    }
    return [word for name, value in chosen.items() for word in (f"--{name}", str(value))]


def _own(options: argparse.Namespace, model: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Our steps with one completion of each group kept."""
    out = folder / "own.json"
    arguments = settings(options, model, options.prompts)
    arguments += ["--num_steps", str(options.steps), "--keep_per_group", "true", "--eval_every", "0"]
    arguments += ["--save_every", "0", "--progress", "false", "--output_dir", str(folder / "run")]
    _run(["benchmarks.gpu.own", str(out), *arguments], seconds)
    return json.loads(out.read_text(encoding="utf-8"))


def _against_trl(options: argparse.Namespace, model: Path, folder: Path, seconds: float) -> dict[str, Any]:
    """Ours and TRL's on the same prompts, every completion trained on."""
    out = folder / "trl.json"
    sampler = "vllm" if options.sampler == "vllm" else "transformers"
    command = ["benchmarks.against_trl", "--model", str(model), "--setup", "given", "--rounds", "1"]
    command += ["--steps", str(options.trl_steps), "--update-rounds", "0", "--trl-batch", str(options.trl_batch)]
    command += ["--sampler", sampler, "--trl-generation", sampler, "--out", str(out)]
    _run([*command, "--", *settings(options, model, options.trl_prompts)], seconds)
    return json.loads(out.read_text(encoding="utf-8"))["end to end"][0]


def _run(arguments: list[str], seconds: float) -> None:
    """Run a module to its end; when the time is up, nothing that it started stays on the GPU."""
    command = [sys.executable, "-m", *arguments]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams) as process:
        try:
            _, errors = process.communicate(timeout=max(seconds, 1))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=errors or "no message")


def text(report: dict[str, Any]) -> str:
    """The numbers in words."""
    place, lines = report["machine"], []
    lines.append(f"{report['shape']} on {place['gpu'] or place['cpu']}, {place['cores']} cores")
    if own := report.get("own"):
        phases = ", ".join(f"{name} {value:.1f} s" for name, value in own["seconds"].items() if name != "step")
        work = f"{own['prompts']} prompts, {own['tokens']} tokens"
        lines.append(f"{own['seconds_per_prompt']:.3f} s per prompt ({work}): {phases}")
        lines.append(f"pushes and moves {own['switching']:.1%} of a step; loading {own['seconds_of_loading']:.0f} s")
        lines += ["", "| phase | planned, GB | measured, GB | measured / planned |", "|---|---|---|---|"]
        for row in own["memory"]:
            amounts = f"{row['planned'] / 1e9:.2f} | {row['measured'] / 1e9:.2f}"
            lines.append(f"| {row['phase']} | {amounts} | {row['ratio']:.2f} |")
        lines.append("")
    if both := report.get("against_trl"):
        per_token = {side: 1e3 * each["step"] / each["tokens"] for side, each in both.items()}
        ratio = per_token["trl"] / per_token["ours"]
        lines.append(f"ms per token: ours {per_token['ours']:.3f}, TRL {per_token['trl']:.3f}, ratio {ratio:.2f}")
    lines += [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, help="sizes of the model (default: 1.5b, or the recipe's)")
    parser.add_argument("--prompts", type=int, help="prompts of a step (default: 512, or the recipe's)")
    parser.add_argument("--generations", type=int, default=4, help="completions of a prompt (default: 4)")
    parser.add_argument("--length", type=int, help="longest completion (default: 1500, or what the recipe assumes)")
    parser.add_argument("--steps", type=int, default=1, help="steps (default: 1)")
    parser.add_argument("--trl-prompts", type=int, default=64, help="prompts of a step beside TRL; 0: without it")
    parser.add_argument("--trl-steps", type=int, default=2, help="steps beside TRL (default: 2)")
    parser.add_argument("--trl-batch", type=int, default=16, help="rows of a forward pass of TRL (default: 16)")
    parser.add_argument("--sampler", choices=("vllm", "transformers"), help="of both (default: vllm)")
    parser.add_argument("--seconds", type=float, default=530, help="time limit for everything (default: 530)")
    parser.add_argument("--out", type=Path, help=f"JSON file for all numbers (default: {RESULTS}/gpu-SHAPE.json)")
    only = parser.add_argument_group("a recipe", "instead of all that: some steps of its script")
    only.add_argument("--recipe", choices=RECIPES, help="of docs/recipes.md")
    only.add_argument("--minutes", type=float, default=10, help="for all of it, downloads too (default: 10)")
    only.add_argument("--weights", choices=("hub", "random"), default="hub", help="of the model (default: hub)")
    only.add_argument("--card", help="whose rates are computed with, such as h100 (default: the one that is there)")
    options = parser.parse_args()
    if options.recipe and options.weights == "hub" and (options.shape or options.length):
        parser.error("--shape and --length are for random weights: with a recipe, pass --weights random too")
    if not options.recipe:
        options.shape, options.sampler = options.shape or "1.5b", options.sampler or "vllm"
        options.prompts, options.length = options.prompts or 512, options.length or 1500
    return options


if __name__ == "__main__":
    main()
