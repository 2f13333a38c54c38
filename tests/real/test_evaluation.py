"""An evaluation of a real model by its command: stopped and started again, it gives what it gives without a stop."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.real.conftest import rows_of, with_root, words

# Long enough that the first problem ends while others are sampled.
SETTINGS = {"task": "gsm8k", "num_samples": 1, "temperature": 0.0, "max_completion_length": 96, "vllm_max_num_seqs": 2}


def outputs(folder: Path) -> list[dict]:
    (file,) = folder.glob("*/outputs.jsonl")
    return rows_of(file)


def num_kept(folder: Path) -> int:
    """Problems whose completions an unfinished evaluation has kept; the first line of its file is about itself."""
    return sum(len(file.read_text().splitlines()) - 1 for file in folder.rglob("*.unfinished.jsonl"))


def test_a_stopped_evaluation_goes_on_and_gives_the_same(model, sums, run, tmp_path):
    settings = SETTINGS | {"model": model, "dataset": sums[1]}
    table = run("common.evaluation", **settings)
    whole = outputs(tmp_path / "evaluations")
    assert len(whole) == 12 and "lenient accuracy" in table
    (tmp_path / "stopped").mkdir()
    command = [sys.executable, "-m", "common.evaluation", *words(settings)]
    place = {"cwd": tmp_path / "stopped", "env": with_root()}
    with subprocess.Popen(command, **place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 300
        while num_kept(tmp_path / "stopped") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read().decode()
    assert "are kept in" in said and not list((tmp_path / "stopped").rglob("outputs.jsonl"))
    again = subprocess.run(command, **place, capture_output=True, text=True)
    assert again.returncode == 0 and "of which are there" in again.stderr
    assert outputs(tmp_path / "stopped" / "evaluations") == whole
