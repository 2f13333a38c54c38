"""A few steps of a recipe of docs/recipes.md, by its own script: seconds by phase beside the computed ones.

With `--weights random` the model has the recipe's sizes and no data or reward model is downloaded: every completion
then is as long as docs/recipes.md assumes, since random weights never end one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.gpu.stand_in import write_prompts
from benchmarks.recipes import MEASURED, RECIPES, ROOT, Planned, measured, planned
from benchmarks.shapes import save_shape
from common.cli import as_arguments
from common.memory.cards import GB, card, rated_name, rates
from common.memory.seconds import Part, Tokens, step_seconds
from common.runs.log import METRICS_FILE

# Steps that are measured, after a first one, in which memory is reserved and kernels are chosen.
STEPS = 4
# Seconds for random weights, the start of vLLM and loading; they count against the minutes, as downloads do.
START = 180
# Ids below it are tokens of any model.
VOCABULARY = 100
# The sizes that the page has.
SIZES = (24, 40, 80)
# A run that is measured writes and evaluates nothing.
QUIET = {"eval_every": 0, "save_every": 0, "samples_every": 0, "progress": False}
# Settings that the recipe's model, data and rewards bring, and those that decide where a run is.
NOT_GIVEN = ("preset", "output_dir", "resume", "model", "task", "dataset", "rewards", "reward_weights", "push_to_hub")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where it runs.

    Attributes:
        gpu: its name; None without one.
        rated: the card whose rates are computed with, as `rated_name` gives it; None if they are not known.
        gigabytes: of the page's sizes, the one that it stands for.
    """

    gpu: str | None
    rated: str | None
    gigabytes: int

    @classmethod
    def here(cls, name: str | None) -> "Place":
        """This machine.

        Args:
            name: of the card whose rates count; None: that of the driver.

        Raises:
            ValueError: the card that was named is not known.
        """
        rated = name and rated_name(name)
        if not torch.cuda.is_available():
            return cls(gpu=None, rated=rated, gigabytes=_size(card(rated).total) if rated else SIZES[0])
        # In a process of its own: asking makes a context, which would take memory that the recipe is planned with.
        code = "import torch; found = torch.cuda.get_device_properties(0); print(found.total_memory, found.name)"
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        total, _, gpu = asked.stdout.strip().partition(" ")
        with suppress(ValueError):  # a card without known rates is measured all the same
            rated = rated or rated_name(gpu)
        return cls(gpu=gpu, rated=rated, gigabytes=_size(int(total)))


def _size(total: int) -> int:
    """The largest of the page's sizes that a card has."""
    return max((each for each in SIZES if each * GB <= total), default=SIZES[0])


def measure(options: Namespace, folder: Path) -> dict[str, Any]:
    """Run some steps of a recipe.

    Args:
        options: of the command line: recipe, minutes, weights, card, prompts, length, shape and sampler.
        folder: for the model, the prompts and the run.

    Returns:
        What benchmarks/results/recipes.json keeps of it, and beside it the computed seconds by phase.

    Raises:
        subprocess.CalledProcessError: the script ended with an error.
        subprocess.TimeoutExpired: no step ended in time.
    """
    ends = time.monotonic() + 60 * options.minutes
    place = Place.here(options.card)
    found = planned(options.recipe, place.gigabytes)
    prompts = options.prompts or _prompts(found, place, 60 * options.minutes)
    command = _command(options, found, prompts, folder)
    lines = _run(command, ROOT / found.recipe.folder, folder / "run", ends)
    steps = lines[1:] or lines
    length = mean(each["length"] for each in steps)
    longest = found.config.max_completion_length if options.weights == "hub" else round(length)
    tokens = replace(found.recipe.tokens(found.config), prompts=prompts, completion=length, longest=longest)
    return {
        "recipe": options.recipe,
        "gpu": place.gpu,
        "rates": place.rated,
        "gigabytes": place.gigabytes,
        "weights": options.weights,
        "shape": options.shape or found.recipe.shape,
        "command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "day": datetime.now(UTC).date().isoformat(),
        "prompts": prompts,
        "steps": len(steps),
        "length": length,
        "seconds": _seconds(steps),
        "memory_gb": {name: max(each[name] for each in steps) for name in steps[0] if name.endswith("_gb")},
        "planned_gb": found.plan.peak.on_device / GB,
        "computed": {name: part.seconds for name, part in _computed(found, place, tokens).items()},
    }


def _computed(found: Planned, place: Place, tokens: Tokens) -> dict[str, Part]:
    if place.rated is None:
        return {}
    return step_seconds(found.config, found.plan, rates(place.rated), tokens)


def _prompts(found: Planned, place: Place, seconds: float) -> int:
    """Prompts of a step, fewer than the recipe's where so many steps would take longer than there is time."""
    tokens = found.recipe.tokens(found.config)
    step = sum(part.seconds for part in _computed(found, place, tokens).values())
    part = min(1, (seconds - START) / (STEPS + 1) / step) if step else 1
    return max(round(part * tokens.prompts), 1)


def _seconds(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each phase."""
    names = dict.fromkeys(name for each in steps for name in each if name.startswith("time/"))
    return {name.removeprefix("time/"): mean(each.get(name, 0) for each in steps) for name in names}


def _command(options: Namespace, found: Planned, prompts: int, folder: Path) -> list[str]:
    """The recipe's own command, with fewer prompts if need be; with random weights, all of its settings by name."""
    recipe, config = found.recipe, found.config
    chosen = {"prompts_per_step": prompts, "output_dir": str(folder / "run"), **QUIET}
    if options.sampler:
        chosen["sampler"] = options.sampler
    start = [sys.executable, recipe.script]
    if options.weights == "hub":
        return [*start, *recipe.words, *found.more, *as_arguments(chosen)]
    shape = options.shape or recipe.shape.lower()
    # Random weights end no completion, so all are as long as is allowed: as long as the page assumes.
    length = options.length or recipe.completion
    room = max(config.max_prompt_length, 2 * recipe.prompt)
    data = write_prompts(folder / "prompts.jsonl", tokens=recipe.prompt, vocabulary=VOCABULARY)
    given = {name: value for name, value in asdict(config).items() if name not in NOT_GIVEN}
    given |= {"max_completion_length": length, "max_prompt_length": room, "num_eval_prompts": 1}
    given |= {"model": str(save_shape(shape, folder / "model")), "task": "prompts", "dataset": str(data)}
    given |= {"rewards": [f"{ROOT / 'benchmarks' / 'gpu' / 'stand_in.py'}:score"]} | chosen
    return [*start, "--preset", "none", *as_arguments(given)]


def _run(command: list[str], where: Path, run: Path, ends: float) -> list[dict[str, float]]:
    """Run a script until enough steps are done or the time is up; nothing of it stays on the GPU."""
    log = run.parent / "output.txt"
    with (
        log.open("w", encoding="utf-8") as output,
        subprocess.Popen(command, cwd=where, start_new_session=True, stdout=output, stderr=output) as process,
    ):
        try:
            while process.poll() is None and time.monotonic() < ends and len(_steps(run)) <= STEPS:
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if found := _steps(run):
        return found
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if time.monotonic() >= ends:
        raise subprocess.TimeoutExpired(command, 0, output="\n".join(said[-3:]) or "nothing")
    raise subprocess.CalledProcessError(process.returncode, command, stderr="\n".join(said[-12:]) or "no message")


def _steps(run: Path) -> list[dict[str, float]]:
    """Lines of finished steps; the last line may be half written."""
    path = run / METRICS_FILE
    whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [line for line in map(json.loads, whole) if line["step"] > 0]


def keep(found: dict[str, Any], path: Path = MEASURED) -> None:
    """Add a measurement to those that are there."""
    rows = [*(measured() if path == MEASURED else []), found]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def text(found: dict[str, Any]) -> str:
    """The numbers in words, and the line for docs/recipes.md."""
    recipe, seconds, computed = RECIPES[found["recipe"]], found["seconds"], found["computed"]
    where = found["gpu"] or "the CPU"
    lines = [f"{found['recipe']} ({recipe.title}) on {where}, {found['weights']} weights of {found['shape']}"]
    lines.append(f"{found['steps']} steps of {found['prompts']} prompts, completions of {found['length']:.0f} tokens")
    lines += ["", "| phase | computed, s | measured, s | measured / computed |", "|---|---|---|---|"]
    names = [*computed, *(name for name in seconds if name not in (*computed, "step", "eval", "save"))]
    pairs = [(name, computed.get(name), seconds.get(name, 0)) for name in names]
    for name, expected, took in [*pairs, ("step", sum(computed.values()), seconds["step"])]:
        compared = f"{expected:.1f} | {took:.1f} | {took / expected:.2f}" if expected else f"| {took:.1f} |"
        lines.append(f"| {name} | {compared} |")
    peaks = ", ".join(f"{name.removeprefix('memory/')} {value:.1f}" for name, value in found["memory_gb"].items())
    lines += ["", f"memory of torch in GiB: {peaks}"]
    lines.append(f"the plan's most on a card of {found['gigabytes']} GB, vLLM included: {found['planned_gb']:.1f} GB")
    return "\n".join(lines)
