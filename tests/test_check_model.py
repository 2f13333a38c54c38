"""The check of a model before anything is loaded: its table, its verdict, and trying it out."""

import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from common import check_model
from common.config import RLConfig
from common.embedded.policy import build_tokenizer
from common.evaluation.command import Evaluation
from common.evaluation.settings import EvaluationSettings
from common.host import HostMemory
from common.models.facts import Memory, Size, check_memory
from common.models.positions import check_room
from common.sampling.comparison import Difference
from common.sampling.torch_sampler import TransformersSampler
from common.tasks import Task
from tests import forked
from tests.imports import ROOT
from tests.toy import algorithms

SMALL = {
    **{"vocab_size": 459, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024},
    **{"initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16},
    **{"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
}


def save(folder: Path, kind: str, *, auto: type = transformers.AutoModelForCausalLM, **settings) -> Path:
    """A random model of an architecture with the embedded tokenizer."""
    config = transformers.AutoConfig.for_model(kind, **SMALL | settings)
    auto.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def rows(folder: Path | str, *args: str, capsys: pytest.CaptureFixture) -> dict[str, str]:
    """The table of the command, by name."""
    check_model.main([str(folder), *args])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 35
    return {line[:20].strip(): line[21:] for line in lines}


# The table


def test_a_dense_model_is_described_from_its_configuration(tmp_path, capsys):
    found = rows(save(tmp_path, "qwen2", tie_word_embeddings=True), "--sampler", "transformers", capsys=capsys)
    count = sum(each.numel() for each in transformers.AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert found["parameters"] == f"{count:,}; embeddings and head are one weight (tied)"
    assert found["architecture"].startswith("Qwen2ForCausalLM")
    assert found["heads"] == "2 of 32, 1 of keys and values"
    assert found["context"].startswith("1,024 tokens; max_prompt_length 512 + max_completion_length 512 = 1,024")
    assert found["vocabulary"] == "459 tokens" and found["end tokens"] == "1 <eos>"
    modules = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    assert found["LoRA"] == f"118,784 parameters at r=64 in 14 modules: {modules}"
    assert all(found[name] == "none" for name in ("wrapper", "experts", "recurrent state", "sliding window"))
    assert found["verdict"] == "a run starts with sampler=transformers, full training"


def test_experts_count_by_the_share_that_a_token_uses(tmp_path, capsys):
    folder = save(tmp_path, "qwen3_moe", **EXPERTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    of_experts = 2 * 4 * 3 * 64 * 32  # layers, experts, matrices
    assert Size.of(model, model.config).active == Size.of(model, model.config).total - of_experts // 2
    found = rows(folder, "--sampler", "transformers", capsys=capsys)
    assert found["experts"] == "4 in a layer, 2 for a token" and "active per token" in found["parameters"]


def test_what_differs_from_plain_attention_is_named(tmp_path, capsys):
    settings = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 24}
    found = rows(save(tmp_path / "a", "gemma2", **settings), "--sampler", "transformers", capsys=capsys)
    assert found["logits"] == "final_logit_softcapping 3, attn_logit_softcapping 2"
    assert found["sliding window"] == "24 tokens in 1 of 2 layers"
    found = rows(save(tmp_path / "b", "qwen3_next", **EXPERTS, **LINEAR), "--sampler", "transformers", capsys=capsys)
    assert found["recurrent state"] == "yes, in layers of linear_attention"
    assert found["layers"] == "2, hidden size 64: 1 linear_attention, 1 full_attention"
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    found = rows(save(tmp_path / "c", "llama", rope_parameters=rope), "--sampler", "transformers", capsys=capsys)
    assert found["rope"] == "linear, theta 10000, factor 4"


def test_a_wrapper_says_what_of_it_is_trained(tmp_path, capsys):
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(
        "gemma3",
        text_config=SMALL | {"model_type": "gemma3_text", "sliding_window": 24},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    found = rows(tmp_path, "--sampler", "transformers", capsys=capsys)
    assert "gemma3" in found["wrapper"] and "language model is trained" in found["wrapper"]


def test_memory_is_that_of_what_is_trained():
    full = RLConfig(sampler="vllm", kl_coef=0.1)
    cpu = torch.device("cpu")
    assert Memory.of(1000, 10, full, cpu) == Memory(weights=4000, training=12000, sampler=4000, reference=4000)
    lora = RLConfig(sampler="transformers", kl_coef=0.1, use_lora=True)
    assert Memory.of(1000, 10, lora, cpu) == Memory(weights=4040, training=120, sampler=0, reference=0)


def test_only_weights_that_no_memory_holds_are_refused(monkeypatch):
    model = torch.nn.Linear(100, 100, device="meta")
    sizes = iter([(0, 40_400), (0, 40_399)])
    monkeypatch.setattr("common.models.facts.memory_there", lambda device: next(sizes))
    check_memory(model, RLConfig(), torch.device("cpu"))
    with pytest.raises(ValueError, match="10,100 parameters take"):
        check_memory(model, RLConfig(), torch.device("cpu"))


@pytest.mark.parametrize(("kind", "sampler", "is_refused"), [
    ("gpt2", "transformers", True), ("qwen2", "transformers", False), ("qwen2", "vllm", True),
])  # fmt: skip
def test_lengths_beyond_the_context_are_refused_where_there_are_no_positions_for_them(kind, sampler, is_refused):
    config = transformers.AutoConfig.for_model(kind, **SMALL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    check_room(model, RLConfig(sampler=sampler, max_prompt_length=512, max_completion_length=512))
    longer = RLConfig(sampler=sampler, max_prompt_length=512, max_completion_length=513)
    if is_refused:
        with pytest.raises(ValueError, match=r"room for 1,024 tokens.*--max_completion_length 512"):
            check_room(model, longer)
    else:
        check_room(model, longer)


@pytest.mark.parametrize(("kind", "rope"), [
    ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}),
])  # fmt: skip
@pytest.mark.parametrize("sampler", ["vllm", "transformers"])
def test_lengths_beyond_which_all_angles_change_are_refused(kind, rope, sampler):
    rope = rope | {"rope_theta": 10000.0}
    # One names the length for which it was trained, the other the length that it can be scaled to.
    longest = {} if kind == "llama" else {"max_position_embeddings": 8192, "original_max_position_embeddings": 1024}
    config = transformers.AutoConfig.for_model(kind, **SMALL | longest, rope_parameters=rope)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    check_room(model, RLConfig(sampler=sampler, max_prompt_length=512, max_completion_length=512))
    with pytest.raises(ValueError, match=r"longer than 1,024 tokens.*--max_completion_length 512"):
        check_room(model, RLConfig(sampler=sampler, max_prompt_length=512, max_completion_length=513))


def test_the_embedded_policy_is_not_built_to_be_described(monkeypatch, capsys):
    monkeypatch.setattr("common.embedded.policy.tiny_policy", lambda *_: pytest.fail("built"))
    found = rows("tiny", capsys=capsys)
    assert found["vLLM, full"] == "yes" and found["verdict"].startswith("a run starts")


def test_a_check_takes_less_than_five_seconds_beyond_imports(tmp_path, capsys):
    folder = save(tmp_path, "qwen2")
    rows(folder, capsys=capsys)  # imports
    start = time.process_time()
    rows(folder, capsys=capsys)
    assert time.process_time() - start < 5


# Refusals


def test_what_a_run_would_refuse_is_the_verdict(tmp_path, capsys):
    folder = save(tmp_path, "qwen2")
    with pytest.raises(ValueError, match=r"lora_target_modules=nope"):
        rows(folder, "--use_lora", "--lora_target_modules", "nope", "--sampler", "transformers", capsys=capsys)
    assert capsys.readouterr().out.splitlines()[-1].endswith("refused with sampler=transformers, LoRA")


def test_a_chat_template_that_cannot_be_run_is_told_before_data_are_read(tiny_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content' }}")
    found = rows(folder, "--sampler", "transformers", capsys=capsys)
    assert found["chat template"].startswith("of no use, so that prompts have to be plain text: the chat template")
    assert found["verdict"].endswith("on prompts of plain text: it cannot use its chat template")


@pytest.mark.parametrize("kind", ["t5", "quantised", "nobody knows"])
def test_a_kind_that_cannot_be_trained_ends_with_status_2_in_eight_lines(tmp_path, kind):
    if kind == "t5":
        transformers.T5Config(vocab_size=459, d_model=32).save_pretrained(tmp_path)
    elif kind == "quantised":
        config = transformers.AutoConfig.for_model("qwen2", **SMALL)
        config.quantization_config = {"quant_method": "awq", "bits": 4}
        config.save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text('{"model_type": "nobodyknows", "architectures": ["NobodyKnows"]}')
    build_tokenizer().save_pretrained(tmp_path)
    done = forked.run(["-m", "common.check_model", tmp_path, "--sampler", "transformers"], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: model=") and len(done.stderr.splitlines()) <= 8


def test_a_run_refuses_a_model_before_it_reads_data(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", "qwen2")
    small = HostMemory(total=1000, available=0, source="this machine")
    monkeypatch.setattr("common.memory.start.host_memory", lambda **_: small)
    monkeypatch.setattr("common.trainer.load_task", lambda *_: pytest.fail("data were read"))
    algorithm = algorithms()["GRPO"]
    settings = {"model": str(folder), "output_dir": str(tmp_path / "run"), "sampler": "transformers"}
    with pytest.raises(ValueError, match="main memory, and this process may use"):
        algorithm.trainer(algorithm.config(task="countdown", **settings))
    task = Task(train=[{"prompt": "1"}], rewards={"none": lambda **_: [0.0]})
    with pytest.raises(ValueError, match="main memory, and this process may use"):
        algorithm.trainer(algorithm.config(**settings), task=task)


@pytest.mark.slow
def test_heads_that_vllm_does_not_take_are_refused_before_data_are_read(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path / "model", "qwen3", head_dim=16)
    monkeypatch.setattr("common.trainer.load_task", lambda *_: pytest.fail("data were read"))
    algorithm, settings = algorithms()["GRPO"], {"output_dir": str(tmp_path / "run"), "max_completion_length": 64}
    with pytest.raises(ValueError, match=r"attention heads of 16.*--sampler transformers"):
        algorithm.trainer(algorithm.config(task="countdown", model=str(folder), **settings))
    with pytest.raises(ValueError, match="attention heads of 16"):
        rows(folder, capsys=capsys)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("refused with sampler=vllm, full training")
    answers = [line.split()[2] for line in lines if line.startswith(("vLLM, ", "transformers, "))]
    assert answers == ["no:", "no:", "yes", "yes"]


@pytest.mark.slow
def test_an_evaluation_refuses_them_before_it_loads(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", "qwen3", head_dim=16)
    monkeypatch.setattr("common.evaluation.command.load", lambda *_: pytest.fail("loaded"))
    settings = EvaluationSettings(model=[str(folder)], task="countdown", num_problems=2, max_completion_length=16)
    with pytest.raises(ValueError, match="attention heads of 16"):
        Evaluation(replace(settings, output_dir=str(tmp_path / "evaluation")))


def test_a_mistyped_task_is_told_before_the_model_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("common.trainer.check_model", lambda *_: pytest.fail("looked at"))
    algorithm = algorithms()["GRPO"]
    with pytest.raises(ValueError, match="task='countdwn'"):
        algorithm.trainer(algorithm.config(task="countdwn", model=str(tmp_path), sampler="transformers"))


# Trying it out


@pytest.mark.parametrize(("mean", "described", "is_right"), [
    (1e-6, {}, True), (1e-4, {}, False), (math.nan, {}, False),
    (1e-6, {"limit": 1e-7}, False), (1e-6, {"limit": 1e-5}, True), (1e-4, {"limit": 1e-3}, False),
    (1e-3, {"is_move": True, "rounding": 1e-6}, True), (1e-3, {"is_move": True, "rounding": 1e-3}, False),
    (math.nan, {"is_move": True}, False), (1e-3, {"is_move": True, "rounding": math.nan}, False),
])  # fmt: skip
def test_a_difference_is_right_within_its_bound_and_never_if_it_is_nan(mean, described, is_right):
    assert Difference(what="", mean=mean, largest=mean, **described).is_right(1e-5) == is_right


def test_one_log_prob_that_is_nan_makes_the_difference_nan(rollouts):
    other = rollouts.sampling_logprobs.clone()
    other[0, 0] = math.nan
    assert math.isnan(Difference.of(rollouts.sampling_logprobs, other, rollouts, what="").mean)


@pytest.mark.parametrize("use_lora", [False, True])
def test_sampler_and_trainer_agree_before_and_after_the_weights_moved(tmp_path, capsys, use_lora):
    folder = save(tmp_path, "qwen2")
    words = ["--run", "--sampler", "transformers", "--use_lora", str(use_lora), "--max_completion_length", "64"]
    check_model.main([str(folder), *words])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("PASS") for line in lines) == 4
    assert "PASS with sampler=transformers" in lines[-1]


def test_bfloat16_passes_where_rounding_is_all_that_differs(tmp_path, capsys):
    folder = save(tmp_path, "qwen2", initializer_range=0.1)
    words = ["--run", "--sampler", "transformers", "--dtype", "bfloat16", "--max_completion_length", "64"]
    check_model.main([str(folder), *words])
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("FAIL") for line in lines)
    assert "PASS with sampler=transformers" in lines[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sampler_that_keeps_the_old_weights_fails(tmp_path, capsys, monkeypatch, dtype):
    folder = save(tmp_path, "qwen2", initializer_range=0.1)
    first = []

    def old(self, *args, **options):
        with self._use_policy() as policy, torch.no_grad():
            new = {name: weight.clone() for name, weight in policy.state_dict().items()}
            first.append(new)
            policy.load_state_dict(first[0])
            found = generate(self, *args, **options)
            policy.load_state_dict(new)
        return found

    generate = TransformersSampler.generate
    monkeypatch.setattr(TransformersSampler, "generate", old)
    words = ["--run", "--sampler", "transformers", "--dtype", dtype, "--max_completion_length", "64"]
    with pytest.raises(SystemExit):
        check_model.main([str(folder), *words])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("FAIL")] == [
        "FAIL sampler and trainer, second push"
    ]


def test_a_weight_that_is_no_number_is_named_before_anything_is_sampled(tmp_path, capsys):
    folder = save(tmp_path, "qwen2")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["--run", "--sampler", "transformers", "--max_completion_length", "32"]
    with pytest.raises(ValueError, match=r"1 weight is NaN or infinite, such as model.layers.1.mlp.up_proj.weight"):
        check_model.main([str(folder), *words])
    assert "FAIL" not in capsys.readouterr().out


def test_attention_that_leaves_something_out_fails(tmp_path, capsys, monkeypatch):
    folder = save(tmp_path, "gemma2", attn_logit_softcapping=2.0)
    monkeypatch.setattr("common.models.loading.attention_for", lambda *_, **__: ("sdpa", None))  # which drops the cap
    with pytest.raises(SystemExit) as stopped:
        check_model.main([str(folder), "--run", "--sampler", "transformers", "--max_completion_length", "32"])
    assert stopped.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("FAIL")] == ["FAIL attention sdpa and eager"]
    assert lines[-1].startswith("verdict") and "FAIL with sampler=transformers" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("use_lora", ["false", "true"])
def test_vllm_and_the_trainer_agree_before_and_after_the_weights_moved(tmp_path, use_lora):
    folder = save(tmp_path, "qwen2")
    words = [sys.executable, "-m", "common.check_model", str(folder), "--run", "--use_lora", use_lora]
    done = subprocess.run([*words, "--vllm_memory_share", "0.1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PASS sampler and trainer, second push" in done.stdout and "PASS with sampler=vllm" in done.stdout
