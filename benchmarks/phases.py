"""Where the time of a step goes, from the metrics.jsonl of a short run of the real script."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from common.runs.log import METRICS_FILE

ROOT = Path(__file__).parent.parent
NUM_STEPS = 8
# The first step creates the optimizer's state and warms up every library.
FIRST_STEP = 2


def split_of_step(arguments: list[str], folder: Path) -> dict:
    """Run `python grpo.py` and split the time of its steps by phase.

    Args:
        arguments: settings as on the command line.
        folder: the run's, which creates it.

    Returns:
        The command, seconds of the median step, and the median over steps of each phase's share of its step; rest is
        the time outside all phases.

    Raises:
        RuntimeError: if the run fails.
    """
    short = ["--num_steps", str(NUM_STEPS), "--eval_every", "0", "--save_every", "4", "--progress", "false"]
    command = [sys.executable, "grpo.py", *arguments, *short, "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT / "GRPO", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    fractions = defaultdict(list)
    steps = [line for line in lines if line["step"] >= FIRST_STEP]
    for line in steps:
        seconds = {key.removeprefix("time/"): value for key, value in line.items() if key.startswith("time/")}
        step = seconds.pop("step")
        for phase, value in seconds.items():
            fractions[phase].append(value / step)
        fractions["rest"].append(1 - sum(seconds.values()) / step)
    return {
        "command": " ".join(["python", *command[1:]]).replace(str(folder.parent), "FOLDER"),
        "steps": len(steps),
        "seconds_per_step": median(line["time/step"] for line in steps),
        "median_share": {phase: median(values) for phase, values in fractions.items()},
        "highest_share": {phase: max(values) for phase, values in fractions.items()},
    }
