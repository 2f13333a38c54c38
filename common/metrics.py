"""What a run measures and where it says so: global means, time and memory, the files of a run, the progress line.

Which quantities exist is the trainer's and the algorithms' business; the curves are drawn in `common/plots.py`.
"""

import json
import math
import netrc
import operator
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, gather_object
from tqdm import tqdm

from common.checkpoints import write_file

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
GB = 2**30
LEADING_KEYS = ("episodes", "tokens", "score")  # after the step the first in a line of metrics.jsonl, for its readers

Number = float | torch.Tensor


class MetricShares:
    """Global means from the part that each process and each micro-batch contributes.

    A mean over all rows or tokens is the sum of all totals over the sum of all counts, so a process without rows, or
    with fewer of them, counts for exactly what it has. Tensors stay on their device until `reduce`.
    """

    def __init__(self) -> None:
        self._totals: dict[str, Number] = {}
        self._counts: dict[str, Number] = {}
        self._sums: dict[str, Number] = {}
        self._maxima: dict[str, float] = {}

    def add(self, name: str, total: Number, count: Number) -> None:
        """Adds a share of a mean: the sum over `count` real rows or tokens, never over padding."""
        self._totals[name] = self._totals.get(name, 0) + _as_scalar(total)
        self._counts[name] = self._counts.get(name, 0) + _as_scalar(count)

    def add_sum(self, name: str, total: Number) -> None:
        """Adds to a quantity whose global value is a sum, such as the number of tokens."""
        self._sums[name] = self._sums.get(name, 0) + _as_scalar(total)

    def add_max(self, name: str, value: float) -> None:
        """Offers a value of a quantity whose global value is the largest, such as a memory peak."""
        self._maxima[name] = max(self._maxima.get(name, value), value)

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The global values of everything added since the last call, in float64; every process gets the same.

        All processes have to call it, and their names may differ. A mean over nothing is left out.
        """
        own = [_as_numbers(part) for part in (self._totals, self._counts, self._sums, self._maxima)]
        self._totals, self._counts, self._sums, self._maxima = {}, {}, {}, {}
        everyone = gather_object([own]) if accelerator.num_processes > 1 else [own]
        totals, counts, sums = (_merge([parts[kind] for parts in everyone], operator.add) for kind in range(3))
        maxima = _merge([parts[3] for parts in everyone], max)
        means = {name: total / counts[name] for name, total in totals.items() if counts[name]}
        return means | sums | maxima


def _as_scalar(value: Number) -> Number:
    return value.detach().double().reshape(()) if isinstance(value, torch.Tensor) else value


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
    """Seconds, and on a GPU peak memory, by phase: `with watch("sample"): ...`.

    A phase inside another one is taken out of the outer one, so the phases add up to the step, but for what runs in
    none of them. Only "eval" keeps what is inside it: its sampling is not part of training. A GPU is waited for at the
    borders of phases.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._running: list[str] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, float] = defaultdict(float)
        self._step_start = self._last_border = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charges what runs inside to `phase`: sample, score, logprobs, values, update, push, offload, eval, save."""
        self._charge()
        self._running.append("eval" if "eval" in self._running else phase)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def read_and_reset(self) -> dict[str, float]:
        """time/<phase> of the step that ends now, time/step, and its memory as in `memory_report`.

        On a GPU memory/<phase>_peak_gb too: the peak within each phase, whoever is on the device then.
        """
        self._charge()
        report = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        report["time/step"] = self._last_border - self._step_start
        report |= memory_report(self._device)
        if self._device.type == "cuda":
            report |= {f"memory/{phase}_peak_gb": peak for phase, peak in self._peaks.items() if phase}
            report["memory/peak_gb"] = max(self._peaks.values())
        self._seconds.clear()
        self._peaks.clear()
        self._step_start = self._last_border
        return report

    def _charge(self) -> None:
        """Books what passed since the last border on the innermost phase."""
        phase = self._running[-1] if self._running else ""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._peaks[phase] = max(self._peaks[phase], _take_device_peak(self._device))
        now = time.perf_counter()
        if phase:
            self._seconds[phase] += now - self._last_border
        self._last_border = now


def memory_report(device: torch.device | str) -> dict[str, float]:
    """Memory in GB of 2^30 bytes; begins a new peak on a GPU.

    Returns:
        memory/peak_gb: highest allocation on the device since the last call; on the CPU the process's highest resident
            memory so far.
        memory/host_gb: the process's resident memory now.
    """
    device = torch.device(device)
    # getrusage would start from the peak of the process that launched this one.
    status = Path("/proc/self/status").read_text()
    resident, highest = (int(status.partition(f"{name}:")[2].split()[0]) * 1024 / GB for name in ("VmRSS", "VmHWM"))
    peak = _take_device_peak(device) if device.type == "cuda" else highest
    return {"memory/peak_gb": peak, "memory/host_gb": resident}


def _take_device_peak(device: torch.device) -> float:
    peak = torch.cuda.max_memory_allocated(device) / GB
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def choose_trackers(report_to: list[str] | None) -> list[str]:
    """The trackers for `Accelerator(log_with=...)`; wandb without an account works offline.

    Raises:
        ValueError: a tracker that Accelerate does not know, or whose package is not installed.
    """
    known = sorted(str(name) for name in LoggerType if name != LoggerType.ALL)
    installed = sorted(str(name) for name in get_available_trackers())
    for name in report_to or []:
        if name not in installed:
            lack = "its package is not installed" if name in known else f"Accelerate knows only {', '.join(known)}"
            raise ValueError(
                f"report_to={name!r}: {lack}, so nothing could be sent there. Install it, name another, or leave it "
                f"out: {METRICS_FILE} is always written."
            )
    if "wandb" in (report_to or []) and "WANDB_MODE" not in os.environ and not _has_wandb_account():
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    return list(report_to or [])


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].strip("/")
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class RunLog:
    """metrics.jsonl and samples.jsonl of a run, and the trackers it reports to; only the main process writes.

    Args:
        folder: the run's folder, which exists; its name is the run's name.
        accelerator: made with `log_with=choose_trackers(...)` and any `project_dir`, which tensorboard insists on.
        settings: shown by the trackers.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._accelerator = accelerator
        if accelerator.log_with:
            shown = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
            options = {"wandb": {"name": self.folder.name, "dir": str(self.folder)}}
            accelerator.project_configuration.logging_dir = str(self.folder)
            accelerator.init_trackers("nanoRLHF", config=shown, init_kwargs=options)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl; floats come back bit-equal, and what is not finite is null.

        Args:
            step: number of finished steps; 0 for an evaluation before training.
            metrics: global values of that step, evaluation among them.
        """
        values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        leading = {name: values[name] for name in LEADING_KEYS if name in values}
        values = {"step": step} | leading | dict(sorted(values.items()))
        self._append(METRICS_FILE, [values])
        if self._accelerator.trackers:
            self._accelerator.log(values, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes a line of samples.jsonl for each row, and the rows as a table to wandb.

        Args:
            step: number of finished steps.
            rows: prompt, completion, score, parts; all with the same keys.
        """
        self._append(SAMPLES_FILE, [{"step": step, **row} for row in rows])
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb" and rows:
                cells = [[str(value) for value in row.values()] for row in rows]
                tracker.log_table("samples", columns=list(rows[0]), data=cells, step=step)

    def rewind(self, step: int) -> None:
        """Drops what lies after `step`, and a line that a kill cut off: the resumed run writes these lines again.

        Args:
            step: the step of the checkpoint that the run goes on from; -1 for its very beginning.
        """
        if not self._accelerator.is_main_process:
            return
        for path in (self.folder / METRICS_FILE, self.folder / SAMPLES_FILE):
            if path.exists():
                lines = path.read_bytes().split(b"\n")
                write_file(path, b"".join(line + b"\n" for line in lines if _belongs_before(line, step)))

    def close(self) -> None:
        """Ends the trackers' runs; the files need no closing."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self._accelerator.is_main_process:
            return
        with open(self.folder / name, "ab") as file:
            file.write(b"".join(json_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not survive a power cut that its line of metrics does not


def json_line(row: dict[str, Any]) -> bytes:
    """A line of a .jsonl file; numbers that are not finite become null."""
    text = json.dumps(_finite_or_null(row), ensure_ascii=False, allow_nan=False, default=str)
    # Half a surrogate pair, as a cut-off completion can have, becomes the \\u escape that JSON has for it.
    return text.encode(errors="backslashreplace") + b"\n"


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_null(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _belongs_before(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # empty, or cut off by a kill, perhaps within a character
        return False


class Progress:
    """One line that shows step, score, last evaluation and time left; in a file or pipe a few plain lines instead.

    Args:
        num_steps: steps of the whole run.
        start: steps finished before this process began.
        enabled: False shows nothing, as on all processes but the main one.
        file: where to; None is standard error.
    """

    MAX_PLAIN_LINES = 40

    def __init__(self, num_steps: int, *, start: int = 0, enabled: bool = True, file: TextIO | None = None) -> None:
        self._num_steps, self._start = num_steps, start
        self._file = file or sys.stderr
        self._plain = enabled and not self._file.isatty()
        self._every = math.ceil(num_steps / self.MAX_PLAIN_LINES)
        self._began = time.monotonic()
        self._evaluation: list[str] = []
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            file=self._file,
            disable=not enabled or self._plain,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} |{bar:12}| {remaining} left, {desc}",
        )

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a finished step; step 0 is an evaluation before training."""
        evaluations = [f"{name} {metrics[name]:.3f}" for name in ("eval/accuracy", "eval/score") if name in metrics]
        self._evaluation = evaluations[:1] or self._evaluation
        score = [f"score {metrics['score']:.3f}"] if "score" in metrics else []
        text = ", ".join(score + self._evaluation)
        if self._plain and (step % self._every == 0 or step == self._num_steps):
            left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._num_steps - step)
            remaining = f", {tqdm.format_interval(left)} left" if step > self._start else ""
            self._file.write(f"step {step}/{self._num_steps}: {text}{remaining}\n")
            self._file.flush()
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Leaves the line as it is and goes to the next one."""
        self._bar.close()
