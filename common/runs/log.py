"""Where a run writes its metrics: metrics.jsonl, samples.jsonl and trackers."""

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.runs.checkpoints import write_file
from common.runs.disk import append
from common.runs.own_files import write_new
from common.runs.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from common.runs.held import HeldFolder

logger = logging.getLogger("nanorlhf")

METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
LEADING_KEYS = ("episodes", "tokens", "score")  # first in a line of metrics.jsonl after the step, for human readers


class RunLog:
    """metrics.jsonl and samples.jsonl of a run, and the trackers it reports to; only the main process writes.

    Args:
        folder: the run's folder, which exists; its name is the run's name.
        accelerator: made with `log_with=choose_trackers(...)` and any `project_dir`, which tensorboard needs.
        settings: shown by the trackers.
        held: looks after the folder before each line; None: nothing does.

    Attributes:
        samples_size: bytes of samples.jsonl at the last line of metrics, for a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: "Accelerator",
        settings: dict[str, Any],
        held: "HeldFolder | None" = None,
    ) -> None:
        self.folder = Path(folder)
        self._held = held
        # What is in the files, to see and repair what somebody does to them. Metrics of 10,000 steps take some 30 MB.
        self._metrics: bytearray | None = None
        self._size: int | None = None  # of samples.jsonl
        self.samples_size = 0
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
        self._append_metrics(json_line(values))
        self._trackers.log(step, values, self._tables)
        self._tables.clear()

    def samples(self, step: int, rows: list[dict[str, Any]], *, table: str = "samples") -> None:
        """Writes a line of samples.jsonl for each row; wandb gets the rows as a table, with the step's metrics.

        Args:
            step: number of finished steps; its metrics are logged afterwards.
            rows: prompt, completion, score, parts; all with the same keys.
            table: name of the table; of two tables with one name in one step, wandb keeps the second.
        """
        self._append_samples(b"".join(json_line({"step": step, **row}) for row in rows))
        if rows:
            self._tables[table] = rows

    def rewind(self, step: int, *, samples_size: int | None = None) -> None:
        """Drops lines after `step`, and a line that a kill cut off; the resumed run writes them again.

        W&B keeps what it has of those steps, and this says so. What is missing before that, it says too.

        Args:
            step: the step of the checkpoint that the run continues from; -1 for the very beginning.
            samples_size: bytes of samples.jsonl when the checkpoint was saved; None: not known.
        """
        if not self._accelerator.is_main_process:
            return
        for path in (self.folder / METRICS_FILE, self.folder / SAMPLES_FILE):
            if path.exists():
                write_file(path, _lines_until(path, step))
        self._metrics, self._size, self.samples_size = None, None, self._size_of_samples()
        self._trackers.rewind(step)
        self._say_what_is_missing(step, samples_size)

    def _say_what_is_missing(self, step: int, samples_size: int | None) -> None:
        kept = {line["step"] for line in read_metrics(self.folder)}
        if missing := [number for number in range(1, step + 1) if number not in kept]:
            logger.warning(
                "%s has no line of %d of the %d steps before the checkpoint, the first of them step %d: somebody "
                "changed the file, and the checkpoint holds no copy of these lines. The run goes on, and its curves "
                "lack these steps.",
                self.folder / METRICS_FILE,
                len(missing),
                step,
                missing[0],
            )
        path, found = self.folder / SAMPLES_FILE, self.samples_size
        if samples_size not in (None, found):
            logger.warning(
                "%s has %s bytes of the steps before the checkpoint, and had %s: somebody changed the file. "
                "Checkpoints hold no copy of completions. The run goes on, and its page lacks those that are missing.",
                *(path, f"{found:,}", f"{samples_size:,}"),
            )

    def copy_metrics(self, path: Path) -> None:
        """Write metrics.jsonl as it should be, for a checkpoint."""
        write_new(path, self._lines())

    def _size_of_samples(self) -> int:
        path = self.folder / SAMPLES_FILE
        return path.stat().st_size if path.exists() else 0

    def close(self) -> None:
        """Ends the trackers' runs; the files need no closing."""
        self._trackers.close()

    def _lines(self) -> bytearray:
        if self._metrics is None:
            path = self.folder / METRICS_FILE
            self._metrics = bytearray(path.read_bytes() if path.exists() else b"")
        return self._metrics

    def _append_metrics(self, line: bytes) -> None:
        if not self._accelerator.is_main_process:
            return
        known, path = self._lines(), self.folder / METRICS_FILE
        is_as_written = self._append(path, line, expected=len(known)) == len(known)
        known += line
        self.samples_size = self._size_of_samples()
        if not is_as_written:
            write_file(path, bytes(known))
            logger.warning("%s was changed while the run worked, and is written again", path)

    def _append_samples(self, lines: bytes) -> None:
        if not self._accelerator.is_main_process:
            return
        path = self.folder / SAMPLES_FILE
        found = self._append(path, lines)
        if self._size not in (None, found):
            logger.warning(
                "%s was changed while the run worked: it had %s bytes, and has %s. What is missing is lost; the run "
                "goes on.",
                *(path, f"{self._size:,}", f"{found:,}"),
            )
        self._size = found + len(lines)

    def _append(self, path: Path, content: bytes, *, expected: int | None = None) -> int:
        if self._held:
            self._held.check()
        return append(path, content, expected=expected)


def restore_metrics(folder: Path, checkpoint: Path) -> None:
    """Give metrics.jsonl the lines that it had when a checkpoint was saved, if somebody has changed them, and say so.

    Args:
        folder: the run's folder.
        checkpoint: that the run continues from; one from before checkpoints held a copy changes nothing.
    """
    path, copy = folder / METRICS_FILE, checkpoint / METRICS_FILE
    if not copy.is_file():
        return
    saved = copy.read_bytes()
    step = max((row["step"] for row in read_metrics(checkpoint)), default=-1)
    found = _lines_until(path, step)
    if found == saved:
        return
    later = b"".join(line + b"\n" for line in _whole_lines(path) if not _belongs_before(line, step))
    write_file(path, saved + later)
    logger.warning(
        "%s was not as the run had written it: of the %d lines up to step %d, %d were missing or changed. It is "
        "written again from the copy in %s.",
        *(path, saved.count(b"\n"), step, len(set(saved.split(b"\n")) - set(found.split(b"\n"))), checkpoint.name),
    )


def _lines_until(path: Path, step: int) -> bytes:
    return b"".join(line + b"\n" for line in _whole_lines(path) if _belongs_before(line, step))


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a .jsonl file that a run has written and no kill has cut off; none if there is no file."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [line for line in lines if _row(line) is not None]


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
    return [_row(line) for line in _whole_lines(Path(folder) / METRICS_FILE)]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row in a line; None for an empty line, one that a kill cut off, and one that no run has written."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # cut off perhaps within a character; nested too deeply
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _belongs_before(line: bytes, step: int) -> bool:
    row = _row(line)
    return row is not None and row["step"] <= step
