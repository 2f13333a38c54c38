"""What happens to a run in tools/soak.py: each kind of event, with what the run has to do then.

A function here starts the run, does to it what the event says, and returns how it ended, or raises `Failure` with what
it should have done instead. Afterwards the run is continued and compared, by tools/soak.py, the same way for all.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.runs.checkpoints import FINAL_FOLDER, list_checkpoints, step_of
from common.runs.folder import CONFIG_FILE, LOCK_FILE
from common.runs.log import METRICS_FILE, SAMPLES_FILE
from tools.soak_compare import leftovers
from tools.soak_plan import DAMAGES, LOSSES, NUM_STEPS, Event, Moment
from tools.soak_runs import SLOW_FILE, Ended, Process, Runs, children, last_step, ranks, words_of

MAX_LINES = 8  # of a message
# What the fraction of a moment means, in seconds.
START, STEP, WRITE = 4.0, 0.3, 0.004
# From a signal to the end: a run may finish its step, which takes a moment here; a launcher waits longer.
AT_ONCE, PATIENCE_OF_QUEUES = 8.0, 60.0
APART = 1.2  # seconds between two signals that are not one request
DISK = 12 << 20  # bytes of the small disk
TIMEOUT = 20.0  # seconds for which processes of a run wait for one that hangs
UNTIL_SAID = 60.0  # from the loss of a process
NEEDED = 1_800_000  # bytes that a run of these settings takes, about


# What the process that is left says first.
MESSAGE = re.compile(r"^error: process \d of 2 \(pid \d+ on .*\) is (gone|stopped)", re.MULTILINE)
LOST_BY = {"one-killed": signal.SIGKILL, "one-stopped": signal.SIGSTOP}


class Failure(Exception):
    """What a run should have done."""


class Missed(Exception):
    """The run was over before the event, or did not come to what it was about."""


class Skipped(Exception):
    """Why this machine does not allow it."""


class Case:
    """One event and its run.

    Args:
        event: what happens.
        runs: starts the run.
        folder: of the case; gets what the run prints, and the run.

    Attributes:
        output_dir: the run's folder.
        steps_lost: finished steps that the last interruption has cost.
        note: what else is worth to be shown of it.
    """

    def __init__(self, event: Event, runs: Runs, folder: Path) -> None:
        self.event, self.runs, self.folder = event, runs, folder
        self.output_dir = folder / "run"
        self.steps_lost, self.note = 0, ""
        self._started: list[Process] = []

    @property
    def command(self) -> list[str]:
        options = {"save_every": self.event.save_every, "stop_grace": self.event.grace}
        if self.event.kind in LOSSES:
            options |= {"restarts": 1, "process_timeout": TIMEOUT / 60}
        return self.runs.command(self.event.setup, self.output_dir, **options)

    def start(self, *before: str) -> Process:
        """Start the run, or go on with it; `before` are words that come before its command."""
        name = f"part-{len(self._started) + 1}"
        self._started.append(Process([*before, *self.command], self.folder, name))
        return self._started[-1]

    def end(self) -> None:
        """End what is still running, because the case failed halfway."""
        for process in self._started:
            if process.running:
                process.send(signal.SIGKILL, group=True)
                process.wait()

    def continued(self) -> Ended:
        """Go on with the run until it ends by itself."""
        ended = self.start().wait()
        self.require_continued(ended)
        return ended

    def require_continued(self, ended: Ended) -> None:
        """Require that the run went on to its end, or says that it had ended: only the name of final/ was missing."""
        has_finished = (self.output_dir / FINAL_FOLDER).is_dir() and "the run there has finished" in ended.errors
        require(ended.status == (2 if has_finished else 0), "the same command continues it", ended)
        require(not ended.left, "its processes end with it", ended)

    def wait_until(self, process: Process, moment: Moment) -> None:
        """Wait for a moment.

        Raises:
            Missed: if the run is over before.
        """
        if moment.step < 0:
            time.sleep(moment.fraction * START)
        while process.running and last_step(self.output_dir) < moment.step:
            time.sleep(0.005)
        if moment.aim is not None:
            pattern = re.compile(rf"{moment.aim}.*\.tmp-")
            while process.running and not any(pattern.match(name) for name in os.listdir(self.output_dir)):
                time.sleep(0.0002)
            time.sleep(moment.fraction * WRITE)
        elif moment.step >= 0:
            time.sleep(moment.fraction * STEP)
        if not process.running:
            ended = process.wait()
            require(ended.status == 0, "it does not end by itself before anything happens", ended)
            raise Missed("it was over before")

    def note_loss(self) -> None:
        """Compare the last line of metrics.jsonl with the last checkpoint, unless the run is complete."""
        if self.output_dir.is_dir() and not (self.output_dir / FINAL_FOLDER).is_dir():
            saved = max(map(step_of, list_checkpoints(self.output_dir)), default=0)
            self.steps_lost = max(0, last_step(self.output_dir) - saved)

    def message(self, ended: Ended) -> list[str]:
        """The lines of stderr that an uninterrupted run does not print, whatever numbers are in them."""
        usual = {_plain(line) for line in self.runs.reference(self.event.setup).errors.splitlines()}
        return [line for line in ended.errors.splitlines() if line.strip() and _plain(line) not in usual]


def _plain(line: str) -> str:
    return re.sub(r"[\d.]+", "0", line)


def require(holds: bool, what: str, ended: Ended) -> None:
    """Raise a Failure that says what was to hold, and how the run ended."""
    if not holds:
        last = " | ".join(ended.errors.strip().splitlines()[-4:])[-700:]
        left = f"; left: {'; '.join(ended.left)}" if ended.left else ""
        raise Failure(f"need: {what}; exit status {ended.status}{left}; stderr ends: {last}")


def require_message(case: Case, ended: Ended) -> None:
    """Require that the run ended with one message and status 2, and left no part of a file."""
    lines = case.message(ended)
    if case.event.setup.processes > 1:  # a launcher has a status and a traceback of its own
        require(ended.status != 0, "an exit status that is not 0", ended)
        require(any(line.startswith("error: ") for line in lines), "a message", ended)
    else:
        require("Traceback" not in ended.errors, "no traceback", ended)
        require(ended.status == 2, "exit status 2", ended)
        require(1 <= len(lines) <= MAX_LINES, f"a message of at most {MAX_LINES} lines, not {len(lines)}", ended)
    require(not ended.left, "its processes end with it", ended)
    left = leftovers(case.output_dir)
    is_read_only = case.event.kind == "read-only"  # where nothing can be removed either
    require(is_read_only or not left, f"nothing half written, not {', '.join(left)}", ended)


# Kills and signals


def kill(case: Case) -> None:
    """SIGKILL at each moment, of one process or of all."""
    event = case.event
    for moment in event.moments:
        process = case.start()
        case.wait_until(process, moment)
        whole = event.kind == "kill-group" or (event.kind != "kill" and event.group)
        process.note_family()
        if whole or event.setup.processes == 1:
            process.send(signal.SIGKILL, group=whole)
        else:  # its launcher ends the others; without the launcher, they end by themselves
            found = [*ranks(process.pid), process.pid]
            os.kill(found[int(event.level * len(found))], signal.SIGKILL)
        if event.setup.processes > 1:
            process.wait_for_group(PATIENCE_OF_QUEUES)
        ended = process.wait()
        require(ended.status != 0, "an exit status that is not 0", ended)
        require(not ended.left, "its processes end with it", ended)
        case.note_loss()
        limit = event.save_every
        require(case.steps_lost <= limit, f"at most {limit} steps lost, not {case.steps_lost}", ended)


def stop(case: Case) -> None:
    """A signal that asks the run to stop: it writes a checkpoint first."""
    event = case.event
    second = event.kind == "second-signal"
    number = (
        (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[int(event.choice * 3)] if second else signal.Signals[event.kind]
    )
    [moment] = event.moments
    process = case.start()
    case.wait_until(process, moment)
    # Signals that come together are one request. A launcher has a way of its own with a second one.
    is_apart = second and event.level < 0.6 and moment.step >= 0 and event.setup.processes == 1
    if is_apart:
        (case.folder / SLOW_FILE).touch()
        time.sleep(STEP)
    # A launcher does not hand on what it does not know: a queue sends that to each process.
    group = event.group or number == signal.SIGUSR1
    process.send(number, group=group)
    # From its last step on, it only writes final/, and has ended as usual.
    last = last_step(case.output_dir) >= NUM_STEPS - 1
    if second:
        time.sleep(APART + event.level if is_apart else event.level * STEP)
        process.send(number, group=group)
        (case.folder / SLOW_FILE).unlink(missing_ok=True)
    begun = time.monotonic()
    if event.setup.processes > 1:
        process.wait_for_group(30 + 15)  # a launcher's own patience, and some more
    ended = process.wait()
    seconds = time.monotonic() - begun
    limit = AT_ONCE if is_apart else PATIENCE_OF_QUEUES
    require(seconds < limit, f"an end within {limit:.0f} s after the signal, not {seconds:.0f}", ended)
    if ended.status == 0 and last:
        require((case.output_dir / FINAL_FOLDER).is_dir(), f"{FINAL_FOLDER}/ with exit status 0", ended)
    elif event.setup.processes > 1:
        require(ended.status != 0, "an exit status that is not 0", ended)
    else:
        require(ended.status == 128 + number, f"exit status {128 + number}", ended)
    require("Traceback" not in ended.errors or event.setup.processes > 1, "no traceback", ended)
    require(not ended.left, "its processes end with it", ended)
    left = leftovers(case.output_dir)
    require(is_apart or not left, f"nothing half written, not {', '.join(left)}", ended)
    case.note_loss()
    limit = event.save_every if is_apart else 0
    require(case.steps_lost <= limit, f"at most {limit} finished steps lost, not {case.steps_lost}", ended)


def lose(case: Case) -> None:
    """One of two processes is killed or hangs: the other says so once, and the launcher's restart goes on."""
    [moment] = case.event.moments
    if case.event.setup.processes == 1:
        raise Skipped("it needs two processes")
    # Without it, processes that are started again look for the dead ones.
    process = case.start("env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    case.wait_until(process, moment)
    found = ranks(process.pid)
    os.kill(found[int(case.event.level * len(found))], LOST_BY[case.event.kind])
    begun = time.monotonic()
    while process.running and not process.said(MESSAGE) and time.monotonic() - begun < UNTIL_SAID:
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    ended = process.wait()
    said = len(MESSAGE.findall(ended.errors))
    if not said and ended.status == 0 and "continued after" not in process.output:
        raise Missed("its last step was done")
    require(said == 1, f"one message of the loss, not {said}", ended)
    require(seconds < UNTIL_SAID, f"the message within {UNTIL_SAID:.0f} s", ended)
    case.note = f"said after {seconds:.1f} s, over after {time.monotonic() - begun:.0f} s"
    case.require_continued(ended)


# Places that cannot be written to


def file_limit(case: Case) -> None:
    """A limit on the size of a file, as some queues set it, somewhere below that of the weights."""
    kilobytes = 1 + int(case.event.level**2 * 300)
    ended = case.start("bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "limited").wait()
    require_message(case, ended)


@contextmanager
def mounted(target: Path, *options: str) -> Iterator[None]:
    """Mount something for a while."""
    done = subprocess.run(["mount", *options, target], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"no mount here: {done.stderr.strip()}")
    try:
        yield
    finally:
        # The lazy way works also while a process that fails to end still has a file open there.
        subprocess.run(["umount", "--lazy", target], check=True)


def full_disk(case: Case) -> None:
    """A disk that becomes full somewhere in the run, which is then continued where there is room."""
    disk, kept = case.folder / "disk", case.output_dir
    disk.mkdir(parents=True)
    with mounted(disk, "-t", "tmpfs", "-o", f"size={DISK}", "none"):
        free = 20_000 + int(case.event.level * NEEDED)
        (disk / "ballast").write_bytes(bytes(DISK - free))
        case.output_dir = disk / "run"
        try:
            ended = case.start().wait()
            if ended.status != 0:
                require_message(case, ended)
        finally:
            case.note_loss()
            if case.output_dir.is_dir():
                shutil.copytree(case.output_dir, kept, symlinks=True)
            case.output_dir = kept
    if ended.status == 0:
        raise Missed("the disk was large enough")


def read_only(case: Case) -> None:
    """A folder that becomes read-only while the run has its lock open."""
    process = case.start()
    case.wait_until(process, case.event.moments[0])
    here = case.output_dir
    with mounted(here, "--bind", str(here)):
        done = subprocess.run(["mount", "-o", "remount,bind,ro", here], capture_output=True, text=True)
        ended = process.wait()
        if done.returncode:
            raise Skipped(f"no read-only mount here: {done.stderr.strip()}")
    require_message(case, ended)


# Files that are damaged or deleted


def damage(case: Case) -> None:
    """A run that was killed or asked to end, and whose files somebody has damaged before it goes on."""
    process = case.start()
    case.wait_until(process, case.event.moments[0])
    event, folder = case.event, case.output_dir
    process.send(signal.SIGKILL if event.group else signal.SIGTERM, group=True)
    process.wait()
    what, how = event.kind.split("-")
    if what in ("metrics", "samples"):
        path = folder / {"metrics": METRICS_FILE, "samples": SAMPLES_FILE}[what]
        size = 0 if how == "emptied" else int(path.stat().st_size * event.level)
        os.truncate(path, size)
        return
    checkpoints = list_checkpoints(folder)
    if len(checkpoints) < 2:
        raise Missed("there were no two checkpoints yet")
    files = sorted(path for path in checkpoints[-1].rglob("*") if path.is_file())
    path = files[int(event.choice * len(files))]
    if how == "cut":
        os.truncate(path, int(path.stat().st_size * event.level))
    elif how == "bit":
        content = bytearray(path.read_bytes())
        content[int(event.level * len(content))] ^= 1 << int(event.choice * 8)
        path.write_bytes(content)
    else:
        path.unlink()


def config_deleted(case: Case) -> None:
    """config.yaml and .lock vanish while the run goes on: it writes them again."""
    process = case.start()
    case.wait_until(process, case.event.moments[0])
    for name in (CONFIG_FILE, LOCK_FILE):
        (case.output_dir / name).unlink()
    ended = process.wait()
    require(ended.status == 0, "it goes on", ended)
    for name in (CONFIG_FILE, LOCK_FILE):
        require((case.output_dir / name).is_file(), f"{name} is written again", ended)


def folder_deleted(case: Case) -> None:
    """The whole folder vanishes: the run says so, and can be begun again."""
    process = case.start()
    case.wait_until(process, case.event.moments[0])
    os.replace(case.output_dir, doomed := case.folder / "deleted")  # at once, as a file is deleted
    shutil.rmtree(doomed)
    ended = process.wait()
    require_message(case, ended)


# The processes that score


def scorer_killed(case: Case) -> None:
    """The keeper of a rule, or the worker that it keeps, is killed: the run goes on."""
    event = case.event
    process = case.start()
    case.wait_until(process, event.moments[0])
    parents = ranks(process.pid)
    # A fork has its parent's command line, unlike what libraries start.
    keepers = [pid for parent in parents for pid in children(parent) if words_of(pid) == words_of(parent)]
    found = [pid for keeper in keepers for pid in children(keeper)] if event.kind == "worker-killed" else keepers
    if not found:
        raise Missed("there was no such process")
    try:
        os.kill(found[int(event.level * len(found))], signal.SIGKILL)
    except ProcessLookupError:
        raise Missed("the process was gone") from None
    ended = process.wait()
    require(ended.status == 0, "it goes on", ended)
    require(not ended.left, "its processes end with it", ended)


ACTIONS: dict[str, Callable[[Case], None]] = {
    **dict.fromkeys(("kill", "kill-group", "kill-writing", "kill-starting", "kill-often"), kill),
    **dict.fromkeys(("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "second-signal"), stop),
    **{"full-disk": full_disk, "file-limit": file_limit, "read-only": read_only},
    **dict.fromkeys(DAMAGES, damage),
    **{"config-deleted": config_deleted, "folder-deleted": folder_deleted},
    **dict.fromkeys(("keeper-killed", "worker-killed"), scorer_killed),
    **dict.fromkeys(LOSSES, lose),
}
