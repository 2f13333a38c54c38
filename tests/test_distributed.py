"""Two processes with gloo, under a torchrun each, give gradient and metrics of one, with and without rows on each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.environment import check_launch
from tests.forked import launch
from tests.toy import metrics_of, toy_trainer

ROOT = Path(__file__).parent.parent


# Groups without signal; 1, 2, 3: others are sampled beside, in their place, in vain; and where gradients add up.
CASES = ["0,0", "1,0", "2,0", "2,1", "2,2", "2,3", "2,0,host"]


def on_nodes(count: int) -> list[str]:
    """The words for torchrun's agents on so many nodes, all of them this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [f"--nnodes={count}", "--rdzv_backend=c10d", f"--rdzv_endpoint={address}", "--local_addr=127.0.0.1"]


@pytest.fixture(scope="module")
def steps(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict]:
    """What one process, and two processes under an agent each, made of each case."""
    folders = {number: tmp_path_factory.mktemp(f"{number} processes") for number in (1, 2)}
    words = {number: ["-m", "tests.distributed_step", tiny_folder, folders[number], *CASES] for number in folders}
    launch(1, words[1])
    command = [sys.executable, "-m", "torch.distributed.run", *on_nodes(2), "--nproc_per_node=1", *map(str, words[2])]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    agents = [subprocess.Popen(command, **options) for _ in range(2)]
    said = [agent.communicate()[0] for agent in agents]
    assert not any(agent.returncode for agent in agents), "\n".join(said)[-3000:]
    return {(number, case): torch.load(folders[number] / case / "result.pt") for number in folders for case in CASES}


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
    if case in ("2,2", "2,3"):
        of_refills = [one["metrics"][f"refill/{name}"] for name in ("rounds", "filled", "left_empty", "completions")]
        assert of_refills == ([2, 2, 0, 12] if case == "2,2" else [2, 0, 2, 16])
        assert one["metrics"]["zero_advantage"] == (0 if case == "2,2" else 0.5)
    if case == "2,3":  # after the last round the step goes on as without refills
        assert torch.equal(two["step"], steps[2, "2,0"]["step"])
    if case.startswith("2,0"):
        assert two["num_rows"].tolist()[1] == 0 < two["num_rows"].tolist()[0]


LAUNCH = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def launched_with(monkeypatch):
    """Leaves only these variables of a launcher in the environment."""

    def put(*names: str, **values: str) -> None:
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in ({name: LAUNCH[name] for name in names} | values).items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("given", ["RANK WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK", "RANK LOCAL_RANK WORLD_SIZE"])
def test_a_process_that_cannot_find_the_others_is_refused_before_anything_is_loaded(launched_with, tmp_path, given):
    launched_with(*given.split())
    with pytest.raises(ValueError) as caught:
        toy_trainer(tmp_path / "no model", tmp_path / "run")
    said, message = str(caught.value).partition(", without ")[::2]
    assert said == f"{', '.join(f'{name}={LAUNCH[name]}' for name in given.split())} in the environment"
    missing = [name for name in LAUNCH if name not in given.split()]
    assert message.startswith(f"{', '.join(missing)}: ")
    assert "torchrun --nproc_per_node" in message and "accelerate launch" in message
    assert "`env " + " ".join(f"-u {name}" for name in given.split()) in message


@pytest.mark.parametrize("given", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "-1"}, LAUNCH])
def test_one_process_and_one_that_a_launcher_has_started_are_not(launched_with, given):
    launched_with(**given)
    check_launch()


ONE_HELD_OUT = """
import sys
from pathlib import Path
import common
from tests.toy import algorithms, toy_config, toy_task

def share_of_longest(completions, **columns):
    longest = max(map(len, completions))
    return [len(text) / longest for text in completions]

task = toy_task()
task.eval, task.rewards, task.reward_weights, task.accuracy = task.eval[:1], {"share": share_of_longest}, None, None
config = toy_config(Path(sys.argv[1]), Path(sys.argv[2]), eval_every=1, num_steps=1)
trainer = algorithms()["GRPO"].trainer(config, task=task)
trainer.train()
trainer.accelerator.state.destroy_process_group()
"""


@pytest.mark.slow
def test_a_process_without_a_held_out_prompt_takes_part_in_evaluations(tiny_folder, tmp_path):
    (tmp_path / "run.py").write_text(ONE_HELD_OUT)
    for count in (1, 2):
        launch(count, [tmp_path / "run.py", tiny_folder, tmp_path / str(count)])
    one, two = (metrics_of(tmp_path / str(count)) for count in (1, 2))
    before = {name: value for name, value in one[0].items() if name.startswith("eval/")}
    assert before["eval/score"] == 1.0 and before.items() <= two[0].items()
