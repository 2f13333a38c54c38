"""Distillation alone: by hand what a step makes of a teacher's judgement, and which teachers are refused."""

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.frozen import find_frozen
from common.memory.fit import without_storage
from common.memory.start import plan_of
from Distill.distill_trainer import DistillConfig, DistillTrainer
from tests.by_hand import assert_advantages, trained_on
from tests.toy import CLIP, LORA, metrics_of, samples_of, save_toy_policy, toy_config, toy_trainer, train_until


def writes_digits(policy: Path) -> str:
    """The folder of a teacher that was made of a policy, and that writes digits more often than all else.

    One number of every token's embedding is large, so that the last hidden state has it whatever was read.
    """
    folder = policy.with_name(f"{policy.name} writes digits")
    if folder.is_dir() or not policy.is_dir():
        return str(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    texts = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    is_digits = torch.tensor([text.strip().isdigit() for text in texts])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 200.0
        head[:, 0] = torch.where(is_digits, 0.8, -0.3)
    model.config.tie_word_embeddings, model.lm_head.weight = False, head
    temporary = folder.with_name(f"{folder.name} {os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    with contextlib.suppress(OSError):  # another process of the run has made it meanwhile
        temporary.rename(folder)
    return str(folder)


TOY_SETTINGS = {"teacher": writes_digits}
LOGPROBS_ARE_REWARDS = True
# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {
    "teacher": None,  # below
    "gamma": ({}, 1.0),
    "reward_coef": ({}, 3.0),
    "missing_eos_penalty": ({"reward_coef": 1.0}, 1.0),
}
OWN_VALUES = {"kl_coef": "the teacher takes the reference's place"}
VALUES = {"gamma": [0.0, 1.0, 0.5], "reward_coef": [0.0, 1.0, -0.5]}
VARIANTS = {"lora": LORA | {"gamma": 1.0, "reward_coef": 0.5}}


def distill(model, folder, **settings) -> DistillTrainer:
    return toy_trainer(model, folder, algorithm="Distill", **settings)


# What a step makes of it


def logprobs_by_hand(folder: str, rollouts) -> list[list[float]]:
    """Of each completion's tokens, from transformers alone."""
    model, rows = AutoModelForCausalLM.from_pretrained(folder), []
    for row, length in enumerate(rollouts.lengths.tolist()):
        prompt = rollouts.prompt_ids[row][rollouts.prompt_mask[row]]
        ids = torch.cat([prompt, rollouts.completion_ids[row, :length]])
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        rows.append([float(logprobs[place - 1, ids[place]]) for place in range(len(prompt), len(ids))])
    return rows


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_token_is_compared_with_those_of_the_prompts_other_completions(toy_folder, tmp_path, gamma):
    settings = {"gamma": gamma, "reward_coef": 2.0, "kl_coef": 0.5, "learning_rate": 1e-2}
    trainer = distill(toy_folder, tmp_path / "run", **settings)
    rollouts = trained_on(trainer)
    expected, teacher = [], logprobs_by_hand(trainer.config.teacher, rollouts)
    own, ref = rollouts.old_logprobs.tolist(), rollouts.ref_logprobs.tolist()
    rewards = [
        [q - p - 0.5 * (p - r) for q, p, r in zip(*each, strict=False)] for each in zip(teacher, own, ref, strict=True)
    ]
    returns = [
        [sum(gamma**later * reward for later, reward in enumerate(row[place:])) for place in range(len(row))]
        for row in rewards
    ]
    for row in range(16):
        others = [other for other in range(row // 4 * 4, row // 4 * 4 + 4) if other != row]
        tokens = [value for other in others for value in returns[other]]
        score = float(rollouts.scores[row]) - sum(float(rollouts.scores[other]) for other in others) / 3
        expected.append([value - sum(tokens) / len(tokens) + 2.0 * score for value in returns[row]])
    assert_advantages(rollouts, expected)
    line = metrics_of(tmp_path / "run")[-1]
    log_ratios = [p - q for each in zip(own, teacher, strict=True) for p, q in zip(*each, strict=False)]
    assert line["teacher/kl"] == pytest.approx(sum(log_ratios) / len(log_ratios), rel=1e-4)


def test_one_completion_per_prompt_is_compared_with_nothing(toy_folder, tmp_path):
    trainer = distill(toy_folder, tmp_path / "run", num_generations=1, num_steps=1)
    rollouts = trained_on(trainer)
    teacher = logprobs_by_hand(trainer.config.teacher, rollouts)
    own = rollouts.old_logprobs.tolist()
    assert_advantages(
        rollouts, [[q - p for q, p in zip(*each, strict=False)] for each in zip(teacher, own, strict=True)]
    )


# The teacher


def adapter_on(base: Path, folder: Path, scale: float) -> str:
    """A LoRA adapter of a model, whose second matrices are random times `scale`."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(scale * torch.randn(each.shape))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("base", ["the policy", "another model"])
def test_an_adapter_teaches_as_the_model_that_it_is_merged_into(toy_folder, tmp_path, base):
    from peft import PeftModel

    base = toy_folder if base == "the policy" else save_toy_policy(tmp_path / "other", initializer_range=0.2)
    adapter = adapter_on(base, tmp_path / "adapter", 0.3)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "merged")
    lines = []
    for teacher in (adapter, str(tmp_path / "merged")):
        # A student with LoRA begins as its base, so that only the teacher's adapter tells them apart.
        settings = LORA | {"teacher": teacher, "offload": "always", "num_steps": 1}
        distill(toy_folder, tmp_path / f"run {Path(teacher).name}", **settings).train()
        lines.append(metrics_of(tmp_path / f"run {Path(teacher).name}")[0])
    assert lines[0]["teacher/kl"] == pytest.approx(lines[1]["teacher/kl"], abs=1e-5)
    assert lines[0]["policy/grad_norm"] == pytest.approx(lines[1]["policy/grad_norm"], rel=1e-3)


def test_a_teacher_is_in_the_precision_of_passes_and_never_in_4_bits(toy_folder, tmp_path):
    trainer = distill(toy_folder, tmp_path / "run", dtype="bfloat16", attn_implementation="eager")
    with trainer.models.use("teacher") as teacher, trainer.models.use("policy") as policy:
        assert {each.dtype for each in teacher.parameters()} == {torch.bfloat16}
        assert not any(each.requires_grad for each in teacher.parameters()) and not teacher.training
        assert {each.dtype for each in policy.parameters()} == {torch.float32}
        assert teacher.config._attn_implementation == "sdpa" and policy.config._attn_implementation == "eager"
    settings = LORA | {"load_in_4bit": True}
    with distill(toy_folder, tmp_path / "packed", **settings).models.use("teacher") as teacher:
        assert {each.dtype for each in teacher.parameters()} == {torch.float32}


def edited(folder: Path, source: Path, file: str, **values) -> str:
    """A copy of a model whose settings in a file are other ones."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(settings))
    return str(folder)


def other_vocabulary(folder: Path, source: Path) -> str:
    """A copy of a model whose tokenizer has two tokens in each other's place."""
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    tokens = content["model"]["vocab"]
    first, second = list(tokens)[40:42]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    file.write_text(json.dumps(content))
    return str(folder)


def zeros_adapter(folder: Path, source: Path) -> str:
    return adapter_on(source, folder, 0.0)


def copied(folder: Path, source: Path) -> str:
    return str(shutil.copytree(source, folder))


def fewer_rows(folder: Path, source: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(model.config.vocab_size - 8)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


REFUSED = {
    "none": (lambda folder, source: None, "there is no default for it. Pass --teacher with"),
    "no folder": (lambda folder, source: str(folder), "there is no such folder"),
    "itself": (lambda folder, source: str(source), "both are the same model"),
    "itself, spelled otherwise": (lambda folder, source: f"{source}/../{source.name}/", "both are the same model"),
    "a copy of itself": (copied, "every weight is that of the policy"),
    "an adapter that is all zeros": (zeros_adapter, "every weight is that of the policy"),
    "another vocabulary": (other_vocabulary, "another vocabulary than the policy"),
    "fewer tokens than the policy": (fewer_rows, "the policy can sample"),
    "too few positions": (
        lambda folder, source: edited(folder, source, "config.json", max_position_embeddings=40),
        "has room for 40 tokens in total",
    ),
    "quantised": (
        lambda folder, source: edited(folder, source, "config.json", quantization_config={"quant_method": "gptq"}),
        "quantised",
    ),
    "not causal": (
        lambda folder, source: edited(folder, source, "config.json", architectures=["Qwen2ForSequenceClassification"]),
        "without the head of a language model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_teach_is_refused_with_the_setting_that_names_it(toy_folder, tmp_path, case):
    make, message = REFUSED[case]
    teacher = make(tmp_path / "teacher", toy_folder)
    with pytest.raises(ValueError, match=r"^teacher=") as error:
        distill(toy_folder, tmp_path / "run", teacher=teacher)
    assert message in str(error.value) and "--model " not in str(error.value).replace("another --model.", "")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_teacher_whose_embedding_was_filled_up_further_is_taken(toy_folder, tmp_path):
    """As Qwen2.5-7B has 152,064 rows for the tokens of Qwen2.5-0.5B, which has 151,936."""
    model = AutoModelForCausalLM.from_pretrained(writes_digits(toy_folder))
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(toy_folder).save_pretrained(tmp_path / "teacher")
    distill(toy_folder, tmp_path / "run", teacher=str(tmp_path / "teacher"), num_steps=1).train()


def test_a_continued_run_has_the_teacher_of_its_start(toy_folder, tmp_path):
    teacher = Path(shutil.copytree(writes_digits(toy_folder), tmp_path / "teacher"))
    settings = {"teacher": str(teacher), "save_every": 1}
    train_until(distill(toy_folder, tmp_path / "run", num_steps=3, **settings), 2)
    shutil.copytree(teacher, tmp_path / "kept")
    shutil.rmtree(teacher)
    save_toy_policy(teacher, initializer_range=0.3)
    with pytest.raises(ValueError, match="another model than at the run's start"):
        distill(toy_folder, tmp_path / "run", num_steps=3, **settings)
    shutil.rmtree(teacher)
    shutil.copytree(tmp_path / "kept", teacher)
    distill(toy_folder, tmp_path / "run", num_steps=3, **settings).train()
    whole = distill(toy_folder, tmp_path / "whole", num_steps=3, **settings)
    whole.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_an_adapter_is_another_teacher_if_its_scale_has_changed_and_not_if_its_base_has_moved(toy_folder, tmp_path):
    adapter = adapter_on(toy_folder, tmp_path / "adapter", 0.3)
    config = toy_config(toy_folder, tmp_path / "run", algorithm="Distill", teacher=adapter)

    def identity(**changed):
        file = Path(adapter, "adapter_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
        (teacher,) = find_frozen(config)
        return teacher.identity()

    moved = shutil.copytree(toy_folder, tmp_path / "moved")
    at_start = identity()
    assert identity(base_model_name_or_path=str(moved)) == at_start
    assert identity(lora_alpha=64) != at_start


# Settings


def test_a_score_needs_completions_to_be_compared_with_and_a_weight_that_is_a_number(tmp_path):
    with pytest.raises(ValueError, match="num_generations=1: reward_coef"):
        DistillConfig(reward_coef=1.0, num_generations=1)
    with pytest.raises(ValueError, match="reward_coef=nan"):
        DistillConfig(reward_coef=float("nan"))
    with pytest.raises(ValueError, match="gamma=2"):
        DistillConfig(gamma=2.0)


# Without rewards


def test_prompts_are_enough_and_then_nothing_is_called_a_score(toy_folder, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{number} make"}) + "\n" for number in range(1, 9)))
    data = {"task": "prompts", "dataset": str(rows), "num_eval_prompts": 2, "eval_every": 1}
    config = toy_config(toy_folder, tmp_path / "run", algorithm="Distill", **data)
    trainer = DistillTrainer(config)
    trainer.train()
    for line in metrics_of(tmp_path / "run"):
        assert not [name for name in line if "score" in name] and ("teacher/kl" in line) is (line["step"] > 0)
    assert {row["score"] for row in samples_of(tmp_path / "run")} == {None}
    with pytest.raises(ValueError, match="task='prompts' without rewards"):
        DistillTrainer(toy_config(toy_folder, tmp_path / "with", algorithm="Distill", reward_coef=1.0, **data))
    with pytest.raises(ValueError, match=r"missing_eos_penalty=1.0 without rewards"):
        DistillTrainer(toy_config(toy_folder, tmp_path / "end", algorithm="Distill", missing_eos_penalty=1.0, **data))
    with pytest.raises(ValueError, match="early_stopping_patience=1 without rewards"):
        DistillTrainer(
            toy_config(toy_folder, tmp_path / "stop", algorithm="Distill", early_stopping_patience=1, **data)
        )


# The memory plan


def test_the_plan_counts_the_teacher_that_is_loaded_with_its_adapter(toy_folder, tmp_path):
    adapter = adapter_on(toy_folder, tmp_path / "adapter", 0.3)
    trainer = distill(toy_folder, tmp_path / "run", teacher=adapter, dtype="bfloat16", offload="always")
    planned = next(each for each in trainer.plan.cast.others if each.name == "teacher")
    with trainer.models.use("teacher") as teacher:
        sizes = [each.numel() * each.element_size() for each in teacher.parameters()]
    assert planned.weights == sum(sizes) and sorted(planned.home) == sorted(sizes)
    assert "log-probs, teacher" in [phase.name for phase in trainer.plan.phases]


def test_a_teacher_that_does_not_fit_is_refused_by_name_with_what_helps():
    policy, teacher = without_storage("0.5B"), without_storage("14B")
    settings = {"model": "small", "teacher": "large", "max_tokens_per_microbatch": "auto", "sampler": "transformers"}
    config = DistillConfig(**settings, use_lora=True, gradient_checkpointing=True)
    frozen = {"teacher": (teacher, ())}
    with pytest.raises(ValueError, match=r"model=small, teacher=large.*pass a smaller --model or --teacher"):
        plan_of(config, policy, frozen=frozen, device="24gb")
    spread = dataclasses.replace(config, shard="full")
    plan = plan_of(spread, policy, frozen=frozen, device="24gb", processes=4)
    assert plan.fits and phase_of(plan, "log-probs, teacher").device["teacher"] < 9e9
    assert plan_of(config, policy, frozen=frozen, device="80gb").choices.offload == "never"


def phase_of(plan, name: str):
    return next(each for each in plan.phases if each.name == name)
