"""Two processes by torchrun with gloo give the gradient and the metrics of one, with and without rows on each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


CASES = ["0,0", "1,0", "2,0", "2,1"]  # groups without signal, and whether others are sampled in their place


@pytest.fixture(scope="module")
def steps(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict]:
    """What one process and two processes made of each case."""
    results = {}
    for num_processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"{num_processes} processes")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        done = subprocess.run(
            [*command, "-m", "tests.distributed_step", str(tiny_folder), str(folder), *CASES],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results |= {(num_processes, case): torch.load(folder / case / "result.pt") for case in CASES}
    return results


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(steps, case):
    one, two = steps[1, case], steps[2, case]
    assert one["step"].abs().max() > 1e-4
    torch.testing.assert_close(two["step"], one["step"], atol=2e-5, rtol=1e-4)
    assert two["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-5), name
    # Whitening is over the tokens of all processes.
    torch.testing.assert_close(two["moments"], one["moments"], atol=1e-3, rtol=1e-5)
    if case == "2,0":
        assert two["num_rows"].tolist()[1] == 0 < two["num_rows"].tolist()[0]
