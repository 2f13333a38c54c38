"""The command line: what wins over what, how a mistake is answered, and that a written configuration reads back."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict, fields, replace

import pytest
import yaml

from common.cli import parse_config, run_script
from common.config import MEMORY_SETTINGS, RLConfig
from common.presets.preset import PRESETS
from common.start import prepare, report
from GRPO.grpo import EMBEDDED, SETTINGS
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from PPO.ppo_trainer import PPOConfig
from tests.toy import ROOT, toy_trainer
from VinePPO.vineppo_trainer import VinePPOConfig


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    """The same presets whatever machine the tests run on."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def parse(*args: str, **settings: object) -> GRPOConfig:
    """The settings that these arguments give a script whose literal has `settings`, without any preset."""
    return parse_config(GRPOConfig(**({"preset": "none"} | settings)), args=list(args))


@pytest.fixture
def write_yaml(tmp_path):
    """Write text to a file and give the arguments that read it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def refused(*args: str, **settings: object) -> str:
    with pytest.raises(ValueError) as caught:
        parse(*args, **settings)
    return str(caught.value)


# What wins


def test_each_source_of_settings_wins_over_the_one_before(write_yaml):
    """Class default < preset < edited literal < YAML file < command line: each source sets one less than before."""
    default = GRPOConfig()
    literal = {"warmup_steps": 12, "num_steps": 13, "eval_every": 14}
    preset = yaml.safe_load((PRESETS / "cpu.yaml").read_text())
    from_file = write_yaml("num_steps: 33\neval_every: 34\n")
    config = parse(*from_file, "--eval_every", "44", **literal, preset="cpu", lora_r=5)
    assert config.lora_alpha == default.lora_alpha  # nobody but the class
    assert config.lora_r == 5  # the literal, which no preset speaks about
    assert config.prompts_per_step == preset["prompts_per_step"][1] == 32
    assert config.warmup_steps == 12 != preset["warmup_steps"][1]  # edited
    assert config.num_steps == 33
    assert config.eval_every == 44


def test_the_literal_on_top_of_a_script_wins_over_the_class():
    assert parse(clip_range=0.1, use_lora=True).clip_range == 0.1
    assert parse(use_lora=True).use_lora is True
    assert parse(save_every=0).save_every == 0  # 0 and False are values, not missing ones
    assert parse(progress=False, scale_by_std=False).scale_by_std is False


def test_a_file_can_take_a_value_back_to_nothing(write_yaml):
    assert parse(*write_yaml("dataset: null\n"), dataset="somebody/some-data").dataset is None


def test_the_literal_is_left_as_it_was():
    settings = GRPOConfig(rewards=["a"], preset="none")
    before = asdict(settings)
    parsed = parse_config(settings, args=["--rewards", "b", "--num_steps", "3"])
    parsed.rewards.append("c")
    assert asdict(settings) == before


# Presets


def test_without_a_gpu_the_bare_command_is_the_embedded_default():
    config = parse_config(SETTINGS, embedded=EMBEDDED, args=[])
    assert config.preset == "cpu"
    assert config.model == "tiny" and config.dataset is None  # nothing to download
    assert config.use_lora is False and config.kl_coef == 0.0
    assert {name: vars(config)[name] for name in EMBEDDED} == {name: pair[1] for name, pair in EMBEDDED.items()}


def test_with_a_gpu_the_bare_command_is_what_stands_on_top_of_the_script(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = parse_config(SETTINGS, embedded=EMBEDDED, args=[])
    assert asdict(config) == asdict(SETTINGS) | {"preset": "none"}


@pytest.mark.parametrize("where", ["command line", "file", "literal"])
def test_a_preset_can_be_named_anywhere(write_yaml, where):
    args = {"command line": ["--preset=gpu-24gb"], "file": write_yaml("preset: gpu-24gb\n"), "literal": []}[where]
    settings = GRPOConfig(preset="gpu-24gb" if where == "literal" else "auto")
    config = parse_config(settings, embedded={"num_steps": (200, 7)}, args=args)
    assert (
        config.preset == "gpu-24gb" and config.max_tokens_per_microbatch == 32768 and config.vllm_memory_share == 0.67
    )
    assert config.num_steps == 200  # what an algorithm wants embedded concerns the preset cpu alone


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_preset_for_a_gpu_on_a_machine_without_one_is_said_first(monkeypatch, has_gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    for name in ("gpu-24gb", "gpu-80gb"):
        first = parse("--preset", name).notes[0]
        assert first.startswith(f"warning: preset {name} is for a GPU, and this machine has no CUDA GPU") != has_gpu
        assert ("Qwen/Qwen2.5-1.5B-Instruct" in first and "hours a step" in first) != has_gpu
    assert not any("warning" in note for name in ("cpu", "none", "auto") for note in parse("--preset", name).notes)
    tiny = parse("--preset", "gpu-24gb", "--model", "tiny").notes
    assert ("this machine has no CUDA GPU. Leave" in tiny[0]) != has_gpu


def test_the_last_preset_on_the_command_line_counts_like_the_last_of_any_setting(write_yaml):
    assert parse(*write_yaml("preset: cpu\n"), "--preset", "gpu-40gb").preset == "gpu-40gb"
    config = parse("--num_steps", "1", "--num_steps", "2", "--preset", "cpu", "--preset", "gpu-24gb")
    assert config.num_steps == 2
    assert config.preset == "gpu-24gb" and config.model != "tiny" and config.vllm_memory_share == 0.67


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_hold_known_settings_and_those_for_gpus_change_no_result(path):
    preset = yaml.safe_load(path.read_text())
    of_some = preset.pop("of_some_algorithms", {})
    assert set(preset) <= {field.name for field in fields(RLConfig)}
    assert all(any(hasattr(config, name) for config in (PPOConfig, VinePPOConfig)) for name in of_some)
    GRPOConfig(**{name: value for name, (_, value) in preset.items()})
    if path.stem.startswith("gpu"):
        assert set(preset) <= set(MEMORY_SETTINGS)


# What is written on top is what runs

SCRIPT = str(ROOT / "GRPO" / "grpo.py")


def edited(*args: str, **settings: object) -> GRPOConfig:
    """What grpo.py runs, on this machine without a GPU, after a user has edited these lines."""
    return parse_config(replace(SETTINGS, **settings), embedded=EMBEDDED, script=SCRIPT, args=list(args))


def test_an_edited_line_wins_over_the_preset_and_the_others_are_replaced_as_ever():
    config, shipped = edited(num_steps=3, prompts_per_step=4, learning_rate=7e-5), edited()
    assert (config.num_steps, config.prompts_per_step, config.learning_rate) == (3, 4, 7e-5)
    changed = {name for name in asdict(config) if vars(config)[name] != vars(shipped)[name]}
    assert changed == {"num_steps", "prompts_per_step", "learning_rate"}


def test_a_line_that_is_edited_to_the_default_of_the_class_counts_as_edited_too():
    assert GRPOConfig().num_steps == 200 == edited(num_steps=200).num_steps


def test_an_edited_line_loses_against_the_command_line_and_a_file(write_yaml):
    assert edited("--num_steps", "9", num_steps=3).num_steps == 9
    assert edited(*write_yaml("num_steps: 8"), num_steps=3).num_steps == 8


def test_the_run_says_what_was_replaced_and_what_was_kept():
    said = "\n".join(edited(num_steps=3).notes)
    assert "preset cpu (there is no CUDA GPU)" in said and "GRPO/grpo.py" in said and "--preset none" in said
    assert "prompts_per_step 64 -> 32" in said and "model Qwen/Qwen2.5-1.5B-Instruct -> tiny" in said
    assert "average_over rows -> tokens" in said
    assert "num_steps 500" not in said and "num_steps=3" in said
    assert "seed" not in said and "num_minibatches" not in said  # the same with the preset and without
    assert edited("--preset", "none").notes == ()
    assert "num_steps" not in "".join(edited("--num_steps", "7").notes)  # typed, so the preset has no say in it


def test_a_line_that_says_already_what_the_preset_says_is_no_reason_to_keep_others():
    assert edited(task="countdown").rewards == edited().rewards == ["format", "equation"]
    assert "since you edited" not in "".join(edited(task="countdown").notes)


def test_edited_data_keep_their_task_and_rewards():
    config = edited(dataset="mine.jsonl")
    assert (config.task, config.dataset, config.rewards) == ("hh_rlhf", "mine.jsonl", None)
    assert config.model == "tiny"


@pytest.mark.parametrize("how", ["command line", "file", "edited"])
def test_what_the_embedded_policy_learns_with_never_reaches_another_model(write_yaml, how):
    model = "Qwen/Qwen2.5-0.5B-Instruct"
    args = {"command line": ["--model", model], "file": write_yaml(f"model: {model}"), "edited": []}[how]
    config = edited(*args, **({"model": model} if how == "edited" else {}))
    without = parse_config(SETTINGS, script=SCRIPT, args=["--preset", "none", "--model", model])
    changed = {name for name in asdict(config) if vars(config)[name] != vars(without)[name]}
    assert config.preset == "cpu" and changed <= {*MEMORY_SETTINGS, "preset"}
    assert config.max_tokens_per_microbatch == 2048 and config.gradient_checkpointing is False
    assert "num_steps" not in "".join(config.notes)
    assert "num_steps" not in "".join(edited("--model", model, num_steps=3).notes)  # an edited line is no exception


def test_another_embedded_policy_learns_with_them():
    config = edited("--model", "tiny-r1")
    assert (config.model, config.task, config.num_steps) == ("tiny-r1", "countdown", 60)


def test_settings_for_pretrained_models_reach_no_embedded_one_and_the_other_way_round():
    pretrained = edited("--preset", "cpu-small")
    assert (pretrained.model, pretrained.task) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "instructions")
    assert (pretrained.dtype, pretrained.max_completion_length, pretrained.num_steps) == ("fast", 48, 40)
    assert edited("--preset", "cpu-small", "--model", "/a/folder").num_steps == 40
    tiny = edited("--preset", "cpu-small", "--model", "tiny")
    assert tiny.num_steps == SETTINGS.num_steps
    assert tiny.notes[0].startswith("warning: preset cpu-small is for pretrained models")
    other = edited("--preset", "cpu", "--model", "/a/folder")
    assert other.num_steps == SETTINGS.num_steps
    assert "--preset cpu-small has settings" in other.notes[0]


def test_a_preset_may_know_settings_that_only_some_algorithms_have():
    from PPO.ppo import SETTINGS as OF_PPO

    assert parse_config(OF_PPO, args=["--preset", "cpu-small"]).value_init_prompts == 64
    assert not hasattr(edited("--preset", "cpu-small"), "value_init_prompts")


def test_an_edited_line_wins_over_a_preset_for_a_gpu_too():
    config = edited("--preset", "gpu-24gb", vllm_memory_share=0.3)
    assert config.vllm_memory_share == 0.3 and config.max_tokens_per_microbatch == 32768


@pytest.mark.parametrize(
    ("args", "settings", "where"),
    [
        ([], {"num_minibatches": 7}, "num_minibatches is from GRPO/grpo.py"),
        (["--num_minibatches", "7"], {}, "(prompts_per_step and num_generations are from preset cpu.)"),
        (["--num_minibatches", "7", "--prompts_per_step", "4", "--num_generations", "4"], {}, None),
        (["--preset", "none"], {"temperature": 1.5, "num_minibatches": 7}, "num_minibatches"),
    ],
)
def test_a_message_says_where_a_value_comes_from_unless_it_was_just_typed(args, settings, where):
    written = replace(SETTINGS)
    vars(written).update(settings)  # a literal is checked before the preset is known
    with pytest.raises(ValueError, match="num_minibatches=7") as caught:
        parse_config(written, embedded=EMBEDDED, script=SCRIPT, args=args)
    assert " from " not in str(caught.value) if where is None else where in str(caught.value)


def test_a_message_names_the_preset_or_the_file_a_value_is_from(write_yaml):
    with pytest.raises(ValueError, match=r"max_completion_length=0.*max_completion_length is from .*settings.yaml"):
        edited(*write_yaml("max_completion_length: 0"))
    with pytest.raises(ValueError, match=r"num_minibatches=7 with prompts_per_step=32"):
        edited("--num_minibatches", "7")
    with pytest.raises(ValueError, match=r"max_completion_length=0.*\(max_completion_length is from preset cpu.\)"):
        parse_config(SETTINGS, embedded={"max_completion_length": (1024, 0)}, script=SCRIPT, args=[])


@pytest.mark.parametrize("text", ["learning_rat: [1, 2]", "num_steps: 60", "num_steps: [1, 2, 3]"])
def test_a_preset_with_a_mistake_names_it(monkeypatch, tmp_path, text):
    (tmp_path / "cpu.yaml").write_text(text)
    monkeypatch.setattr("common.presets.preset.PRESETS", tmp_path)
    with pytest.raises(ValueError, match=text.partition(":")[0]):
        edited()


def test_what_a_trainer_refuses_is_told_with_where_it_comes_from_too(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = edited("--preset", "none", "--sampler", "transformers", "--output_dir", str(tmp_path), model="no/model")
    with pytest.raises(ValueError, match=r"model='no/model': cannot.*\(model is from GRPO/grpo.py.\)"):
        prepare(GRPOTrainer, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "written", "message"),
    [
        ("num_generations=4", "num_generations=1", "GRPO compares completions"),
        ("num_steps=500", "num_stepz=500", "unknown setting 'num_stepz' in GRPOConfig(...): nothing reads it. Did"),
    ],
)
def test_a_mistake_in_a_literal_is_one_message_with_its_line(tmp_path, line, written, message):
    source = (ROOT / "GRPO" / "grpo.py").read_text()
    assert line in source
    script = tmp_path / "my_grpo.py"
    script.write_text(source.replace(line, written).replace("Path(__file__).resolve().parent.parent", repr(str(ROOT))))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert done.stderr.startswith("error: ") and "my_grpo.py, line 11: " in done.stderr


def test_a_literal_with_a_misspelt_setting_names_it():
    with pytest.raises(TypeError, match=r"'num_stepz' in GRPOConfig.*Did you mean num_steps"):
        GRPOConfig(num_stepz=3)


def test_a_preset_that_is_not_there_is_answered_with_those_that_are():
    message = refused("--preset", "gpu-99gb")
    assert (
        "preset='gpu-99gb'" in message
        and "cpu, cpu-small, gpu-12gb, gpu-16gb, gpu-24gb, gpu-40gb, gpu-80gb, none" in message
    )


# Ways to write a setting


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--learning_rate", "2e-6"], "learning_rate", 2e-6),
        (["--learning_rate=2e-6"], "learning_rate", 2e-6),
        (["--learning-rate", "2e-6"], "learning_rate", 2e-6),
        (["--sparse"], "sparse", True),
        (["--sparse", "true"], "sparse", True),
        (["--sparse=false"], "sparse", False),
        (["--no_progress"], "progress", False),
        (["--progress", "no"], "progress", False),
        (["--rewards", "format", "equation"], "rewards", ["format", "equation"]),
        (["--rewards=format"], "rewards", ["format"]),
        (["--rewards", "a", "b", "--reward_weights", "0.5", "-1"], "reward_weights", [0.5, -1.0]),
        (["--dataset_split", "train[:10%]"], "dataset_split", "train[:10%]"),
        (["--output_dir=runs/a=b"], "output_dir", "runs/a=b"),
        (["--lora_target_modules", "q_proj", "v_proj", "--seed", "1"], "lora_target_modules", "q_proj,v_proj"),
        (["--lora-target-modules=q_proj, v_proj"], "lora_target_modules", "q_proj,v_proj"),
        (["--report_to", "none"], "report_to", None),
        (["--clip_range_high", "0.28"], "clip_range_high", 0.28),
        (["--kl_coef", "1"], "kl_coef", 1.0),
    ],
    ids=str,
)
def test_a_setting_on_the_command_line(args, name, value):
    given = vars(parse(*args))[name]
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize("args", [["--no_use_lora"], ["--use_lora", "false"], ["--use_lora=no"]], ids=" ".join)
def test_what_a_script_switches_on_the_command_line_can_switch_off(args):
    assert parse(*args, use_lora=True).use_lora is False


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 2e-6", "learning_rate", 2e-6),  # YAML 1.1 reads this as text
        ("learning_rate: 2.0e-6", "learning_rate", 2e-6),
        ("kl_coef: 1", "kl_coef", 1.0),
        ("sparse: yes", "sparse", True),
        ("progress: off", "progress", False),
        ("clip_range_high: 28e-2", "clip_range_high", 0.28),
        ("rewards: [format]", "rewards", ["format"]),
        ("{rewards: [a, b], reward_weights: [1e-1, 1]}", "reward_weights", [0.1, 1.0]),
        ("output_dir: runs/mine", "output_dir", "runs/mine"),
    ],
)
def test_a_setting_in_a_file(write_yaml, line, name, value):
    given = vars(parse(*write_yaml(line)))[name]
    assert given == value and type(given) is type(value)
    if isinstance(value, list):
        assert [type(item) for item in given] == [type(item) for item in value]


def test_the_command_line_goes_on_before_and_after_a_file(write_yaml):
    config = parse("--num_steps", "7", *write_yaml("eval_every: 3\n"), "--seed", "5")
    assert (config.num_steps, config.eval_every, config.seed) == (7, 3, 5)


def test_a_file_can_be_named_with_an_equals_sign(tmp_path):
    (tmp_path / "my.yaml").write_text("num_steps: 9")
    assert parse(f"--config={tmp_path / 'my.yaml'}").num_steps == 9


@pytest.mark.parametrize("preset", ["none", "cpu"])
def test_a_configuration_that_was_written_reads_back_the_same(tmp_path, preset):
    """On this machine or on one with another default preset."""
    args = ["--preset", preset, "--learning_rate=2e-6", "--seed", "7", "--clip_range_high", "0.28", "--keep_per_group"]
    config = parse_config(SETTINGS, embedded=EMBEDDED, args=args)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    assert parse_config(SETTINGS, embedded=EMBEDDED, args=["--config", str(path)]) == config
    assert parse_config(GRPOConfig(), embedded={"num_steps": (200, 1)}, args=["--config", str(path)]) == config


# Mistakes


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--learning_rte", "1"], ["learning_rte", "on the command line", "Did you mean learning_rate?"]),
        (["--num_generation=4"], ["num_generation", "Did you mean num_generations?"]),
        (["--top_p", "0.9"], ["top_p"]),
        (["--no_sparze"], ["no_sparze"]),
        (["--zzz", "1"], ["zzz", "--help"]),
        (["--num_steps", "many"], ["num_steps", "many"]),
        (["--num_steps", "1.5"], ["num_steps", "1.5"]),
        (["--num_steps"], ["num_steps"]),
        (["--sparse", "maybe"], ["sparse", "maybe"]),
        (["--temperature", "0"], ["temperature=0.0"]),
        (["--num_generations", "1"], ["num_generations=1"]),
        (["--num_minibatches", "7"], ["num_minibatches=7"]),
        (["--lr_scheduler", "step"], ["lr_scheduler='step'", "cosine"]),
        (["num_steps=3"], ["num_steps=3"]),
        (["-n", "3"], ["-n"]),
        (["--no_num_steps", "3"], ["no_num_steps"]),
        (["--config"], ["--config"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    ],
    ids=str,
)
def test_a_mistake_on_the_command_line_is_named(args, fragments):
    message = refused(*args)
    assert all(fragment in message for fragment in fragments), message
    assert "HfArgumentParser" not in message


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("learning_rte: 1", ["learning_rte", "settings.yaml", "Did you mean learning_rate?"]),
        ("env:\n  HOME: x", ["env"]),
        ("no_progress: true", ["no_progress"]),
        ("config: other.yaml", ["config"]),
        ("1: 2", ["1"]),
        ("num_steps: many", ["num_steps", "many"]),
        ("num_steps: [1, 2]", ["num_steps", "int"]),
        ("model: null", ["model=None"]),
        ("rewards: equation", ["rewards='equation'", "list"]),
        ("temperature: 0", ["temperature=0"]),
        ("num_steps: [1", ["settings.yaml", "YAML"]),
        ("just text", ["settings.yaml", "setting: value"]),
        ("preset: huge", ["preset='huge'"]),
    ],
)
def test_a_mistake_in_a_file_is_named(write_yaml, text, fragments):
    message = refused(*write_yaml(text))
    assert all(fragment in message for fragment in fragments), message
    assert "dataclass" not in message


def test_a_dash_is_as_good_as_an_underscore_in_a_file_too(write_yaml):
    assert parse(*write_yaml("learning-rate: 2e-6\n")).learning_rate == 2e-6


def test_rewards_of_ones_own_do_not_clash_with_the_weights_of_the_preset():
    """The preset has two rewards and two weights: who names one reward did not ask for two weights."""
    assert parse("--preset", "cpu", "--rewards", "equation").rewards == ["equation"]


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"--{field.name}" in shown for field in fields(GRPOConfig))


# Starting a script


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_a_users_mistake_ends_a_script_with_its_message_and_status_two(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: parse("--num_generations", "1"))
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == ""
    assert captured.err.startswith("error: num_generations=1: GRPO compares") and captured.err.count("\n") == 1


@pytest.mark.parametrize("main", [lambda: json.loads("{"), raising(RuntimeError("x")), raising(KeyError("x"))])
def test_what_is_not_the_users_mistake_keeps_its_traceback(main):
    with pytest.raises((json.JSONDecodeError, RuntimeError, KeyError)):
        run_script(main)


def test_a_value_error_that_python_itself_raises_keeps_its_traceback():
    """It has no advice for a user, and where it came from is what a developer needs."""
    with pytest.raises(ValueError, match="zip"):
        run_script(lambda: list(zip([1], [], strict=True)))


def test_an_interrupted_script_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(raising(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert "same command continues" in capsys.readouterr().err


def test_a_script_that_ends_well_just_ends():
    ran = []
    assert run_script(lambda: ran.append(1)) is None and ran == [1]


def test_a_report_says_where_the_run_is_and_what_became_of_the_policy(tiny_folder, tmp_path, capsys, with_curves):
    with with_curves():
        report(toy_trainer(tiny_folder, tmp_path / "run", eval_every=1, save_every=2, max_prompt_length=10))
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"run: {tmp_path / 'run'} (new)" in said
    assert f"{lines[0]['eval/accuracy']:.3f} before (step 0)" in said
    assert f"{lines[-1]['eval/accuracy']:.3f} after step 2" in said
    assert "eval/accuracy on 4 held-out prompts" in said
    for path in (tmp_path / "run" / "curves.png", tmp_path / "run" / "final"):
        assert str(path) in said and path.exists()


def test_a_reward_can_be_given_as_often_as_needed_with_a_weight_or_without():
    parsed = parse("--reward", "equation", "2", "--seed", "7", "--reward", "my.py:short")
    assert (parsed.rewards, parsed.reward_weights, parsed.seed) == (["equation", "my.py:short"], [2.0, 1.0], 7)
    parsed = parse("--reward=equation", "--reward", "format", "--preset", "cpu")
    assert (parsed.rewards, parsed.reward_weights) == (["equation", "format"], None)


def test_a_reward_needs_a_name():
    assert "--reward without a name" in refused("--reward", "--seed", "7")


def test_another_task_brings_its_own_data_and_rewards():
    settings = {"dataset": "mine.jsonl", "dataset_split": "train[:9]", "rewards": ["a"], "reward_weights": [0.5]}
    parsed = parse("--task", "gsm8k", **settings)
    assert (parsed.dataset, parsed.dataset_split, parsed.rewards, parsed.reward_weights) == (None, "train", None, None)
    parsed = parse("--task", "gsm8k", "--dataset", "x.jsonl", "--reward", "b", **settings)
    assert (parsed.dataset, parsed.rewards) == ("x.jsonl", ["b"])
    assert parse("--seed", "1", **settings).rewards == ["a"]


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.ERROR), (None, logging.INFO)])
def test_of_several_processes_one_says_what_all_would_say(rank, level, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    logger = logging.getLogger("nanorlhf")
    before = logger.level
    run_script(lambda: None)
    found, _ = logger.level, logger.setLevel(before)
    assert found == level
