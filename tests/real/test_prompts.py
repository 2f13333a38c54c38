"""A chat template with a default system message: policy, reward, SFT and evaluation see the same prompts."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from common.evaluation.command import evaluate
from common.evaluation.settings import EvaluationSettings
from examples.sft.conversations import IGNORED
from examples.sft.sft import load_tokenizer, read_data, read_settings
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.real.conftest import rows_of
from tests.toy import samples_of

QUESTIONS = ("How many legs has a cat?", "How many wheels has a car?", "How many days has a week?", "What is 3 + 4?")
SEEN = f"{Path(__file__).with_name('rewards.py')}:seen"


@pytest.fixture(scope="module")
def tokenizer(model):
    """The model's, whose template has a default system message."""
    loaded = AutoTokenizer.from_pretrained(model)
    if "system" not in loaded.apply_chat_template(chat("x"), tokenize=False):
        pytest.skip(f"the chat template of {model} has no default system message")
    return loaded


def chat(question: str, *, system: str | None = None) -> list[dict[str, str]]:
    begin = [{"role": "system", "content": system}] if system else []
    return [*begin, {"role": "user", "content": question}]


@pytest.fixture
def data(tmp_path):
    """Rows with and without a system message of their own; every second one has one."""
    prompts = [chat(text, system="Be brief." if number % 2 else None) for number, text in enumerate(QUESTIONS)]
    rows = [{"prompt": prompt, "completion": "Four.", "folder": str(tmp_path)} for prompt in prompts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def expected(data, tokenizer) -> dict[str, list[int]]:
    """What the template makes of each prompt: text and token ids."""
    prompts = [row["prompt"] for row in rows_of(data)]
    texts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in prompts]
    assert [text.count("<|im_start|>system") for text in texts] == [1] * len(texts)
    return {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}


def seen_by_reward(data: Path) -> set[str]:
    return set(rows_of(data.with_name("seen.jsonl")))


def test_policy_and_reward_see_in_training_what_the_template_writes(model, data, expected, tmp_path):
    small = {"num_steps": 1, "prompts_per_step": 3, "num_generations": 2, "max_completion_length": 4}
    small |= {"num_eval_prompts": 1, "eval_every": 1, "save_every": 0, "samples_every": 1, "progress": False}
    places = {"model": model, "task": "prompts", "dataset": str(data), "output_dir": str(tmp_path / "run")}
    small |= {"sampler": "transformers", "use_lora": True, "dtype": "fast"}
    run = GRPOTrainer(GRPOConfig(**places, rewards=[SEEN], **small))
    run.train()
    encoded = [*zip(run.prompts.texts, run.prompts.ids, strict=True)]
    encoded += zip(run.eval_prompts.texts, run.eval_prompts.ids, strict=True)
    assert dict(encoded) == expected
    assert seen_by_reward(data) == expected.keys()
    assert {sample["prompt"] for sample in samples_of(tmp_path / "run")} <= expected.keys()


def test_an_evaluation_shows_the_same_prompts(model, data, expected, tmp_path):
    places = {"model": [model], "task": "prompts", "dataset": str(data), "output_dir": str(tmp_path / "result")}
    small = {"num_samples": 1, "max_completion_length": 4, "sampler": "transformers", "dtype": "fast"}
    evaluate(EvaluationSettings(**places, rewards=[SEEN], **small))
    assert [row["prompt"] for row in rows_of(tmp_path / "result" / "outputs.jsonl")] == list(expected)
    assert seen_by_reward(data) == expected.keys()


def test_supervised_fine_tuning_learns_from_the_same_prompts(model, data, expected):
    settings = read_settings(["--model", model, "--dataset", str(data), "--num_eval_prompts", "1"])
    tokenizer = load_tokenizer(settings)
    train, held_out, _ = read_data(settings, tokenizer)
    answer = [*tokenizer("Four.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    found = []
    for row in [*train, *held_out]:
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        assert learned == answer
        found.append(row["input_ids"][: -len(answer)])
    assert sorted(found) == sorted(expected.values())
