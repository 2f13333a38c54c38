"""What the runs of a comparison are given: all of them after `--`, one algorithm by `--for` and `--teacher`.

Which settings an algorithm has is read from the `SETTINGS` on top of its script, where every setting stands; nothing
is imported.
"""

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common.foreign_names import ON_COMMAND_LINE, unknown_settings
from common.runs.writable import make_folder
from examples.compare_algorithms.processes import run_environment
from examples.compare_algorithms.runs import must_be_equal

ARGUMENTS_FILE = "arguments.json"
# Settings that the comparison sets for each run, or that would make the runs differ.
RESERVED = ("seed", "output_dir", "preset", "resume")
# The model that an algorithm learns from. There is no default for it, so without one an algorithm is left out.
TEACHER = "teacher"

# Settings of single algorithms: by the name of the folder, then by that of the setting.
Own = dict[str, dict[str, str]]


def check_passed_on(words: list[str]) -> None:
    """Refuse a setting for all runs that the comparison sets itself.

    Raises:
        ValueError: names it.
    """
    for word in words:
        if word.startswith("--") and _name(word) in RESERVED:
            raise ValueError(
                f"-- {word}: this script sets {_name(word)} for every run, so that runs can be compared and "
                "continued. Pass --seeds, --output_dir or --preset before the --."
            )


def own_settings(options: argparse.Namespace, chosen: dict[str, Path]) -> Own:
    """The settings that one algorithm has been given alone.

    Args:
        options: `own` (the words after each --for) and `teacher`.
        chosen: scripts of the compared algorithms, by name.

    Returns:
        Those of each algorithm that has any. A teacher goes to all that learn from one; --for counts more.

    Raises:
        ValueError: an algorithm or a setting that is not there, a setting that must be equal in all runs, or a
            teacher of whom nobody learns.
    """
    found: Own = {}
    if options.teacher is not None:
        learners = [name for name, script in chosen.items() if TEACHER in written_settings(script)]
        if not learners:
            raise ValueError(
                f"teacher={options.teacher}: none of {', '.join(chosen)} has a setting {TEACHER}, so nobody would "
                "learn from it. Leave out --teacher, or add an algorithm that has it to --algorithms."
            )
        found = {name: {TEACHER: options.teacher} for name in learners}
    by_lower = {name.lower(): name for name in chosen}
    for given, *words in options.own:
        if given.lower() not in by_lower:
            raise ValueError(
                f"--for {given}: it is not among the compared algorithms, {', '.join(chosen)}. Write --for, one of "
                "these, and its settings as NAME=VALUE."
            )
        name = by_lower[given.lower()]
        found[name] = found.get(name, {}) | _read(name, words, written_settings(chosen[name]))
    return found


def _read(algorithm: str, words: list[str], known: dict[str, Any]) -> dict[str, str]:
    """The settings in the words after --for and the algorithm's name."""
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name):
            raise ValueError(
                f"--for {algorithm} {word}: each word after the algorithm is one setting with its value. Write "
                f"--for {algorithm} {name or 'NAME'}=VALUE."
            )
        name = _name(name)
        if name in RESERVED or must_be_equal(name):
            raise ValueError(
                f"--for {algorithm} {word}: {name} must be equal in all runs, or they cannot be compared. Pass it to "
                "every run: --seeds, --output_dir and --preset before the --, other settings after it."
            )
        settings[name] = value
    if not words:
        raise ValueError(f"--for {algorithm}: without a setting. Write --for {algorithm} NAME=VALUE.")
    owner, where = f"{algorithm}Config", f"after --for {algorithm}"
    message = unknown_settings(settings, known, where=where, form=ON_COMMAND_LINE, owner=owner) if known else None
    if message:
        raise ValueError(message)
    return settings


def without_teacher(chosen: dict[str, Path], own: Own, passed_on: list[str]) -> list[str]:
    """Algorithms that learn from a teacher, and have none.

    Args:
        chosen: scripts by name.
        own: settings of single algorithms.
        passed_on: arguments of every run.
    """
    if TEACHER in map(_name, passed_on):
        return []
    lacking = {name for name, script in chosen.items() if written_settings(script).get(TEACHER, ...) is None}
    return [name for name in chosen if name in lacking and TEACHER not in own.get(name, ())]


def written_settings(script: Path) -> dict[str, Any]:
    """The settings on top of a script with their values; ... for a value that is no literal.

    Returns:
        By name; empty if the script has no `SETTINGS = Something(...)`.
    """
    for node in ast.parse(script.read_text(encoding="utf-8"), script).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "SETTINGS" in names:
                return {part.arg: _value(part.value) for part in node.value.keywords if part.arg}
    return {}


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ...


def as_words(settings: dict[str, str]) -> list[str]:
    """Settings as the arguments of a script."""
    return [f"--{name}={value}" for name, value in settings.items()]


def try_settings(script: Path, words: list[str], own: list[str]) -> None:
    """Have a script check settings of its own by its memory plan, which loads nothing: a mistake must not cost hours.

    Args:
        script: of the algorithm.
        words: settings of every run.
        own: those that this algorithm has alone.

    Raises:
        ValueError: with what the script says.
    """
    command = [sys.executable, str(script), "--plan", *words, *own]
    done = subprocess.run(command, env=run_environment(), capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().rpartition("error: ")[2]
        raise ValueError(
            f"{script.parent.name} with {' '.join(own)}: {said or f'its --plan ends with status {done.returncode}'}"
        )


def keep_arguments(output_dir: Path, every: list[str], own: Own, running: list[str]) -> None:
    """Refuse other arguments in the same folder: finished runs are not repeated, so they would not notice them.

    An algorithm that has not run there yet may get settings of its own.

    Args:
        output_dir: of the comparison.
        every: arguments of every run.
        own: settings of single algorithms.
        running: the algorithms that are going to run.

    Raises:
        ValueError: what was given before, and what now.
    """
    make_folder(output_dir)
    stored = _stored(output_dir)
    if stored and stored["all"] != every:
        raise ValueError(
            f"{' '.join(every)}: the runs in {output_dir} were started with {' '.join(stored['all'])}, and only runs "
            "with equal settings can be compared. Pass the same settings to continue, or another --output_dir."
        )
    kept = dict(stored["for"]) if stored else {}
    for name in running:
        before, now = (as_words(each.get(name, {})) for each in (kept, own))
        has_begun = any(path.is_dir() for path in output_dir.glob(f"{name.lower()}-seed*"))
        if has_begun and before != now:
            raise ValueError(
                f"{name} with {' '.join(now) or 'no setting of its own'}: its runs in {output_dir} were started with "
                f"{' '.join(before) or 'none'}, and all of them need the same. Pass the same --for and --teacher to "
                "continue, or another --output_dir."
            )
        kept.pop(name, None)
        if name in own:
            kept[name] = own[name]
    content = {"all": every, "for": dict(sorted(kept.items()))}
    (output_dir / ARGUMENTS_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def given_alone(output_dir: Path) -> Own:
    """The settings that single algorithms of a comparison were given."""
    return (_stored(output_dir) or {"for": {}})["for"]


def _stored(output_dir: Path) -> dict[str, Any] | None:
    path = output_dir / ARGUMENTS_FILE
    if not path.exists():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    # Older comparisons have a list, that of all runs.
    return {"all": stored, "for": {}} if isinstance(stored, list) else stored


def _name(word: str) -> str:
    """The setting that a word of a command line is about."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")
