"""An HTML page to read a run's completions through training.

The page needs no network and no other file, so it can be sent by mail. What a model wrote is data, never markup: the
page stores it as JSON without a "<", its script turns it into text, and no other script is allowed.
"""

import base64
import hashlib
import html
import json
import math
import re
import reprlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

from common.runs.checkpoints import write_file
from common.runs.folder import CONFIG_FILE
from common.runs.log import METRICS_FILE, SAMPLES_FILE, json_line
from common.runs.own_files import check_own_files, what_else
from common.runs.plots import PHASE_COLORS
from common.terminal import one_line
from common.yaml_files import MAX_BYTES, parse_yaml

PAGE_FILE = "samples.html"
PAGE_PARTS = Path(__file__).parent / "assets"
SCRIPTS = ("page.js", "curves.js", "filters.js", "completions.js", "cards.js", "live.js", "start.js")

# A browser opens this much in a second or two; of a longer run the page shows fewer steps, evenly spread.
MAX_ROWS = 10_000
MAX_CHARACTERS = 20_000_000
# Of one text. Longer ones are usually degenerate, which their beginning and end show.
MAX_TEXT = 20_000
# Of a page that is reloaded while the run goes on, so that each reload takes a fraction of a second.
LIVE_SHARE = 0.2
DIGITS = 6  # significant digits of a metric
MAX_NUMBER = 1e300  # differences of larger ones are not finite
MAX_STEP = 2**53  # a browser cannot tell larger ones apart
MAX_LINE = 64 * 2**20  # bytes of a line of a .jsonl file
MAX_FILE = 2 * 2**30  # bytes of such a file, all of whose lines are in memory
# Of a run's metrics, which the page holds as a table; a run of this project has about 50 names.
MAX_STEPS, MAX_METRICS, MAX_PARTS, MAX_NAME = 5_000, 300, 50, 100
MAX_SETTINGS = 1_000

_HALF_PAIR = re.compile("[\ud800-\udfff]")
# A settings file of a few lines can say a list of lists of lists ... with billions of entries.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxstring, _BRIEF.maxother = 3, 30, 30, 200, 200

Row = dict[str, Any]


def write_page(folders: list[Path], output: Path | None = None, *, refresh: float | None = None) -> Path:
    """Write the page of a run, or of several runs side by side.

    Args:
        folders: the runs' folders; a run may still be running.
        output: the page's file; None: samples.html in the folder of the single run.
        refresh: an open page reloads itself every so many seconds, since it is to be written again; None: never.

    Returns:
        The page's file.

    Raises:
        ValueError: a folder is not a run or has no samples, a line is broken, `output` is another file or cannot be
            written.
    """
    output = page_file(folders, output)
    share = (1 if refresh is None else LIVE_SHARE) / len(folders)
    runs = [read_run(folder, share=share) for folder in folders]
    if len({run["name"] for run in runs}) < len(runs):
        runs = [run | {"name": str(folder)} for run, folder in zip(runs, folders, strict=True)]
    page = make_page(runs, refresh=refresh)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_file(output, page.encode())
    except OSError as error:
        raise ValueError(
            f"output={output}: the page cannot be written there ({error.strerror}). Pass --output with a file in a "
            "folder where you may write."
        ) from None
    return output


def page_file(folders: list[Path], output: Path | None) -> Path:
    """The page's file, which is new or an earlier page.

    Args:
        folders: the runs' folders.
        output: None: samples.html in the folder of the single run.

    Raises:
        ValueError: it is another file, or there are several runs and no `output`.
    """
    if output is None and len(folders) > 1:
        raise ValueError(
            f"{len(folders)} runs without --output: a page of several belongs in no run's folder. Pass --output FILE."
        )
    output = Path(output or folders[0] / PAGE_FILE)
    marker = _part("page.html").split("<html")[0].encode()
    if output.is_dir() or (output.is_file() and not output.read_bytes().startswith(marker)):
        raise ValueError(
            f"output={output}: it exists and is not a page of this command, which overwrites nothing else. "
            "Pass --output with a new file."
        )
    return output


def read_run(folder: Path, *, share: float = 1.0) -> dict[str, Any]:
    """What the page shows of a run.

    Args:
        folder: holds metrics.jsonl and samples.jsonl.
        share: of MAX_ROWS and MAX_CHARACTERS that this run may use.

    Returns:
        name, settings (as text), versions, facts, notes, metrics (a list per name, in order of "step"), samples, and
        the time of the last entry in seconds since 1970.

    Raises:
        ValueError: the folder is not a run or has no samples, one of both files is a link, or a line is broken.
    """
    folder = Path(folder)
    check_own_files(folder, (METRICS_FILE, SAMPLES_FILE), setting="RUN")
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
    metrics, num_steps = read_metrics_evenly(folder / METRICS_FILE)
    shown = spread_evenly(samples, share)
    steps = max((row["step"] for row in metrics), default=0)
    facts = [settings.get(name) for name in ("task", "model")]
    facts.append(f"step {steps} of {settings['num_steps']}" if "num_steps" in settings else f"step {steps}")
    return {
        "name": _name(folder.resolve().name),
        "settings": {_setting(name): _setting(value) for name, value in islice(settings.items(), MAX_SETTINGS)},
        "versions": versions,
        "facts": " · ".join(one_line(fact, 200) for fact in facts if fact is not None),
        "notes": [
            *_notes_on_links(folder),
            *notes(settings, samples, len(shown)),
            *_notes_of_metrics(metrics, num_steps),
        ],
        "metrics": columns(metrics),
        "samples": shown,
        "written": (folder / SAMPLES_FILE).stat().st_mtime,
    }


def _notes_on_links(folder: Path) -> list[str]:
    found = what_else(folder / CONFIG_FILE)
    return [f"No settings: {CONFIG_FILE} is {found}, and what is elsewhere is not shown."] if found else []


def read_settings(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of a config.yaml and the versions in its comments; both empty if there is none, or a link.

    Raises:
        ValueError: the file is not a YAML mapping.
    """
    if not path.is_file() or what_else(path):
        return {}, []
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)  # of more, parse_yaml says that it is too much
    try:
        settings, wrong = parse_yaml(content, str(path), written_out=False), f"{path}: not the settings of a run."
    except ValueError as error:
        settings, wrong = None, str(error)
    if not isinstance(settings, dict):
        raise ValueError(f"{wrong} A run's settings are a YAML mapping. Restore or remove the file.")
    comments = [line for line in content.decode().splitlines() if line.startswith("# From step")]
    return settings, [one_line(line.removeprefix("# "), 300) for line in comments[:100]]


def read_metrics_evenly(path: Path) -> tuple[list[Row], int]:
    """The lines of metrics.jsonl, of more than MAX_STEPS some that are evenly spread and the last; and their number.

    Raises:
        ValueError: a line is broken.
    """
    kept: list[Row] = []
    every, number, row = 1, 0, {}
    for number, row in enumerate(read_lines(path, ("step",)), start=1):
        if (number - 1) % every == 0:
            kept.append(row)
        if len(kept) > MAX_STEPS:
            kept, every = kept[::2], 2 * every
    if kept and kept[-1] is not row:
        kept.append(row)
    return kept, number


def _notes_of_metrics(metrics: list[Row], num_steps: int) -> list[str]:
    """Which metrics the page leaves out."""
    found = []
    if num_steps > len(metrics):
        found.append(f"The curves show {len(metrics)} of {num_steps} lines of {METRICS_FILE}, evenly spread.")
    num_names = len({name for row in metrics for name in row})
    if num_names > MAX_METRICS:
        found.append(f"The curves show the first {MAX_METRICS} of {num_names} metrics in {METRICS_FILE}.")
    return found


def read_lines(path: Path, keys: tuple[str, ...]) -> Iterator[Row]:
    """The objects of a .jsonl file; an incomplete last line, which is still being written, is skipped.

    Args:
        path: the file.
        keys: required in each object: a number of steps under "step", text under any other.

    Raises:
        ValueError: a line is broken.
    """
    if (size := path.stat().st_size) > MAX_FILE:
        raise ValueError(
            f"{path}: {size / 2**30:.1f} GB; the page is made of at most {MAX_FILE // 2**30} GB. Pass a copy of the "
            "folder with fewer lines in this file."
        )
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
            if not line.endswith(b"\n") and len(line) < MAX_LINE:
                return  # the last one, which is still being written
            try:
                row = json.loads(line, parse_constant=lambda name: None)
            except (ValueError, RecursionError):  # not JSON, not UTF-8, nested too deeply, or cut off as too long
                row = None
            if not isinstance(row, dict) or not all(_fits(key, row.get(key)) for key in keys):
                raise ValueError(
                    f"{path}: line {number} is not one JSON object with {', '.join(keys)}, as a run writes them "
                    "(step is a whole number from 0 to 2^53). Correct or remove the line."
                )
            yield row


def _fits(key: str, value: Any) -> bool:
    if key == "step":
        return type(value) is int and 0 <= value <= MAX_STEP  # a step of a run, and one that a browser can tell apart
    return isinstance(value, str)


def _sample(row: Row) -> Row:
    """A row of samples.jsonl for the page; values that another version of the project did not write are null."""
    parts = row.get("parts")
    return {
        "step": row["step"],
        "split": _name(row["split"]) if isinstance(row.get("split"), str) else None,
        "prompt": _readable(row["prompt"]),
        "completion": _readable(row["completion"]),
        "score": _number(row.get("score")),
        "parts": _parts(parts) if isinstance(parts, dict) else {},
        "length": _number(row.get("length")),
        "truncated": bool(row.get("truncated")),
    }


def _parts(parts: dict[str, Any]) -> dict[str, float | int | None]:
    return {_name(name): _number(value) for name, value in islice(parts.items(), MAX_PARTS)}


def _number(value: Any) -> float | int | None:
    """The value if a browser can calculate with it."""
    return value if isinstance(value, int | float) and abs(value) <= MAX_NUMBER else None


def _name(text: str) -> str:
    """A name, shortened to MAX_NAME."""
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."


def _setting(value: Any) -> str:
    """A setting as text; of one that is nested or long, the beginning."""
    return _readable(value if isinstance(value, str) else _BRIEF.repr(value))


def _readable(text: str) -> str:
    """The text, shortened to MAX_TEXT, with the replacement character for half a surrogate pair."""
    text = _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)
    left_out = len(text) - MAX_TEXT
    if left_out > 0:
        text = f"{text[: MAX_TEXT // 2]}\n[... {left_out} characters are left out here ...]\n{text[-MAX_TEXT // 2 :]}"
    return text


def spread_evenly(samples: list[Row], share: float = 1.0) -> list[Row]:
    """As many samples as the page can hold: whole steps, evenly spread, with the first and last of each split.

    Args:
        samples: rows with step, split, prompt and completion.
        share: of MAX_ROWS and MAX_CHARACTERS that they may use.
    """
    excess = _excess(samples, share)
    if excess <= 1:
        return samples
    kept = set()
    for split in {row["split"] for row in samples}:
        steps = sorted({row["step"] for row in samples if row["split"] == split})
        number = max(int(len(steps) / excess), 2)
        chosen = {steps[round(index * (len(steps) - 1) / (number - 1))] for index in range(number)}
        kept |= {(split, step) for step in chosen}
    shown = [row for row in samples if (row["split"], row["step"]) in kept]
    excess = _excess(shown, share)
    # Where a few steps have thousands of rows, as in no run of this project, rows are left out too.
    return shown if excess < 2 else shown[:: math.ceil(excess)]


def _excess(samples: list[Row], share: float) -> float:
    """How many times as much as the page can hold."""
    size = sum(len(row["completion"]) for row in samples) + sum(map(len, {row["prompt"] for row in samples}))
    return max(len(samples) / MAX_ROWS, size / MAX_CHARACTERS) / share


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
    names = list(dict.fromkeys(name for row in metrics for name in row))[:MAX_METRICS]
    return {_name(name): [_rounded(row.get(name)) for row in metrics] for name in ["step", *names]}


def _rounded(value: Any) -> float | int | None:
    value = _number(value)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def make_page(runs: list[dict[str, Any]], *, refresh: float | None = None) -> str:
    """The page as text; the same runs make the same page.

    Args:
        runs: from `read_run`.
        refresh: seconds after which an open page reloads itself; None: never.
    """
    prompts = list(dict.fromkeys(row["prompt"] for run in runs for row in run["samples"]))
    number = {prompt: index for index, prompt in enumerate(prompts)}
    shown = [run | {"samples": [row | {"prompt": number[row["prompt"]]} for row in run["samples"]]} for run in runs]
    data = json_line({"runs": shown, "prompts": prompts, "phases": PHASE_COLORS, "refresh": refresh}).decode()
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
