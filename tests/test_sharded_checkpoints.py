"""Checkpoints of models that are spread over processes: complete or absent, and read by any number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.runs.parts import read_description
from tests.own_copy import use_own_copies
from tests.sharded_runs import NUM_STEPS, STEP, copy_until, trainer_of
from tests.toy import metrics_of

ROOT = Path(__file__).parent.parent


def start(num_processes: int, model: Path, folder: Path, *names: str) -> None:
    """Do this in so many processes, and see that all of them end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    done = subprocess.run(
        [*command, "-m", "tests.sharded_runs", str(model), str(folder), *names],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one, two and three processes, and what those that continue them have written."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = ("grpo", "lora", "ppo", "host")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_own_copies(monkeypatch)
        for kind in ("grpo", "ppo"):
            trainer_of(toy_folder, folder / f"{kind} whole", kind, shard="none").train()
            copy_until(folder / f"{kind} whole", folder / f"{kind} from one")
        two = [f"{verb}:{kind}" for kind in kinds for verb in ("whole", "again")]
        start(2, toy_folder, folder, *two, "rest:grpo from one", "rest:ppo from one", "full_disk", "stopped")
        start(3, toy_folder, folder, *(f"again:{kind}" for kind in kinds))
        for kind in kinds:
            copy_until(folder / kind, folder / f"{kind} on 1")
            shard = "none" if kind == "grpo" else "full"  # alone, both keep models whole
            trainer_of(toy_folder, folder / f"{kind} on 1", kind, shard=shard).train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "lora", "ppo", "host"])
def test_a_run_of_two_goes_on_alone_on_two_and_on_three(runs, kind):
    expected = metrics_of(runs / kind)
    assert metrics_of(runs / f"{kind} on 2") == expected
    for num in (1, 3):
        lines = metrics_of(runs / f"{kind} on {num}")
        for name in ("policy/loss", "policy/grad_norm", "value/loss", "score"):
            if name in expected[STEP + 1]:
                assert lines[STEP + 1][name] == pytest.approx(expected[STEP + 1][name], abs=1e-6), (num, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_of_one_goes_on_with_shards(runs, kind):
    expected, lines = metrics_of(runs / f"{kind} whole"), metrics_of(runs / f"{kind} from one")
    assert len(lines) == len(expected) and read_description(runs / f"{kind} from one/checkpoint-{NUM_STEPS}")
    assert lines[STEP + 1]["policy/loss"] == pytest.approx(expected[STEP + 1]["policy/loss"], abs=1e-6)
