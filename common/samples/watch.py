"""Follows runs and writes their page again as they write completions; no server: an open page reloads itself.

The run does not write the page: reading thousands of completions every few steps would cost it time.
"""

import sys
import time
from itertools import zip_longest
from pathlib import Path

from common.runs.checkpoints import FINAL_FOLDER, STATE_FILE, load_state
from common.runs.folder import CONFIG_FILE
from common.runs.log import METRICS_FILE, SAMPLES_FILE
from common.samples.page import page_file, read_settings, write_page
from common.signals import Stopped

POLL = 1.0  # seconds between looks at the files
# Of the time, reading and writing take at most a part in so many: the run needs the cores.
IDLE_SHARE = 20
# Seconds between reloads of an open page, which follow the seconds between entries.
SHORTEST, LONGEST = 10.0, 300.0

Entry = tuple[int, int] | None  # size and time of samples.jsonl; None: there is no such file


def watch(folders: list[Path], output: Path | None = None) -> None:
    """Write the page now and after every further entry, until all runs have finished or the user presses Ctrl-C.

    The last page that is written reloads itself no more.

    Args:
        folders: the runs' folders; a run may have no completions yet.
        output: as for `write_page`.

    Raises:
        ValueError: as for `write_page`.
        Stopped: after another signal than Ctrl-C.
    """
    page = page_file(folders, output)
    try:
        _wait_for_entries(folders)
        _follow(folders, page)
    except (KeyboardInterrupt, Stopped) as end:
        if not any(map(_awaits_entries, folders)):
            write_page(folders, page)
        if isinstance(end, Stopped):  # Ctrl-C is the usual end
            raise


def _wait_for_entries(folders: list[Path]) -> None:
    waiting = [str(folder) for folder in folders if _awaits_entries(folder)]
    if waiting:
        print(f"waiting for the first completions of {', '.join(waiting)}", file=sys.stderr)
    while any(map(_awaits_entries, folders)):
        time.sleep(POLL)


def _awaits_entries(folder: Path) -> bool:
    """True for a run that has begun and will write its first completions."""
    if (folder / METRICS_FILE).is_file() and (folder / SAMPLES_FILE).is_file():
        return False
    if not (folder / CONFIG_FILE).is_file() or is_finished(folder):
        return False
    settings, _ = read_settings(folder / CONFIG_FILE)
    if settings.get("samples_every") == settings.get("eval_every") == 0:
        raise ValueError(
            f"{folder}: the run has samples_every=0 and eval_every=0, so it saves no completions, which the page "
            "shows. Stop it and pass --samples_every 5: the run continues with it."
        )
    return True


def _follow(folders: list[Path], page: Path) -> None:
    shown: list[Entry] = []
    changed, refresh = time.monotonic(), SHORTEST
    while True:
        finished = all(map(is_finished, folders))  # before reading: its last lines are there then
        began = time.monotonic()
        entries = [_last_entry(folder, before) for folder, before in zip_longest(folders, shown)]
        if shown and entries != shown:
            refresh, changed = min(max(began - changed, SHORTEST), LONGEST), began
        if finished or entries != shown:
            write_page(folders, page, refresh=None if finished else refresh)
        if not shown:
            print(page.resolve(), flush=True)
        if finished:
            return
        shown = entries
        time.sleep(max(POLL, IDLE_SHARE * (time.monotonic() - began)))


def is_finished(folder: Path) -> bool:
    """True if the run has written final/ and was not made longer since."""
    final = folder / FINAL_FOLDER
    if not (final / STATE_FILE).is_file():
        return False
    state, (settings, _) = load_state(final), read_settings(folder / CONFIG_FILE)
    return bool(state.get("stopped_early")) or state["step"] >= settings.get("num_steps", 0)


def _last_entry(folder: Path, before: Entry) -> Entry:
    """What changes with each entry of samples.jsonl whose step has ended, which its line of metrics.jsonl says."""
    files = [folder / SAMPLES_FILE, folder / METRICS_FILE]
    if not all(path.is_file() for path in files):
        return None
    samples, metrics = (path.stat() for path in files)
    if before is not None and metrics.st_mtime_ns < samples.st_mtime_ns:
        return before
    return samples.st_size, samples.st_mtime_ns
