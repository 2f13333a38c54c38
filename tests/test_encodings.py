"""Text files are UTF-8 whatever the locale: every place that opens one says so, and what is printed has no limits."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.toy import ROOT

_ROOMS = ("common", "tools", "examples", "benchmarks", "[A-Z]*")
# Whose `open` is another function.
_OTHERS = {"os", "io", "gzip", "bz2", "lzma", "tarfile", "zipfile", "webbrowser", "Image"}


def without_encoding(text: str) -> Iterator[int]:
    """Lines that open a text file without saying its encoding."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        is_method, called = isinstance(node.func, ast.Attribute), node.func
        name = called.attr if is_method else getattr(called, "id", "")
        is_other = is_method and isinstance(called.value, ast.Name) and called.value.id in _OTHERS
        modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
        modes += node.args[0 if is_method else 1 :][:1]
        is_binary = any("b" in str(mode.value) for mode in modes if isinstance(mode, ast.Constant))
        read = is_method and name == "read_text" and not node.args
        written = is_method and name == "write_text" and len(node.args) == 1
        if read or written or (name == "open" and not is_other and not is_binary):
            yield node.lineno


def test_every_text_file_is_opened_with_its_encoding():
    files = [path for room in _ROOMS for path in ROOT.glob(f"{room}/**/*.py") if not path.name.startswith("test_")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): list(without_encoding(path.read_text(encoding="utf-8"))) for path in files}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    ["path.read_text()", "path.write_text('x')", "open(path)", "open(p, 'w')", "p.open()", "open(p, mode='a')"],
)
def test_a_file_without_one_would_be_seen(code):
    assert list(without_encoding(code)) == [1]


@pytest.mark.parametrize(
    "code", ["open(path, 'rb')", "os.open(path, 0)", "path.read_text('utf-8')", "path.open('wb')"]
)
def test_other_files_are_not(code):
    assert not list(without_encoding(code))


def test_everything_can_be_printed_under_the_c_locale(tmp_path):
    code = "from common.cli import run_script; run_script(lambda: print('\\u00fc \\ud800'))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout == rb"\xfc \ud800" + b"\n", done.stderr


@pytest.mark.slow
def test_names_are_refused_that_other_libraries_cannot_read(tmp_path):
    code = "from common.runs.writable import check_folder; import sys; check_folder(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(Path(tmp_path) / "rün")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "set PYTHONUTF8=1, or LC_ALL=C.UTF-8" in done.stderr
    assert not list(tmp_path.iterdir())
