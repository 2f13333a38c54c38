"""Runs every algorithm on the same task with several seeds: `python compare_algorithms.py`, `--help` for more.

An algorithm is a folder `Name` in the repository's root with `name.py` and `name_trainer.py`. Its script runs as a
user would start it, one run after another, or N at a time with --at_once N, each on its own CPUs. Arguments after `--`
go to every run: `-- --num_steps 20 --task hh_rlhf`. --for NAME SETTING=VALUE ... gives settings to one algorithm, and
--teacher MODEL goes to those that learn from one; without it they are left out. With --judge REWARD, as often as
needed, rewards that no run was trained on score the untrained policy and each final model; if the runs are finished,
only that is done.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import run_script
from common.mistakes import ROOT
from examples.compare_algorithms.given import (
    as_words,
    check_passed_on,
    keep_arguments,
    own_settings,
    try_settings,
    without_teacher,
)
from examples.compare_algorithms.processes import Processes, last_line
from examples.compare_algorithms.report import write_report
from examples.compare_algorithms.runs import FinishedRun, check_equal, has_finished, read_run, run_folder

if TYPE_CHECKING:
    from examples.compare_algorithms.judging import Judging


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a planned run.

    Attributes:
        summary: a line.
        run: None if it failed.
        has_failed: the run, or its judging.
    """

    summary: str
    run: FinishedRun | None = None
    has_failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run that there is to be.

    Attributes:
        script: of the algorithm.
        seed: of the run.
        settings: arguments of the script besides its seed and folder.
    """

    script: Path
    seed: int
    settings: list[str]


def find_algorithms(root: Path) -> dict[str, Path]:
    """Path of each algorithm's script by the name of its folder, sorted."""
    scripts = {folder.name: folder / f"{folder.name.lower()}.py" for folder in sorted(root.iterdir())}
    return {
        name: script
        for name, script in scripts.items()
        if script.is_file() and script.with_name(f"{script.stem}_trainer.py").is_file()
    }


def compare(arguments: list[str], root: Path = ROOT) -> int:
    """Run the comparison. Once all algorithms have run with a seed, a report gives a fair partial result.

    Args:
        arguments: command line without the program's name.
        root: where the algorithms' folders are.

    Returns:
        Exit status: 1 if a run, or judging one, failed.

    Raises:
        ValueError: for an unknown algorithm or setting, a setting that must not be passed on, a folder of another
            comparison, and runs that cannot be compared.
    """
    found = find_algorithms(root)
    options, passed_on = _options(arguments)
    chosen = _choose(options.algorithms, found)
    settings = ["--preset", options.preset, "--eval_kl", "true", *passed_on]
    scripts = {name: found[name] for name in chosen}
    planned = [] if options.report_only else _plan(scripts, options, passed_on, settings)
    finished, num_failed = [], 0
    with closing(_run_all(planned, options)) as outcomes:
        for number, outcome in enumerate(outcomes, start=1):
            print(f"[{number}/{len(planned)}] {outcome.summary}", flush=True)
            num_failed += outcome.has_failed
            if outcome.run is not None:
                finished.append(outcome.run)
                check_equal(finished)  # now, rather than after hours
            ends_round = number % (len(planned) // len(options.seeds)) == 0
            if ends_round and number < len(planned) and not num_failed:
                write_report(options.output_dir, chosen, known=list(found))
    if finished or options.report_only:
        print("\n" + write_report(options.output_dir, chosen, known=list(found)))
        print(f"table, numbers and figure: {options.output_dir.resolve()}")
    return 1 if num_failed else 0


def _plan(
    chosen: dict[str, Path], options: argparse.Namespace, passed_on: list[str], settings: list[str]
) -> list[Planned]:
    """Which runs there are to be, in their order; what is wrong with settings of one algorithm is said now."""
    own = own_settings(options, chosen)
    lacking = without_teacher(chosen, own, passed_on)
    runs = {name: script for name, script in chosen.items() if name not in lacking}
    if lacking and (options.algorithms or not runs):
        raise ValueError(
            f"algorithms={' '.join(lacking)}: without a teacher there is nothing to learn from, and there is no "
            "default for it. Pass --teacher with a folder or a hub id, such as the final/ of a run, or leave it out."
        )
    for name in lacking:
        print(f"{name} is left out: it learns from a teacher, and none is given. Pass --teacher to compare it too.")
    words = {name: as_words(own.get(name, {})) for name in runs}
    for name, script in runs.items():
        folders = [run_folder(options.output_dir, name, seed) for seed in options.seeds]
        if words[name] and not all(map(has_finished, folders)):
            try_settings(script, settings, words[name])
    keep_arguments(options.output_dir, ["--preset", options.preset, *passed_on], own, list(runs))
    return [
        Planned(script=script, seed=seed, settings=[*settings, *words[name]])
        for seed in options.seeds
        for name, script in runs.items()
    ]


def _run_all(planned: list[Planned], options: argparse.Namespace) -> Iterator[Outcome]:
    """Do the planned runs; each worker uses its own part of the CPUs.

    Yields:
        In the order of the plan.
    """
    cpus, cpu_sets = sorted(os.sched_getaffinity(0)), SimpleQueue()
    for worker in range(options.at_once):
        cpu_sets.put(cpus[worker :: options.at_once])
    processes, judging = Processes(), _judging(options)

    def run(each: Planned) -> Outcome:
        outcome = _run(each, options.output_dir, processes)
        if judging is None or outcome.run is None:
            return outcome
        # Here, so that no other run uses the CPUs of this worker meanwhile.
        said, has_all = judging.judge(outcome.run, processes)
        return Outcome(summary=f"{outcome.summary}; {said}", run=outcome.run, has_failed=not has_all)

    # CPU affinity belongs to a thread, and the processes that it starts inherit it.
    pool = ThreadPoolExecutor(options.at_once, initializer=lambda: os.sched_setaffinity(0, cpu_sets.get()))
    try:
        yield from pool.map(run, planned)
    finally:
        # After an interruption no other run may start, and running ones end with this script.
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end()


def _judging(options: argparse.Namespace) -> "Judging | None":
    """The judges, which can be called; None without any."""
    if not options.judge:
        return None
    from examples.compare_algorithms.judging import Judging

    return Judging(options.output_dir, options.judge, options.judge_samples)


def _run(planned: Planned, output_dir: Path, processes: Processes) -> Outcome:
    """Start or continue one run; a finished run is only read."""
    script, seed, name = planned.script, planned.seed, planned.script.parent.name
    folder = run_folder(output_dir, name, seed)
    log = folder.with_name(f"{folder.name}.log")
    how = "finished before"
    if not has_finished(folder):
        command = [sys.executable, script, "--seed", seed, "--output_dir", folder, "--resume", "auto"]
        start = time.monotonic()
        status = processes.run([*command, *planned.settings], log)
        how = f"{time.monotonic() - start:.0f} s"
        if status or not has_finished(folder):
            reason = f"FAILED with status {status} after {how}, see {log}: {last_line(log)}"
            return Outcome(summary=f"{name}, seed {seed}: {reason}", has_failed=True)
    run = read_run(folder, name, seed)
    metric, before, after = run.progress()
    return Outcome(summary=f"{name}, seed {seed}: {how}, {metric} {before:.3f} -> {after:.3f}", run=run)


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and the arguments for every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", help="folders in the repository's root (default: all)")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/compare_algorithms"))
    parser.add_argument("--preset", default="auto", help="of every run; auto: cpu without a CUDA GPU, else none")
    parser.add_argument("--at_once", type=int, default=1, help="runs at a time, each on its part of the CPUs")
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="REWARD",
        help="a reward that no run was trained on: a reward model's folder or hub id, or file.py:function; may be "
        "given several times",
    )
    parser.add_argument(
        "--judge_samples",
        type=int,
        help="completions per held-out prompt for judges (default: the runs' eval_num_samples)",
    )
    parser.add_argument(
        "--for",
        dest="own",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "SETTING=VALUE"),
        help="settings for one algorithm alone, beside those of all after --; may be given for several",
    )
    parser.add_argument(
        "--teacher",
        help="folder or hub id of a model, for algorithms that learn from one; without it they are left out",
    )
    parser.add_argument("--report_only", action="store_true", help="redraw table and figure from finished runs")
    end = arguments.index("--") if "--" in arguments else len(arguments)
    (options, unknown), passed_on = parser.parse_known_args(arguments[:end]), arguments[end + 1 :]
    if unknown:
        raise ValueError(
            f"{' '.join(unknown)}: no option of this script. Settings of every run stand after --, as in -- "
            "--num_steps 20; those of one algorithm after --for, as in --for GSPO clip_range=0.2. --help lists the "
            "options."
        )
    if options.judge_samples is not None and (options.judge_samples < 1 or not options.judge):
        raise ValueError(
            f"judge_samples={options.judge_samples}{'' if options.judge else ' without a judge'}: it is the number of "
            "completions that judges score for each held-out prompt, 1 or more. Pass --judge too, or leave it out."
        )
    if options.judge and options.report_only:
        raise ValueError(
            f"judge={options.judge[0]} with report_only: a report shows what was judged before and judges nothing. "
            "Leave out --report_only to judge finished runs, which are not repeated, or --judge to see what is there."
        )
    if options.report_only and (options.own or options.teacher is not None):
        raise ValueError(
            f"{f'for={options.own[0][0]}' if options.teacher is None else f'teacher={options.teacher}'} with "
            "report_only: a report starts no run that could be given settings. Leave out one of them."
        )
    num_cpus = len(os.sched_getaffinity(0))
    if not 1 <= options.at_once <= num_cpus:
        raise ValueError(
            f"at_once={options.at_once}: each run needs a CPU for itself to be timed, and there are {num_cpus}. Pass "
            f"--at_once 1 to {num_cpus}."
        )
    check_passed_on(passed_on)
    return options, passed_on


def _choose(wanted: list[str] | None, found: dict[str, Path]) -> list[str]:
    """The chosen algorithms, spelled as their folders, sorted."""
    by_lower = {name.lower(): name for name in found}
    for name in wanted or []:
        if name.lower() not in by_lower:
            raise ValueError(
                f"algorithms={name!r}: it needs a folder {name}/ with {name.lower()}.py and {name.lower()}_trainer.py "
                f"in the repository's root. Pass --algorithms with some of {', '.join(found)}."
            )
    return sorted({by_lower[name.lower()] for name in wanted or found})


def main() -> None:
    """Run the comparison of the command line."""
    # Ending this script also ends its runs; the same command continues them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(compare(sys.argv[1:]))


if __name__ == "__main__":
    run_script(main)
