"""The memory plan: who is where in each phase, what is chosen, what is refused with which way out, and --plan."""

import dataclasses
import importlib
import re
import shutil
import sys
import time

import pytest
import torch
import transformers
from transformers import LlamaConfig, Qwen2Config

from common import start
from common.cli import parse_settings, take_plan
from common.config import RLConfig
from common.host import HostMemory
from common.memory import show
from common.memory.cards import GB, Card, card
from common.memory.cast import Casting
from common.memory.fit import without_storage as qwen
from common.memory.passes import PassBytes
from common.memory.plan import Machine, Plan, make_plan
from common.memory.remedies import refusal
from common.memory.start import plan_of
from common.memory.tenants import cache_bytes, pinned
from common.memory.work import Work
from GRPO.grpo_trainer import GRPOConfig
from PPO.ppo_trainer import PPOConfig
from tests import forked
from tests.imports import ROOT
from tests.toy import algorithms, toy_trainer, train_until
from tools import memory_table

AUTO = {"max_tokens_per_microbatch": "auto", "vllm_memory_share": "auto", "gradient_checkpointing": True}


def skeleton(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def quick(monkeypatch):
    """Passes by a formula in place of fake layers, which take a second each: 3 KB of a token for each feature."""

    def of(config, passes, *, rows, row_tokens, completion_tokens):
        each = rows * row_tokens * config.get_text_config().hidden_size
        kept = 1 if passes.checkpointing else 12
        return PassBytes(training=each * 100 * kept, forward=each * 20, source="formula")

    monkeypatch.setattr("common.memory.work.pass_bytes", of)


def planned(size: str, gigabytes: float, config: RLConfig, *, host: int | None = None, processes: int = 1) -> Plan:
    there = Card(name=f"{gigabytes:g}gb", total=int(gigabytes * GB))
    cast = Casting(config, qwen(size), there, processes=processes).cast(config)
    return make_plan(config, cast, Machine(card=there, host=host, processes=processes))


def phase(plan: Plan, name: str):
    return next(each for each in plan.phases if each.name == name)


# What is counted


def test_parameters_are_those_of_the_published_models(quick):
    counts = {size: sum(each.numel() for each in qwen(size).parameters()) for size in ("0.5B", "1.5B", "3B", "7B")}
    assert counts == {"0.5B": 494032768, "1.5B": 1543714304, "3B": 3085938688, "7B": 7615616512}
    plan = planned("1.5B", 80, GRPOConfig(use_lora=True, **AUTO))
    assert plan.cast.sizes.parameters == 1543714304 and sum(plan.cast.sizes.adapter) == 73859072


def test_the_cache_has_keys_and_values_of_the_heads_that_there_are(quick):
    assert [cache_bytes(qwen(size).config, 1, 2) for size in ("0.5B", "1.5B", "3B", "7B")] == [
        *(12288, 28672, 36864, 57344)
    ]


def test_layers_with_a_window_keep_no_more_than_it():
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}
    whole = transformers.Gemma3TextConfig(num_hidden_layers=6, sliding_window=32, **shape)
    kinds = whole.layer_types
    each = 2 * 2 * 16 * 2
    expected = sum(each * (32 if kind == "sliding_attention" else 1000) for kind in kinds)
    assert "sliding_attention" in kinds and cache_bytes(whole, 1000, 2) == expected
    assert cache_bytes(LlamaConfig(num_hidden_layers=6, **shape), 1000, 2) == 6 * each * 1000


def test_optimizers_have_their_bytes_on_the_device_and_on_the_host(quick):
    count = 494032768
    full = planned("0.5B", 80, GRPOConfig(**AUTO))
    update = phase(full, "update, policy").device
    assert update["policy"] == update["gradients of policy"] == 4 * count
    assert update["optimizer of policy"] == 8 * count
    on_host = planned("0.5B", 80, GRPOConfig(optimizer="adamw_host", **AUTO))
    update = phase(on_host, "update, policy")
    assert update.device["policy"] == 2 * count and "optimizer of policy" not in update.device
    assert update.device["gradients of policy"] == 2 * 151936 * 896  # the largest, on its way
    assert update.host["optimizer of policy"] == 16 * count


def test_a_view_and_a_shared_base_take_no_second_copy(quick):
    lora = GRPOConfig(use_lora=True, kl_coef=0.1, **AUTO)
    assert phase(planned("0.5B", 80, lora), "log-probs, ref").device.get("ref", 0) == 0
    full = GRPOConfig(kl_coef=0.1, **AUTO)
    assert phase(planned("0.5B", 80, full), "log-probs, ref").device["ref"] == 4 * 494032768
    settings = {"use_lora": True, "kl_coef": 0.0, "num_generations": 4, **AUTO}
    own, shared = (
        planned("0.5B", 80, PPOConfig(value_backbone=backbone, **settings)) for backbone in ("own", "shared")
    )
    values = phase(own, "update, value").device["value"] - phase(shared, "update, value").device["value"]
    assert values == 2 * 494032768  # the base in bfloat16; its head is the embedding, so nothing is left out
    moved = planned("0.5B", 80, PPOConfig(value_backbone="shared", offload="always", **settings))
    assert phase(moved, "update, value").device["policy"] > 2 * 494032768  # the base that it uses is there


def test_several_processes_add_up_their_gradients_in_flat_copies_of_a_part(quick):
    alone, two = (planned("3B", 80, GRPOConfig(**AUTO), processes=n) for n in (1, 2))
    # As much at a time as the largest gradient has, and its sum.
    assert (alone.cast.policy.step, two.cast.policy.step) == (0, 2 * 4 * 151936 * 2048)
    assert phase(alone, "update, policy").device == phase(two, "update, policy").device  # its passes need more


def test_the_push_has_one_tensor_beside_the_engine(quick):
    plan = planned("3B", 24, GRPOConfig(optimizer="adamw_host", offload="always", **AUTO))
    push = phase(plan, "push").device
    assert plan.fits and "policy" not in push
    assert push["one tensor"] == (2 + 2) * 151936 * 2048


def test_pinned_memory_is_rounded_up_to_powers_of_two():
    assert pinned([1024, 1025, 3, 0]) == 1024 + 2048 + 4


# What is chosen


@pytest.mark.parametrize("method", [{}, {"optimizer": "adamw_host"}, {"use_lora": True}])
@pytest.mark.parametrize("size", ["0.5B", "3B", "7B"])
def test_more_memory_never_fits_less_and_a_smaller_budget_never_needs_more(quick, size, method):
    fits, needs = [], []
    for gigabytes in (8, 12, 16, 24, 32, 40, 48, 80, 141):
        fits.append(planned(size, gigabytes, GRPOConfig(kl_coef=0.1, **method, **AUTO)).fits)
    assert fits == sorted(fits)
    for budget in (512, 2048, 8192, 32768, 131072):
        settings = AUTO | {"max_tokens_per_microbatch": budget, "offload": "always", "vllm_memory_share": 0.5}
        plan = planned(size, 80, GRPOConfig(kl_coef=0.1, **method, **settings))
        needs.append(phase(plan, "update, policy").on_device)
    assert needs == sorted(needs) and needs[0] < needs[-1]


def test_offload_is_chosen_only_where_all_together_do_not_fit(quick):
    config = GRPOConfig(use_lora=True, kl_coef=0.1, **AUTO)
    chosen = {gigabytes: planned("3B", gigabytes, config).choices.offload for gigabytes in (16, 80)}
    assert chosen == {16: "always", 80: "never"}
    for gigabytes in (16, 80):
        plan = planned("3B", gigabytes, config)
        assert plan.fits and all(each.on_device <= gigabytes * GB for each in plan.phases)


def test_a_share_is_no_larger_than_what_all_completions_need(quick):
    few = GRPOConfig(use_lora=True, prompts_per_step=2, num_generations=4, **AUTO)
    plan = planned("0.5B", 80, few)
    assert plan.sequences == 8 and plan.choices.vllm_memory_share < 0.1
    asleep, awake = (planned("0.5B", 80, dataclasses.replace(few, vllm_sleep_level=level)) for level in (1, 0))
    share = int(awake.choices.vllm_memory_share * 80 * GB)
    assert phase(awake, "update, policy").device["vLLM"] == share > phase(asleep, "update, policy").device["vLLM"]


def test_settings_get_the_plans_numbers_and_keep_their_own(quick):
    config = GRPOConfig(use_lora=True, **AUTO | {"vllm_memory_share": 0.3})
    settled = planned("0.5B", 24, config).settled(config)
    assert settled.vllm_memory_share == 0.3 and settled.max_tokens_per_microbatch == 32768
    assert config.max_tokens_per_microbatch == "auto"
    same = GRPOConfig(max_tokens_per_microbatch=16384, vllm_memory_share=0.4)
    assert planned("0.5B", 80, same).settled(same) is same


def test_a_server_leaves_the_share_of_its_device_open(quick):
    config = GRPOConfig(use_lora=True, sampler="vllm_server", sampler_url="http://127.0.0.1:8000", **AUTO)
    settled = planned("0.5B", 24, config).settled(config)
    assert settled.vllm_memory_share == "auto" and settled.max_tokens_per_microbatch > 0


def test_a_row_that_is_longer_than_the_budget_runs_alone(quick):
    plans = [
        planned("0.5B", 24, GRPOConfig(use_lora=True, **AUTO | {"max_tokens_per_microbatch": budget}))
        for budget in (1, 1536, 4096)
    ]
    passes = [phase(each, "update, policy").device["passes"] for each in plans]
    assert all(each.fits for each in plans) and passes[0] == passes[1] < passes[2]


# What is refused


def why_not(size: str, gigabytes: float, config: RLConfig, *, host: int | None = None) -> str:
    there = Card(name=f"{gigabytes:g}gb", total=int(gigabytes * GB))
    casting, machine = Casting(config, qwen(size), there), Machine(card=there, host=host)
    work = Work(config)
    plan = make_plan(config, casting.cast(config), machine, work=work)
    assert not plan.fits
    message = refusal(config, plan, casting, machine, work)
    assert len(message) < 8 * 119
    return message


@pytest.mark.parametrize(
    ("size", "gigabytes", "settings", "flag"),
    [
        ("1.5B", 24, {"use_lora": True, "max_tokens_per_microbatch": 500_000}, "--max_tokens_per_microbatch 32768:"),
        ("1.5B", 24, {"use_lora": True, "vllm_memory_share": 0.1}, "--vllm_memory_share 0."),
        ("1.5B", 24, {"use_lora": True, "vllm_memory_share": 1.0}, "--vllm_memory_share 0."),
        ("3B", 16, {"use_lora": True, "kl_coef": 0.1, "offload": "never"}, "--offload auto:"),
        ("3B", 24, {}, "--optimizer adamw_host:"),
        ("7B", 80, {}, "--optimizer adamw_host:"),
        ("7B", 16, {"use_lora": True, "sampler": "transformers", "prompts_per_step": 1}, "--load_in_4bit true:"),
    ],
)
def test_a_refusal_names_the_first_change_that_fits(quick, size, gigabytes, settings, flag):
    config = GRPOConfig(**{**AUTO, **settings})
    message = why_not(size, gigabytes, config)
    assert f"Pass {flag}" in message and "GB" in message
    flags = dict(re.findall(r"--(\w+) ([\w.]+)", message.split(" Pass ")[1].rsplit(":", 1)[0]))
    kinds = {"true": True, "false": False}
    changed = {
        name: kinds.get(value, float(value) if "." in value else int(value) if value.isdigit() else value)
        for name, value in flags.items()
    }
    assert planned(size, gigabytes, dataclasses.replace(config, **changed)).fits


def test_a_model_that_no_setting_helps_says_so(quick):
    message = why_not("14B", 8, GRPOConfig(use_lora=True, load_in_4bit=True, **AUTO))
    assert "No setting" in message and "--model" in message


def test_a_row_that_does_not_fit_alone_is_refused_with_its_length(quick):
    long = GRPOConfig(use_lora=True, load_in_4bit=True, max_completion_length=200_000, **AUTO)
    message = why_not("1.5B", 24, long)
    assert "200,512 tokens" in message and "--max_completion_length" in message


def test_a_host_that_is_too_small_for_masters_is_refused(quick):
    config = GRPOConfig(optimizer="adamw_host", **AUTO)
    assert planned("3B", 24, config, host=100 * GB).fits
    message = why_not("3B", 24, config, host=40 * GB)
    assert "main memory" in message and "optimizer of policy 49.4" in message and "--use_lora true" in message


def test_copies_are_not_all_pinned_where_main_memory_is_short(quick):
    config = GRPOConfig(use_lora=True, offload="always", **AUTO)
    assert planned("7B", 40, config, host=200 * GB).choices.pins
    short = planned("7B", 40, config, host=50 * GB)
    assert short.fits and not short.choices.pins


def test_what_a_plan_cannot_read_it_names(quick, tmp_path):
    casting = Casting(GRPOConfig(), qwen("0.5B"), Card(name="x", total=GB), rewards=[str(tmp_path / "judge")])
    assert "judge" in casting.cast(GRPOConfig()).not_counted[0]


@pytest.mark.parametrize("name", ["max_tokens_per_microbatch", "vllm_memory_share"])
@pytest.mark.parametrize("value", ["some", "", -1, 0])
def test_silly_budgets_and_shares_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}.*auto"):
        GRPOConfig(**{name: value})


# On a CPU, where main memory is all that there is


@pytest.fixture
def host(monkeypatch):
    """A function that has this machine, or the cgroup of this process, so many GB, and a CPU with bfloat16 or none."""

    def have(gigabytes: float, *, bfloat16: bool = True) -> None:

        def there(*, processes: int = 1) -> HostMemory:
            part = int(gigabytes * GB) // processes
            return HostMemory(total=part, available=part, source="the cgroup x")

        monkeypatch.setattr("common.memory.start.host_memory", there)
        monkeypatch.setattr("common.memory.remedies.cpu_computes_bfloat16", lambda: bfloat16)

    return have


@pytest.mark.parametrize(
    ("size", "gigabytes", "settings", "bfloat16", "flags"),
    [
        ("7B", 40, {"use_lora": True, "sampler": "transformers"}, True, "--dtype bfloat16"),
        ("7B", 48, {"use_lora": True}, True, "--dtype bfloat16"),
        ("7B", 64, {"use_lora": True, "prompts_per_step": 4}, False, "--sampler transformers"),
        ("7B", 25, {}, True, "--dtype bfloat16 --use_lora true --sampler transformers"),
        ("1.5B", 25, {}, True, "--use_lora true"),
        ("0.5B", 25, {"max_tokens_per_microbatch": 500_000}, True, "--max_tokens_per_microbatch 2048"),
        ("0.5B", 14, {"use_lora": True, "vllm_memory_share": 0.9}, True, "--vllm_memory_share 0."),
    ],
)
def test_a_refusal_on_a_cpu_names_changes_that_act_there_and_are_enough(
    quick, host, size, gigabytes, settings, bfloat16, flags
):
    host(gigabytes, bfloat16=bfloat16)
    config = GRPOConfig(model="x", **{**AUTO, **settings})
    with pytest.raises(ValueError, match=r"main memory, and this process may use") as refused:
        plan_of(config, qwen(size), with_passes=False)
    message = str(refused.value)
    assert f"Pass {flags}" in message and "GB of main memory" in message
    given = message.split(" Pass ")[1].rsplit(":", 1)[0].split()
    changed = dict(zip(given[::2], given[1::2], strict=True))
    assert not changed.keys() & {"--offload", "--vllm_sleep_level"}
    again = parse_settings(GRPOConfig, ["--model", "x", *words(AUTO | settings), *given])
    assert plan_of(again, qwen(size), with_passes=False).fits


def words(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value).lower())]


def test_a_model_that_no_memory_of_this_machine_holds_is_refused_with_no_card_to_buy(quick, host):
    host(8)
    with pytest.raises(ValueError, match=r"8\.0: .*No setting.*a smaller --model, or use a machine with more memory"):
        plan_of(GRPOConfig(model="x", **AUTO), qwen("14B"), with_passes=False)


def test_vllms_copy_and_its_cache_take_main_memory_from_the_start_to_the_end(quick, host):
    host(25)
    config = GRPOConfig(model="x", use_lora=True, kl_coef=0.1, **AUTO)
    plan = plan_of(config, qwen("0.5B"))
    rows = 128  # of a step, and no more in an evaluation
    for each in plan.phases:
        assert each.host["vLLM"] == 4 * 494032768
        assert each.host["vLLM's cache"] == plan.sequences * 4 * 6144 * 1536
    assert plan.sequences == rows or plan.host_peak.on_host <= 25 * GB
    without = plan_of(dataclasses.replace(config, sampler="transformers"), qwen("0.5B"))
    assert not any(name.startswith("vLLM") for each in without.phases for name in each.host)


def test_vllms_cache_gets_no_more_than_its_share_and_what_the_phases_leave(quick, host):
    config = GRPOConfig(model="x", use_lora=True, **AUTO)
    shares = []
    for gigabytes in (8, 10, 12, 16, 32, 64, 128):
        host(gigabytes)
        plan = plan_of(config, qwen("0.5B"))
        assert plan.host_peak.on_host <= gigabytes * GB
        shares.append(plan.choices.vllm_memory_share)
        assert plan.phases[0].host["vLLM's cache"] <= shares[-1] * gigabytes * GB
    assert shares == sorted(shares) and shares[0] < shares[-1] == 0.4
    assert plan.sequences == 256  # of the evaluation


def test_a_cache_without_room_for_one_completion_is_refused(quick, host):
    host(25)
    config = GRPOConfig(model="x", use_lora=True, **AUTO | {"vllm_memory_share": 0.001})
    with pytest.raises(ValueError, match=r"cache gets 0\.001 of the memory.*1,536 tokens.*--vllm_memory_share 0\."):
        plan_of(config, qwen("0.5B"))


def test_passes_are_predicted_at_a_start_only_where_much_of_the_memory_is_needed(quick, host):
    config = GRPOConfig(model="x", use_lora=True, sampler="transformers", **AUTO)
    host(100)
    assert not plan_of(config, qwen("0.5B"), with_passes=False).sources
    host(20)
    assert plan_of(config, qwen("0.5B"), with_passes=False).sources


def test_an_evaluation_is_planned_without_what_training_needs(quick, host):
    host(25)
    config = RLConfig(model="x", num_eval_prompts=64, max_tokens_per_microbatch=16384, vllm_memory_share=0.4)
    plan = plan_of(config, qwen("0.5B"), is_trained=False, with_passes=False)
    assert [each.name for each in plan.phases] == ["load", "sample"]
    assert plan.phases[0].host["policy"] == plan.phases[0].host["vLLM"] == 4 * 494032768
    host(40)
    with pytest.raises(
        ValueError, match=r"model=x: the phase `sample` needs .* Pass --vllm_memory_share 0\.\d+ --dtype bfloat16: "
    ):
        plan_of(config, qwen("7B"), is_trained=False, with_passes=False)


# Cards


def test_cards_are_known_by_their_names_and_sizes():
    assert card("24gb").total == card("24 GB").total == 24 * GB and card("24GiB").total == 24 * 2**30
    assert card("H100") == card("H100") and card("RTX 4090").total == card("rtx4090").total == card("4090").total
    assert card("NVIDIA A100 40GB").total < card("a100").total < card("h200").total
    assert not card("t4").computes_bfloat16 and not card("v100").computes_bfloat16 and card("l4").computes_bfloat16
    names = "24gb 80gb h100 h200 a100 a100-40gb 4090 3090 l4 t4 a10 l40s rtx6000 5090 v100"
    assert all(10 * GB < card(name).total < 200 * GB for name in names.split())


@pytest.mark.parametrize("name", ["foo", "", "0gb", "gb", "99999gb", "-4gb"])
def test_an_unknown_card_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"--device.*24gb.*h100"):
        card(name)


def test_a_card_without_bfloat16_is_refused_for_vllm(quick):
    config = GRPOConfig(use_lora=True, model="x", **AUTO)
    with pytest.raises(ValueError, match=r"t4.*7\.5.*--dtype float32"):
        plan_of(config, qwen("0.5B"), device="t4")
    assert plan_of(dataclasses.replace(config, dtype="float32"), qwen("0.5B"), device="t4").fits


# The command line


def test_plan_and_device_are_taken_off_the_command_line():
    assert take_plan(["--seed", "1"]) == (None, ["--seed", "1"])
    assert take_plan(["--plan", "--seed", "1", "--device", "24gb"])[1] == ["--seed", "1"]
    assert take_plan(["--device=h100", "--plan"])[0].device == "h100"
    for words in (["--device", "24gb"], ["--plan", "--device"], ["--plan", "24gb"]):
        with pytest.raises(ValueError, match=r"--plan|--device 24gb"):
            take_plan(words)


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    """A model of which there is a configuration and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2Config(**shape, num_key_value_heads=2, vocab_size=300, architectures=["Qwen2ForCausalLM"]).save_pretrained(
        folder
    )
    return folder


SCRIPTS = [*algorithms(), "PPO own"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_prints_its_plan_and_loads_nothing(quick, config_folder, tmp_path, monkeypatch, capsys, name):
    algorithm, *own = name.split()
    path = ROOT / algorithm / f"{algorithm.lower()}.py"
    words = ["--plan", "--device", "24gb", "--model", config_folder, "--task", "countdown", "--kl_coef", "0.1"]
    words += ["--value_backbone", "own"] if own else []
    if "teacher" in {field.name for field in dataclasses.fields(algorithms()[algorithm].config)}:
        words += ["--teacher", shutil.copytree(config_folder, tmp_path.with_name(f"{tmp_path.name} teacher"))]
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(f"{algorithm}.{algorithm.lower()}")
    start.start(
        algorithms()[algorithm].trainer, script.SETTINGS, embedded=vars(script).get("EMBEDDED"), script=str(path)
    )
    lines = capsys.readouterr().out.rstrip().splitlines()
    value = [*(["values, value", "update, value"] if algorithm == "PPO" else [])]
    named = {line.split("  ")[0].strip() for line in lines}
    assert {"load", "push", "sample", "log-probs, policy", "update, policy", *value} <= named
    assert lines[-1] == "it fits" and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_script_plans_or_refuses_with_its_status(config_folder, tmp_path):
    words = [ROOT / "GRPO" / "grpo.py", "--task", "countdown", "--model", config_folder, "--plan"]
    for more, status, said in (
        ([], 0, ""),
        (["--device", "24gb", "--vllm_memory_share", "0.01"], 2, "Pass --vllm_memory_share"),
    ):
        done = forked.run([*words, *more], cwd=tmp_path)
        assert done.returncode == status and said in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: ") == bool(status) and not list(tmp_path.iterdir())


# In a run


def test_a_run_says_its_plan_and_goes_on_with_the_chosen_budget(toy_folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="nanorlhf")
    settings = {"max_tokens_per_microbatch": "auto", "vllm_memory_share": "auto", "save_every": 1}
    trainer = toy_trainer(toy_folder, tmp_path / "run", **settings)
    assert trainer.batches.max_tokens_per_microbatch == 2048 and trainer.models.offload == "never"
    assert "memory plan: " in caplog.text and "max_tokens_per_microbatch 2048 (auto)" in caplog.text
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "# memory plan of " in text and "max_tokens_per_microbatch: auto" in text
    train_until(trainer, 1)
    del trainer
    again = toy_trainer(toy_folder, tmp_path / "run", **settings)
    assert again.batches.max_tokens_per_microbatch == 2048


def test_on_a_cpu_only_what_is_larger_than_all_memory_is_refused(quick):
    config = GRPOConfig(model="x", sampler="transformers")
    small = skeleton(Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300))
    plan = plan_of(config, small, with_passes=False)
    assert plan.fits and not plan.sources and "and activations" in show.short(plan, config)[0]
    with pytest.raises(ValueError, match="main memory"):
        plan_of(config, qwen("14B"), with_passes=False)


def test_a_plan_takes_milliseconds_where_passes_are_a_formula(quick):
    config, there = GRPOConfig(use_lora=True, kl_coef=0.1, **AUTO), card("24gb")
    casting = Casting(config, qwen("1.5B"), there)
    start = time.process_time()
    for _ in range(20):
        make_plan(config, casting.cast(config), Machine(card=there), work=Work(config))
    assert (time.process_time() - start) / 20 < 0.02


# The page and the presets


@pytest.mark.parametrize(
    ("size", "method", "name", "gigabytes"),
    [
        ("0.5B", "full", "critic-free", 12),
        ("1.5B", "LoRA", "PPO, shared", 12),
        ("3B", "full", "critic-free", 24),
        ("7B", "LoRA", "critic-free", 40),
        ("14B", "QLoRA", "critic-free", 40),
    ],
)
def test_the_table_of_the_page_is_what_its_command_writes(size, method, name, gigabytes):
    page = memory_table.PAGE.read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {size} | {method} | {name} |"))
    shown = row.strip("| ").split(" | ")[4 + memory_table.CARDS.index(gigabytes)]
    assert shown == memory_table.cell(size, method, memory_table.ALGORITHMS[name], gigabytes)


@pytest.mark.parametrize("gigabytes", memory_table.CARDS)
def test_presets_are_what_the_plan_chooses(gigabytes):
    path = memory_table.PRESETS / f"gpu-{gigabytes}gb.yaml"
    assert path.read_text(encoding="utf-8") == memory_table.preset(gigabytes)
