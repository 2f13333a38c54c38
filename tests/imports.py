"""The import graph of the repository, between rooms.

A room is a package of common, a single module of common, an algorithm's folder, or all examples or benchmarks. There
is an arrow when a module of one room imports from another, anywhere in the file; imports for type checkers alone do
not count.

    python -m tests.imports [REPOSITORY]     # prints rooms, arrows, and what each room imports
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTSIDE = {"tests", "tools", "docs", ".venv"}  # not part of the graph


@dataclass(frozen=True)
class Import:
    """One import of one module."""

    module: str
    """Dotted name of the importing module."""
    imported: str
    """The module that is imported."""
    names: tuple[str, ...]
    line: int


@cache
def modules(root: Path = ROOT) -> dict[str, Path]:
    """The project's modules by dotted name; a package is named after its folder."""
    found = {}
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name not in OUTSIDE]
    for path in [path for folder in folders for path in sorted(folder.rglob("*.py"))]:
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1].startswith("test_"):
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(root: Path = ROOT) -> list[Import]:
    """Every import of a module of the project by another."""
    return list(_imports(modules(root)))


def _imports(known: dict[str, Path]) -> Iterator[Import]:
    for module, path in known.items():
        tree = ast.parse(path.read_text())
        for_checkers = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if id(node) in for_checkers:
                continue
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in known:
                        yield Import(module, alias.name, (), node.lineno)
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                whole = [alias.name for alias in node.names if f"{node.module}.{alias.name}" in known]
                for name in whole:
                    yield Import(module, f"{node.module}.{name}", (), node.lineno)
                names = tuple(alias.name for alias in node.names if alias.name not in whole)
                if names:
                    yield Import(module, node.module, names, node.lineno)


def room_of(module: str) -> str:
    """The room that a module belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "common" else parts[0]


def arrows(root: Path = ROOT) -> dict[str, set[str]]:
    """For every room, the other rooms that it imports."""
    found: dict[str, set[str]] = {room_of(module): set() for module in modules(root) if module != "common"}
    for each in imports(root):
        if room_of(each.module) != room_of(each.imported) and "common" not in (each.module, each.imported):
            found[room_of(each.module)].add(room_of(each.imported))
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Rooms that import each other in a circle; none if there is no circle."""
    state: dict[str, int] = defaultdict(int)  # 1: on the way, 2: done
    way: list[str] = []

    def visit(room: str) -> list[str]:
        state[room] = 1
        way.append(room)
        for other in sorted(graph.get(room, ())):
            if state[other] == 1:
                return [*way[way.index(other) :], other]
            if state[other] == 0 and (found := visit(other)):
                return found
        way.pop()
        state[room] = 2
        return []

    return next((found for room in sorted(graph) if state[room] == 0 and (found := visit(room))), [])


def main() -> None:
    """Print the graph."""
    graph = arrows(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    for room, others in sorted(graph.items()):
        print(f"{room:24} {' '.join(sorted(others))}")
    print(f"{len(graph)} rooms, {sum(map(len, graph.values()))} arrows, circle: {' -> '.join(cycle(graph)) or 'none'}")


if __name__ == "__main__":
    main()
