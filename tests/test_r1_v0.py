"""examples/r1-v0: its settings, its two tasks end to end, and the picture of accuracy and length."""

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from common.embedded import check_model, load_tokenizer, resolve_model
from common.embedded.policy import TINY_POLICIES, tiny_policy
from GRPO.grpo_trainer import GRPOConfig
from tests.toy import metrics_of

FOLDER = Path(__file__).parents[1] / "examples" / "r1-v0"
MATH_500 = Path(__file__).parents[2] / "shared" / "data" / "math500" / "test.jsonl"
sys.path.insert(0, str(FOLDER))

import grpo_r1  # noqa: E402
from r1_figure import write_figure  # noqa: E402


@pytest.fixture
def with_gpu(monkeypatch):
    """What the settings are where there is a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def train(monkeypatch, folder, output_dir, *arguments):
    """Run the script's main with a few small steps."""
    small = [
        *("--model", str(folder), "--output_dir", str(output_dir), "--sampler", "transformers", "--progress", "false"),
        *("--num_steps", "2", "--prompts_per_step", "2", "--num_generations", "2", "--num_eval_prompts", "3"),
        *("--max_completion_length", "8", "--eval_every", "1", "--save_every", "0"),
    ]
    monkeypatch.setattr("sys.argv", ["grpo_r1.py", *small, *arguments])
    grpo_r1.main()
    return metrics_of(output_dir)


# Settings


def test_every_setting_is_on_top_of_the_script():
    script = (FOLDER / "grpo_r1.py").read_text()
    for field in fields(GRPOConfig):
        assert f"\n    {field.name}=" in script, field.name


def test_with_a_gpu_it_is_sparse_grpo_of_a_base_model_on_countdown(with_gpu):
    config = grpo_r1.parse([])
    assert asdict(config) == asdict(grpo_r1.SETTINGS) | {"preset": "none"}
    assert config.sparse and config.kl_coef == 0 and not config.use_lora
    assert config.dataset == "Jiayi-Pan/Countdown-Tasks-3to4" and config.num_eval_prompts == 500


def test_without_a_gpu_it_is_the_larger_embedded_default():
    config = grpo_r1.parse([])
    assert config.preset == "cpu" and config.sparse
    assert {name: vars(config)[name] for name in grpo_r1.EMBEDDED} == {
        name: pair[1] for name, pair in grpo_r1.EMBEDDED.items()
    }


def test_mathematics_has_its_own_data_and_settings(with_gpu):
    config = grpo_r1.parse(["--task", "math", "--num_steps", "7"])
    assert config.task == "math" and config.num_steps == 7
    assert config.dataset is config.rewards is config.reward_weights is None  # the task's own
    assert config.num_eval_prompts == 500 and config.eval_temperature == 0 and config.num_generations == 4
    changed = {name for name, value in asdict(config).items() if value != vars(grpo_r1.SETTINGS)[name]}
    assert changed == {*grpo_r1.MATH, "task", "dataset", "rewards", "reward_weights", "preset"} - {"num_generations"}


@pytest.mark.parametrize("task", ["countdown", "math"])
def test_the_settings_of_a_small_card_are_accepted(with_gpu, task):
    arguments = ["--task", task, "--preset", "gpu-24gb", "--use_lora", "true", "--learning_rate", "1e-5"]
    assert grpo_r1.parse(arguments).use_lora


def test_the_larger_policy_is_known_by_its_name_and_built_from_its_own_settings(tmp_path, monkeypatch):
    check_model("tiny-r1")  # no folder and no download
    assert (
        load_tokenizer("tiny-r1")("2 3 5 6 make 48")["input_ids"]
        == load_tokenizer("tiny")("2 3 5 6 make 48")["input_ids"]
    )
    small = replace(
        TINY_POLICIES["tiny-r1"], hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_lessons=32
    )
    monkeypatch.setitem(TINY_POLICIES, "tiny-r1", small)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(resolve_model("tiny-r1")) == tiny_policy(small)
    assert len(list((tmp_path / "nanorlhf").glob("tiny-*/model.safetensors"))) == 1


# Runs


@pytest.mark.slow
def test_a_run_ends_with_both_curves_in_its_folder(tiny_folder, tmp_path, monkeypatch, capsys):
    rows = train(monkeypatch, tiny_folder, tmp_path / "run", "--dataset", "generated-3to4")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all({"eval/accuracy", "eval/length"} <= row.keys() for row in rows)
    assert (tmp_path / "run" / "r1.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "run" / "r1.png") in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["dataset"] == "generated-3to4" and settings["sparse"]
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    sizes = {len(json.loads(line)["prompt"].split(" make ")[0].split()) for line in samples}
    assert sizes <= {3, 4} and 4 in sizes


@pytest.mark.slow
def test_mathematics_runs_from_a_local_file(tiny_folder, tmp_path, monkeypatch):
    rows = train(monkeypatch, tiny_folder, tmp_path / "run", "--task", "math", "--dataset", str(math_rows(tmp_path)))
    assert {"reward/correct", "reward/boxed", "eval/accuracy"} <= rows[-1].keys()
    assert (tmp_path / "run" / "r1.png").is_file()


def math_rows(tmp_path: Path) -> Path:
    """MATH-500 where it is at hand, else problems with its columns."""
    if MATH_500.is_file():
        return MATH_500
    rows = [{"problem": f"What is ${a} + 1$?", "solution": "", "answer": str(a + 1)} for a in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


# Picture


def write_run(folder, *, seed=0, **gone):
    """A run's folder with nothing but metrics; `gone` names what no line has."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    lines = []
    for step in range(21):
        line = {"step": step, "length": 60 + 3 * step + random.normal()} if step else {"step": 0}
        if step % 5 == 0:
            line |= {"eval/accuracy": 0.2 + 0.02 * step + 0.01 * random.normal(), "eval/accuracy_ci95": 0.05}
        lines.append({name: value for name, value in line.items() if name not in gone.get("gone", ())})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_picture_of_several_seeds_differs_from_that_of_one(tmp_path):
    runs = [write_run(tmp_path / f"seed{seed}", seed=seed) for seed in range(3)]
    write_figure(runs[:1], tmp_path / "one.png")
    write_figure(runs, tmp_path / "three.png")
    one, three = imread(tmp_path / "one.png"), imread(tmp_path / "three.png")
    assert one.shape == three.shape and (one != three).any()


@pytest.mark.slow
def test_the_picture_is_drawn_again_by_its_command(tmp_path):
    runs = [str(write_run(tmp_path / f"seed{seed}", seed=seed)) for seed in range(2)]
    command = [sys.executable, "r1_figure.py", *runs, "--output", str(tmp_path / "both.png")]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_what_is_drawn_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: has no metrics\.jsonl"):
        write_figure([tmp_path / "empty"], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"no line of metrics\.jsonl has eval/accuracy"):
        write_figure([write_run(tmp_path / "blind", gone=["eval/accuracy"])], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
