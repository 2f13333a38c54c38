"""Interrupts real runs for a given time, and checks that nothing is lost: `python tools/soak.py --minutes 60`.

Each event starts a small run as a user would, and kills it, sends it a signal, fills its disk or damages its files at
a random moment. The same command then continues it, and the result is compared with an uninterrupted run:
metrics.jsonl except for time and memory, samples.jsonl, every byte of final/, the checkpoints. The same seed gives the
same plan.

Prints a table, also when it is itself asked to end, as soon as the events that have begun are over. Status 1 says that
an event failed, or that none could be tried; the folder of one that failed is kept, with what the run printed, and the
command that repeats it is shown.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.runs.checkpoints import FINAL_FOLDER  # noqa: E402
from common.runs.log import METRICS_FILE, SAMPLES_FILE  # noqa: E402
from tools.soak_compare import difference  # noqa: E402
from tools.soak_events import ACTIONS, Case, Failure, Missed, Skipped, require_message  # noqa: E402
from tools.soak_plan import KINDS, Event, event  # noqa: E402
from tools.soak_runs import ALGORITHMS, Runs  # noqa: E402
from tools.soak_table import Outcome, summary, table  # noqa: E402


def run_event(runs: Runs, one: Event) -> Outcome:
    """Do what an event says, continue the run and compare it; a folder of a case that passed is deleted."""
    begun = time.monotonic()
    case = Case(one, runs, runs.folder / f"event-{one.number}")
    shutil.rmtree(case.folder, ignore_errors=True)
    verdict, reasons, result = "equal", [], Result()
    try:
        runs.reference(one.setup)  # first, so that its time is not the event's
        begun = time.monotonic()
        try:
            ACTIONS[one.kind](case)
        except Missed as missed:
            verdict, reasons = "missed", [str(missed)]
        except Failure as failure:  # whether it can be continued all the same, is worth to know
            verdict, reasons = "failed", [str(failure)]
        finish(case, result)
        if result.said and verdict != "failed":
            verdict, reasons = "said so", [result.said]
    except Skipped as skipped:
        verdict, reasons = "skipped", [str(skipped)]
    except Failure as failure:
        verdict, reasons = "failed", [*reasons, str(failure)]
    except Exception as error:  # of the soak itself, or a folder in a state that nobody thought of
        verdict, reasons = "failed", [*reasons, f"{type(error).__name__}: {error}"]
    finally:
        case.end()
    if verdict != "failed":
        shutil.rmtree(case.folder, ignore_errors=True)
    return Outcome(
        event=one,
        verdict=verdict,
        reason="; then ".join(reasons) or case.note,
        survived=result.survived,
        equal=result.equal,
        steps_lost=case.steps_lost,
        resume_seconds=result.seconds,
        seconds=time.monotonic() - begun,
    )


@dataclass
class Result:
    """What became of a run after the event: see Outcome; `said` is what it says itself of what differs."""

    survived: bool = False
    equal: bool = False
    said: str = ""
    seconds: float = 0.0


def finish(case: Case, result: Result) -> None:
    """Continue a run that is not finished, and compare it with its reference.

    Raises:
        Failure: if it cannot be continued, or something differs and nothing says so.
    """
    kind, errors = case.event.kind, ""
    if not (case.output_dir / FINAL_FOLDER).is_dir():
        ended = case.start().wait()
        result.seconds, errors = ended.seconds, ended.errors
        if kind.startswith(("metrics-", "samples-")) and ended.status != 0:
            require_message(case, ended)  # nobody can bring back what was in the file
            result.survived, result.said = True, "it says that it cannot go on"
            return
        case.require_continued(ended)
    result.survived = True
    differs = difference(case.output_dir, case.runs.folder / "references" / case.event.setup.name / "run")
    result.equal = differs is None
    if result.equal:
        return
    if kind == "samples-cut" and differs.startswith(SAMPLES_FILE) and SAMPLES_FILE in errors:
        result.said = "it names the lines of samples that are gone"
    elif kind == "worker-killed" and _rows_lost(case.output_dir):
        result.said = "the row that the worker was at counts as over its limit"
    else:
        raise Failure(differs)


def _rows_lost(folder: Path) -> bool:
    """Whether metrics.jsonl has rows that were over their limit."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    return any(value for line in lines for name, value in line.items() if name.startswith("over_limit/"))


def soak(runs: Runs, events: Iterator[Event], *, seconds: float, jobs: int, asked: list[int]) -> Iterator[Outcome]:
    """Run events, `jobs` at a time, until the time is over or a signal is in `asked`; then finish those that run."""
    end, running = time.monotonic() + seconds, set()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            while len(running) < jobs and not asked and time.monotonic() < end and (one := next(events, None)):
                running.add(pool.submit(run_event, runs, one))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=60.0, help="no event begins later (default: %(default)s)")
    add("--seed", type=int, default=1, help="of the plan (default: %(default)s)")
    add("--events", type=int, help="at most so many")
    add("--only", type=int, nargs="+", help="events of the plan, by their numbers")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--samplers", nargs="+", choices=("transformers", "vllm"), default=["transformers", "vllm"])
    add("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="of a run (default: 1 2)")
    add("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS), metavar="NAME")
    add("--jobs", type=int, default=1, help="events at the same time (default: 1)")
    add("--folder", type=Path, help="for the runs; of events that passed nothing stays (default: a new one)")
    add("--write", type=Path, help="a JSON file for all outcomes")
    return parser


def main() -> None:
    """Run, print, and say by the exit status whether all passed."""
    parser = make_parser()
    settings = parser.parse_args()
    # Started in the background, a shell has this process ignore Ctrl-C, and what it starts would inherit that.
    # What asks the soak itself to end lets the events that have begun end: they have mounts and processes to put away.
    asked = []
    has_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        counts = number != signal.SIGHUP or not has_nohup
        signal.signal(number, lambda number, _, counts=counts: asked.append(number) if counts else None)
    folder = (settings.folder or Path(tempfile.mkdtemp(prefix="nanorlhf-soak-"))).resolve()
    drawn = {name: getattr(settings, name) for name in ("kinds", "samplers", "processes", "algorithms")}
    numbers = settings.only or (count() if settings.events is None else range(settings.events))
    events = (event(settings.seed, number, **drawn) for number in numbers)
    repeat = ["python", "tools/soak.py", "--seed", str(settings.seed)]
    for name, values in drawn.items():
        if values != parser.get_default(name):
            repeat += [f"--{name}", *map(str, values)]
    print(f"in {folder}", flush=True)
    begun, outcomes = time.monotonic(), []
    limits = {"seconds": 60 * settings.minutes, "jobs": settings.jobs, "asked": asked}
    for outcome in soak(Runs(folder), events, **limits):
        outcomes.append(outcome)
        one = outcome.event
        what = f"{one.number:4} {one.kind:16} {one.setup.name:24} {outcome.verdict:8} {outcome.seconds:5.0f} s"
        print(f"{what}  {outcome.reason}".rstrip(), flush=True)
        if outcome.verdict == "failed":
            again = shlex.join([*repeat, "--only", str(one.number)])
            print(f"     kept in {folder}/event-{one.number}; {again}", flush=True)
        if settings.write:  # each time, so that a soak that is killed keeps what it found
            kept = json.dumps([asdict(each) for each in outcomes], indent=1)
            settings.write.write_text(f"{kept}\n", encoding="utf-8")
    print(f"\n{table(outcomes)}\n\n{summary(outcomes, time.monotonic() - begun)}")
    failed = any(outcome.verdict == "failed" for outcome in outcomes)
    sys.exit(1 if failed or not any(outcome.tried for outcome in outcomes) else 128 + asked[0] if asked else 0)


if __name__ == "__main__":
    main()
