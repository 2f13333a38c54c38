"""Which errors of a Python program are messages; tests/test_foreign_names.py has programs that end with one."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.mistakes import is_ours

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_who_asks_for_the_traceback_gets_it(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("from common.config import RLConfig\n\nRLConfig(num_generations='8x')\n")
    for options, status, traceback in (([], 2, 0), (["-X", "dev", "-W", "ignore"], 1, 1)):
        command = [sys.executable, *options, str(script)]
        done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == status and done.stderr.count("Traceback") == traceback
        assert "num_generations='8x'" in done.stderr


@pytest.mark.slow
def test_a_limit_of_the_shell_in_the_way_is_a_message(tmp_path):
    command = f"ulimit -v 300000; exec '{sys.executable}' '{ROOT}/GRPO/grpo.py' --preset cpu --output_dir run"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "ulimit -v 300000" in done.stderr


@pytest.mark.parametrize(
    ("source", "file", "expected"),
    [
        ("raise ValueError(\n    'ours'\n)", ROOT / "common" / "gone.py", True),
        ("raise ValueError from KeyError()", ROOT / "common" / "gone.py", True),
        ("int('a fault')", ROOT / "common" / "gone.py", False),
        ("raise ValueError(int('a fault'))", ROOT / "common" / "gone.py", False),
        ("raise ValueError", "/elsewhere/gone.py", False),
    ],
)
def test_an_error_is_ours_also_when_the_source_was_edited_since(source, file, expected):
    with pytest.raises(ValueError) as raised:
        exec(compile(source, str(file), "exec"))
    assert is_ours(raised.value.__traceback__) is expected
