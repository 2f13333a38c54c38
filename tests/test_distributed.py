"""Two processes by torchrun with gloo give the gradient and the metrics of one, with and without rows on each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def one_step(model: Path, folder: Path, *, num_processes: int, num_dead: int, refills: int) -> dict:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    arguments = [str(model), str(folder / "run"), str(folder / "result.pt"), str(num_dead), str(refills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.distributed_step", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "result.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("num_dead", "refills"), [(0, 0), (1, 0), (2, 0), (2, 1)])
def test_two_processes_take_the_step_of_one(tiny_folder, tmp_path, num_dead, refills):
    one = one_step(tiny_folder, tmp_path / "one", num_processes=1, num_dead=num_dead, refills=refills)
    two = one_step(tiny_folder, tmp_path / "two", num_processes=2, num_dead=num_dead, refills=refills)
    assert one["step"].abs().max() > 1e-4
    torch.testing.assert_close(two["step"], one["step"], atol=2e-5, rtol=1e-4)
    assert two["metrics"].keys() == one["metrics"].keys()
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-5), name
    # Whitening is over the tokens of all processes.
    torch.testing.assert_close(two["moments"], one["moments"], atol=1e-3, rtol=1e-5)
    if num_dead == 2 and not refills:
        assert two["num_rows"].tolist()[1] == 0 < two["num_rows"].tolist()[0]
