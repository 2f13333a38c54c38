"""The folder of a result and the table of several; written completely or not at all, never overwritten."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from torch import Tensor

from common.rollouts import Rollouts
from common.runs.checkpoints import temporary_path
from common.runs.disk import remove_folder, reported
from common.runs.log import finite_or_null, json_line
from common.runs.measures import is_one, sizes_of_k
from common.terminal import one_line

SCORE_FILE, OUTPUTS_FILE, TABLE_FILE = "score.json", "outputs.jsonl", "table.md"

Score = dict[str, Any]


def digest(*content: Any) -> str:
    """Eight hexadecimal digits that change when any of the content does."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def stored_score(folder: Path, identity: dict[str, Any]) -> Score | None:
    """Read the score of an earlier evaluation.

    Args:
        folder: where its result would be.
        identity: everything that the result depends on, by name.

    Returns:
        What score.json holds; None if the folder is new.

    Raises:
        ValueError: the folder holds something else.
    """
    path = folder / SCORE_FILE
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"output_dir={folder}: it exists and holds no {SCORE_FILE}; a result is written only into a new "
                "folder, so that nothing is overwritten. Pass another --output_dir."
            )
        return None
    score = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name, value in identity.items() if score["settings"].get(name) != value]
    if different:
        raise ValueError(
            f"output_dir={folder}: the result there differs from this evaluation in {', '.join(different)}, and "
            "results are not overwritten. Pass another --output_dir, or leave it out for a new folder."
        )
    return score


@reported
def write_result(
    folder: Path, score: Score, rollouts: Rollouts, *, accuracy: str | None, lenient: Tensor | None = None
) -> None:
    """Write score.json, outputs.jsonl and table.md into a temporary folder, then rename it.

    Args:
        folder: new or empty.
        score: the content of score.json.
        rollouts: scored completions, score["num_samples"] adjacent rows per problem.
        accuracy: the reward that gives 1 for a right answer; None if there is none.
        lenient: (B,) bool, the answer is right in any form; None if that was not judged.

    Raises:
        CannotWrite: the file system does not let it; nothing is left.
    """
    temporary = temporary_path(folder)
    try:
        temporary.mkdir(parents=True)
        with open(temporary / OUTPUTS_FILE, "wb") as file:
            file.writelines(map(json_line, _outputs(rollouts, score["num_samples"], accuracy, lenient)))
        (temporary / TABLE_FILE).write_text(table([score]), encoding="utf-8")
        (temporary / SCORE_FILE).write_text(
            json.dumps(finite_or_null(score), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        os.replace(temporary, folder)
    except BaseException:  # a full disk or Ctrl-C
        remove_folder(temporary)
        raise


def _outputs(
    rollouts: Rollouts, num_samples: int, accuracy: str | None, lenient: Tensor | None
) -> Iterator[dict[str, Any]]:
    """One row per problem."""
    correct = is_one(rollouts.parts, accuracy)
    for start in range(0, len(rollouts), num_samples):
        completions = [
            {
                "text": rollouts.completions[row],
                "score": float(rollouts.scores[row]),
                "parts": {name: float(part[row]) for name, part in rollouts.parts.items()},
                **({} if correct is None else {"correct": bool(correct[row])}),
                **({} if lenient is None else {"lenient": bool(lenient[row])}),
                "length": int(rollouts.lengths[row]),
                "truncated": bool(rollouts.truncated[row]),
            }
            | ({"extra": {name: values[row] for name, values in rollouts.extra.items()}} if rollouts.extra else {})
            for row in range(start, start + num_samples)
        ]
        row = {"problem": start // num_samples, "prompt": rollouts.prompts[start]}
        for name, values in rollouts.columns.items():
            row[f"{name}_column" if name in (*row, "completions") else name] = values[start]
        yield row | {"completions": completions}


def _columns(score: Score) -> dict[str, Callable[[Score], str]]:
    """Heads of the table, and how each of their cells is written."""
    columns: dict[str, Callable[[Score], str]] = {}
    has_accuracy, own_rewards = "accuracy" in score, score["settings"].get("rewards") or []
    if has_accuracy:
        columns["accuracy"] = partial(_number, path=("accuracy",))
        columns["95 % interval"] = partial(_interval, path=("accuracy_ci95",))
        ks = [f"pass@{k}" for k in sizes_of_k(score["num_samples"])[1:]]
        names = ks + ["lenient_accuracy"] * ("lenient_accuracy" in score)
        columns |= {name.replace("_", " "): partial(_number, path=(name,)) for name in names}
    if own_rewards or not has_accuracy:
        columns["score"] = partial(_number, path=("score",))
        columns["95 % of scores" if has_accuracy else "95 % interval"] = partial(_interval, path=("score_ci95",))
        several = score["rewards"] if len(score["rewards"]) > 1 else ()
        columns |= {f"reward {name}": partial(_number, path=("rewards", name)) for name in several}
    if "format" in score:
        columns["format"] = partial(_number, path=("format",))
    columns["length"] = partial(_number, path=("length",), digits=1)
    columns["truncated"] = partial(_number, path=("truncated",))
    return columns


def _number(score: Score, *, path: tuple[str, ...], digits: int = 3) -> str:
    value = reduce(getitem, path, score)
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(score: Score, *, path: tuple[str, ...]) -> str:
    ends = reduce(getitem, path, score)
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def table(scores: list[Score]) -> str:
    """Results of the same settings as a Markdown table, one row per model.

    Args:
        scores: the content of each score.json.
    """
    first, settings = scores[0], scores[0]["settings"]
    columns = _columns(first)
    rows = [["model", *map(one_line, columns), "limit", "tokens/s"]]
    rows.append(["---"] * len(rows[0]))
    for score in scores:
        row = [" + ".join(one_line(part, 200) for part in (score["model"], score["adapter"]) if part)]
        row += [cell(score) for cell in columns.values()]
        rows.append([*row, str(score["settings"]["max_completion_length"]), f"{score['tokens_per_second']:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    chosen = ", ".join(f"{name} {settings[name]}" for name in ("temperature", "top_p", "top_k", "seed"))
    title = f"{first['task']}: {first['num_problems']} problems x {first['num_samples']} completions, {chosen}"
    reasons = {
        "num_too_long": "whose prompt is longer",
        "num_left_out": "whose answer is yes, no, true or false, or nothing that could be matched",
    }
    notes = []
    for score in scores:
        named = one_line(score["model"], 200)
        missing = {reason: score[name] for name, reason in reasons.items() if score[name]}
        notes += [f"{named}: without {count} rows {reason}" for reason, count in missing.items()]
    return "\n".join([title, *notes, "", *lines, ""])
