"""shard=full over NCCL: two GPUs take the step of one. It has never been run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_sharding import ROOT, difference, results
from tests.toy import save_toy_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="shards over NCCL need two GPUs"),
]

CASES = ["GRPO", "GRPO,lora", "PPO,fitted", "GRPO,host_steps", "GRPO,offload_steps", "GRPO,steps", "GRPO,bfloat16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of GPUs, the folder with the results of all cases."""
    model, found = save_toy_policy(tmp_path_factory.mktemp("model")), {}
    for number in (1, 2):
        found[number] = tmp_path_factory.mktemp(f"{number} GPUs")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        done = subprocess.run(
            [*command, "-m", "tests.sharded_step", str(model), str(found[number]), *CASES],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.parametrize("case", ["GRPO", "GRPO,lora", "PPO,fitted"])
def test_a_sharded_step_is_that_of_one_gpu(folders, case):
    assert difference(*results(folders, case)) < 1e-4


def test_steps_on_the_host_and_with_offload_are_those_without(folders):
    plain, host, moved = (results(folders, f"GRPO,{name}")[1] for name in ("steps", "host_steps", "offload_steps"))
    for one, other, third in zip(plain["metrics"], host["metrics"], moved["metrics"], strict=True):
        assert other["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=1e-3)
        assert third["policy/grad_norm"] == pytest.approx(one["policy/grad_norm"], rel=1e-5)


def test_in_bfloat16_the_first_ratio_is_1(folders):
    assert results(folders, "GRPO,bfloat16")[1]["metrics"][0]["policy/first_ratio"] == 1.0
