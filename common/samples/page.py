"""Writes an HTML page to read a run's completions through training: ``python -m common.samples RUN [RUN ...]``.

The page needs no network and no other file, so it can be sent by mail. What a model wrote is data, never markup: the
page stores it as JSON without a "<", its script turns it into text, and no other script is allowed.
"""

import argparse
import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from string import Template
from typing import Any

import yaml

from common.runs.checkpoints import write_file
from common.runs.folder import CONFIG_FILE
from common.runs.log import METRICS_FILE, SAMPLES_FILE, json_line
from common.runs.plots import PHASE_COLORS

PAGE_FILE = "samples.html"
PAGE_PARTS = Path(__file__).parent / "assets"
SCRIPTS = ("page.js", "curves.js", "completions.js", "start.js")

# A browser opens this much in a second or two; of a longer run the page shows fewer steps, evenly spread.
MAX_ROWS = 10_000
MAX_CHARACTERS = 20_000_000
# Of one text. Longer ones are usually degenerate, which their beginning and end show.
MAX_TEXT = 20_000
DIGITS = 6  # significant digits of a metric

_HALF_PAIR = re.compile("[\ud800-\udfff]")

Row = dict[str, Any]


def write_page(folders: list[Path], output: Path | None = None) -> Path:
    """Write the page of a run, or of several runs side by side.

    Args:
        folders: the runs' folders; a run may still be running.
        output: the page's file; None: samples.html in the folder of the single run.

    Returns:
        The page's file.

    Raises:
        ValueError: a folder is not a run or has no samples, a line is broken, or `output` is another file.
    """
    if output is None and len(folders) > 1:
        raise ValueError(
            f"{len(folders)} runs without --output: a page of several belongs in no run's folder. Pass --output FILE."
        )
    output = Path(output or folders[0] / PAGE_FILE)
    _check_free(output)
    runs = [read_run(folder, share=1 / len(folders)) for folder in folders]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [run | {"name": str(folder)} for run, folder in zip(runs, folders, strict=True)]
    page = make_page(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, page.encode())
    return output


def _check_free(output: Path) -> None:
    """Refuse to overwrite anything but an earlier page."""
    marker = _part("page.html").split("<html")[0].encode()
    if output.is_dir() or (output.is_file() and not output.read_bytes().startswith(marker)):
        raise ValueError(
            f"output={output}: it exists and is not a page of this command, which overwrites nothing else. "
            "Pass --output with a new file."
        )


def read_run(folder: Path, *, share: float = 1.0) -> dict[str, Any]:
    """What the page shows of a run.

    Args:
        folder: holds metrics.jsonl and samples.jsonl.
        share: of MAX_ROWS and MAX_CHARACTERS that this run may use.

    Returns:
        name, settings (as text), versions, facts, notes, metrics (a list per name, in order of "step") and samples.

    Raises:
        ValueError: the folder is not a run or has no samples, or a line is broken.
    """
    folder = Path(folder)
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(
            f"{folder}: there is no {METRICS_FILE} in it, so it is not the folder of a run that has started. Pass the "
            "folder that the training script printed, such as runs/grpo-countdown-seed0-1a2b3c."
        )
    if not (folder / SAMPLES_FILE).is_file():
        raise ValueError(
            f"{folder}: there is no {SAMPLES_FILE} in it, whose completions the page shows. Wait for the first step, "
            "or train with --samples_every above 0; completions that a run did not save cannot be recovered."
        )
    settings, versions = read_settings(folder / CONFIG_FILE)
    samples = [_sample(row) for row in read_lines(folder / SAMPLES_FILE, ("step", "prompt", "completion"))]
    metrics = read_lines(folder / METRICS_FILE, ("step",))
    shown = spread_evenly(samples, share)
    steps = max((row["step"] for row in metrics), default=0)
    facts = [settings.get(name) for name in ("task", "model")]
    facts.append(f"step {steps} of {settings['num_steps']}" if "num_steps" in settings else f"step {steps}")
    return {
        "name": folder.resolve().name,
        "settings": {name: str(value) for name, value in settings.items()},
        "versions": versions,
        "facts": " · ".join(str(fact) for fact in facts if fact is not None),
        "notes": notes(settings, samples, len(shown)),
        "metrics": columns(metrics),
        "samples": shown,
    }


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of a config.yaml and the versions in its comments; both empty if there is no such file.

    Raises:
        ValueError: the file is not a YAML mapping.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: not the settings of a run, which are a YAML mapping. Restore or remove the file.")
    return settings, [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# From step")]


def read_lines(path: Path, keys: tuple[str, ...]) -> list[Row]:
    """The objects of a .jsonl file; an incomplete last line, which is still being written, is skipped.

    Args:
        path: the file.
        keys: required in each object: an integer under "step", text under any other.

    Raises:
        ValueError: a line is broken.
    """
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=lambda name: None)
        except ValueError:  # not JSON, or not UTF-8
            row = None
        kinds = {key: int if key == "step" else str for key in keys}
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(
                f"{path}: line {number} is not one JSON object with {', '.join(keys)}, as a run writes them. Correct "
                "or remove the line."
            )
        rows.append(row)
    return rows


def _sample(row: Row) -> Row:
    """A row of samples.jsonl for the page; values that another version of the project did not write are null."""
    return {
        "step": row["step"],
        "split": row.get("split"),
        "prompt": _readable(row["prompt"]),
        "completion": _readable(row["completion"]),
        "score": row.get("score"),
        "parts": row.get("parts") or {},
        "length": row.get("length"),
        "truncated": bool(row.get("truncated")),
    }


def _readable(text: str) -> str:
    """The text, shortened to MAX_TEXT, with the replacement character for half a surrogate pair."""
    text = _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)
    left_out = len(text) - MAX_TEXT
    if left_out <= 0:
        return text
    return f"{text[: MAX_TEXT // 2]}\n[... {left_out} characters are left out here ...]\n{text[-MAX_TEXT // 2 :]}"


def spread_evenly(samples: list[Row], share: float = 1.0) -> list[Row]:
    """As many samples as the page can hold: whole steps, evenly spread, with the first and last of each split.

    Args:
        samples: rows with step, split, prompt and completion.
        share: of MAX_ROWS and MAX_CHARACTERS that they may use.
    """
    size = sum(len(row["completion"]) for row in samples) + sum(map(len, {row["prompt"] for row in samples}))
    excess = max(len(samples) / MAX_ROWS, size / MAX_CHARACTERS) / share
    if excess <= 1:
        return samples
    kept = set()
    for split in {row["split"] for row in samples}:
        steps = sorted({row["step"] for row in samples if row["split"] == split})
        number = max(int(len(steps) / excess), 2)
        chosen = {steps[round(index * (len(steps) - 1) / (number - 1))] for index in range(number)}
        kept |= {(split, step) for step in chosen}
    return [row for row in samples if (row["split"], row["step"]) in kept]


def notes(settings: dict[str, Any], samples: list[Row], num_shown: int) -> list[str]:
    """What the page lacks, why, and what to do about it."""
    splits = {row["split"] for row in samples}
    found = []
    if settings.get("samples_every") == 0 and "train" not in splits:
        found.append(
            "No completions of training prompts: the run has samples_every=0. --samples_every 5 saves some of every "
            "fifth step, also when an interrupted run continues."
        )
    if "eval" not in splits:
        found.append(
            "No held-out prompts, whose completions could be compared from step to step: the run has made no "
            "evaluation. --eval_every 10 evaluates every ten steps, on a task with held-out prompts."
        )
    if num_shown < len(samples):
        found.append(
            f"This page shows {num_shown} of {len(samples)} completions, of evenly spread steps; all are in "
            f"{SAMPLES_FILE}."
        )
    return found


def columns(metrics: list[Row]) -> dict[str, list[float | None]]:
    """The lines of metrics.jsonl as one list per name, None where a line lacks it."""
    names = dict.fromkeys(name for row in metrics for name in row)
    return {name: [_rounded(row.get(name)) for row in metrics] for name in names}


def _rounded(value: Any) -> float | int | None:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    return value if isinstance(value, int) else None


def make_page(runs: list[dict[str, Any]]) -> str:
    """The page as text; the same runs make the same page.

    Args:
        runs: from `read_run`.
    """
    prompts = list(dict.fromkeys(row["prompt"] for run in runs for row in run["samples"]))
    number = {prompt: index for index, prompt in enumerate(prompts)}
    shown = [run | {"samples": [row | {"prompt": number[row["prompt"]]} for row in run["samples"]]} for run in runs]
    data = json_line({"runs": shown, "prompts": prompts, "phases": PHASE_COLORS}).decode()
    style, script = _part("page.css"), "".join(map(_part, SCRIPTS))
    return Template(_part("page.html")).substitute(
        title=html.escape(" and ".join(run["name"] for run in runs)),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        # In JSON a "<" occurs only inside text; its escape means the same there and cannot end the element.
        data=data.replace("<", "\\u003c"),
    )


def _part(name: str) -> str:
    return (PAGE_PARTS / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash by which the page's Content-Security-Policy allows a script or style; it forbids all others."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def main(args: list[str] | None = None) -> None:
    """Write the page of the runs on the command line and print its path."""
    parser = argparse.ArgumentParser(prog="python -m common.samples", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the page; default for one run: RUN/{PAGE_FILE}")
    given = parser.parse_args(args)
    print(write_page(given.runs, given.output).resolve())
