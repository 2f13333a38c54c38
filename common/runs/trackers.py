"""What a run sends to trackers such as Weights & Biases. A tracker that fails never ends a run: it is left alone."""

import json
import logging
import netrc
import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.mistakes import first_line
from common.runs.checkpoints import write_file

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("nanorlhf")

WANDB_FILE = "wandb.json"
PROJECT = "nanoRLHF"  # of trackers
# W&B's service ends with the run's process, also by SIGKILL, and loses what is not in its file: by default 15 seconds.
_WANDB_SETTINGS = {"x_transaction_log_flush_interval": 0.1}
_WANDB_ID = re.compile(r"[^\s:;,#?/']+")  # others are refused by wandb


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
                "it out: metrics.jsonl is always written."
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
                "it keeps what it has of steps %d to %d; metrics.jsonl gets them anew, and values may differ. For a "
                "W&B run with the new ones, stop, delete %s, and repeat the command: another one then begins with "
                "step %d.",
                *(self._last_step, max(step, 0), step + 1, self._last_step, self._path, step + 1),
            )

    def _keep(self, step: int) -> None:
        if self._write:
            known = {"id": self.id, "last_step": step, "project": self.project}
            write_file(self._path, (json.dumps(known) + "\n").encode())


def _known(path: Path, project: str) -> dict[str, Any]:
    """The W&B run that a file holds; empty if there is no file.

    Raises:
        ValueError: why it cannot be continued.
    """
    if not path.is_file():
        return {}
    try:
        known = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    name, step = (known.get("id"), known.get("last_step")) if isinstance(known, dict) else (None, None)
    if not isinstance(name, str) or not _WANDB_ID.fullmatch(name) or type(step) is not int:
        raise ValueError("it does not hold the id of a W&B run and the last step that was sent")
    if (before := known.get("project", project)) != project:
        raise ValueError(f"its run {name} is in the project {before}, and this one is to be in {project}")
    return known


class Trackers:
    """The trackers that a run reports to; only the main process sends.

    Whatever a tracker raises is one warning. This process then sends it nothing more; the next start does.

    Args:
        folder: the run's folder; its name is the run's name.
        accelerator: made with `log_with=choose_trackers(...)` and any `project_dir`, which tensorboard needs.
        settings: shown by the trackers.
    """

    def __init__(self, folder: Path, accelerator: "Accelerator", settings: dict[str, Any]) -> None:
        self._wandb: WandbRun | None = None
        self._trackers: list[GeneralTracker] = []
        self._failed: set[str] = set()
        self._is_main = accelerator.is_main_process
        names = list(map(str, accelerator.log_with))
        accelerator.project_configuration.logging_dir = str(folder)
        shown = {key: value if isinstance(value, int | float) else str(value) for key, value in settings.items()}
        for name in names:
            self._try(name, lambda name=name: self._begin(name, folder, accelerator, shown))
        accelerator.log_with, accelerator.trackers = names, self._trackers

    def _begin(self, name: str, folder: Path, accelerator: "Accelerator", settings: dict[str, Any]) -> None:
        options, project = {}, PROJECT
        if name == "wandb":
            self._wandb = WandbRun(folder, write=self._is_main)
            place = {"name": folder.name, "dir": str(folder), "settings": _WANDB_SETTINGS}
            options["wandb"], project = place | self._wandb.arguments(), self._wandb.project
        accelerator.log_with = [name]  # one by one, so that the others go on where one fails
        accelerator.init_trackers(project, config=settings, init_kwargs=options)
        self._trackers += accelerator.trackers

    def log(self, step: int, values: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> None:
        """Send a step.

        Args:
            step: the step.
            values: its metrics by name.
            tables: rows by the name of their table; only W&B shows them.
        """
        for tracker in list(self._trackers):
            send = self._send_to_wandb if tracker.name == "wandb" else self._send
            self._try(tracker.name, lambda send=send, tracker=tracker: send(tracker, step, values, tables))

    def _send(self, tracker: "GeneralTracker", step: int, values: dict[str, Any], _: dict) -> None:
        tracker.log(values, step=step)

    def _send_to_wandb(self, tracker: "GeneralTracker", step: int, values: dict[str, Any], tables: dict) -> None:
        if not self._wandb.takes(step):
            return
        # Tables and metrics at once: a kill between them would leave a step that W&B lets nobody complete.
        for name, rows in tables.items():
            cells = [[str(value) for value in row.values()] for row in rows]
            tracker.log_table(name, columns=list(rows[0]), data=cells, step=step)
        tracker.log(values, step=step, commit=True)
        self._wandb.sent(step)

    def rewind(self, step: int) -> None:
        """Say which steps W&B keeps, if the run goes back; see `WandbRun.rewind`."""
        if self._wandb:
            self._wandb.rewind(step)

    def close(self) -> None:
        """End their runs."""
        for tracker in list(self._trackers):
            self._try(tracker.name, tracker.finish)
        if "wandb" in self._failed:
            import wandb

            with suppress(Exception):  # its service may be dead, of which it would print a traceback when Python ends
                wandb.teardown()

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:  # of the network, of an account, of a service of its own
            self._failed.add(name)
            self._trackers[:] = [tracker for tracker in self._trackers if tracker.name != name]
            if self._is_main:
                logger.warning(
                    "%s failed, and gets nothing more of this run until it is started again: %s. The run goes on, and "
                    "everything is in metrics.jsonl and samples.jsonl.",
                    *(name, first_line(error)),
                )
