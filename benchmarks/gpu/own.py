"""A run of ours with its memory read many times a second: `python -m benchmarks.gpu.own OUT SETTINGS` is its process.

On a GPU it is the memory in use on the whole device, so nobody else may use it; without one, the process's resident
memory. What torch keeps for later tensors counts, as it does for everybody else on the device.
"""

import json
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from common.cli import parse_config
from common.memory.plan import Plan
from common.runs.log import METRICS_FILE
from GRPO.grpo import EMBEDDED, SETTINGS
from GRPO.grpo_trainer import GRPOTrainer

PAUSE = 0.01
# The phase of the stopwatch for each phase of a plan, which also says of which model. While the run prepares, the
# stopwatch names none.
PHASES = {"load": "load", "push": "push", "sample": "sample", "score": "score", "update": "update"}
PHASES |= {"log-probs": "logprobs", "values": "values"}


@dataclass
class Watch(threading.Thread):
    """Reads the memory in use until it is left.

    Attributes:
        trainer: once it is there, it says which phase runs.
        peaks: bytes by phase.
    """

    trainer: GRPOTrainer | None = None
    peaks: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._ends = threading.Event()

    __hash__ = threading.Thread.__hash__

    def __enter__(self) -> Self:
        """Begin."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._ends.set()
        self.join()

    def run(self) -> None:
        """Read, and wait."""
        while not self._ends.wait(PAUSE):
            phase = "load" if self.trainer is None else self.trainer.stopwatch.phase
            self.peaks[phase] = max(self.peaks[phase], in_use())


def in_use() -> int:
    """Bytes of the device that anybody uses; without a GPU, of this process."""
    if not torch.cuda.is_available():
        return psutil.Process().memory_info().rss
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(arguments: list[str]) -> dict[str, Any]:
    """Train, and say what that took.

    Args:
        arguments: settings as on the command line of grpo.py.

    Returns:
        Seconds of loading, of the steps and of their phases; prompts, tokens; memory by phase, planned and measured.
    """
    config = parse_config(SETTINGS, embedded=EMBEDDED, args=arguments)
    start = time.perf_counter()
    with Watch() as watch:
        trainer = GRPOTrainer(config)
        loaded = time.perf_counter() - start
        watch.trainer = trainer
        trainer.train()
    lines = (Path(trainer.run.folder) / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    seconds = defaultdict(float)
    for step in steps:
        for name, value in step.items():
            if name.startswith("time/"):
                seconds[name.removeprefix("time/")] += value
    prompts = config.prompts_per_step * len(steps)
    return {
        "seconds_of_loading": loaded,
        "seconds": seconds,
        "prompts": prompts,
        "tokens": steps[-1]["tokens"],
        "seconds_per_prompt": seconds["step"] / prompts,
        "switching": (seconds["push"] + seconds["offload"]) / seconds["step"],
        "memory": memory(trainer.plan, watch.peaks),
        "torch_gb": {name: value for name, value in steps[-1].items() if name.startswith("memory/")},
    }


def memory(plan: Plan, peaks: dict[str, int]) -> list[dict[str, Any]]:
    """Planned and measured bytes of the phases of a step; where several models share a phase, the largest plan."""
    planned: dict[str, int] = defaultdict(int)
    for phase in plan.phases:
        name = PHASES[phase.name.partition(",")[0]]
        planned[name] = max(planned[name], phase.on_host if plan.card.kind == "cpu" else phase.on_device)
    return [
        {"phase": name, "planned": size, "measured": peaks[name], "ratio": peaks[name] / size}
        for name, size in planned.items()
        if name in peaks
    ]


if __name__ == "__main__":
    out, *arguments = sys.argv[1:]
    Path(out).write_text(json.dumps(measure(arguments)), encoding="utf-8")
