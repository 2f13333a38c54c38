"""Reads what judges said, and compares each run with the untrained policy, prompt by prompt.

The reward of training and every judge scored the same completions, those of the untrained policy and of each run's
final model, to the same held-out prompts.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.evaluation.results import OUTPUTS_FILE, SCORE_FILE
from examples.compare_algorithms.intervals import mean_with_interval
from examples.compare_algorithms.runs import FinishedRun, run_folder

JUDGED_FOLDER = "judged"
UNTRAINED = "untrained"
TRAINING = "training"
# Two results can be compared prompt by prompt if these are equal; see `Evaluation`.
SAME_COMPLETIONS = ("problems", "num_samples", "temperature", "top_p", "top_k", "max_completion_length", "seed")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores that one judge gave the completions of one model.

    Attributes:
        by_prompt: (prompts, samples) float64.
        lengths: (prompts, samples) in tokens.
        settings: everything that they depend on, by name.
    """

    by_prompt: np.ndarray
    lengths: np.ndarray
    settings: dict[str, Any]


def judged_folder(output_dir: Path, who: str, judge: str) -> Path:
    """The folder of one evaluation: who answered, and who judged."""
    return output_dir / JUDGED_FOLDER / who / judge


def mean_score(folder: Path) -> float:
    """The mean score of an evaluation."""
    return json.loads((folder / SCORE_FILE).read_text(encoding="utf-8"))["score"]


def read_scores(folder: Path) -> Scores | None:
    """Read an evaluation; None if it is not there."""
    if not (folder / SCORE_FILE).is_file():
        return None
    settings = json.loads((folder / SCORE_FILE).read_text(encoding="utf-8"))["settings"]
    rows = [json.loads(line)["completions"] for line in (folder / OUTPUTS_FILE).read_bytes().splitlines()]
    by_prompt, lengths = (np.array([[each[key] for each in row] for row in rows]) for key in ("score", "length"))
    return Scores(by_prompt=by_prompt.astype(float), lengths=lengths, settings=settings)


def judges_of(output_dir: Path) -> list[str]:
    """Who has judged the untrained policy: the reward of training first, then the judges in alphabetical order."""
    folders = (output_dir / JUDGED_FOLDER / UNTRAINED).glob(f"*/{SCORE_FILE}")
    return sorted((path.parent.name for path in folders), key=lambda name: (name != TRAINING, name))


def compare_with_untrained(output_dir: Path, runs: list[FinishedRun]) -> dict[str, Any] | None:
    """What every judge says of the runs.

    Args:
        output_dir: of the comparison.
        runs: comparable runs, by algorithm and seed.

    Returns:
        As JSON: prompts, samples, and for each judge in `judges`: its rewards, the score of the untrained policy with
        the half width of its 95 % interval over prompts, and for each algorithm `score` (as `mean_with_interval`),
        `gain` and `wins` (see `_effects`) and `length`. A run that a judge has not judged has None. None if nothing
        was judged.

    Raises:
        ValueError: a result is of other prompts or completions than that of the untrained policy.
    """
    judges = judges_of(output_dir)
    if not judges:
        return None
    found = {}
    for judge in judges:
        before = read_scores(judged_folder(output_dir, UNTRAINED, judge))
        own: dict[str, list[Scores | None]] = {}
        for run in runs:
            folder = judged_folder(output_dir, run_folder(output_dir, run.algorithm, run.seed).name, judge)
            after = read_scores(folder)
            if after is not None:
                _check_same(before, after, folder)
            own.setdefault(run.algorithm, []).append(after)
        per_prompt = before.by_prompt.mean(1)
        found[judge] = {
            "untrained": float(per_prompt.mean()),
            "untrained_ci95": _half_width(per_prompt),
            "untrained_length": float(before.lengths.mean()),
            "algorithms": {name: _of_algorithm(before, scores) for name, scores in own.items()},
        }
    prompts, samples = before.by_prompt.shape
    return {"prompts": prompts, "samples": samples, "judges": found}


def _of_algorithm(before: Scores, seeds: list[Scores | None]) -> dict[str, Any]:
    def means(values: str) -> dict[str, Any]:
        return mean_with_interval([None if s is None else float(vars(s)[values].mean()) for s in seeds])

    gains = [None if s is None else s.by_prompt.mean(1) - before.by_prompt.mean(1) for s in seeds]
    wins = [None if s is None else win_rates(before.by_prompt, s.by_prompt) for s in seeds]
    return {"score": means("by_prompt"), "length": means("lengths"), "gain": _effects(gains), "wins": _effects(wins)}


def win_rates(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """(prompts,) share of the pairs of completions of one prompt in which the later one scores higher; a tie is half.

    Args:
        before: (prompts, samples) scores.
        after: the same for the other model.
    """
    difference = after[:, :, None] - before[:, None, :]  # (prompts, samples, samples)
    return (0.5 + 0.5 * np.sign(difference)).mean((1, 2))


def _effects(seeds: list[np.ndarray | None]) -> dict[str, Any]:
    """A mean over prompts of one number for each, with the half width of its 95 % interval over prompts.

    Args:
        seeds: for each (prompts,) float; None if it was not judged.

    Returns:
        mean and ci95 of the prompts' means over the seeds, None if a seed is missing; per_seed and per_seed_ci95.
    """
    each = {
        "per_seed": [None if values is None else float(values.mean()) for values in seeds],
        "per_seed_ci95": [None if values is None else _half_width(values) for values in seeds],
    }
    if any(values is None for values in seeds):
        return {"mean": None, "ci95": None} | each
    together = np.mean(seeds, axis=0)
    return {"mean": float(together.mean()), "ci95": _half_width(together)} | each


def _half_width(values: np.ndarray) -> float | None:
    """1.96 standard errors of the mean of independent values; None with fewer than two."""
    return 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def _check_same(before: Scores, after: Scores, folder: Path) -> None:
    different = [name for name in SAME_COMPLETIONS if before.settings.get(name) != after.settings.get(name)]
    if different:
        raise ValueError(
            f"{folder}: its completions differ from those of the untrained policy in {', '.join(different)}, and only "
            f"answers to the same prompts, sampled alike, can be compared. Delete {folder.parent} and "
            f"{folder.parent.with_name(UNTRAINED)}, and repeat the command with --judge."
        )
