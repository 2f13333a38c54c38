"""What a user can get wrong ends in one clear message, before anything expensive is done."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from PPO.test_value_model import save_classifier
from tests import forked
from tests.toy import algorithms, toy_config, toy_task, toy_trainer

ROOT = Path(__file__).parent.parent


def run_grpo(*arguments: str, before: str = "", **environment: str) -> subprocess.CompletedProcess:
    """GRPO/grpo.py as a user starts it, in its folder; `before` is Python that runs first."""
    code = f"{before}\nimport runpy, sys\nsys.argv[0] = 'grpo.py'\nrunpy.run_path('grpo.py', run_name='__main__')"
    if not before and not environment:  # what comes before, changes what is imported
        return forked.run(["-c", code, *arguments], cwd=ROOT / "GRPO")
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT / "GRPO",
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
    )


def assert_one_message(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    for part in parts:
        assert part in done.stderr


@pytest.mark.slow
def test_a_misspelt_setting_names_the_nearest():
    assert_one_message(run_grpo("--learning_rat", "1e-3"), "learning_rat", "Did you mean learning_rate?")


@pytest.mark.slow
def test_a_missing_data_file_is_named_before_the_tiny_policy_is_built(tmp_path):
    arguments = ["--preset", "cpu", "--dataset", "no/such.jsonl", "--output_dir", str(tmp_path / "run")]
    done = run_grpo(*arguments, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert_one_message(done, "no/such.jsonl")
    assert not (tmp_path / "cache" / "nanorlhf").exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_vllm_the_message_says_what_to_install(tmp_path):
    arguments = ["--preset", "cpu", "--output_dir", str(tmp_path / "run")]
    done = run_grpo(*arguments, before="import sys; sys.modules['vllm'] = None")
    assert_one_message(done, "make install", "--sampler transformers")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_our_own_keeps_its_traceback(tmp_path):
    done = run_grpo(
        "--help",
        before="import sys; sys.path.insert(0, '..'); import common.cli as c; c.parse_config = lambda *a, **k: 1 / 0",
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such-model"}, r"model='no/such-model'"),
        ({"max_prompt_length": 1}, r"max_prompt_length=1: no prompt of 12 is short enough.*--max_prompt_length"),
        ({"rewards": ["sun"]}, r"rewards='sun'.*digits, sum"),
        ({"rewards": ["no_file.py:f"]}, r"no file no_file.py"),
        ({"report_to": ["wandbb"]}, "wandbb"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(tiny_folder, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = []
    monkeypatch.setattr("common.trainer.load_policy", lambda *args, **kwargs: loaded.append(args))
    config = toy_config(**({"model": tiny_folder, "output_dir": tmp_path / "run"} | settings))
    with pytest.raises(ValueError, match=message):
        GRPOTrainer(config, task=toy_task())
    assert not loaded and not (tmp_path / "run").exists()


def test_an_unknown_task_names_the_ones_that_are_there(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=r"task='countdwn'.*countdown"):
        GRPOTrainer(toy_config(tiny_folder, tmp_path / "run", task="countdwn"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, r"num_generations=1: GRPO compares.*--num_generations 8"),
        ({"temperature": 0.0}, r"temperature=0.0.*--eval_temperature 0"),
        ({"prompts_per_step": 5, "num_generations": 3, "num_minibatches": 4}, r"15 rows.*divisor"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)


@pytest.mark.parametrize(
    ("name", "arguments", "parts"),
    [
        ("GRPO", "--num_generations 1", ["num_generations=1: GRPO compares", "Pass --num_generations 8"]),
        ("RLOO", "--num_generations 1", ["num_generations=1: RLOO's baseline", "at least 2"]),
        ("RAFT", "--num_generations 1", ["num_generations=1: RAFT learns from the best of", "at least 2"]),
        ("Reinforce", "--group_baseline true --num_generations 1", ["num_generations=1: group_baseline"]),
        ("RLOO", "--average_over tokens", ["ratio_level='sequence'", "--average_over rows"]),
        ("RAFT", "--whiten_advantages true", ["RAFT has no advantages"]),
        ("ReMax", "--gamma 1.5", ["gamma=1.5", "in [0, 1]"]),
        ("Reinforce", "--clip_range 1.5", ["clip_range=1.5", "Pass --clip_range 0.2"]),
        ("PPO", "--gae_lambda -0.1", ["gae_lambda=-0.1", "in [0, 1]"]),
        ("PPO", "--value_clip_range 0", ["value_clip_range=0.0", "above 0"]),
        ("PPO", "--value_backbone shared", ["value_backbone='shared' with use_lora=False", "--use_lora true"]),
        ("PPO", "--value_backbone shared --use_lora true --value_init some/model", ["--value_backbone own"]),
        ("PPO", "--value_init_prompts 3", ["value_init_prompts=3", "--value_init_prompts 640"]),
    ],
    ids=str,
)
def test_a_script_says_what_its_algorithm_needs(tmp_path, monkeypatch, capsys, name, arguments, parts):
    script, folder = algorithms()[name].script, tmp_path / "run"
    settings = f"--preset cpu --sampler transformers --output_dir {folder} {arguments}"
    monkeypatch.setattr(sys, "argv", [str(script), *settings.split()])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr()
    assert left.value.code == 2 and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert all(part in shown.err for part in parts)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_labels": 2}, "2 labels and 459 tokens"), ({"vocab_size": 300}, "1 label and 300 tokens")],
    ids=["two labels", "fewer tokens"],
)
def test_a_model_that_cannot_be_ppos_value_model_is_refused(tiny_folder, tmp_path, settings, message):
    folder = save_classifier(tmp_path / "model", **settings)
    with pytest.raises(ValueError, match=rf"value_init='.*model'.*{message}.*Pass --value_init fit"):
        toy_trainer(tiny_folder, tmp_path / "run", algorithm="PPO", value_init=str(folder))


def test_prompts_that_are_too_long_are_dropped_and_counted(tiny_folder, tmp_path):
    task = toy_task()
    task.train.append({"prompt": "long " * 50, "total": 1})
    trainer = GRPOTrainer(toy_config(tiny_folder, tmp_path / "run"), task=task)
    assert trainer.prompts.num_dropped == 1 and len(trainer.prompts) == 12
