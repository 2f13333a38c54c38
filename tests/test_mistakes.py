"""A mistake in a script of one's own is a message with its line; whatever else goes wrong keeps its traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
from common.tasks import Task
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer

def make():
    {line}

make()
"""


def run(tmp_path: Path, line: str, *options: str) -> subprocess.CompletedProcess:
    (tmp_path / "script.py").write_text(SCRIPT.format(line=line))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *options, "script.py"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


MISTAKES = {
    "value": ('GRPOConfig(model="tiny", num_generations="8x")', "num_generations='8x'"),
    "trainer": ('GRPOTrainer(GRPOConfig(model="tiny"), reward_funcs=[len])', "here reward_funcs is Task("),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_project_refuses_is_a_message_with_the_line_of_the_script(tmp_path, name):
    line, part = MISTAKES[name]
    done = run(tmp_path, line)
    assert done.returncode == 2 and done.stdout == ""
    assert "script.py, line 6: " in done.stderr
    assert part in done.stderr and "Traceback" not in done.stderr and done.stderr.count("\n") <= 8


@pytest.mark.slow
@pytest.mark.parametrize("line", ['int("x")', 'raise ValueError("mine")'])
def test_other_errors_keep_their_traceback(tmp_path, line):
    done = run(tmp_path, line)
    assert done.returncode == 1 and "Traceback" in done.stderr and "line 6, in make" in done.stderr


@pytest.mark.slow
def test_so_do_all_for_who_asks_for_it(tmp_path):
    done = run(tmp_path, MISTAKES["value"][0], "-X", "dev", "-W", "ignore")
    assert done.returncode == 1 and "Traceback" in done.stderr and "num_generations='8x'" in done.stderr
