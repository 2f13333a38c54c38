"""Where a run writes its metrics: metrics.jsonl, samples.jsonl, trackers, and the progress line."""

import json
import logging
import math
import netrc
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from common.runs.checkpoints import write_file

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("nanorlhf")

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
LEADING_KEYS = ("episodes", "tokens", "score")  # first in a line of metrics.jsonl after the step, for human readers


def choose_trackers(report_to: list[str] | None) -> list[str]:
    """The trackers for `Accelerator(log_with=...)`; wandb without an account works offline.

    Raises:
        ValueError: for a tracker that Accelerate does not know, or whose package is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = sorted(str(name) for name in LoggerType if name != LoggerType.ALL)
    installed = sorted(str(name) for name in get_available_trackers())
    for name in report_to or []:
        if name not in installed:
            problem = "its package is not installed" if name in known else f"Accelerate knows only {', '.join(known)}"
            raise ValueError(
                f"report_to={name!r}: {problem}, so nothing could be sent there. Install it, pass another, or leave "
                f"it out: {METRICS_FILE} is always written."
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
        accelerator: made with `log_with=choose_trackers(...)` and any `project_dir`, which tensorboard needs.
        settings: shown by the trackers.
    """

    def __init__(self, folder: Path, accelerator: "Accelerator", settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self._accelerator = accelerator
        if accelerator.log_with:
            shown = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
            options = {"wandb": {"name": self.folder.name, "dir": str(self.folder)}}
            accelerator.project_configuration.logging_dir = str(self.folder)
            accelerator.init_trackers("nanoRLHF", config=shown, init_kwargs=options)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl; floats are read back bit-equal, and those that are not finite become null.

        Args:
            step: number of finished steps; 0 for an evaluation before training.
            metrics: global values of that step, including evaluation.
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
        """Drops lines after `step`, and a line that a kill cut off; the resumed run writes them again.

        Args:
            step: the step of the checkpoint that the run continues from; -1 for the very beginning.
        """
        if not self._accelerator.is_main_process:
            return
        for path in (self.folder / METRICS_FILE, self.folder / SAMPLES_FILE):
            if path.exists():
                lines = path.read_bytes().split(b"\n")
                write_file(path, b"".join(line + b"\n" for line in lines if _belongs_before(line, step)))
        kept = {line["step"] for line in read_metrics(self.folder)}
        if missing := [number for number in range(1, step + 1) if number not in kept]:
            logger.warning(
                "%s has no line of %d of the %d steps before the checkpoint, the first of them step %d: somebody "
                "changed the file. The run goes on, and its curves lack these steps.",
                self.folder / METRICS_FILE,
                len(missing),
                step,
                missing[0],
            )

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
            os.fsync(file.fileno())  # after a power cut, no checkpoint may be without its line of metrics


def json_line(row: dict[str, Any]) -> bytes:
    """A line of a .jsonl file; numbers that are not finite become null."""
    text = json.dumps(_finite_or_null(row), ensure_ascii=False, allow_nan=False, default=str)
    # Half a surrogate pair, which a cut-off completion can contain, becomes its \\u escape of JSON.
    return text.encode(errors="backslashreplace") + b"\n"


def _finite_or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_null(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_null(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that can be read; none if there is no such file."""
    path = Path(folder) / METRICS_FILE
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None for an empty line, one that a kill cut off, and one that no run has written."""
    try:
        row = json.loads(line)
    except ValueError:  # cut off perhaps within a character
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _belongs_before(line: bytes, step: int) -> bool:
    row = _row(line)
    return row is not None and row["step"] <= step


class Progress:
    """One line with step, score, last evaluation and time left; in a file or pipe, a few plain lines instead.

    Args:
        num_steps: steps of the whole run.
        start: steps finished before this process began.
        enabled: False shows nothing, as on all processes but the main one.
        file: the output; None is standard error.
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
        """Ends the line."""
        self._bar.close()
