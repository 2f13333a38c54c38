"""Reads the finished runs of a comparison, and refuses runs that differ in more than their algorithm.

Only seeds that all compared algorithms have finished are used, with equal settings.
"""

from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from common.config import RLConfig
from common.runs.checkpoints import FINAL_FOLDER
from common.runs.folder import CONFIG_FILE, MAY_CHANGE
from common.runs.log import read_metrics
from common.yaml_files import read_yaml_file

# Two runs are comparable when these settings are equal, and all that every algorithm has and that begin with
# EQUAL_PREFIXES.
EQUAL = (
    *("task", "model", "seed", "num_steps", "prompts_per_step", "num_generations", "num_eval_prompts"),
    *("temperature", "max_prompt_length", "max_completion_length", "early_stopping_patience"),
    *("prompt_file", "prompt_weights", "enable_thinking"),
)
EQUAL_PREFIXES = ("dataset", "reward", "eval_")
OF_ALL = frozenset(field.name for field in fields(RLConfig))
# Ends of the metrics that count, step by step, what is sampled besides the completions that are trained from.
ADDITIONAL = ("/completions", "/continuations")
ABSENT = "no such setting"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """One run of one algorithm.

    Attributes:
        algorithm: name of its folder in the repository's root.
        seed: the seed in its folder's name.
        settings: content of config.yaml.
        rows: lines of metrics.jsonl; the first is of the untrained policy.
    """

    algorithm: str
    seed: int
    settings: dict[str, Any]
    rows: list[dict[str, Any]]

    def evaluations(self) -> list[dict[str, Any]]:
        """The lines with a held-out evaluation, each with `seconds`: time of training until then.

        It includes what an algorithm prepares before its first step, but not evaluation and writing checkpoints.

        Raises:
            ValueError: if there are fewer than two.
        """
        spent = [row["time/step"] - row.get("time/eval", 0.0) - row.get("time/save", 0.0) for row in self.rows]
        rows = [row | {"seconds": until} for row, until in zip(self.rows, accumulate(spent), strict=True)]
        evaluations = [row for row in rows if row.get("eval/score") is not None]
        if len(evaluations) < 2:
            raise ValueError(
                f"{self.algorithm}, seed {self.seed}: {len(evaluations)} held-out evaluations, and a comparison needs "
                "one before training and one after. Pass every run an --eval_every above 0, after --."
            )
        return evaluations

    def progress(self) -> tuple[str, float, float]:
        """Name of the held-out metric, accuracy where the task has one, and its value before and after training."""
        first, *_, last = self.evaluations()
        metric = "accuracy" if "eval/accuracy" in last else "score"
        return metric, first[f"eval/{metric}"], last[f"eval/{metric}"]

    def numbers(self) -> dict[str, float | None]:
        """The columns of the table, and accuracy_ci95 over prompts; None for values that the run did not measure."""
        first, *_, last = self.evaluations()
        kl, length = last.get("eval/kl"), last.get("eval/length")
        return {
            "accuracy_before": first.get("eval/accuracy"),
            "accuracy": last.get("eval/accuracy"),
            "accuracy_ci95": last.get("eval/accuracy_ci95"),
            "score_before": first["eval/score"],
            "score": last["eval/score"],
            "kl": kl,
            "kl_per_completion": None if kl is None or length is None else kl * length,
            "length_before": first.get("eval/length"),
            "length": length,
            "seconds_per_episode": last["seconds"] / last["episodes"],
            "episodes": last["episodes"],
            "completions_sampled": last["episodes"] + self._additional(),
            "tokens_sampled": last["tokens"],
            "tokens_trained": sum(row.get("policy/tokens", 0) for row in self.rows),
            "peak_gb": max(row["memory/peak_gb"] for row in self.rows),
        }

    def _additional(self) -> float:
        """Completions that were sampled for another purpose than to be trained on."""
        return sum(value or 0 for row in self.rows for name, value in row.items() if name.endswith(ADDITIONAL))


def run_folder(output_dir: Path, algorithm: str, seed: int) -> Path:
    """The folder of a run of the comparison."""
    return output_dir / f"{algorithm.lower()}-seed{seed}"


def has_finished(folder: Path) -> bool:
    """True once the run has written its last file."""
    return (folder / FINAL_FOLDER).is_dir()


def read_run(folder: Path, algorithm: str, seed: int) -> FinishedRun:
    """Read a run's folder."""
    settings = read_yaml_file(folder / CONFIG_FILE)
    return FinishedRun(algorithm=algorithm, seed=seed, settings=settings, rows=read_metrics(folder))


def comparable_runs(output_dir: Path, algorithms: list[str]) -> tuple[list[FinishedRun], list[str]]:
    """The runs of those seeds that every algorithm with a finished run has finished.

    Returns:
        The runs by algorithm and seed, and what is left out, in words.

    Raises:
        ValueError: if there is none.
    """
    seeds: dict[str, set[int]] = {}
    for name in algorithms:
        after = [path.name.rpartition("-seed")[2] for path in output_dir.glob(f"{name.lower()}-seed*")]
        numbers = {
            int(seed) for seed in after if seed.removeprefix("-").isdecimal()
        }  # others are copies, such as grpo-seed0.bak
        seeds[name] = {seed for seed in numbers if has_finished(run_folder(output_dir, name, seed))}
    shared = set.intersection(*(own for own in seeds.values() if own)) if any(seeds.values()) else set()
    if not shared:
        there = "; ".join(f"{name}: {sorted(own) or 'none'}" for name, own in seeds.items())
        raise ValueError(
            f"finished seeds in {output_dir}: {there}. A fair comparison needs a seed that all algorithms have "
            "finished. Run the same command without --report_only to finish the others, or leave out those that have "
            "not finished: --report_only --algorithms with the rest."
        )
    left_out = [f"{name} (no finished run)" for name, own in seeds.items() if not own]
    for seed in sorted(set().union(*seeds.values()) - shared):
        lacking = [name for name, own in seeds.items() if own and seed not in own]
        left_out.append(f"seed {seed} of all (not finished by {', '.join(lacking)})")
    pairs = [(name, seed) for name, own in seeds.items() if own for seed in sorted(shared)]
    return [read_run(run_folder(output_dir, name, seed), name, seed) for name, seed in pairs], left_out


def must_be_equal(setting: str) -> bool:
    """True for settings that must be equal for a fair comparison of two runs."""
    return setting in EQUAL or (setting in OF_ALL and setting.startswith(EQUAL_PREFIXES))


def check_equal(runs: list[FinishedRun]) -> None:
    """Refuse runs that differ in more than their algorithm and seed.

    Raises:
        ValueError: names the runs, the setting and its values.
    """
    first_of: dict[str, FinishedRun] = {}
    for run in runs:
        for other in (runs[0], first_of.setdefault(run.algorithm, run)):
            _check_pair(run, other)


def _check_pair(run: FinishedRun, other: FinishedRun) -> None:
    same_algorithm = run.algorithm == other.algorithm
    for name in sorted((run.settings.keys() | other.settings.keys()) - MAY_CHANGE):
        own = run.settings.get(name, ABSENT)
        wanted = run.seed if name == "seed" else other.settings.get(name, ABSENT)
        if own != wanted and (same_algorithm or must_be_equal(name)):
            reference = "its folder's name" if name == "seed" else f"{other.algorithm}, seed {other.seed}"
            raise ValueError(
                f"{run.algorithm}, seed {run.seed}: {name} is {own!r} but {wanted!r} in {reference}. Only runs that "
                "differ in nothing but the algorithm can be compared. Pass the setting to every run, after --, with "
                "another --output_dir."
            )
