"""Compares the algorithms of finished runs: results.json, table.md and comparison.png."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.runs.checkpoints import write_file
from common.runs.folder import MAY_CHANGE
from examples.compare_algorithms.apart import in_words, seeds_on_frontier, tell_apart, typical_interval
from examples.compare_algorithms.figure import picture
from examples.compare_algorithms.given import TEACHER, as_words, given_alone
from examples.compare_algorithms.intervals import mean_with_interval
from examples.compare_algorithms.judged import TRAINING, compare_with_untrained
from examples.compare_algorithms.runs import FinishedRun, check_equal, comparable_runs, must_be_equal

RESULTS_FILE, TABLE_FILE, FIGURE_FILE = "results.json", "table.md", "comparison.png"
# Columns of the table: title and format. A column without any value is left out.
COLUMNS = {
    "accuracy_before": ("accuracy before", ".3f"),
    "accuracy": ("accuracy after", ".3f"),
    "score_before": ("score before", ".3f"),
    "score": ("score after", ".3f"),
    "kl": ("KL, nats/token", ".4f"),
    "kl_per_completion": ("KL, nats/completion", ".2f"),
    "length_before": ("length before", ".1f"),
    "length": ("length after", ".1f"),
    "seconds_per_episode": ("s/episode", ".4f"),
    "completions_sampled": ("completions sampled", ",.0f"),
    "tokens_sampled": ("tokens sampled", ",.0f"),
    "tokens_trained": ("tokens trained on", ",.0f"),
    "peak_gb": ("peak GB", ".2f"),
}


def write_report(output_dir: Path, algorithms: list[str], *, known: list[str]) -> str:
    """Write results.json, table.md and comparison.png.

    Args:
        output_dir: holds the runs' folders.
        algorithms: which to compare.
        known: all existing algorithms, so that each keeps its colour in every comparison.

    Returns:
        The table.

    Raises:
        ValueError: if there is no finished run, no seed that all finished, or if runs are not comparable.
    """
    runs, left_out = comparable_runs(output_dir, algorithms)
    check_equal(runs)
    judged = compare_with_untrained(output_dir, runs)
    results = summarize(runs) | {"judged": judged, "left_out": left_out}
    results["given_alone"] = {
        name: settings for name, settings in given_alone(output_dir).items() if name in results["algorithms"]
    }
    table = table_of(results)
    write_file(output_dir / RESULTS_FILE, (json.dumps(results, indent=1) + "\n").encode())
    write_file(output_dir / TABLE_FILE, table.encode())
    write_file(output_dir / FIGURE_FILE, picture(runs, sorted(known), results["frontier"], judged))
    return table


def summarize(runs: list[FinishedRun]) -> dict[str, Any]:
    """Everything the table shows, as JSON.

    Returns:
        seeds, algorithms (for each its columns as in `mean_with_interval`), equal (settings that must be equal in all
        runs), different (for each other setting its value by algorithm, for the algorithms that have it), teachers
        (of the algorithms that have one), metric (what is compared, accuracy or score), frontier (of the metric
        against KL, as `seeds_on_frontier`) and told_apart (as `tell_apart`, for the metric and for kl).
    """
    by_algorithm: dict[str, list[FinishedRun]] = defaultdict(list)
    for run in runs:
        by_algorithm[run.algorithm].append(run)
    algorithms = {}
    for name, own in by_algorithm.items():
        numbers = [run.numbers() for run in own]
        algorithms[name] = {key: mean_with_interval([entry[key] for entry in numbers]) for key in numbers[0]}
    settings = {name: own[0].settings for name, own in by_algorithm.items()}
    names = sorted(set().union(*settings.values()) - MAY_CHANGE - {"seed"})
    different = {}
    for name in names:
        values = {algorithm: own[name] for algorithm, own in settings.items() if name in own}
        if len(values) < len(settings) or any(value != values[runs[0].algorithm] for value in values.values()):
            different[name] = values
    return {
        "seeds": [run.seed for run in by_algorithm[runs[0].algorithm]],
        "algorithms": algorithms,
        "equal": {name: runs[0].settings.get(name) for name in names if must_be_equal(name)},
        "different": different,
        "teachers": {name: own[TEACHER] for name, own in settings.items() if own.get(TEACHER)},
        **_ranked(algorithms, runs[0].progress()[0]),
    }


def _ranked(algorithms: dict[str, Any], metric: str) -> dict[str, Any]:
    """Who is on the frontier, and which pairs the seeds tell apart; without those that lack a value with some seed."""
    measured = {
        key: {name: own[key]["per_seed"] for name, own in algorithms.items() if None not in own[key]["per_seed"]}
        for key in (metric, "kl")
    }
    points = {
        name: list(zip(values, measured["kl"][name], strict=True))
        for name, values in measured[metric].items()
        if name in measured["kl"]
    }
    return {
        "metric": metric,
        "frontier": seeds_on_frontier(points),
        "told_apart": {key: tell_apart(values) for key, values in measured.items()},
    }


def table_of(results: dict[str, Any]) -> str:
    """The results in Markdown.

    Args:
        results: from `summarize`, with judged (from `compare_with_untrained`) and left_out.
    """
    algorithms, seeds = results["algorithms"], results["seeds"]
    columns = {
        key: title_and_format
        for key, title_and_format in COLUMNS.items()
        if any(value is not None for own in algorithms.values() for value in own[key]["per_seed"])
    }
    means, singles = [], []
    for name, own in algorithms.items():
        title = f"**{name}**" if name in results["frontier"] and len(algorithms) > 1 else name
        means.append((title, {key: (own[key]["mean"], own[key]["ci95"]) for key in columns}))
        for index, seed in enumerate(seeds):
            cells = {key: (own[key]["per_seed"][index], None) for key in columns}
            if "accuracy" in cells:
                cells["accuracy"] = (cells["accuracy"][0], own["accuracy_ci95"]["per_seed"][index])
            singles.append((f"{name}, seed {seed}", cells))
    equal = ", ".join(f"{name} {_shown(value)}" for name, value in results["equal"].items())
    lines = [
        f"Mean over seeds {', '.join(map(str, seeds))} ± 95 % confidence interval (Student's t over the seeds):\n"
        if len(seeds) > 1
        else f"Seed {seeds[0]}:\n",
        *_markdown(means, columns),
        *_counted(results),
        *(_compared(results) if len(algorithms) > 1 else ()),
        "\nEach seed; ± is the 95 % confidence interval over its held-out prompts:\n",
        *_markdown(singles, columns),
        "\nSeconds are of training, without evaluation and checkpoints; KL is to the untrained policy, on held-out "
        "completions.",
    ]
    if results["judged"]:
        lines += _judged(results["judged"], seeds)
    if results["given_alone"]:
        given = (f"{name} {' '.join(as_words(settings))}" for name, settings in results["given_alone"].items())
        lines.append(f"\nGiven to one algorithm alone: {'; '.join(given)}.")
    lines.append(f"\nEqual in all runs: {equal}.")
    if results["different"]:
        lines.append("\nSettings that differ; an algorithm that is not named has no such setting:\n")
        lines += [_difference(name, values) for name, values in results["different"].items()]
    if results["left_out"]:
        lines.append(
            f"\nLeft out, since only seeds that all have finished are compared: {'; '.join(results['left_out'])}."
        )
    return "\n".join(lines) + "\n"


def _counted(results: dict[str, Any]) -> list[str]:
    """Which completions were sampled, and which were not counted, in Markdown."""
    counts = [int(each) for own in results["algorithms"].values() for each in own["episodes"]["per_seed"]]
    least, most = min(counts), max(counts)
    lines = [
        f"\nEvery run is trained from {f'{least:,} to ' if least < most else ''}{most:,} completions of its steps' "
        "own prompts (episodes). What an algorithm samples besides, such as refills, greedy completions, "
        "continuations or those that values are fitted on, is part of the completions and tokens sampled."
    ]
    if results["teachers"]:
        who = "; ".join(f"{name}: {teacher}" for name, teacher in results["teachers"].items())
        lines.append(f"\nNot counted are the completions, tokens and seconds of a teacher's own training ({who}).")
    return lines


def _compared(results: dict[str, Any]) -> list[str]:
    """The frontier, and what the seeds tell apart, in Markdown."""
    metric, frontier, algorithms = results["metric"], results["frontier"], results["algorithms"]
    num_seeds = len(results["seeds"])
    lines = []
    if frontier:
        by_seed = [f"{name} (with {count} of {num_seeds} seeds)" for name, count in frontier.items()]
        who = ", ".join(by_seed if num_seeds > 1 else frontier)
        by_means = ", by the means over seeds" if num_seeds > 1 else ""
        lines.append(
            f"\n**Frontier** of held-out {metric} against KL{by_means}, bold above: {who}. No other "
            "algorithm is better in one of the two without being worse in the other."
        )
    missing = [name for name, own in algorithms.items() if None in own["kl"]["per_seed"]]
    if missing:
        lines.append(f"\nWithout a KL in some run, so not on a frontier: {', '.join(missing)}.")
    if num_seeds == 1:
        return [
            *lines,
            "\n**Told apart**: nothing, by one seed. A difference between two algorithms may be one between seeds. "
            "Pass more --seeds.",
        ]
    told = {key: compared for key, compared in results["told_apart"].items() if compared["pairs"]}
    if not told:  # values are missing
        return lines
    lines.append(f"\n**Told apart** by {num_seeds} seeds, same seeds and prompts:\n")
    for key, compared in told.items():
        title, form = {"kl": ("KL", ".4f")}.get(key, (f"held-out {key}", ".3f"))
        width = format(typical_interval(compared), form)
        lines.append(f"* {title}: {in_words(compared)} A pair's interval is typically ± {width}.")
    num_pairs = max(len(compared["pairs"]) for compared in told.values())
    lines.append(
        "\nTold apart means: the pair's own 95 % interval (Student's t over its differences by seed) leaves out 0, "
        "and the mean difference is significant at 5 % after Holm's correction for all pairs, with the noise of the "
        f"pair or of a typical one, whichever is larger. Of {num_pairs} pairs without any difference, "
        f"{0.05 * num_pairs:.1f} on average would pass the first test alone. Not told apart does not mean equal. "
        "results.json has every pair."
    )
    return lines


def _judged(judged: dict[str, Any], seeds: list[int]) -> list[str]:
    """What the judges say, in Markdown."""
    judges, prompts = judged["judges"], judged["prompts"]
    columns, untrained, means, singles = {}, {}, {}, {}
    for judge, own in judges.items():
        who = "by the reward of training" if judge == TRAINING else f"by {judge}"
        columns |= {(judge, "score"): (f"score {who}", ".3f"), (judge, "gain"): ("gain", "+.3f")}
        columns |= {(judge, "wins"): ("wins", ".3f")}
        untrained[judge, "score"] = (own["untrained"], own["untrained_ci95"])
        for name, numbers in own["algorithms"].items():
            for key in ("score", "gain", "wins"):
                interval = None if key == "score" else numbers[key]["ci95"]
                means.setdefault(name, {})[judge, key] = (numbers[key]["mean"], interval)
                intervals = numbers[key].get("per_seed_ci95", [None] * len(seeds))
                for seed, value, interval in zip(seeds, numbers[key]["per_seed"], intervals, strict=True):
                    singles.setdefault(f"{name}, seed {seed}", {})[judge, key] = (value, interval)
    return [
        f"\n**Judged**: the untrained policy and the final models answer the same {prompts} held-out prompts, "
        f"{judged['samples']} completions each, and every judge scores these completions. gain: score above that of "
        "the untrained policy. wins: share of pairs, an answer of the trained and one of the untrained policy to the "
        "same prompt, in which the first scores higher; 0.5 is no difference. ± is the 95 % confidence interval over "
        "prompts, of their means over the seeds:\n",
        *_markdown([("untrained", untrained), *means.items()], columns),
        "\nEach seed:\n",
        *_markdown(list(singles.items()), columns),
    ]


def _markdown(
    rows: list[tuple[str, dict[Any, tuple[float | None, float | None]]]], columns: dict[Any, tuple[str, str]]
) -> list[str]:
    titles = [title for title, _ in columns.values()]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, cells in rows:
        shown = [_cell(*cells[key], form) if key in cells else "" for key, (_, form) in columns.items()]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def _cell(value: float | None, interval: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) + (f" ± {format(interval, form.lstrip('+'))}" if interval is not None else "")


def _difference(name: str, values: dict[str, Any]) -> str:
    """One line: each value with the algorithms that have it."""
    having: dict[str, list[str]] = defaultdict(list)
    for algorithm, value in values.items():
        having[_shown(value)].append(algorithm)
    return f"* {name}: " + "; ".join(f"{value} ({', '.join(who)})" for value, who in having.items())


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
