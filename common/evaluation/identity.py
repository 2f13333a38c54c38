"""What an evaluation depends on: digests that change with the weights, the prompts and the code of rewards.

Two evaluations with the same sampling_identity have the same completions, whatever judges them.
"""

import ast
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
from common.data.cache import content_digest
from common.evaluation.results import digest
from common.rewards.load import source_of
from common.runs.sources import Source, commit_on_hub

# Settings that act on scores alone.
_JUDGING = ("rewards", "reward_weights", "reward_format", "reward_time_limit", "reward_memory_limit", "accuracy")

_INSTALLED = {Path(path).resolve() for path in sysconfig.get_paths().values()}
_OURS = Path(common.__file__).resolve().parent

_loaded: dict[Path, str] = {}  # digests of the modules that rewards import, when this process had just loaded them


def sampling_identity(settings: dict[str, Any], prompts: Sequence[list[int]]) -> dict[str, Any]:
    """The part of an evaluation's identity that its completions depend on.

    Args:
        settings: everything that the result depends on, by name.
        prompts: token ids of each.
    """
    judging = (*_JUDGING, "reward_sources", "problems")  # of the problems, completions see only the prompt
    kept = {name: value for name, value in settings.items() if name not in judging}
    return kept | {"prompts": digest([list(map(int, ids)) for ids in prompts])}


def weights_digest(source: Source) -> str:
    """A digest that changes with the weights: commit on the hub, or sizes and times of the files in a folder."""
    folders = [Path(name) for name in (source.base, source.adapter) if name is not None]
    commit = None if folders[0].is_dir() else commit_on_hub(str(folders.pop(0)))
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    return digest(commit, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def reward_digest(name: str) -> str | None:
    """A digest that changes with the code of a function, or with a reward model; None for a reward of the task.

    Args:
        name: as in the setting `rewards`; a function has been loaded.

    Raises:
        ValueError: a module that the function uses was edited after this process had loaded it.
    """
    if ":" in name:
        file, *imported = reward_files(name) or [None]
        return file and digest(file.read_bytes().hex(), *(_digest_of_loaded(name, each) for each in imported))
    return weights_digest(Source(base=name, what=name)) if Path(name).is_dir() or "/" in name else None


def reward_files(where: str) -> list[Path]:
    """The file of a function, and the modules that it and they import anywhere in them, also within functions.

    Modules are looked for beside the file, or in the function's own package, in the working directory and in
    PYTHONPATH. Installed packages and nanoRLHF itself are left out.

    Args:
        where: file.py:function or module:function, which has been loaded.

    Returns:
        Existing files, that of the function first; none if it has none, as in a C library.
    """
    file = source_of(where)
    if file is None:
        return []
    file = file.resolve()
    packages = [] if where.partition(":")[0].endswith(".py") else _packages_of(file)
    top = [file, *packages][-1]
    places = [Path.cwd(), *map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    places = [place.resolve() for place in places]
    if top.parent not in _INSTALLED:
        places.insert(0, top.parent)
    found = [file, *(package / "__init__.py" for package in packages)]
    for each in found:  # grows on the way
        for level, name in _imports(each):
            if level:
                beside = each.parents[level - 1 : level]
            else:
                beside = [top.parent, *places] if name.partition(".")[0] == top.stem else places
            files = next(filter(None, (_files_of(place, name) for place in beside)), [])  # of the first place
            found += [one for one in files if one not in found and _OURS not in one.parents]
    return [file, *sorted(set(found) - {file})]


def _digest_of_loaded(where: str, file: Path) -> str:
    """The digest of a module's file; Python loads a module once, so it must be what this process has loaded."""
    now = content_digest(file)
    others = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    same_name = (Path(each) for each in others if isinstance(each, str) and Path(each).name == file.name)
    if any(each.resolve() == file for each in same_name) and _loaded.setdefault(file, now) != now:
        raise ValueError(
            f"rewards={where!r}: {file}, which it imports, was edited after this process had loaded it, and "
            "Python loads a module once. Start the evaluation in a new process."
        )
    return now


def _packages_of(file: Path) -> list[Path]:
    """The folders of the packages that a module is in, the outermost last."""
    packages = []
    for folder in file.parents:
        if not (folder / "__init__.py").is_file():
            break
        packages.append(folder)
    return packages


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    """The modules that a file may import, each with how many packages up it begins; 0: anywhere."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes()))) if file.suffix == ".py" else []
    except (SyntaxError, ValueError):  # it cannot be imported either
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [node.module] if node.module else []
            yield from ((node.level, ".".join([*start, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and _is_import(node.func) and node.args:
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if isinstance(name, str):
                yield len(name) - len(name.lstrip(".")), name.lstrip(".")


def _is_import(function: ast.expr) -> bool:
    """Whether it is importlib.import_module or __import__."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return name in ("import_module", "__import__")


def _files_of(place: Path, name: str) -> list[Path]:
    """The files below a folder that Python runs for `import a.b.c`, where c may be a name in a.b."""
    files = []
    for part in filter(None, name.split(".")):
        place = place / part
        files += [file for file in (place / "__init__.py", place.with_name(f"{part}.py")) if file.is_file()][:1]
    return files
