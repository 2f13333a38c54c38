"""Whole runs with the real vLLM on the CPU: what is trained is what samples, step after step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.embedded.policy import save_untrained
from common.environment import process_unchanged
from tests.toy import ROOT, toy_trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An untrained policy whose attention heads are wide enough for vLLM on the CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return save_untrained(tmp_path_factory.mktemp("model"), **sizes, **heads, initializer_range=0.2)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_the_sampler_has_the_trained_weights_at_every_step(model, tmp_path, use_lora):
    settings = {"temperature": 0.7, "learning_rate": 2e-2, "num_minibatches": 2, "kl_coef": 0.01}
    trainer = toy_trainer(
        model, tmp_path / "run", sampler="vllm", num_steps=5, eval_every=2, use_lora=use_lora, lora_r=4, **settings
    )
    trainer.train()
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    for line in lines[1:]:
        assert line["sampler/logprob_diff"] < 1e-4
        assert line["policy/first_ratio"] == 1.0
    assert lines[-1]["policy/kl_loss"] > 1e-3  # the policy has moved, so old weights would have shown


@pytest.mark.slow
def test_runs_with_vllm_repeat_and_resume(model, tmp_path):
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for num_steps in steps:
            trainer = toy_trainer(model, tmp_path / name, sampler="vllm", num_steps=num_steps, save_every=2)
            trainer.train()
    numbers = [
        [
            {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))}
            for line in lines_of(tmp_path / name)
        ]
        for name in ("whole", "parts")
    ]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_the_final_model_loads_in_plain_vllm(model, tmp_path):
    trainer = toy_trainer(model, tmp_path / "run", sampler="vllm", num_steps=2, use_lora=True, lora_r=4)
    trainer.train()
    final = tmp_path / "run" / "final"
    with process_unchanged():
        from vllm import LLM, SamplingParams

        plain = LLM(str(final), dtype="float32", max_model_len=64, enforce_eager=True, kv_cache_memory_bytes=1 << 26)
        prompt = trainer.prompts.ids[0]
        greedy = SamplingParams(temperature=0, max_tokens=8)
        found = plain.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)[0].outputs[0].token_ids
    theirs = AutoModelForCausalLM.from_pretrained(final)
    ids = list(prompt)
    with torch.no_grad():
        for _ in found:
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    assert list(found) == ids[len(prompt) :]


@pytest.mark.slow
def test_a_script_ends_without_a_word_of_complaint(model, tmp_path):
    settings = {"model": model, "output_dir": tmp_path / "run", "num_steps": 1, "prompts_per_step": 2}
    settings |= {"num_generations": 2, "max_completion_length": 8, "num_eval_prompts": 2, "task": "countdown"}
    settings |= {"max_prompt_length": 64, "warmup_steps": 0, "lr_scheduler": "constant"}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    words += ["--preset", "none", "--use_lora", "false", "--save_every", "0", "--progress", "false"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "GRPO" / "grpo.py"), *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and "model: " in done.stdout
    plan, rest = done.stderr.split("\n", 1)
    assert plan.startswith("memory plan: ") and rest == f"loading {model} and vllm ...\n"
