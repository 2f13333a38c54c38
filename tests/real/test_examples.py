"""The examples on a real model, for a few steps: they run to their end, and what they write is in order."""

import json
from pathlib import Path

import pytest

from common.tasks.countdown import problems
from tests.real.conftest import first_rows, rows_of
from tests.toy import metrics_of, samples_of

SMALL = {"num_steps": 2, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 48, "eval_every": 2}
SMALL |= {"num_eval_prompts": 2, "save_every": 0, "samples_every": 1, "progress": "false", "preset": "none"}
SMALL |= {"dtype": "fast"}


def check_run(folder: Path) -> list[dict]:
    """Metrics of a run whose sampler and trainer agreed."""
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line["policy/first_ratio"] == 1.0 and line["sampler/logprob_diff"] < 0.15
    assert 0 <= lines[-1]["eval/accuracy"] <= 1
    return lines


@pytest.fixture
def countdown(tmp_path) -> Path:
    """Problems with the columns of the hub's data set."""
    rows, _ = problems(4)
    (tmp_path / "countdown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-40:]))
    return tmp_path / "countdown.jsonl"


def test_r1_v0_trains_a_real_model_on_countdown(model, countdown, run, tmp_path):
    settings = SMALL | {"model": model, "dataset": countdown, "output_dir": tmp_path / "run"}
    said = run("examples/r1-v0/grpo_r1.py", **settings)
    lines = check_run(tmp_path / "run")
    assert "reward/equation" in lines[-1] and "r1.png" in said and (tmp_path / "run" / "r1.png").is_file()
    assert all(sample["prompt"].endswith("<think>") for sample in samples_of(tmp_path / "run"))


def test_nano_r1_trains_a_real_model_in_4_bits(model, sums, run, tmp_path):
    settings = SMALL | {"model": model, "dataset": sums[0], "output_dir": tmp_path / "run"}
    run("examples/nano-r1/nano_r1.py", **settings)
    lines = check_run(tmp_path / "run")
    assert {"reward/correct", "reward/length", "kl"} <= lines[1].keys() and lines[1]["kl"] == 0.0
    assert (tmp_path / "run" / "final" / "adapter").is_dir()


def test_the_pipeline_takes_a_real_model_through_all_stages_on_gsm8k(model, real_records, run, tmp_path):
    train = first_rows(real_records[0], 48, tmp_path / "train.jsonl")
    test = first_rows(real_records[1], 8, tmp_path / "test.jsonl")
    small = {"sft__num_steps": 2, "sft__num_eval_prompts": 4, "rl__num_steps": 2, "rl__prompts_per_step": 2}
    small |= {"rl__num_generations": 4, "rl__max_completion_length": 48, "rl__num_eval_prompts": 2}
    small |= {"evaluate__num_problems": 8, "evaluate__max_completion_length": 64}
    data = {"sft__model": model, "sft__dataset": train, "rl__dataset": train, "evaluate__dataset": test}
    if train.endswith(".jsonl"):  # a file is no slice of a hub data set
        data |= {"sft__dataset_split": "train", "rl__dataset_split": "train"}
    recipe = Path(__file__).parents[2] / "examples" / "pipeline" / "smollm2-gsm8k" / "pipeline.yaml"
    table = run("examples/pipeline/pipeline.py", config=recipe, output_dir=tmp_path / "out", **data, **small)
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert rows == ["model", "---", "base", "after SFT", "after RL"]
    (loss,) = (json.loads(file.read_text()) for file in (tmp_path / "out").glob("sft-??????/loss.json"))
    assert loss["loss_after"] < loss["loss_before"]
    (outputs,) = (tmp_path / "out").glob("evaluate-rl-*/outputs.jsonl")
    assert len(rows_of(outputs)) == 8
