"""The memory plan on several devices: parts of models, engines and hosts that processes share, and what they move."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from common import start
from common.cli import PlanRequest, take_plan
from common.host import HostMemory, host_memory, processes_here
from common.memory import show
from common.memory.cards import GB, Card, Rates, card, rates
from common.memory.cast import Casting
from common.memory.fit import without_storage as qwen
from common.memory.passes import PassBytes
from common.memory.plan import Machine, Plan, make_plan
from common.memory.remedies import enough_processes, refusal, remedy
from common.memory.seconds import Links, Tokens, step_seconds
from common.memory.start import plan_of
from common.memory.tenants import Gathered, cache_bytes, parts_of
from common.memory.work import Work
from GRPO.grpo_trainer import GRPOConfig
from PPO.ppo_trainer import PPOConfig
from tests.imports import ROOT
from tools import several_gpus

AUTO = {"max_tokens_per_microbatch": "auto", "vllm_memory_share": "auto", "gradient_checkpointing": True}
SPREAD = AUTO | {"shard": "full", "kl_coef": 0.0}
# Of Qwen2.5 7B: all weights, those of a layer, and embedding, head and the last norm.
ALL, LAYER, ROOT_WEIGHTS = 7615616512, 233057792, 2 * 152064 * 3584 + 3584


@pytest.fixture
def host(monkeypatch):
    """A function that has this machine so many GB; passes need 100 bytes of a token for each feature."""

    def have(gigabytes: int) -> None:
        def there(*, processes: int = 1) -> HostMemory:
            part = gigabytes * GB // processes
            return HostMemory(total=part, available=part, source="this machine")

        monkeypatch.setattr("common.memory.start.host_memory", there)

    def passes(config, passes, *, rows, row_tokens, completion_tokens):
        each = rows * row_tokens * config.hidden_size
        return PassBytes(training=each * 100, forward=each * 20, source="formula")

    monkeypatch.setattr("common.memory.work.pass_bytes", passes)
    return have


def planned(size: str, config: GRPOConfig, processes: int, *, gigabytes: float = 80, nodes: int = 1) -> Plan:
    there = Card(name=f"{gigabytes:g}gb", total=int(gigabytes * GB))
    casting = Casting(config, qwen(size), there, processes=processes)
    return make_plan(config, casting.cast(config), Machine(card=there, processes=processes, nodes=nodes))


def phase(plan: Plan, name: str):
    return next(each for each in plan.phases if each.name == name)


# Parts


def test_a_tensor_is_dealt_out_by_rows_and_some_process_has_the_most_of_them():
    assert parts_of([12, 7, 100], [4, 7, 1], 1) == [12, 7, 100]
    assert parts_of([12, 7, 100], [4, 7, 1], 2) == [6, 4, 100]
    assert parts_of([12, 7, 100], [4, 7, 1], 8) == [3, 1, 100]


def test_weights_gradients_and_moments_are_parts_of_the_whole():
    alone, eight = planned("7B", GRPOConfig(**SPREAD), 1), planned("7B", GRPOConfig(**SPREAD), 8)
    assert (alone.fits, eight.fits) == (False, True)
    whole, part = alone.cast.policy, eight.cast.policy
    for name in ("weights", "gradients", "moments"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name) / 8, rel=1e-4)
    assert (part.weights, part.step, whole.gathered) == (pytest.approx(ALL / 2, rel=1e-4), 0, Gathered())


def test_what_is_gathered_is_the_root_two_layers_and_the_gradients_of_two():
    """By hand, in bytes of bfloat16, and float32 for gradients that are on their way."""
    found = planned("7B", GRPOConfig(**SPREAD), 8).cast.policy.gathered
    assert found.forward == 2 * (ROOT_WEIGHTS + 2 * LAYER)
    assert found.start == 2 * (2 * ROOT_WEIGHTS + LAYER)
    assert found.layers == found.forward + (2 + 4) * LAYER
    adapter = planned("7B", GRPOConfig(use_lora=True, **SPREAD), 8).cast.policy.gathered
    assert found.forward < adapter.forward < 1.05 * found.forward
    assert adapter.layers < 1.05 * adapter.forward  # an adapter has few gradients


def test_the_reference_and_a_value_model_have_their_parts_and_a_reward_model_is_whole(tmp_path):
    config = PPOConfig(**SPREAD | {"kl_coef": 0.1}, value_backbone="own")
    plan = planned("7B", config, 8)
    ref, value = phase(plan, "log-probs, ref").device["ref"], phase(plan, "update, value").device["value"]
    assert ref == pytest.approx(4 * ALL / 8, rel=1e-4)
    assert value == pytest.approx(4 * (ALL - 152064 * 3584) / 8, rel=1e-4)
    assert phase(plan, "log-probs, ref").device["gathered"] == 2 * (ROOT_WEIGHTS + 2 * LAYER)
    values = phase(plan, "values, value").device["gathered"]
    assert values == 2 * (ROOT_WEIGHTS - 152064 * 3584 + 2 * LAYER)


def test_more_processes_never_need_more_on_a_device():
    most = [planned("7B", GRPOConfig(**SPREAD), n).peak.on_device for n in (2, 4, 8, 16, 64)]
    assert most == sorted(most, reverse=True) and most[0] > most[-1]


def test_masters_on_the_host_are_parts_too_and_idle_models_may_leave():
    settings = SPREAD | {"offload": "always", "optimizer": "adamw_host"}
    plan = planned("7B", GRPOConfig(**settings), 8)
    assert phase(plan, "update, policy").host["optimizer of policy"] == pytest.approx(16 * ALL / 8, rel=1e-4)
    assert "rounding of pinned copies" not in phase(plan, "sample").host  # what is spread moves by plain copies
    # A push needs all parts at once, so they are on the device.
    assert phase(plan, "push").device["policy"] == pytest.approx(2 * ALL / 8, rel=1e-4)
    assert "policy" not in phase(plan, "sample").device


# Engines


def test_processes_that_share_an_engine_have_a_part_of_its_weights_and_of_its_cache():
    config = GRPOConfig(**SPREAD)
    own, two, four = (
        planned("7B", dataclasses.replace(config, vllm_tensor_parallel=n), 8).cast.engine for n in (1, 2, 4)
    )
    vectors = 2 * 28 * 3584 + 3584 + 28 * (3584 + 2 * 512)  # norms, and biases of the attention
    assert two.weights == 2 * ((ALL - vectors) // 2 + vectors)
    assert own.weights > two.weights > four.weights and own.sequence == 2 * two.sequence == 4 * four.sequence
    assert cache_bytes(qwen("7B").config, 1, 2, 8) == cache_bytes(qwen("7B").config, 1, 2, 4)  # four heads of keys
    assert own.push == two.push  # every process gathers the whole tensor


def test_an_engine_samples_the_completions_of_all_processes_that_share_it():
    config = GRPOConfig(prompts_per_step=64, num_generations=4, **SPREAD)
    rows = [planned("7B", dataclasses.replace(config, vllm_tensor_parallel=n), 8).sequences for n in (1, 2, 4)]
    assert rows == [32, 64, 128]


def test_a_server_takes_nothing_on_the_trainers_devices_and_has_a_line_of_its_own():
    config = GRPOConfig(model="x", sampler="vllm_server", sampler_url="http://127.0.0.1:8000", **SPREAD)
    plan = planned("7B", config, 8)
    assert not any("vLLM" in name for each in plan.phases for name in each.device | each.host)
    assert [each.name for each in plan.phases[:3]] == ["load", "push", "sample"]
    own = planned("7B", GRPOConfig(model="x", **SPREAD), 8)
    assert (plan.cast.server.weights, plan.cast.server.sequence) == (own.cast.engine.weights, own.cast.engine.sequence)
    said = "\n".join(show.whole(plan, config))
    assert "the main process sends 15.2 GB in bfloat16 to the server" in said
    left = 0.9 * 80 * GB - plan.cast.server.weights - plan.cast.server.work
    assert f"with 0.9 of 80gb: room for {int(left // plan.cast.server.sequence)} at a time" in said


# Main memory that processes share


def test_processes_of_one_machine_share_its_memory_and_each_has_the_shells_limit(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes_here() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_here() == 4
    assert host_memory(processes=4).total <= host_memory().total // 4 + 1
    limit = HostMemory(total=5, available=3, source="ulimit -v")
    monkeypatch.setattr("common.host._shell_limits", lambda proc: [limit])
    assert host_memory(processes=4).total == 5


@pytest.mark.parametrize(("processes", "nodes", "fits"), [(1, 1, True), (2, 1, False), (2, 2, True)])
def test_a_run_that_fits_alone_is_refused_where_two_share_the_machine(host, processes, nodes, fits):
    host(16)
    config = GRPOConfig(model="x", prompts_per_step=4, sampler="transformers", max_completion_length=256)
    options = {"processes": processes, "nodes": nodes, "with_passes": False}
    if fits:
        assert plan_of(config, qwen("0.5B"), **options).host_peak.on_host > 8 * GB
    else:
        with pytest.raises(ValueError, match=r"may use 8\.0, as one of 2 on this machine: .*Pass --"):
            plan_of(config, qwen("0.5B"), **options)


def test_two_processes_that_spread_their_model_fit_where_whole_ones_do_not(host):
    host(24)
    config = GRPOConfig(model="x", prompts_per_step=4, max_completion_length=256, **AUTO | {"kl_coef": 0.0})
    with pytest.raises(ValueError, match=r"Pass --shard full: it then needs") as refused:
        plan_of(config, qwen("0.5B"), processes=2, with_passes=False)
    spread = plan_of(dataclasses.replace(config, shard="full"), qwen("0.5B"), processes=2)
    assert f"needs {spread.host_peak.on_host / GB:.1f} GB" in str(refused.value)


# What is refused, and the way out


def why_not(size: str, config: GRPOConfig, processes: int, *, gigabytes: float = 80) -> tuple[str, dict | None]:
    there = Card(name=f"{gigabytes:g}gb", total=int(gigabytes * GB))
    casting = Casting(config, qwen(size), there, processes=processes)
    machine, work = Machine(card=there, processes=processes), Work(config, processes)
    plan = make_plan(config, casting.cast(config), machine, work=work)
    assert not plan.fits
    found = remedy(config, casting, machine, work)
    return refusal(config, plan, casting, machine, work), found and found[0]


def test_a_policy_larger_than_one_device_is_planned_if_it_is_spread():
    assert ALL * 4 > 24 * GB
    config = GRPOConfig(model="x", **SPREAD | {"max_tokens_per_microbatch": 2048})
    assert planned("7B", dataclasses.replace(config, vllm_tensor_parallel=2), 16, gigabytes=24).fits
    message, change = why_not("7B", dataclasses.replace(config, shard="none"), 16, gigabytes=24)
    assert change["shard"] == "full" and change.keys() <= {"shard", "vllm_tensor_parallel"}
    assert "Pass --shard full" in message


def test_an_engine_that_does_not_fit_is_shared_before_anything_else_is_learned():
    _, change = why_not("32B", GRPOConfig(model="x", **SPREAD), 16)
    assert set(change) == {"vllm_tensor_parallel"} and change["vllm_tensor_parallel"] in (2, 4)


def test_a_model_too_large_even_spread_is_refused_with_the_devices_on_which_it_fits():
    config = GRPOConfig(model="x", vllm_tensor_parallel=2, **SPREAD)
    message, _ = why_not("7B", config, 2, gigabytes=24)
    count, machines, need = re.search(
        r"Or use (\d+) such cards(?: on (\d+) machines)?: each then needs ([\d.]+) GB\.", message
    ).groups()
    fitting = planned("7B", config, int(count), gigabytes=24, nodes=int(machines or 1))
    assert fitting.fits and f"{fitting.peak.on_device / GB:.1f}" == need
    assert not planned("7B", config, int(count) // 2, gigabytes=24).fits


def test_one_card_is_told_of_several_only_where_no_setting_is_enough():
    message, change = why_not("7B", GRPOConfig(model="x", **SPREAD | {"shard": "none"}), 1)
    assert change == {"optimizer": "adamw_host"} and "Or use" not in message
    small = GRPOConfig(model="x", use_lora=True, **SPREAD | {"shard": "none", "sampler": "vllm_server"})
    message, change = why_not("14B", dataclasses.replace(small, max_completion_length=128), 1, gigabytes=9.5)
    assert change is None and re.search(r"Or use \d+ such cards.* and pass --shard full", message)


def test_what_cannot_be_spread_is_not_told_to():
    for more in ({"use_lora": True, "load_in_4bit": True}, {"optimizer": "adamw_8bit"}, {"sampler": "transformers"}):
        config = GRPOConfig(model="x", **SPREAD | {"shard": "none"} | more)
        _, change = why_not("32B", config, 8, gigabytes=24)
        merged = dataclasses.replace(config, **change or {})
        assert merged.shard == "none" or not (merged.load_in_4bit or merged.sampler == "transformers")


def test_no_number_of_processes_helps_a_pass_that_is_too_large_itself():
    config = GRPOConfig(model="x", **SPREAD | {"max_completion_length": 200_000})
    casting = Casting(config, qwen("7B"), card("24gb"))
    machine = Machine(card=card("24gb"), processes=2)
    assert enough_processes(config, casting, machine, Work(config, 2)) is None


# The command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--plan"], PlanRequest()),
        (["--plan", "--processes", "8"], PlanRequest(None, 8, 1)),
        (["--processes=64", "--nodes=8", "--device=h100", "--plan"], PlanRequest("h100", 64, 8)),
    ],
)
def test_a_plan_may_be_for_several_devices(monkeypatch, words, expected):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert take_plan([*words, "--seed", "1"]) == (expected, ["--seed", "1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--processes", "8"], "--processes 8 without --plan.*torchrun --nproc_per_node"),
        (["--plan", "--processes"], "--processes without a number"),
        (["--plan", "--processes", "--nodes"], "--processes without a number"),
        (["--plan", "--processes", "0"], "need a number, at least 1"),
        (["--plan", "--processes", "-2"], "need a number, at least 1"),
        (["--plan", "--processes", "two"], "need a number, at least 1"),
        (["--plan", "--processes", "²"], "need a number, at least 1"),
        (["--plan", "--processes", "12", "--nodes", "8"], "--nodes 8 for 12 processes.*--processes 16"),
        (["--plan", "--nodes", "2"], "--nodes 2 for 1 processes.*--processes 2"),
    ],
)
def test_numbers_of_devices_that_cannot_be_are_refused(monkeypatch, words, said):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=said):
        take_plan(words)


def test_under_a_launcher_the_plan_is_that_of_its_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert take_plan(["--plan"])[0] == PlanRequest(None, 16, 2)
    with pytest.raises(ValueError, match=r"--processes 8 in a run of 16 processes"):
        take_plan(["--plan", "--processes", "8"])


def test_a_plan_for_several_devices_says_what_each_has_and_what_a_push_moves(capsys, monkeypatch):
    monkeypatch.setattr(start, "skeleton", lambda model: qwen("7B"))
    monkeypatch.setattr(start, "read_config", lambda *args, **options: None)
    monkeypatch.delenv("RANK", raising=False)
    config = GRPOConfig(model="x", vllm_tensor_parallel=2, **SPREAD)
    start.print_plan(config, PlanRequest("h100", 16, 2))
    said = capsys.readouterr().out
    assert "16 processes on 2 machines, each with such a device, 1/16 of every model, 8 engines of 2" in said
    assert "push: each process gathers 14.3 GB in bfloat16, over the network and within machines" in said
    assert re.search(r"main memory of a machine: [\d.]+ GB for its 8 processes", said)
    monkeypatch.setenv("RANK", "1")
    start.print_plan(config, PlanRequest("h100", 16, 2))
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="prompts_per_step=64 on 7 processes"):
        start.print_plan(config, PlanRequest("h100", 7, 1))


# Seconds


SLOW = Rates(bandwidth=1e30, flops=1e30, flops_float32=1e30, link=1e30, source="", peers=1e9, network=1e9)
TOKENS = Tokens(prompts=64, generations=8, prompt=200, completion=1000, longest=1000)


def test_a_step_moves_the_weights_twice_and_the_gradients_once_for_each_micro_batch():
    config = GRPOConfig(**SPREAD)
    plan = planned("7B", config, 8)
    parts = step_seconds(config, plan, SLOW, TOKENS)
    through = -(-64 * 1200 // plan.choices.max_tokens_per_microbatch)  # packed rows would not pay
    moved = through * (2 * 2 + 4) * ALL * 7 / 8 / (0.7 * 1e9)
    assert parts["update"].seconds == pytest.approx(moved + through * 3 * 29 * 20e-6, rel=1e-3)
    assert parts["push"].seconds == pytest.approx(2 * ALL * 7 / 8 / (0.7 * 1e9), rel=0.01)
    whole = GRPOConfig(use_lora=True, **SPREAD | {"shard": "none"})
    plan = planned("7B", whole, 8)
    sums = 2 * 4 * sum(plan.cast.sizes.adapter) * 7 / 8 / (0.7 * 1e9)
    assert step_seconds(whole, plan, SLOW, TOKENS)["update"].seconds == pytest.approx(sums, rel=0.01)


def test_the_slowest_link_decides_and_the_cards_of_a_machine_send_together():
    plan, h100 = planned("7B", GRPOConfig(**SPREAD), 16, nodes=2), rates("h100")
    assert Links.of(plan, h100).rate == 8 * 50e9 * 0.5
    assert Links.of(dataclasses.replace(plan, nodes=1), h100).rate == 450e9 * 0.7
    assert Links.of(dataclasses.replace(plan, nodes=16), h100).rate == 50e9 * 0.5
    with pytest.raises(ValueError, match=r"links between several such cards.*H100"):
        Links.of(plan, rates("4090"))


def test_more_cards_are_never_slower_for_the_same_step():
    config = GRPOConfig(**SPREAD)
    steps = [
        sum(part.seconds for part in step_seconds(config, planned("7B", config, n), rates("h100"), TOKENS).values())
        for n in (4, 8, 16)
    ]
    assert steps == sorted(steps, reverse=True)


# The page


def test_the_table_of_the_page_is_what_its_command_writes():
    assert several_gpus.page(several_gpus.PAGE) == several_gpus.PAGE.read_text(encoding="utf-8")


def test_the_table_says_of_each_line_what_fits():
    for size, gpus in (("7B", 8), ("32B", 64), ("72B", 64)):
        found = several_gpus.line(size, gpus)
        assert found.plan.fits and found.plan.peak.on_device <= card("h100").total
        assert several_gpus.TOKENS.rows == 4096 and found.method == "all weights"
        parameters = found.plan.cast.sizes.parameters
        assert found.state == pytest.approx(16 * parameters / gpus, rel=0.01)


# What two processes take


@pytest.mark.slow
@pytest.mark.several
def test_two_processes_take_what_is_planned_for_a_policy_that_is_spread():
    """Within the bytes that an allocator keeps; a plan is an upper bound of the passes."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not reset the peak of the resident set: no /proc/self/clear_refs to write to")
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*words, "-m", "tests.sharded_set"],
        **{"cwd": ROOT, "env": env, "capture_output": True, "text": True, "check": True, "timeout": 300},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    for found in lines:
        planned = found["planned"]
        assert 4 * found["parts"]["parameters"] * 0.5 == pytest.approx(found["parts"]["weights"], rel=0.05)
        for taken in found["taken"]:
            assert planned["held"] <= taken["held"] <= 1.1 * planned["held"]
            assert 0.85 * planned["grown"] <= taken["grown"] <= 1.05 * planned["grown"]
