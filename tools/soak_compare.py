"""Whether a run that was interrupted and continued is the run that was not: the comparison of tools/soak.py.

Compared are metrics.jsonl except for time and memory, samples.jsonl, every byte of final/, and the weights and
optimizers of the checkpoints that both have. Which checkpoints those are depends on save_every, and may differ.
"""

import json
from pathlib import Path

from common.runs.checkpoints import FINAL_FOLDER, STATE_FILE, damage_of, named_checkpoints
from common.runs.log import METRICS_FILE, SAMPLES_FILE

FROM_THE_MACHINE = ("time/", "memory/")


def difference(run: Path, reference: Path) -> str | None:
    """What differs first between a finished run and its uninterrupted reference; None if nothing does.

    Args:
        run: its folder.
        reference: the folder of the reference.
    """
    for problem in (
        _of_metrics(run / METRICS_FILE, reference / METRICS_FILE),
        _of_samples(run / SAMPLES_FILE, reference / SAMPLES_FILE),
        _of_final(run / FINAL_FOLDER, reference / FINAL_FOLDER),
        *(_of_checkpoint(path, reference / path.name) for path in named_checkpoints(run)),
        _of_names(run, reference),
    ):
        if problem:
            return problem
    return None


def _lines(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(FROM_THE_MACHINE)} for row in rows]


def _of_metrics(path: Path, reference: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        lines, expected = _lines(path), _lines(reference)
        steps = [line["step"] for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path.name} has a line that is none of a run: {error!r}"
    if steps != (known := [line["step"] for line in expected]):
        return f"{path.name} has the steps {steps} instead of {known}"
    for line, other in zip(lines, expected, strict=True):
        names = [
            name for name in line | other if line.get(name) != other.get(name) or (name in line) != (name in other)
        ]
        if names:
            name = names[0]
            return (
                f"{path.name}, step {line['step']}: {name} is {line.get(name)} instead of {other.get(name)}"
                f" ({len(names)} of {len(other)} values differ)"
            )
    return None


def _of_samples(path: Path, reference: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    lines, expected = path.read_bytes().splitlines(), reference.read_bytes().splitlines()
    if len(lines) != len(expected):
        return f"{path.name} has {len(lines)} lines instead of {len(expected)}"
    different = [number for number, pair in enumerate(zip(lines, expected, strict=True), 1) if pair[0] != pair[1]]
    return f"{path.name}: line {different[0]} differs, and {len(different) - 1} more" if different else None


def _files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _of_final(folder: Path, reference: Path) -> str | None:
    if not folder.is_dir():
        return f"{folder.name}/ is missing"
    names, expected = _files(folder), _files(reference)
    if names != expected:
        return f"{folder.name}/ has other files: {', '.join(map(str, sorted({*names} ^ {*expected})))}"
    return next((f"{folder.name}/{name} differs" for name in names if _differ(folder / name, reference / name)), None)


def _differ(path: Path, reference: Path) -> bool:
    return path.read_bytes() != reference.read_bytes()


def _of_checkpoint(checkpoint: Path, reference: Path) -> str | None:
    if damage := damage_of(checkpoint, read=""):
        return f"{checkpoint.name} is damaged: {damage}"
    # The state names the best checkpoint so far, among those that this run has kept; the manifest has its digest.
    names = [path for path in _files(reference) if path.suffix in (".safetensors", ".pt")]
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{checkpoint.name}/{name} is missing"
        if _differ(checkpoint / name, reference / name):
            return f"{checkpoint.name}/{name} differs"
    if not (checkpoint / STATE_FILE).is_file():
        return f"{checkpoint.name}/{STATE_FILE} is missing"
    return None


def leftovers(folder: Path) -> list[str]:
    """What a run has begun to write and not finished."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if ".tmp-" in path.name)


def _of_names(run: Path, reference: Path) -> str | None:
    """The run's folder holds what the reference's does, whatever checkpoints it has kept."""
    if left := leftovers(run):
        return f"left over: {', '.join(left)}"
    names, expected = (
        {path.name for path in folder.iterdir() if not path.name.startswith(("checkpoint-", "best"))}
        for folder in (run, reference)
    )
    return f"in the folder, missing or too many: {', '.join(sorted(names ^ expected))}" if names != expected else None
