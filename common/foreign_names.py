"""What a setting that does not exist here is answered with, for users who know its name from another library.

foreign_names.yaml holds the names; tools/names.py makes the table of docs/from-trl.md of it. A suggestion must be
near, or there is none: a wrong one costs more than "see --help".
"""

import ast
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.mistakes import ROOT
from common.yaml_files import read_yaml_file

NAMES_FILE = Path(__file__).with_suffix(".yaml")

# How similar two names must be for one to be taken for a slip of the other (difflib's ratio, 1 for equal names).
NEAR = 0.8
# Answers in one message, which then has at most eight lines.
MAX_ANSWERS = 6

# How a setting is written, in the three places where one can be given.
ON_COMMAND_LINE, IN_FILE, IN_PYTHON = "--{name} {value}", "{name}: {value}", "{name}={value}"


@dataclass(frozen=True, kw_only=True)
class ForeignName:
    """What a name of another library means here; foreign_names.yaml describes the fields.

    Attributes:
        library: and part of it.
        group: a heading.
        names: those that this is the answer to.
    """

    library: str
    group: str
    names: tuple[str, ...]
    ours: str | None = None
    how: str = ""
    note: str = ""
    also: tuple[str, ...] = ()
    none: str = ""

    @property
    def is_same(self) -> bool:
        """Whether these are settings here, and mean the same."""
        return not self.ours and not self.none


@cache
def foreign_names() -> tuple[ForeignName, ...]:
    """All rows of foreign_names.yaml."""
    rows = []
    for library, groups in read_yaml_file(NAMES_FILE).items():
        for group, answers in groups.items():
            for names, answer in answers.items():
                parts = {"ours": answer} if isinstance(answer, str) else dict(answer or {})
                parts["also"] = tuple(parts.get("also", ()))
                rows.append(ForeignName(library=library, group=group, names=tuple(names.split(", ")), **parts))
    return tuple(rows)


@cache
def algorithm_settings() -> dict[str, frozenset[str]]:
    """The settings of each algorithm, by the name of its folder, read from the files without importing them."""
    folders = sorted(file.parent for file in ROOT.glob("*/*_trainer.py") if _is_trainer(file))
    files = [ROOT / "common" / "config.py"]
    for folder in folders:  # settings may be built on a class beside the trainer
        beside = [file for file in sorted(folder.glob("*.py")) if not file.stem.startswith("test_")]
        files += sorted(beside, key=_is_trainer)  # the trainer last
    classes = [
        node
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    found: dict[str, frozenset[str]] = {}
    for node in classes:  # a base comes before what is built on it
        own = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}
        bases = [found.get(base.id, frozenset()) for base in node.bases if isinstance(base, ast.Name)]
        found[node.name] = frozenset(own).union(*bases)
    names = [folder.name for folder in folders]
    return {name: found[f"{name}Config"] for name in names if f"{name}Config" in found}


def _is_trainer(file: Path) -> bool:
    return file.stem == f"{file.parent.name.lower()}_trainer"


def unknown_settings(
    given: Mapping[str, object], names: Collection[str], *, where: str, form: str, owner: str
) -> str | None:
    """The message about settings that nothing reads.

    Args:
        given: settings with their values; None: no value is known.
        names: of the settings that exist.
        where: they are given, for the message.
        form: ON_COMMAND_LINE, IN_FILE or IN_PYTHON.
        owner: name of the class of settings; that of an algorithm ends in Config.

    Returns:
        At most eight lines: what each one is called here, or why there is none. None if all exist.
    """
    # A heading may have the name of a setting, such as optimizer, and no setting takes a block.
    unknown = {
        name: value
        for name, value in given.items()
        if name.replace("-", "_") not in names or (form == IN_FILE and isinstance(value, dict))
    }
    if not unknown:
        return None
    answers = [(name, _answer(name, value, names, form, owner)) for name, value in unknown.items()]
    if len(answers) == 1:
        return f"unknown setting {answers[0][0]!r} {where}: {answers[0][1]}"
    lines = [f"unknown settings {where}:", *(f"  {name}: {answer}" for name, answer in answers[:MAX_ANSWERS])]
    if rest := [name for name, _ in answers[MAX_ANSWERS:]]:
        lines.append(f"  and {', '.join(rest)}; docs/from-trl.md has the names of other libraries")
    return "\n".join(lines)


def _answer(name: str, value: object, names: Collection[str], form: str, owner: str) -> str:
    if isinstance(value, dict):
        return _about_block(value, names, form)
    plain = name.replace("-", "_").rpartition(".")[2]  # as hydra has it: actor.optim.lr
    if plain in names:
        return f"settings have no groups. Write {_written(form, plain, value)}."
    if answer := _renamed(plain, value, names, form):
        return answer
    # A command has few settings, and what is near to one of them is more likely meant than a setting of training.
    near = None if owner.endswith("Config") else _nearest(plain, names, names)
    if near is None and (answer := _missing(plain, owner, form)):
        return answer
    near = near or _nearest(plain, names, _all_names(names))
    if near is None:
        return f"nothing reads it. {_overview(owner, form)}"
    answer = "" if near in names else _renamed(near, value, names, form) or _missing(near, owner, form)
    return f"nothing reads it. Did you mean {near}? {answer[:1].upper()}{answer[1:]}".rstrip()


def _row(name: str) -> ForeignName | None:
    return next((row for row in foreign_names() if name in row.names), None)


def _renamed(name: str, value: object, names: Collection[str], form: str) -> str:
    """The answer to another library's name of one of the settings; empty if it is none."""
    row = _row(name)
    own = next((each for each in (*row.also, row.ours) if each in names), None) if row else None
    if own is None:
        return ""
    if own == row.ours and row.how:
        return f"it is {own} here: {_sentence(row.how)}"
    return f"it is {own} here. Write {_written(form, own, value)}." + (f" {_sentence(row.note)}" if row.note else "")


def _missing(name: str, owner: str, form: str) -> str:
    """The answer to what exists only in other algorithms, or in other libraries; empty if it exists nowhere."""
    row, algorithms = _row(name), algorithm_settings()
    ours = name if any(name in settings for settings in algorithms.values()) else row and row.ours
    if ours is None:
        return _sentence(row.none) if row else ""
    is_ours = "it is" if ours == name else f"it is {ours},"
    if not owner.endswith("Config"):
        return f"{is_ours} a setting of the algorithms, which this command does not have. {_overview(owner, form)}"
    having = [algorithm for algorithm, settings in algorithms.items() if ours in settings]
    reason = f": {row.none}" if row and row.none else ""
    return f"{is_ours} a setting of {_listed(having)}, which {owner.removesuffix('Config')} does not have{reason}."


def _about_block(block: dict, names: Collection[str], form: str) -> str:
    """The answer to a heading with settings below it; the example is its first setting, as it is called here."""
    inner = {str(name): value for name, value in block.items()}
    text = f"a block with {', '.join(inner) or 'nothing'}: settings are flat, one on a line, without a heading."
    place = " at the beginning of a line" if form == IN_FILE else ""
    for name, value in inner.items():
        if name in names:
            return f"{text} Write {_written(form, name, value)}{place}."
        if "Write" in (answer := _renamed(name, value, names, form)):
            return f"{text} {name}: {answer.rstrip('.')}{place}."
    return text


def _all_names(names: Collection[str]) -> list[str]:
    """Settings first, then those of other algorithms and libraries."""
    elsewhere = {each for row in foreign_names() for each in row.names}.union(*algorithm_settings().values())
    return [*names, *sorted(elsewhere.difference(names))]


def _nearest(name: str, names: Collection[str], candidates: Collection[str]) -> str | None:
    """The candidate that a name was meant to be; None if none is near.

    Args:
        name: that nothing reads.
        names: of settings. One of these may be incomplete, or have a word too many.
        candidates: of equally near ones the first is taken.
    """
    begun = [each for each in names if each.startswith(name)]
    if len(begun) == 1 and len(begun[0]) <= 2 * len(name):
        return begun[0]
    words = [each for each in names if f"_{name}_" in f"_{each}_" or f"_{each}_" in f"_{name}_"]
    words = [each for each in words if max(len(each), len(name)) <= 2 * min(len(each), len(name))]
    if len(words) == 1:
        return words[0]
    ratios = {each: difflib.SequenceMatcher(None, each, name).ratio() for each in candidates}
    best = max(ratios, key=ratios.__getitem__)
    return best if ratios[best] >= NEAR else None


def _written(form: str, name: str, value: object) -> str:
    if form == IN_PYTHON:
        return form.format(name=name, value=repr(value))
    shown = str(value).lower() if isinstance(value, bool) else "" if value is None else value
    return form.format(name=name, value=shown).strip()


def _overview(owner: str, form: str) -> str:
    return f"The settings are the fields of {owner}." if form == IN_PYTHON else "See --help for every setting."


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."
