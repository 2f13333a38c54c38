"""Reward functions by name: file.py:function, module:function, and either with arguments for a factory.

A file finds the modules beside it, as `python file.py` would: its folder comes first on Python's search path while it
is imported, and last afterwards, for what its functions import when they are called. A module is found wherever Python
finds modules, and in the working directory. Nothing is executed twice.
"""

import ast
import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from common.rewards.signatures import check_signature, shown

# FILE_OR_MODULE:FUNCTION or FILE_OR_MODULE:FACTORY(name=value, ...)
_WRITTEN = re.compile(r"(?P<place>.+?):(?P<name>\w+)(?P<call>\(.*\))?", re.DOTALL)
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

_stamps: dict[str, tuple[int, int]] = {}  # by path, of the files that were imported here: time and size


def reward_name(where: str) -> str:
    """The name of such a reward in metrics: that of its function."""
    return _WRITTEN.fullmatch(where)["name"]


def source_of(where: str) -> Path | None:
    """The file that has the function of a reward that was loaded; None if there is none, as in a C library."""
    place = _WRITTEN.fullmatch(where)["place"]
    if place.endswith(".py"):
        return Path(place)
    spec = importlib.util.find_spec(place)  # not sys.modules: its file may have been loaded under another name
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def load_reward(where: str) -> Any:
    """Load a user's reward function.

    Args:
        where: file.py:function, or module:function such as trl.rewards:accuracy_reward. A function that makes rewards
            is called, with literals by name: trl.rewards:get_soft_overlong_punishment(max_completion_len=256, ...).

    Returns:
        The function.

    Raises:
        ValueError: if there is no such file, module or function, it cannot be imported, or it can be no reward.
    """
    written = _WRITTEN.fullmatch(where)
    if written is None:
        raise ValueError(
            f"rewards={where!r}: need a function. Pass --rewards path/to/file.py:function or module:function."
        )
    place, name, call = written["place"], written["name"], written["call"]
    is_file = place.endswith(".py") or os.sep in place
    module = _file(where, Path(place)) if is_file else _module(where, place)
    found = getattr(module, name, None)  # modules may make their names when they are asked for, as those of trl do
    if call is not None and callable(found):
        found = _made(where, found, call)
    if isinstance(found, type):
        raise ValueError(
            f"rewards={where!r}: {name} is a class, and a reward is one of its objects. Write `judge = {name}(...)` "
            f"there and pass {place}:judge, or pass {place}:{name}(...) with its arguments."
        )
    if not callable(found):
        names = [each for each in dir(module) if not each.startswith("_")]
        functions = [each for each in names if callable(getattr(module, each, None))]
        raise ValueError(
            f"rewards={where!r}: {_file_of(module) or place} defines no function {name!r}. Pass the name of a "
            f"function in it: {', '.join(functions)}."
        )
    check_signature(name, found)
    return found


def _file(where: str, path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(
            f"rewards={where!r}: there is no file {path}, or it does not end in .py. Pass --rewards "
            "path/to/file.py:function, or module:function."
        )
    path = path.resolve()
    known = _loaded(path)
    if known is not None:
        return known
    # A dataclass in the file looks up its own module, so register it; the path as name cannot hide another module.
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = set(sys.modules)
    with _first_on_the_path(path.parent):
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's file may raise anything
            del sys.modules[spec.name]
            raise ValueError(
                f"rewards={where!r}: {path} cannot be imported: {type(error).__name__}: {error}."
                f"{_taken_by(path, error)} Fix the file."
            ) from error
    _stamps[str(path)] = _stamp(path)
    loaded = [sys.modules[name] for name in set(sys.modules) - before if name in sys.modules]
    _check_neighbours(where, path.parent, [module, *(each for each in loaded if _is_in(each, path.parent))])
    return module


def _module(where: str, name: str) -> ModuleType:
    if not _MODULE.fullmatch(name):
        raise ValueError(
            f"rewards={where!r}: {name!r} is neither a file that ends in .py nor a module. Pass --rewards "
            "path/to/file.py:function, or module:function."
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last: a file there must not take the place of an installed module
    try:
        spec = importlib.util.find_spec(name)
        known = spec and spec.origin and spec.has_location and _loaded(Path(spec.origin).resolve())
        return known or importlib.import_module(name)
    except Exception as error:  # the user's module may raise anything
        if isinstance(error, ModuleNotFoundError) and name.startswith(str(error.name)):
            raise ValueError(
                f"rewards={where!r}: there is no module {name}, neither in the working directory {os.getcwd()} nor on "
                "Python's search path. Pass --rewards path/to/file.py:function, or install it."
            ) from None
        raise ValueError(
            f"rewards={where!r}: the module {name} cannot be imported: {type(error).__name__}: {error}. Fix or "
            "install it."
        ) from error


def _made(where: str, factory: Any, call: str) -> Any:
    """What a factory gives for the arguments that are written behind its name."""
    try:
        arguments = ast.parse(f"f{call}", mode="eval").body
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in arguments.keywords}
        if arguments.args or None in given:
            raise ValueError("each needs its name")
        return factory(**given)
    except Exception as error:  # the factory may raise anything
        raise ValueError(
            f"rewards={where!r}: {shown(factory)} cannot be called with {call}: {type(error).__name__}: {error}. Pass "
            "its arguments by name, as literals: name:factory(length=256, kind='soft')."
        ) from error


def _loaded(path: Path) -> ModuleType | None:
    """The module that has this file already, which may be the script itself; None if the file was changed since."""
    for name, module in list(sys.modules.items()):
        file = Path(_file_of(module))
        if file.name == path.name and file.resolve() == path:
            return module if name != str(path) or _stamps.get(name) == _stamp(path) else None
    return None


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _first_on_the_path(folder: Path) -> Iterator[None]:
    """The folder is where Python looks first; afterwards it is where it looks last."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _check_neighbours(where: str, folder: Path, modules: list[ModuleType]) -> None:
    """Refuse a file that got another module than the one beside it.

    Args:
        where: the reward.
        folder: of its file.
        modules: the file's, and those of its folder that it loaded.
    """
    for module in modules:
        for name in sorted(_imports(Path(module.__file__))):
            beside, got = _beside(folder, name), sys.modules.get(name)
            if beside and got and name not in sys.stdlib_module_names and not _is_in(got, folder):
                raise ValueError(
                    f"rewards={where!r}: {module.__file__} imports {name}, and Python has loaded another module of "
                    f"that name already: {_file_of(got) or 'a package'}, not {beside}. It knows one of a "
                    "name. Rename one of them, and what imports it."
                )


def _taken_by(path: Path, error: Exception) -> str:
    """If a file's import failed because another module has the name of the one beside it."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    beside, got = _beside(path.parent, name), sys.modules.get(name)
    if not (beside and got) or _is_in(got, path.parent):
        return ""
    return f" {beside} is not what it gets: another module {name} is loaded already. Rename that file."


def _imports(path: Path) -> set[str]:
    """First parts of the names that a file imports, anywhere in it."""
    if path.suffix != ".py":
        return set()
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in found}


def _beside(folder: Path, name: str) -> Path | None:
    """The file of a module or package of this name in a folder."""
    files = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((file for file in files if name and file.is_file()), None)


def _is_in(module: ModuleType, folder: Path) -> bool:
    file = _file_of(module)
    return bool(file) and Path(file).resolve().is_relative_to(folder)


def _file_of(module: ModuleType) -> str:
    """Empty for built-in modules, packages without a file, and other objects that stand for modules."""
    return (vars(module).get("__file__") if isinstance(module, ModuleType) else None) or ""
