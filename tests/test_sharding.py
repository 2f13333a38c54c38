"""shard=full: two processes take the steps of one, whatever is trained and however; and what it refuses."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common.config import RLConfig
from common.sharding import blocks, check_sharding, describe_sharding
from PPO.ppo_trainer import PPOConfig
from tests.forked import launch
from tests.toy import LORA, algorithms, save_toy_policy

ROOT = Path(__file__).parent.parent

# See tests/sharded_step.py.
# An adapter is the same in every algorithm: one with a reference that is the policy without it, one of a value model,
# and one that is not trained.
ONE_STEP = [*algorithms(), "GRPO,lora", "PPO,lora", "Distill,adapter", "GRPO,checkpointing", "PPO,fitted"]
ALONE = ["GRPO,alone", "GRPO,lora,alone"]
STEPS = ["GRPO,steps", "GRPO,host_steps", "GRPO,offload_steps"]
ROUNDED = ["GRPO,bfloat16", "PPO,host_steps,bfloat16"]
CASES = [*ONE_STEP, *ALONE, *STEPS, *ROUNDED]


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of processes, the folder with the results of all cases."""
    found = {number: tmp_path_factory.mktemp(f"{number} processes") for number in (1, 2)}
    for number, folder in found.items():
        launch(number, ["-m", "tests.sharded_step", tiny_folder, folder, *CASES])
    return found


def results(folders: dict[int, Path], case: str) -> tuple[dict, dict]:
    """What one process and two made of a case."""
    return tuple(torch.load(folders[number] / f"{case}.pt") for number in (1, 2))


def fact(folders: dict[int, Path], name: str) -> list[dict]:
    """What each of two processes found."""
    return [torch.load(folders[2] / f"{name}-{process}.pt") for process in (0, 1)]


def difference(one: dict, two: dict) -> float:
    """The largest difference of the change of weights, as a share of the largest change."""
    largest = max(float(change.abs().max()) for change in one["change"])
    assert largest > 1e-4
    pairs = zip(one["change"], two["change"], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def assert_same_metrics(one: dict, two: dict, *, within: float) -> None:
    for ours, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=within, abs=within), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_STEP)
def test_a_sharded_step_of_each_algorithm_is_that_of_one_process(folders, case):
    one, two = results(folders, case)
    assert difference(one, two) < 1e-5
    assert_same_metrics(one, two, within=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALONE)
def test_a_process_without_rows_takes_part_and_changes_no_bit(folders, case):
    one, two = results(folders, case)
    assert two["rows"].flatten().tolist() == [*one["rows"].flatten().tolist(), 0]
    assert difference(one, two) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_sharded_steps_write_the_metrics_of_one_process(folders, case):
    one, two = results(folders, case)
    assert len(one["metrics"]) == (3 if "host" in case else 6)
    assert_same_metrics(one, two, within=1e-5)


@pytest.mark.slow
def test_moving_shards_between_device_and_host_changes_no_bit(folders):
    assert difference(results(folders, "GRPO,steps")[1], results(folders, "GRPO,offload_steps")[1]) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUNDED)
def test_gathered_in_bfloat16_the_first_ratio_is_1_and_the_step_that_of_rounded_weights(folders, case):
    one, two = results(folders, case)
    assert {metrics["policy/first_ratio"] for metrics in two["metrics"]} == {1.0}
    assert difference(one, two) > 0
    for name in ("policy/grad_norm", "policy/loss", "score"):
        assert two["metrics"][0][name] == pytest.approx(one["metrics"][0][name], rel=0.02, abs=1e-3)


@pytest.mark.slow
def test_a_pass_without_gradient_between_backward_and_step_changes_nothing(folders):
    for found in fact(folders, "a_pass_without_gradient_between_backward_and_step"):
        assert found["with"] == found["without"]


@pytest.mark.slow
def test_the_learner_has_the_parts_also_while_the_model_is_whole(folders):
    for found in fact(folders, "names_while_whole"):
        named, own, number = found["within"]
        assert named < own == number  # named_parameters() has the embedding whole
        assert found["before"] == found["after"] == (number, number, number)


@pytest.mark.slow
def test_after_an_error_in_a_pass_nothing_stays_whole_and_the_next_one_is_right(folders):
    assert fact(folders, "an_error_in_a_pass") == [{"left whole": 0, "equal": True}] * 2


@pytest.mark.slow
def test_all_processes_name_a_weight_that_is_not_finite_on_one(folders):
    first, second = fact(folders, "a_weight_that_is_not_finite_elsewhere")
    assert first == second
    assert first["names"] == ["model.layers.1.mlp.down_proj.weight"] and first["names"][0] in first["said"]


@pytest.mark.slow
def test_sharded_models_are_given_packed_rows(folders):
    for found in fact(folders, "rows_that_share_a_prompt"):
        assert found["packs"] and found["difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch has no way to drop its notes")
def test_passes_without_a_backward_pass_leave_nothing_behind(folders):
    assert fact(folders, "passes_without_a_backward_pass") == [{"noted": 0}] * 2


@pytest.mark.slow
def test_layers_that_share_a_weight_are_gathered_with_the_whole(folders):
    for found in fact(folders, "layers_that_share_a_weight"):
        assert found["blocks"] == ["layers.0", "layers.2"] and found["difference"] < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch sums gradients that all processes have")
def test_an_expert_without_a_token_on_one_process_gets_the_gradient_of_the_other(folders):
    for found in fact(folders, "an_expert_that_one_process_does_not_use"):
        assert found["difference"] < 1e-6


@pytest.mark.slow
def test_the_host_has_masters_of_its_own_parts_and_gradients_do_not_stay_on_the_device(folders):
    found = fact(folders, "the_host_keeps_parts")
    assert sum(each["numbers"] for each in found) == found[0]["of"]
    assert [each["left on the device"] for each in found] == [0, 0]


SHORT = """
import sys
from pathlib import Path

import common
import torch
from tests import sharded_step

sharded_step.sample_from_copies()
trainer = sharded_step.make_trainer(Path(sys.argv[1]), Path(sys.argv[2]), "GRPO")

def fail(*_):
    if torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory.")

if sharded_step.process() == 1:
    with trainer.models.use("policy") as policy:
        policy.base_model.layers[1].mlp.register_forward_pre_hook(fail)
trainer.current_step = 1
trainer.step(trainer.training_prompts(1))
"""


@pytest.mark.slow
def test_a_process_that_is_short_of_memory_ends_the_run_and_says_what_to_pass(tiny_folder, tmp_path):
    (tmp_path / "short.py").write_text(SHORT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    begin = time.monotonic()
    done = subprocess.run(
        [*command, str(tmp_path / "short.py"), str(tiny_folder), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode and time.monotonic() - begin < 120  # and not after the ten minutes of a timeout
    assert "line 20: out of memory in a pass of" in done.stderr
    assert "Pass --max_tokens_per_microbatch " in done.stderr and "start the same command again" in done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "transformers"}, "Pass --sampler vllm, or --shard none."),
        (LORA | {"load_in_4bit": True}, "one part in 2 of the base, or --shard none."),
        ({"optimizer": "adamw_8bit"}, "Pass --optimizer adamw, which needs 4 bytes per weight"),
        (LORA | {"value_backbone": "shared"}, "Pass --value_backbone own"),
    ],
)
def test_what_does_not_work_on_shards_is_refused_with_the_reason(settings, said):
    config = PPOConfig(model="tiny", shard="full", **settings)
    with pytest.raises(ValueError, match=r"^shard=full on 2 processes, ") as caught:
        check_sharding(config, 2)
    assert said in str(caught.value)
    check_sharding(config, 1)
    config.shard = "none"
    check_sharding(config, 2)


def test_shard_full_on_one_process_is_said_and_goes_on():
    config = RLConfig(model="tiny", shard="full", sampler="transformers")
    check_sharding(config, 1)
    (said,) = describe_sharding(config, 1)
    assert said.startswith("shard=full on one process: ") and "torchrun" in said
    assert describe_sharding(config, 2) == [] == describe_sharding(RLConfig(model="tiny"), 1)


class Model(nn.Module):
    """Lists in lists and dicts, a list without parameters, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))])]
        self.layers = nn.ModuleList([*layers, nn.ModuleDict({"named": nn.Linear(2, 2)}), nn.Identity()])
        self.shared = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)])
        self.shared[1].weight = self.shared[0].weight
        self.outside = nn.Linear(2, 2)
        self.outside.weight = self.shared[2].weight


def test_blocks_are_what_is_called_in_the_outermost_lists_and_shares_nothing():
    model = Model()
    names = [name for name, module in model.named_modules() if module in blocks(model)]
    assert names == ["layers.0", "layers.1.0", "layers.1.1", "layers.2.named"]


def test_a_policy_is_gathered_layer_by_layer_and_its_embedding_with_the_whole(tmp_path):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(save_toy_policy(tmp_path))
    assert blocks(policy) == [*policy.model.layers]
