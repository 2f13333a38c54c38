"""Metrics of a step: global means, seconds and memory by phase, and the checks that run in every step.

The trainer and the algorithms decide which quantities exist; log.py writes them.
"""

import logging
import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.config import RLConfig

logger = logging.getLogger("nanorlhf")

GB = 2**30

Number = float | torch.Tensor


class StepMetrics:
    """Global means from the parts that each process and each micro-batch contributes.

    A mean over all rows or tokens is the sum of all totals divided by the sum of all counts, so every process counts
    by its number of rows, even with none. Tensors stay on their device until `reduce`.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Number] = {}
        self._counts: dict[str, Number] = {}
        self._sums: dict[str, Number] = {}
        self._maxima: dict[str, float] = {}
        self._minima: dict[str, float] = {}

    def add(self, name: str, total: Number, count: Number) -> None:
        """Adds this process's part of a mean: the sum over `count` real rows or tokens, never over padding."""
        self._totals[name] = self._totals.get(name, 0) + _as_scalar(total)
        self._counts[name] = self._counts.get(name, 0) + _as_scalar(count)

    def add_if_defined(self, name: str, value: float | None) -> None:
        """Adds a quantity that every process knows; None if it is not defined, which leaves it out of this step."""
        if value is not None:
            self.add(name, value, 1)

    def add_sum(self, name: str, total: Number) -> None:
        """Adds to a quantity whose global value is a sum, such as the number of tokens."""
        self._sums[name] = self._sums.get(name, 0) + _as_scalar(total)

    def add_max(self, name: str, value: float) -> None:
        """Adds a value of a quantity whose global value is the maximum, such as a memory peak."""
        self._maxima[name] = _highest(self._maxima.get(name, value), value)

    def add_min(self, name: str, value: float) -> None:
        """Adds a value of a quantity whose global value is the minimum."""
        self._minima[name] = _lowest(self._minima.get(name, value), value)

    def parts(self) -> list[dict[str, Number]]:
        """What this process has added since the last `reduce`, which `restore` takes."""
        return [dict(part) for part in (self._totals, self._counts, self._sums, self._maxima, self._minima)]

    def gather(self, accelerator: Accelerator) -> list[dict[str, float]]:
        """Brings what all processes have added to the main one, where `reduce` finds it; all must call it.

        Returns:
            Totals, counts, sums, maxima and minima by name, which `restore` takes.
        """
        parts = self._merged(accelerator)
        if accelerator.is_main_process:
            self.restore(parts)
        return parts

    def restore(self, parts: list[dict[str, float]]) -> None:
        """Goes on from what `parts` gave, or on the main process alone from what `gather` gave."""
        self._totals, self._counts, self._sums, self._maxima, self._minima = map(dict, parts)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The global values of everything added since the last call, in float64; every process gets the same.

        All processes must call it; the names they added may differ. A mean with count 0 is left out.
        """
        totals, counts, sums, maxima, minima = self._merged(accelerator)
        means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        return means | sums | maxima | minima

    def _merged(self, accelerator: Accelerator) -> list[dict[str, float]]:
        parts = (self._totals, self._counts, self._sums, self._maxima, self._minima)
        own = [_as_numbers(part) for part in parts]
        self._totals, self._counts, self._sums, self._maxima, self._minima = {}, {}, {}, {}, {}
        everyone = gather_object([own]) if accelerator.num_processes > 1 else [own]
        totals, counts, sums = (_merge([parts[kind] for parts in everyone], operator.add) for kind in range(3))
        maxima = _merge([parts[3] for parts in everyone], _highest)
        minima = _merge([parts[4] for parts in everyone], _lowest)
        return [totals, counts, sums, maxima, minima]


def _as_scalar(value: Number) -> Number:
    return value.detach().double().reshape(()) if isinstance(value, torch.Tensor) else value


def _highest(a: float, b: float) -> float:
    """The larger one; NaN if one is NaN, which Python's own max keeps or drops by their order."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _lowest(a: float, b: float) -> float:
    return -_highest(-a, -b)


def _as_numbers(values: dict[str, Number]) -> dict[str, float]:
    """The same with Python numbers; one transfer from each device."""
    numbers = dict(values)
    names_by_device = defaultdict(list)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            names_by_device[value.device].append(name)
    for names in names_by_device.values():
        numbers.update(zip(names, torch.stack([values[name] for name in names]).tolist(), strict=True))
    return numbers


def _merge(parts: list[dict[str, float]], combine: Callable[[float, float], float]) -> dict[str, float]:
    merged: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            merged[name] = combine(merged[name], value) if name in merged else value
    return merged


class Stopwatch:
    """Seconds, and on a GPU peak memory, by phase: `with stopwatch("sample"): ...`.

    The time of an inner phase does not count in the outer one, so the phases add up to the step, except for what runs
    in none of them. Only the phases of WHOLE include their inner phases: their sampling is no part of a step's own. A
    GPU is synchronised when a phase starts or ends.
    """

    WHOLE = frozenset({"eval", "value_init"})

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._running: list[str] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, float] = defaultdict(float)
        self._step_start = self._last_record = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block as `phase`: sample, score, logprobs, values, update, push, offload, save, one of WHOLE."""
        self._record()
        outer = self._running[-1] if self._running else None
        self._running.append(outer if outer in self.WHOLE else phase)
        try:
            yield
        finally:
            self._record()
            self._running.pop()

    @property
    def phase(self) -> str:
        """The innermost phase that runs now; empty if none does."""
        return next(iter(self._running[-1:]), "")

    def start_first_step(self) -> None:
        """Starts the first step. Loading is no part of it, but what prepared it is: the phases of WHOLE."""
        self._record()
        for kept in (self._seconds, self._peaks):
            for phase in kept.keys() - self.WHOLE:
                del kept[phase]
        self._step_start = self._last_record - sum(self._seconds.values())

    def read_and_reset(self) -> dict[str, float]:
        """time/<phase> of the step that ends now, time/step, and its memory as in `memory_report`.

        On a GPU also memory/<phase>_peak_gb: the peak within each phase, over all that is on the device.
        """
        self._record()
        report = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        report["time/step"] = self._last_record - self._step_start
        report |= memory_report(self._device)
        if self._device.type == "cuda":
            report |= {f"memory/{phase}_peak_gb": peak for phase, peak in self._peaks.items() if phase}
            report["memory/peak_gb"] = max(self._peaks.values())
        self._seconds.clear()
        self._peaks.clear()
        self._step_start = self._last_record
        return report

    def _record(self) -> None:
        """Adds the time since the last call to the innermost phase."""
        phase = self._running[-1] if self._running else ""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._peaks[phase] = max(self._peaks[phase], _take_device_peak(self._device))
        now = time.perf_counter()
        if phase:
            self._seconds[phase] += now - self._last_record
        self._last_record = now


def memory_report(device: torch.device | str) -> dict[str, float]:
    """Memory in GB of 2^30 bytes; on a GPU it resets the peak.

    Returns:
        memory/peak_gb: highest allocation on the device since the last call; on the CPU the process's highest resident
            memory so far.
        memory/host_gb: the process's resident memory now.
    """
    device = torch.device(device)
    # getrusage would include the peak of the process that launched this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident, highest = (int(status.partition(f"{name}:")[2].split()[0]) * 1024 / GB for name in ("VmRSS", "VmHWM"))
    peak = _take_device_peak(device) if device.type == "cuda" else highest
    return {"memory/peak_gb": peak, "memory/host_gb": resident}


def _take_device_peak(device: torch.device) -> float:
    peak = torch.cuda.max_memory_allocated(device) / GB
    torch.cuda.reset_peak_memory_stats(device)
    return peak


# Warnings for settings that were given but that the step does not use.
_UNUSED = {
    "kl_coef": "kl_coef=%s: %s.step uses neither the reference's log-probs nor token_rewards, so there is no KL. Use "
    "one of them in `step`, or pass --kl_coef 0.",
    "whiten_advantages": "whiten_advantages=%s: %s.step never calls maybe_whiten, so nothing is whitened. Call it in "
    "`step`, or pass --whiten_advantages false.",
}


def warn_of_unused_settings(config: RLConfig, used: Collection[str], *, algorithm: str) -> None:
    """Warn if a step did not use a setting that was given: the run is not what was asked for.

    Args:
        config: the run's.
        used: those of kl_coef and whiten_advantages that the step used.
        algorithm: name of its trainer.
    """
    for name, message in _UNUSED.items():
        if vars(config)[name] and name not in used:
            logger.warning(message, vars(config)[name], algorithm)


class SignalCheck:
    """Warns once, when the rewards of several steps in a row had nothing to teach, and once of refills in vain.

    Args:
        config: the run's.
        folder: the run's, for the message.
    """

    STEPS = 3
    FEW_GENERATIONS = 8  # with fewer, the completions of a hard or easy prompt often all have the same score
    LOW_TEMPERATURE = 0.5

    def __init__(self, config: RLConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._silent, self._in_vain = 0, 0  # steps in a row
        self._said: set[str] = set()

    def see(self, metrics: dict[str, float], *, step: int) -> None:
        """Take note of a finished step; the metrics of `rollout_means` are read, if they are there."""
        if "score_min" not in metrics:  # such as an evaluation before training
            return
        # Without zero_advantage, no completion is trained on.
        # Where refills replaced some of these groups, zero_advantage is that of what was trained on.
        replaced = metrics.get("refill/filled", 0) > 0
        is_equal = self._config.needs_score and self._all_equal(metrics)
        is_silent = (is_equal and not replaced) or metrics.get("zero_advantage", 1) == 1
        in_vain = metrics.get("refill/left_empty", 0) > 0 and not replaced
        self._silent = self._silent + 1 if is_silent else 0
        self._in_vain = self._in_vain + 1 if in_vain else 0
        if self._silent >= self.STEPS and "silent" not in self._said:
            self._say(f"{self._finding(metrics)}, so there was nothing to learn from the rewards", metrics, step)
            self._said.add("silent")
        elif self._in_vain >= self.STEPS and "in vain" not in self._said:
            self._say(
                "no group of equal scores could be replaced by that of another prompt. The steps went on with these "
                "groups, whose scores teach nothing",
                metrics,
                step,
            )
        if self._in_vain >= self.STEPS:
            self._said.add("in vain")

    def _say(self, finding: str, metrics: dict[str, float], step: int) -> None:
        causes = "\n".join(self._causes(metrics))
        logger.warning("steps %d to %d: %s. Likely causes:\n%s", step - self.STEPS + 1, step, finding, causes)

    def _all_equal(self, metrics: dict[str, float]) -> bool:
        """True if no prompt's completions differ in score, or no completions do."""
        several = self._config.completions_per_step > 1
        return metrics.get("equal_scores") == 1 or (several and metrics["score_min"] == metrics["score_max"])

    def _finding(self, metrics: dict[str, float]) -> str:
        if "zero_advantage" not in metrics:
            return "the length limit cut off all completions, and mask_truncated leaves them out"
        if metrics["score_min"] == metrics["score_max"]:
            return f"all completions had the score {metrics['score']:g}"
        if self._all_equal(metrics):
            return f"all completions of a prompt had the same score ({metrics['score']:g} on average over prompts)"
        return "no completion was better or worse than what it is compared with"

    def _causes(self, metrics: dict[str, float]) -> list[str]:
        config, causes = self._config, []
        if metrics.get("truncated", 0) > 0.5:
            share = f"{metrics['truncated']:.0%} of the completions were cut off"
            causes.append(f"* {share}: pass a larger --max_completion_length than {config.max_completion_length}")
        causes.append("* the prompts are too hard or too easy for this model: take others, or a stronger model")
        causes.append(f"* a reward that is constant: read some completions: python -m common.samples {self._folder}")
        if 1 < config.num_generations < self.FEW_GENERATIONS:
            causes.append(f"* few completions to compare: more than --num_generations {config.num_generations}")
        if config.temperature < self.LOW_TEMPERATURE:
            causes.append(f"* completions that are alike: a higher --temperature than {config.temperature:g}")
        if self._in_vain >= self.STEPS:
            causes.append(self._of_refills(metrics))
        return causes

    def _of_refills(self, metrics: dict[str, float]) -> str:
        """What refills found, and what to do about it."""
        if not metrics["refill/rounds"]:
            return (
                "* refills have no prompts but the step's own: fewer --prompts_per_step than "
                f"{self._config.prompts_per_step}, or more data"
            )
        return (
            f"* refills found no other prompt's group whose scores differ, in {metrics['refill/rounds']:g} rounds of "
            f"{metrics['refill/completions']:g} more completions: until a cause is removed, --refill_rounds 0 saves "
            "their time"
        )
