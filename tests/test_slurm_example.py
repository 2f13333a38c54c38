"""examples/slurm/train.sbatch on a machine without SLURM: stand-ins for srun and scontrol, two agents on 127.0.0.1."""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys

import pytest

from tests.toy import ROOT, metrics_of, toy_trainer

SCRIPT = ROOT / "examples/slurm/train.sbatch"
# As SLURM does, it starts the command once for each node, and ends with a status that is not 0 if one has it.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
shift  # torchrun
for node in $(seq "$SLURM_JOB_NUM_NODES"); do
    "$PYTHON" -m torch.distributed.run --local_addr 127.0.0.1 "$@" &
    agents+=($!)
done
status=0
for agent in "${agents[@]}"; do wait "$agent" || status=$?; done
exit $status
"""


def free_port() -> int:
    """One of those that the script makes of a job's number."""
    while True:
        port = 20000 + secrets.randbelow(20000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@pytest.mark.slow
def test_the_script_for_slurm_goes_on_after_a_kill_on_two_nodes_as_one_process_would(tiny_folder, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\necho another\n")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    slurm |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    settings = {"num_steps": 3, "save_every": 1}
    run = ["tests/lost_process.py", str(tiny_folder), str(tmp_path / "run"), json.dumps(settings), "60"]
    run.append("SIGKILL:1:3:sampling")
    options = {"cwd": ROOT, "env": os.environ | slurm | {"PATH": path}, "capture_output": True, "text": True}
    done = subprocess.run(["bash", str(SCRIPT), *run], timeout=400, **options)
    assert done.returncode == 0, done.stderr
    assert "without TORCH_DISABLE_SHARE" not in done.stderr
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1, done.stderr
    toy_trainer(tiny_folder, tmp_path / "one", **settings).train()
    for line, other in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "one"), strict=True):
        assert line == pytest.approx(other, abs=1e-5)
