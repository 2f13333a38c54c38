"""A process that hangs in an operation of NCCL: the others say so before NCCL ends them."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.toy import ROOT

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two GPUs")
@pytest.mark.parametrize("name", ["SIGSTOP", "SIGKILL"])
def test_a_process_that_is_lost_in_an_update_ends_the_run_with_a_message(tiny_folder, tmp_path, name):
    settings = json.dumps({"num_steps": 3, "save_every": 1})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/lost_process.py", str(tiny_folder), str(tmp_path / "run"), settings, "20", f"{name}:1:3:update"]
    begun = time.monotonic()
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)
    assert done.returncode != 0 and time.monotonic() - begun < 200
    state = "stopped" if name == "SIGSTOP" else "gone"
    said = re.findall(rf"^error: process 1 of 2 .* is {state}", done.stderr, re.MULTILINE)
    assert len(said) == 1, done.stderr
    assert "continues from checkpoint-2" in done.stderr
