"""GRPO with vLLM and LoRA on a real model: sampler and trainer agree, and a killed run goes on to the same numbers."""

import gc
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.environment import cpu_computes_bfloat16
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.toy import metrics_of, train_until

# Rounding alone, between vLLM and transformers: mean difference of log-probs, in nats.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.15}


def trainer(model: str, data: str, folder: Path, dtype: str, **settings: object) -> GRPOTrainer:
    defaults = {"num_steps": 3, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 24}
    defaults |= {"num_eval_prompts": 2, "eval_every": 0, "save_every": 1, "samples_every": 1, "progress": False}
    # A rate at which three steps can be seen, and a reward that most completions differ in: the tags never come.
    learning = {"learning_rate": 1e-3, "kl_coef": 0.05, "use_lora": True, "lora_r": 8, "num_minibatches": 2}
    rewards = {"rewards": [f"{Path(__file__).with_name('rewards.py')}:short"]}
    places = {"model": model, "task": "gsm8k", "dataset": data, "output_dir": str(folder)}
    return GRPOTrainer(GRPOConfig(**places, **rewards, **learning, dtype=dtype, **(defaults | settings)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def whole(request, model, sums, tmp_path_factory) -> tuple[str, Path]:
    """A precision and the folder of a run in it."""
    if request.param == "bfloat16" and not (torch.cuda.is_available() or cpu_computes_bfloat16()):
        pytest.skip("this CPU does not compute in bfloat16, and emulating it takes minutes")
    folder = tmp_path_factory.mktemp("grpo") / "run"
    trainer(model, sums[0], folder, request.param).train()
    gc.collect()
    return request.param, folder


def test_the_sampler_has_the_policy_at_every_step(whole):
    dtype, folder = whole
    lines = metrics_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["policy/first_ratio"] == 1.0 for line in lines)
    assert all(line["sampler/logprob_diff"] < BOUNDS[dtype] for line in lines)
    assert lines[0]["kl"] == 0.0
    assert lines[2]["kl"] > 1e-3  # the policy has moved, so old weights in the sampler would have shown


def test_the_merged_model_is_base_and_adapter(whole, model):
    _, folder = whole
    final = AutoModelForCausalLM.from_pretrained(folder / "final", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=final.dtype).float()  # as the policy had it
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, folder / "final" / "adapter").merge_and_unload().state_dict()
    changed = 0
    for name, weight in final.state_dict().items():
        # Rounded once, to the precision of the folder.
        tolerance = torch.finfo(weight.dtype).eps * merged[name].abs() + 1e-7
        assert ((weight.float() - merged[name]).abs() <= tolerance).all(), name
        changed += not torch.equal(merged[name], before[name])
    assert changed == 7 * base.config.num_hidden_layers


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, model, sums, tmp_path):
    dtype, folder = whole
    stopped = trainer(model, sums[0], tmp_path / "run", dtype)
    train_until(stopped, 1)
    del stopped
    gc.collect()
    trainer(model, sums[0], tmp_path / "run", dtype).train()
    gc.collect()
    assert metrics_of(tmp_path / "run") == metrics_of(folder)
