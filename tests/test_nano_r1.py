"""examples/nano-r1: the recipe, and one step of it in 4 bits on GSM8K-shaped problems."""

import importlib.util
import json
import sys

import pytest

from common.cli import parse_config
from GRPO.grpo_trainer import GRPOTrainer
from tests.toy import ROOT, metrics_of, save_toy_policy

SCRIPT = ROOT / "examples" / "nano-r1" / "nano_r1.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nano_r1", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nano_r1"] = module
    spec.loader.exec_module(module)
    return module


def test_the_recipe_is_that_of_nano_r1(script):
    config = parse_config(script.SETTINGS, embedded=script.EMBEDDED, args=["--preset", "none"])
    assert (config.use_lora, config.load_in_4bit, config.lora_r, config.lora_alpha) == (True, True, 64, 64)
    assert (config.num_generations, config.max_prompt_length, config.max_completion_length) == (12, 256, 1024)
    assert config.rewards == ["correct", "strict_format", "soft_format", "tags", "length"]
    assert config.reward_weights == [2.0, 0.5, 0.5, 0.5, 2.0]
    assert (config.learning_rate, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (
        5e-6,
        0.99,
        0.1,
        0.1,
    )


def test_without_a_gpu_it_is_the_embedded_task_in_4_bits_too(script):
    config = parse_config(script.SETTINGS, embedded=script.EMBEDDED, args=["--preset", "cpu"])
    assert (config.model, config.task, config.load_in_4bit, config.use_lora) == ("tiny", "countdown", True, True)
    assert config.rewards == ["format", "equation"]


@pytest.mark.slow
def test_a_step_of_the_recipe_runs_on_problems_of_the_form_of_gsm8k(script, tmp_path):
    rows = [{"question": f"What is {a} + 1?", "answer": f"It is {a + 1}. #### {a + 1}"} for a in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_toy_policy(tmp_path / "policy", hidden_size=128, max_position_embeddings=2048)
    small = ["--num_steps", "1", "--prompts_per_step", "2", "--num_eval_prompts", "2", "--sampler", "transformers"]
    small += ["--max_prompt_length", "1024", "--max_completion_length", "8", "--progress", "false"]
    place = ["--model", str(model), "--dataset", str(tmp_path / "sums.jsonl"), "--output_dir", str(tmp_path / "run")]
    GRPOTrainer(parse_config(script.SETTINGS, args=["--preset", "none", *small, *place])).train()
    last = metrics_of(tmp_path / "run")[-1]
    assert last["step"] == 1 and last["episodes"] == 24 and "reward/length" in last
