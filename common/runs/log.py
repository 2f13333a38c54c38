"""Where a run writes its metrics: metrics.jsonl, samples.jsonl and trackers."""

import json
import logging
import math
import netrc
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.runs.checkpoints import write_file

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger("nanorlhf")

METRICS_FILE, SAMPLES_FILE, WANDB_FILE = "metrics.jsonl", "samples.jsonl", "wandb.json"
PROJECT = "nanoRLHF"  # of trackers
_WANDB_ID = re.compile(r"[^\s:;,#?/']+")  # others are refused by wandb
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


class WandbRun:
    """The run of Weights & Biases that belongs to a run's folder; a continued run goes on in it.

    W&B cannot take back a step. So steps that a continued run does again, because they came after its checkpoint, are
    not sent again: W&B keeps what it has of them, also where a longer schedule or a corrected reward gives others now.
    `rewind` says so.

    Args:
        folder: the run's folder.
        write: whether this process keeps the file; the others never send anything.

    Attributes:
        project: WANDB_PROJECT, else nanoRLHF.
        id: WANDB_RUN_ID, else that in the file, else a new one.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        self._path, self._write = folder / WANDB_FILE, write
        self.project = os.environ.get("WANDB_PROJECT") or PROJECT
        given, known = os.environ.get("WANDB_RUN_ID"), {}
        try:
            known = _known(self._path, self.project)
        except ValueError as error:
            if write and not given:
                logger.warning(
                    "%s: %s. So its W&B run cannot be continued, and a new one begins, without the steps so far. To "
                    "go on in the old one, stop, and repeat the command with WANDB_RUN_ID set to its id.",
                    *(self._path, error),
                )
        self.id = given or known.get("id") or secrets.token_hex(4)
        self._last_step = known["last_step"] if known.get("id") == self.id else -1  # sent by earlier processes
        self._keep(self._last_step)

    def arguments(self) -> dict[str, str]:
        """Of wandb.init. Offline, the folders of one run carry the same id, and `wandb sync` joins them."""
        return {"id": self.id, "resume": "allow"}

    def takes(self, step: int) -> bool:
        """Whether this step has not been sent yet by an earlier process."""
        return step > self._last_step

    def sent(self, step: int) -> None:
        """All of this step is sent."""
        self._keep(step)

    def rewind(self, step: int) -> None:
        """Say which steps W&B keeps as they were, if the run goes back behind its last one.

        Args:
            step: the last one that is not done again; -1 for the very beginning.
        """
        if self._last_step > step:
            logger.warning(
                "W&B has this run's steps up to %d, and the run goes on from step %d. W&B cannot take a step back, so "
                "it keeps what it has of steps %d to %d; %s gets them anew, and values may differ. For a W&B run with "
                "the new ones, stop, delete %s, and repeat the command: another one then begins with step %d.",
                *(self._last_step, max(step, 0), step + 1, self._last_step, METRICS_FILE, self._path, step + 1),
            )

    def _keep(self, step: int) -> None:
        if self._write:
            write_file(self._path, json_line({"id": self.id, "last_step": step, "project": self.project}))


def _known(path: Path, project: str) -> dict[str, Any]:
    """The W&B run that a file holds; empty if there is no file.

    Raises:
        ValueError: why it cannot be continued.
    """
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError("it is not JSON") from None
    name, step = (known.get("id"), known.get("last_step")) if isinstance(known, dict) else (None, None)
    if not isinstance(name, str) or not _WANDB_ID.fullmatch(name) or type(step) is not int:
        raise ValueError("it does not hold the id of a W&B run and the last step that was sent")
    if (before := known.get("project", project)) != project:
        raise ValueError(f"its run {name} is in the project {before}, and this one is to be in {project}")
    return known


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
        self._wandb: WandbRun | None = None
        self._tables: dict[str, list[dict[str, Any]]] = {}  # of the step whose metrics have not come yet
        if accelerator.log_with:
            shown = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
            options, project = {}, PROJECT
            if "wandb" in map(str, accelerator.log_with):
                self._wandb = WandbRun(self.folder, write=accelerator.is_main_process)
                place = {"name": self.folder.name, "dir": str(self.folder)}
                options["wandb"], project = place | self._wandb.arguments(), self._wandb.project
            accelerator.project_configuration.logging_dir = str(self.folder)
            accelerator.init_trackers(project, config=shown, init_kwargs=options)

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
        for tracker in self._accelerator.trackers:
            if tracker.name != "wandb":
                tracker.log(values, step=step)
            elif self._wandb.takes(step):
                # Tables and metrics at once: a kill between them would leave a step that W&B lets nobody complete.
                for name, rows in self._tables.items():
                    cells = [[str(value) for value in row.values()] for row in rows]
                    tracker.log_table(name, columns=list(rows[0]), data=cells, step=step)
                tracker.log(values, step=step, commit=True)
                self._wandb.sent(step)
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
        if self._wandb:
            self._wandb.rewind(step)
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
    except (ValueError, RecursionError):  # cut off perhaps within a character; nested too deeply
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _belongs_before(line: bytes, step: int) -> bool:
    row = _row(line)
    return row is not None and row["step"] <= step
