"""Where a run writes its metrics: metrics.jsonl, samples.jsonl and trackers."""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.runs.checkpoints import write_file
from common.runs.disk import append
from common.runs.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("nanorlhf")

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
LEADING_KEYS = ("episodes", "tokens", "score")  # first in a line of metrics.jsonl after the step, for human readers


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
        self._tables: dict[str, list[dict[str, Any]]] = {}  # of the step whose metrics have not come yet
        self._trackers = Trackers(self.folder, accelerator, settings)

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
        self._trackers.log(step, values, self._tables)
        self._tables.clear()

    def samples(self, step: int, rows: list[dict[str, Any]], *, table: str = "samples") -> None:
        """Writes a line of samples.jsonl for each row; wandb gets the rows as a table, with the step's metrics.

        Args:
            step: number of finished steps; its metrics are logged afterwards.
            rows: prompt, completion, score, parts; all with the same keys.
            table: name of the table; of two tables with one name in one step, wandb keeps the second.
        """
        self._append(SAMPLES_FILE, [{"step": step, **row} for row in rows])
        if rows:
            self._tables[table] = rows

    def rewind(self, step: int) -> None:
        """Drops lines after `step`, and a line that a kill cut off; the resumed run writes them again.

        W&B keeps what it has of those steps, and this says so.

        Args:
            step: the step of the checkpoint that the run continues from; -1 for the very beginning.
        """
        if not self._accelerator.is_main_process:
            return
        for path in (self.folder / METRICS_FILE, self.folder / SAMPLES_FILE):
            if path.exists():
                lines = path.read_bytes().split(b"\n")
                write_file(path, b"".join(line + b"\n" for line in lines if _belongs_before(line, step)))
        self._trackers.rewind(step)
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
        self._trackers.close()

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if not self._accelerator.is_main_process:
            return
        append(self.folder / name, b"".join(json_line(row) for row in rows))


def json_line(row: dict[str, Any]) -> bytes:
    """A line of a .jsonl file; numbers that are not finite become null."""
    text = json.dumps(finite_or_null(row), ensure_ascii=False, allow_nan=False, default=str)
    # Half a surrogate pair, which a cut-off completion can contain, becomes its \\u escape of JSON.
    return text.encode(errors="backslashreplace") + b"\n"


def finite_or_null(value: Any) -> Any:
    """What JSON can hold of a value: None in place of each number that is not finite."""
    if isinstance(value, dict):
        return {name: finite_or_null(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(inner) for inner in value]
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
