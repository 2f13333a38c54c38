"""The best checkpoint of a run by its held-out metric: which one it is, and the link `best` to its policy.

The pointer says what was evaluated; it is restored on resume only if the checkpoint is still there and whole, so that
a run never promises a best that nobody can load. Step 0, the untrained policy, can be the best and has no checkpoint.
"""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.runs.checkpoints import POLICY_FOLDER, damage_of, list_checkpoints, step_of, temporary_path
from common.runs.log import read_metrics

BEST_LINK = "best"

Best = dict[str, Any]


def better_checkpoint(best: Best | None, step: int, metric: str, value: float) -> Best | None:
    """The best pointer after an evaluation; higher is better, a tie keeps the earlier one.

    Args:
        best: the pointer so far, as stored in `trainer_state.json` under "best", or None.
        step: the step whose checkpoint holds the evaluated weights.
        metric: name of the held-out metric, for example "eval/accuracy".
        value: its value; one that is not finite is never the best.

    Returns:
        {"checkpoint": "checkpoint-<step>", "metric": metric, "value": value} of the better one, or None.
    """
    if not math.isfinite(value) or (best is not None and value <= best["value"]):
        return best
    return {"checkpoint": f"checkpoint-{step}", "metric": metric, "value": value}


def restore_best(folder: Path, best: Best | None, step: int) -> tuple[Best | None, str | None]:
    """The best pointer of a run that continues after `step`.

    If the checkpoint that it names is gone or damaged, the best is the best of those that are left: the evaluations in
    metrics.jsonl up to that step whose checkpoints are whole, and the untrained policy.

    Args:
        folder: the run's folder.
        best: the pointer in the state of the checkpoint that the run continues from.
        step: of that checkpoint.

    Returns:
        The pointer, and a sentence about why it is another one; None if it is the same.
    """
    if best is None or step_of(best["checkpoint"]) == 0:
        return best, None
    lost = folder / best["checkpoint"]
    is_there = lost.exists() or lost.is_symlink()
    damage = damage_of(lost, read=f"{POLICY_FOLDER}/") if is_there else "it is gone"
    if damage is None:
        return best, None
    metric, left = best["metric"], None
    steps = {0, *(step_of(path) for path in list_checkpoints(folder) if path != lost)}
    for line in read_metrics(folder):
        if line["step"] in steps and line["step"] <= step and isinstance(line.get(metric), int | float):
            left = better_checkpoint(left, line["step"], metric, line[metric])
    said = f"{in_words(best)} was the best so far, but {damage}. "
    return left, said + (f"Of what is left, the best is {in_words(left)}." if left else "The next evaluation counts.")


def in_words(best: Best) -> str:
    """Which policy the pointer names, with the value that made it the best."""
    step = step_of(best["checkpoint"])
    name = best["checkpoint"] if step else "the untrained policy (step 0)"
    return f"{name} with {best['metric']} {best['value']:.3f}"


def link_best(folder: Path, best: Best | None) -> None:
    """Have `best` point to the policy in the best checkpoint; where there is none, or no links, there is no `best`.

    Anything but a link under that name is left alone.
    """
    link = folder / BEST_LINK
    if link.exists() and not link.is_symlink():
        return
    target = Path((best or {}).get("checkpoint", "none")) / POLICY_FOLDER  # relative: the folder can be moved
    if not (folder / target).is_dir():
        link.unlink(missing_ok=True)
        return
    with suppress(OSError):  # a file system without links
        temporary = temporary_path(link)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
