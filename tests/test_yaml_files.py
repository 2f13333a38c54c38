"""Every YAML file is read as UTF-8, costs about its size, and what is wrong with it is named with its line."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common.yaml_files import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml_file

ROOT = Path(__file__).parent.parent
BOMB = "\n".join(
    ["k0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
MERGES = "\n".join(
    ["k0: &a0 {x0: 1, y0: 2}"] + [f"k{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], x{n}: 1}}" for n in range(1, 40)]
)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (BOMB, 6, "aliases"),
        (MERGES, 15, "aliases"),
        ("a: 1\nb: &b [1, *b]", 2, "stands inside itself"),
        ("a: 1\nb: " + "[" * 100_000, 2, "nest"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), 1, f"more than {MAX_DEPTH} deep"),
        ("a: 1\nlearning-rate: 1\nlearning_rate: 2", 3, "there twice"),
        ("a: " + "1" * 5000, 1, "5000 characters"),
        ("a: 0x" + "f" * 5000, 1, "5002 characters"),
        ("a: " + "1:" * 100_000 + "1", 1, "characters"),
        ("a: 1\nb: 2024-13-45", 2, "no timestamp"),
        ("a: !!bool x", 1, "no bool"),
        ("a: !!int ''", 1, "no int"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
        (b"a: 1\nb: \xff", 2, "not UTF-8"),
        ("a: 1\nb: \x1b[2J", 2, "control character '\\x1b'"),
        ("a: \0", 1, "control character"),
        ("a: 1\n- b", 2, "not readable as YAML"),
        ("a: *nowhere", 1, "undefined alias"),
    ],
)
def test_what_is_wrong_is_said_at_once_with_file_and_line(content, line, said):
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        parse_yaml(content if isinstance(content, bytes) else content.encode(), "settings.yaml")
    message = str(caught.value)
    assert message.startswith(f"settings.yaml: line {line}: ") and said in message
    assert len(message) < 400 and message.isprintable() and time.process_time() - began < 1


def test_ordinary_anchors_and_all_plain_values_are_read():
    text = "base: &base {lr: 1e-3, n: 2}\nrun: {<<: *base, n: 3}\nwhen: 2024-05-06\nall: [1.5, null, true, ü, *base]\n"
    assert parse_yaml(text.encode(), "x") == yaml.safe_load(text)


def test_json_with_half_a_pair_of_surrogates_is_read():
    assert parse_yaml(rb'{"a": "\ud83d x"}', "x") == {"a": "\ud83d x"}


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(MAX_BYTES * 1000)
    with pytest.raises(ValueError, match=r"large\.yaml: more than 4 MB"):
        read_yaml_file(tmp_path / "large.yaml")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_files_are_utf8_whatever_the_locale_says(mark, tmp_path):
    (tmp_path / "x.yaml").write_bytes(mark + "name: ü\n".encode())
    code = "import sys; from common.yaml_files import *; print(ascii(read_yaml_file(sys.argv[1])))"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.yaml")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.decode().strip() == ascii({"name": "ü"}), done.stderr.decode()


def test_nothing_else_of_this_project_reads_yaml():
    readers = {
        str(path.relative_to(ROOT))
        for folder in ("common", "examples", "GRPO", "PPO")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"yaml\.(?:safe_|full_|unsafe_)?load(?:_all)?\(", path.read_text())
    }
    assert readers == {"common/yaml_files.py", "common/runs/folder.py"}  # the second reads what it has just written
