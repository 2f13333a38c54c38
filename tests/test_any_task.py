"""Every algorithm takes every task, and any mixture of rewards, by its script's own settings and the command line."""

import gzip
import importlib
import json
from pathlib import Path

import pytest

from common.cli import parse_config
from common.embedded.policy import build_tokenizer
from tests.test_reward_model import save_decoder
from tests.toy import algorithms, facts, metrics_of, save_toy_policy

ROWS = {
    "countdown": [{"nums": [a, 2, 3], "target": a + 5} for a in range(1, 9)],
    "gsm8k": [{"question": f"What is {a} + 1?", "answer": f"It is {a + 1}. #### {a + 1}"} for a in range(8)],
    "math": [{"problem": f"What is ${a} + 1$?", "answer": str(a + 1)} for a in range(8)],
    "hh_rlhf": [{"chosen": f"\n\nHuman: say {a}\n\nAssistant: {a}", "rejected": "\n\nHuman: no"} for a in range(8)],
    "prompts": [{"prompt": f"say {a}", "word": str(a)} for a in range(8)],
}
REWARD_FILE = """
def says(prompts, completions, word, **columns):
    return [float(w in text) for w, text in zip(word, completions)]

async def brief(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, a reward model, a file of rewards, and a data file for each task."""
    folder = tmp_path_factory.mktemp("any")
    save_toy_policy(folder / "policy")
    save_decoder(folder / "judge")
    (folder / "rewards.py").write_text(REWARD_FILE)
    for task, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text)
        (folder / f"{task}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def arguments(folder: Path, task: str, output_dir: Path) -> list[str]:
    """A command line for one short step, without the tiny policy's preset."""
    judge, own = str(folder / "judge"), str(folder / "rewards.py")
    rewards = {
        "hh_rlhf": ["--reward", judge],
        "prompts": ["--reward", f"{own}:says", "--reward", judge, "0.5", "--reward", f"{own}:brief", "0.1"],
    }
    return [
        *("--preset", "none", "--task", task, "--dataset", str(folder / f"{task}.jsonl.gz")),
        *("--model", str(folder / "policy"), "--output_dir", str(output_dir), "--sampler", "transformers"),
        *("--num_steps", "1", "--prompts_per_step", "2", "--num_generations", "2", "--num_eval_prompts", "2"),
        *("--max_prompt_length", "500", "--max_completion_length", "6", "--eval_every", "1", "--save_every", "0"),
        *("--use_lora", "false", "--progress", "false", "--kl_coef", "0.01"),
        *rewards.get(task, []),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("name", algorithms())
def test_any_algorithm_trains_on_any_task(folder, tmp_path, name, task):
    args = arguments(folder, task, tmp_path / "run")
    if name == "PPO":
        args += ["--value_backbone", "own", "--value_init_prompts", "5", "--value_init_epochs", "1"]
    made = {setting: make for setting, make in facts(name).get("TOY_SETTINGS", {}).items() if callable(make)}
    args += [word for setting, make in made.items() for word in (f"--{setting}", make(folder / "policy"))]
    algorithm = algorithms()[name]
    settings = vars(importlib.import_module(f"{name}.{name.lower()}"))["SETTINGS"]
    algorithm.trainer(parse_config(settings, args=args)).train()
    first, last = metrics_of(tmp_path / "run")
    parts = {key.removeprefix("reward/") for key in last if key.startswith("reward/")}
    expected = {"countdown": {"format", "equation"}, "hh_rlhf": {"judge"}, "prompts": {"says", "judge", "brief"}}
    assert parts == expected.get(task, parts) and parts
    assert "eval/score" in first and "eval/score" in last
    assert ("eval/accuracy" in last) == (task in ("countdown", "gsm8k", "math"))
    assert ("eval/lenient_accuracy" in last) == (task in ("gsm8k", "math"))


def test_a_reward_that_asks_for_a_column_the_data_lack_is_refused_by_name(folder, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "letter": "b"}\n{"prompt": "c", "letter": "d"}\n')
    args = [*arguments(folder, "prompts", tmp_path / "run"), "--num_eval_prompts", "0", "--eval_every", "0"]
    args[args.index("--dataset") + 1] = str(tmp_path / "other.jsonl")
    settings = vars(importlib.import_module("GRPO.grpo"))["SETTINGS"]
    with pytest.raises(ValueError, match=r"says.*word.*letter"):
        algorithms()["GRPO"].trainer(parse_config(settings, args=args))


def test_conversational_rewards_get_messages(folder, tmp_path):
    (tmp_path / "trl_style.py").write_text(
        "def polite(prompts, completions, **columns):\n"
        "    assert all(prompt[-1]['role'] == 'user' for prompt in prompts)\n"
        "    return [float(len(completion[0]['content'])) for completion in completions]\n"
    )
    args = arguments(folder, "prompts", tmp_path / "run")
    args = args[: args.index("--reward")]
    args += ["--reward", f"{tmp_path / 'trl_style.py'}:polite", "--reward_format", "conversational"]
    settings = vars(importlib.import_module("GRPO.grpo"))["SETTINGS"]
    algorithms()["GRPO"].trainer(parse_config(settings, args=args)).train()
    assert metrics_of(tmp_path / "run")[-1]["reward/polite"] >= 0


def test_a_reward_may_ask_for_the_sampled_tokens(folder, tmp_path):
    (tmp_path / "tokens.py").write_text(
        "def length(prompts, completions, completion_ids, **columns):\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    args = [*arguments(folder, "countdown", tmp_path / "run"), "--reward", f"{tmp_path / 'tokens.py'}:length"]
    settings = vars(importlib.import_module("GRPO.grpo"))["SETTINGS"]
    algorithms()["GRPO"].trainer(parse_config(settings, args=args)).train()
    last = metrics_of(tmp_path / "run")[-1]
    assert last["reward/length"] == last["length"] > 0


# Rewards of trl


@pytest.fixture(scope="module")
def chat(folder) -> Path:
    """A policy with a chat template, and chat prompts with solutions."""
    save_toy_policy(folder / "chat")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "chat")
    rows = [{"prompt": [{"role": "user", "content": f"say {a}"}], "solution": f"${a}$"} for a in range(8)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def chat_run(chat: Path, output_dir: Path, *rewards: str) -> list[dict]:
    args = arguments(chat, "prompts", output_dir)
    args = args[: args.index("--reward")]
    args[args.index("--dataset") + 1], args[args.index("--model") + 1] = str(chat / "chat.jsonl"), str(chat / "chat")
    args += [word for reward in rewards for word in ("--reward", reward)]
    algorithms()["GRPO"].trainer(
        parse_config(vars(importlib.import_module("GRPO.grpo"))["SETTINGS"], args=args)
    ).train()
    return metrics_of(output_dir)


OF_TRL = {
    "accuracy_reward": "",
    "reasoning_accuracy_reward": "",
    "think_format_reward": "",
    "get_soft_overlong_punishment": "(max_completion_len=6, soft_punish_cache=4)",
    "get_cosine_scaled_reward": "(max_len=6)",
    "get_repetition_penalty_reward": "(ngram_size=2)",
}


def test_every_reward_of_trl_trains_on_chat_data_as_it_is(chat, tmp_path):
    import trl.rewards

    assert {name for name in trl.rewards.__all__ if callable(getattr(trl.rewards, name))} == set(OF_TRL)
    first, last = chat_run(chat, tmp_path / "run", *(f"trl.rewards:{name}{call}" for name, call in OF_TRL.items()))
    assert {name.removeprefix("reward/") for name in last if name.startswith("reward/")} == set(OF_TRL)
    assert last["reward/think_format_reward"] == 0.0 and -1 <= last["reward/get_soft_overlong_punishment"] < 0
    assert "eval/score" in first
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[-1])
    assert (
        sample["extra"]["gold_parsed"].startswith("[") and "reasoning_accuracy_reward/gold_parsed" in sample["extra"]
    )


FORMS = """
def text(prompts, completions):
    return [float(prompt.startswith("<user>say")) for prompt, text in zip(prompts, completions)]

def messages(prompts, completions):
    said = [prompt[-1]["content"].startswith("say") for prompt in prompts]
    return [float(ok and completion[0]["role"] == "assistant") for ok, completion in zip(said, completions)]
"""


def test_on_chat_data_functions_of_text_get_text_and_functions_of_messages_get_messages(chat, tmp_path):
    (tmp_path / "forms.py").write_text(FORMS)
    _, last = chat_run(chat, tmp_path / "run", *(f"{tmp_path / 'forms.py'}:{name}" for name in ("text", "messages")))
    assert last["reward/text"] == last["reward/messages"] == 1.0
