"""examples/sft: RL's prompts, a loss on the assistant's turns alone, packs that leak nothing, a run that resumes."""

import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_chat_template

from common.config import RLConfig
from common.data.prompts import PromptSet, PromptStyle
from common.embedded.policy import build_tokenizer as byte_tokenizer
from common.models.loading import end_token_ids
from common.runs.checkpoints import latest_checkpoint
from common.runs.manifest import MANIFEST_FILE, find_damage
from common.tasks import load_task
from common.tasks.gsm8k import correct_reward, strict_format_reward, tags_reward
from examples.sft.conversations import IGNORED, encode, end_of_turn, read_examples
from examples.sft.sft import (
    SFTSettings,
    TinySettings,
    check_settings,
    load_tokenizer,
    make_config,
    make_trainer,
    read_data,
    read_settings,
    train_sft,
)
from examples.sft.tiny_model import build_tokenizer
from tests import forked

SCRIPT = Path(__file__).parent.parent / "examples" / "sft" / "sft.py"
RECORDS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"

SUMS = [
    {"question": f"{a} and {b}?", "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
    for a in range(2, 14)
    for b in range(2, 14)
]
PROBLEMS = [{"problem": f"What is ${i}+1$?", "solution": f"It is $\\boxed{{{i + 1}}}$."} for i in range(12)]
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good night."},
]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat_tokenizer(template: str | None = None):
    """Words of the sums, the tokens of ChatML, and an end token that is not that of a turn."""
    tokenizer = build_tokenizer([*SUMS, *({"text": message["content"]} for message in DIALOGUE)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def spoken(row: dict, tokenizer) -> str:
    """The text that has a loss."""
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def tiny_settings(dataset: str, output_dir: Path, *more: str) -> SFTSettings:
    return read_settings(["--model", "tiny", "--dataset", dataset, "--output_dir", str(output_dir), *more])


QUICK = ("--num_eval_prompts", "16", "--max_length", "256", "--batch_size", "2", "--warmup_steps", "2")


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("data") / "sums.jsonl", SUMS)


@pytest.fixture(scope="module")
def trained(sums: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder and the result of a tiny model after a few seconds of training."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    return folder, train_sft(tiny_settings(sums, folder, *QUICK, "--num_epochs", "6", "--save_every", "50"))


# What is learned from


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), byte_tokenizer()], ids=["chat", "plain"])
@pytest.mark.parametrize(("task", "rows"), [("gsm8k", SUMS), ("math", PROBLEMS)])
def test_the_prompt_is_token_by_token_that_of_the_rl_task(tmp_path, tokenizer, task, rows):
    path = write(tmp_path / "rows.jsonl", rows)
    rl = load_task(RLConfig(task=task, model="tiny", dataset=path, num_eval_prompts=2), tokenizer)
    prompts = PromptSet(rl.train, tokenizer, max_prompt_length=2000, seed=0)
    examples, _ = read_examples(path, "train", form="auto", tokenizer=tokenizer)
    encoded = encode(examples, tokenizer, max_length=4000)
    known = {tuple(ids) for ids in prompts.ids}
    learned = {
        tuple(row["input_ids"][: row["labels"].count(IGNORED)]): row["labels"].count(IGNORED) for row in encoded
    }
    assert known <= learned.keys() and len(learned) == len(known) + 2


def test_the_same_rows_are_held_out_as_by_the_rl_task(sums, tmp_path):
    tokenizer = chat_tokenizer()
    rl = load_task(RLConfig(task="gsm8k", model="tiny", dataset=sums, num_eval_prompts=9), tokenizer)
    settings = tiny_settings(sums, tmp_path, "--num_eval_prompts", "9", "--max_length", "2000")
    _, held_out, _ = read_data(settings, tokenizer)
    prompts = PromptSet(rl.eval, tokenizer, max_prompt_length=2000, seed=0)
    begins = [row["input_ids"][: row["labels"].count(IGNORED)] for row in held_out]
    assert begins == prompts.ids


def test_what_gsm8k_teaches_scores_full_marks(sums):
    examples, left_out = read_examples(sums, "train", form="gsm8k", tokenizer=chat_tokenizer())
    completions = [example["completion"] for example in examples]
    answers = [row["answer"].partition("#### ")[2] for row in SUMS]
    assert left_out == 0 and "<<" not in "".join(completions)
    for reward in (correct_reward, strict_format_reward, tags_reward):
        assert reward(completions, completions, answer=answers) == [1.0] * len(SUMS)


@pytest.mark.skipif(not RECORDS.is_file(), reason="the GSM8K records are not here")
def test_what_the_real_gsm8k_teaches_scores_full_marks():
    examples, _ = read_examples(str(RECORDS), "train", form="auto", tokenizer=byte_tokenizer())
    completions = [example["completion"] for example in examples]
    answers = [json.loads(line)["answer"].rpartition("#### ")[2].replace(",", "") for line in RECORDS.open()]
    assert len(completions) == 1319
    for reward in (correct_reward, strict_format_reward):
        assert reward(completions, completions, answer=answers) == [1.0] * 1319


def test_solutions_without_a_boxed_answer_are_left_out_and_counted(tmp_path):
    rows = [*PROBLEMS, {"problem": "Prove it.", "solution": "Done.", "messages": []}]
    path = write(tmp_path / "rows.jsonl", rows)
    examples, left_out = read_examples(path, "train", form="auto", tokenizer=chat_tokenizer())
    assert (len(examples), left_out) == (12, 1)
    assert all("\\boxed{" in example["prompt"][-1]["content"] for example in examples)


def test_numinamath_with_its_three_columns_is_read_as_problems_of_the_task(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "rows.jsonl", [row | {"messages": messages} for row in PROBLEMS])
    as_task, _ = read_examples(path, "train", form="auto", tokenizer=chat_tokenizer())
    as_messages, _ = read_examples(path, "train", form="messages", tokenizer=chat_tokenizer())
    assert as_task[0]["completion"] == PROBLEMS[0]["solution"] and as_messages[0] == {"messages": messages}


def test_prompt_and_completion_are_taken_as_they_are():
    tokenizer = byte_tokenizer()
    (row,) = encode([{"prompt": "2 + 2 = ", "completion": "4"}], tokenizer, max_length=100)
    assert tokenizer.decode(row["input_ids"]) == "2 + 2 = 4<eos>"
    assert spoken(row, tokenizer) == "4<eos>"


def test_what_rl_puts_around_its_prompts_can_be_put_around_them_here_too(tmp_path):
    (tmp_path / "prompt.txt").write_text("Think. {prompt} Answer:")
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"{i}+1?", "completion": f"{i + 1}"} for i in range(4)])
    more = ["--prompt_file", str(tmp_path / "prompt.txt"), "--num_eval_prompts", "1"]
    train, _, _ = read_data(tiny_settings(path, tmp_path, *more), byte_tokenizer())
    assert {byte_tokenizer().decode(row["input_ids"]) for row in train} < {
        f"Think. {i}+1? Answer:{i + 1}<eos>" for i in range(4)
    }
    path = write(tmp_path / "rows.jsonl", [{"messages": [*DIALOGUE[:i], DIALOGUE[2]]} for i in range(4)])
    with pytest.raises(ValueError, match="prompt_file or enable_thinking with rows of the form messages"):
        read_data(tiny_settings(path, tmp_path, *more), chat_tokenizer())


# Where the loss is


@pytest.mark.parametrize("template", [None, qwen2_5_chat_template, qwen3_chat_template])
def test_the_loss_is_on_all_turns_of_the_assistant_with_their_ends_and_on_nothing_else(template):
    tokenizer = chat_tokenizer(template)
    (row,) = encode([{"messages": DIALOGUE}], tokenizer, max_length=1000)
    text = spoken(row, tokenizer)
    assert text.count("Good day.<|im_end|>") == text.count("Good night.<|im_end|>") == 1
    assert not any(other in text for other in ("kind", "Hello", "now", "<|im_start|>", "user"))
    turns = ["Good day.", "Good night."]
    rest = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
    assert not any(turn in tokenizer.decode(rest) for turn in turns) and "<|im_start|>user" in tokenizer.decode(rest)


@pytest.mark.parametrize("template", [None, qwen2_5_chat_template, qwen3_chat_template])
def test_a_completion_ends_in_the_end_of_the_turn_not_in_the_base_models_end_token(template):
    tokenizer = chat_tokenizer(template)
    assert end_of_turn(tokenizer) == "<|im_end|>" != tokenizer.eos_token
    prompt = [{"role": "user", "content": "Hello?"}]
    (row,) = encode([{"prompt": prompt, "completion": "Good day."}], tokenizer, max_length=1000)
    assert spoken(row, tokenizer) == "Good day.<|im_end|>"
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: len(asked)] == asked and row["labels"][: len(asked)] == [IGNORED] * len(asked)


@pytest.mark.parametrize("template", [None, qwen2_5_chat_template, qwen3_chat_template])
def test_a_special_token_that_data_spell_is_text(template):
    tokenizer = chat_tokenizer(template)
    turn = "Hello?<|im_end|>\n<|im_start|>assistant\nGood day."
    messages = [{"role": "user", "content": turn}, {"role": "assistant", "content": turn}]
    harmless = [{**message, "content": "Hello?"} for message in messages]
    rows = [{"messages": messages}, {"prompt": messages[:1], "completion": turn + "<|im_end|>"}]
    plain = [{"messages": harmless}, {"prompt": harmless[:1], "completion": "Hello?"}]
    for row, other in zip(rows, plain, strict=True):
        (row,), (other,) = (encode([each], tokenizer, max_length=1000) for each in (row, other))
        for marker in tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]):
            assert row["input_ids"].count(marker) == other["input_ids"].count(marker)
            assert row["labels"].count(marker) == other["labels"].count(marker)
        assert spoken(row, tokenizer).count("Hello?") == 1 and "Good day.<|im_end|>" in spoken(row, tokenizer)


def test_examples_that_are_too_long_are_left_out_whole():
    examples = [{"prompt": "a", "completion": "b" * length} for length in (5, 50)]
    (row,) = encode(examples, byte_tokenizer(), max_length=20)
    assert spoken(row, byte_tokenizer()) == "bbbbb<eos>"


# Packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_of_a_pack_do_not_see_each_other(sums, tmp_path, attention):
    """The log-probs of each example in a pack are those it has alone, and no label is lost but that of a prompt."""
    settings = tiny_settings(sums, tmp_path / "run", *QUICK, "--max_length", "512", "--attn_implementation", attention)
    trainer, _, _ = prepared(settings)
    model = trainer.model.eval()
    batch = next(batch for batch in trainer.get_train_dataloader() if int((batch["position_ids"] == 0).sum()) > 2)
    assert "attention_mask" not in batch and batch["input_ids"].shape[0] == 1
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        bounds = batch["cu_seq_lens_q"].tolist()
        alone = [model(input_ids=batch["input_ids"][:, a:b], use_cache=False).logits[0] for a, b in pairwise(bounds)]
        leaking = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert (packed - leaking)[bounds[1] :].abs().max() > 0.01  # what the same row gives without positions


def test_the_loss_of_a_pack_is_the_mean_over_the_assistants_tokens_of_its_examples(sums, tmp_path):
    trainer, _, _ = prepared(tiny_settings(sums, tmp_path / "run", *QUICK))
    trainer.model.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    bounds, losses = batch["cu_seq_lens_q"].tolist(), []
    for a, b in pairwise(bounds):
        ids, labels = batch["input_ids"][0, a:b], batch["labels"][0, a:b]
        with torch.no_grad():
            logprobs = trainer.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = labels[1:] != IGNORED
        losses.append(-logprobs.gather(1, ids[1:, None]).squeeze(1)[chosen])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
    assert len(losses) > 1 and float(loss) == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def prepared(settings: SFTSettings):
    """A trainer with the run's tiny model, before its first step."""
    from examples.sft.sft import prepare_folder

    tokenizer = load_tokenizer(settings)
    train, held_out, counts = read_data(settings, tokenizer)
    prepare_folder(settings, tokenizer)
    return make_trainer(settings, (train, held_out), tokenizer), tokenizer, counts


# The run


@pytest.mark.slow
def test_a_tiny_model_learns_the_layout_and_when_to_stop(trained, sums):
    folder, result = trained
    assert result["loss_after"] < 0.5 * result["loss_before"]
    assert result["token_accuracy_after"] > result["token_accuracy_before"]
    assert result == json.loads((folder / "loss.json").read_text())
    assert result["num_train_examples"] == len(SUMS) - 16 and result["num_packs"] < result["num_train_examples"]
    model, report = AutoModelForCausalLM.from_pretrained(folder / "final", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert not report["missing_keys"] and tokenizer.eos_token == "<|im_end|>"
    assert end_token_ids(model, tokenizer) == (tokenizer.eos_token_id,)
    (example, *_), _ = read_examples(sums, "train", form="auto", tokenizer=tokenizer)
    ids = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_tensors="pt")
    completion = model.generate(**ids, max_new_tokens=100, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert completion[-1] == tokenizer.eos_token_id
    assert strict_format_reward([""], [tokenizer.decode(completion, skip_special_tokens=True)]) == [1.0]


@pytest.mark.slow
def test_metrics_begin_with_the_untrained_model(trained):
    folder, result = trained
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[0]["eval_loss"] == result["loss_before"]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line][-1] == result["loss_after"]


@pytest.mark.slow
def test_an_adapter_is_saved_with_its_base_and_its_end_tokens(sums, tmp_path):
    settings = tiny_settings(sums, tmp_path / "run", *QUICK, "--num_steps", "2", "--use_lora", "true", "--lora_r", "4")
    train_sft(settings)
    final = tmp_path / "run" / "final"
    config = json.loads((final / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base" and config["r"] == 4
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base"), final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert GenerationConfig.from_pretrained(final).eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.slow
def test_a_model_from_a_folder_without_a_chat_template_is_trained_on_plain_prompts(tiny_folder, sums, tmp_path):
    arguments = ["--model", str(tiny_folder), "--dataset", sums, "--output_dir", str(tmp_path / "run"), *QUICK]
    settings = read_settings([*arguments, "--max_length", "700", "--num_steps", "2", "--learning_rate", "0.01"])
    assert settings.warmup_steps == 2 and settings.weight_decay == SFTSettings().weight_decay
    result = train_sft(settings)
    assert result["loss_after"] < result["loss_before"] and result["num_steps"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final").chat_template is None


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(sums, tmp_path):
    def command(name: str) -> list[str]:
        settings = ["--model", "tiny", "--dataset", sums, *QUICK, "--num_epochs", "2", "--save_every", "8"]
        return [SCRIPT, *settings, "--output_dir", str(tmp_path / name)]

    with forked.Forked(command("killed")) as process:
        while not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json")):
            assert process.poll(0.02) is None, process.stderr
    assert not (tmp_path / "killed" / "final").exists()
    assert forked.run(command("whole")).returncode == 0
    last = latest_checkpoint(tmp_path / "whole")
    assert (last / MANIFEST_FILE).is_file() and find_damage(last, read="") is None
    # A later checkpoint that is cut off counts for nothing, and is written again.
    damaged = shutil.copytree(last, tmp_path / "killed" / last.name)
    os.truncate(damaged / "model.safetensors", 999)
    assert forked.run(command("killed")).returncode == 0
    assert find_damage(damaged, read="") is None
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("killed", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    losses = [json.loads((tmp_path / name / "loss.json").read_text()) for name in ("killed", "whole")]
    assert losses[0] == losses[1]


# Settings


@pytest.mark.parametrize("name", [name for name in SFTSettings.__dataclass_fields__ if name != "model"])
def test_every_setting_can_be_given(name):
    value = vars(SFTSettings())[name]
    other = {str: "x", int: 3, float: 0.5, bool: not value}.get(type(value))
    other = {"num_steps": 7, "prompt_file": "x", "enable_thinking": True}.get(name, other)
    assert vars(read_settings([f"--{name}", str(other)]))[name] == other
    tiny = vars(read_settings(["--model", "tiny", f"--{name}", str(other)]))
    assert tiny == vars(TinySettings(model="tiny")) | {name: other}


def test_a_yaml_file_lies_between_the_script_and_the_command_line(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("batch_size: 3\nlearning_rate: 2e-6\nseed: 4\n")
    settings = read_settings(["--config", str(path), "--seed", "5"])
    assert (settings.batch_size, settings.learning_rate, settings.seed) == (3, 2e-6, 5)


def test_settings_reach_the_training():
    settings = replace(
        SFTSettings(), num_epochs=3, num_steps=7, learning_rate=0.5, warmup_steps=9, weight_decay=0.25, seed=6
    )
    args = make_config(settings, "<|im_end|>")
    assert (args.num_train_epochs, args.max_steps, args.learning_rate, args.warmup_steps) == (3, 7, 0.5, 9)
    assert (args.weight_decay, args.seed, args.save_steps, args.max_length) == (0.25, 6, 200, 4096)
    assert args.packing and args.gradient_accumulation_steps == SFTSettings().batch_size
    assert args.model_init_kwargs["attn_implementation"] == "sdpa" and args.gradient_checkpointing
    assert make_config(replace(SFTSettings(), num_steps=None), "<|im_end|>").max_steps == -1


def test_the_precision_of_passes_is_that_of_the_setting(monkeypatch):
    monkeypatch.setattr("common.models.loading.cpu_computes_bfloat16", lambda: True)
    on_cpu = {"auto": False, "float32": False, "bfloat16": True, "fast": True}
    found = {name: make_config(replace(SFTSettings(), dtype=name), "<|im_end|>") for name in on_cpu}
    assert {name: args.bf16 for name, args in found.items()} == on_cpu
    assert {args.model_init_kwargs["dtype"] for args in found.values()} == {"float32"}


# Bad input


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], [], "the first row has the columns text; .*forms completion .prompt, completion."),
        ([*SUMS[:3], {"question": "a"}], [], "row 4 has no answer; rows of the form 'gsm8k'"),
        ([*SUMS[:3], {"question": "a", "answer": "42"}], [], "row 4 has an answer without ####"),
        ([{"prompt": "a", "completion": 7}], [], "row 1 has completion=7; text is needed"),
        ([{"messages": "hello"}], [], "row 1 has messages='hello'; a list of messages"),
        ([{"messages": DIALOGUE[:2]}], [], "row 1 has messages=.*the last one the assistant's"),
        (SUMS[:4], ["--form", "math"], "row 1 has no problem and no solution"),
        (SUMS[:4], ["--num_eval_prompts", "4"], "num_eval_prompts=4: the data has 4 rows"),
        (
            SUMS[:4],
            ["--max_length", "20", "--num_eval_prompts", "1"],
            "max_length=20: no example of 3 is short enough",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_and_nothing_written(tmp_path, rows, options, message):
    settings = tiny_settings(write(tmp_path / "rows.jsonl", rows), tmp_path / "run", *options)
    with pytest.raises(ValueError, match=message):
        train_sft(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "poem"], "form='poem': there is no such form"),
        (["--batch_size", "0"], "batch_size=0: at least 1"),
        (["--num_epochs", "0"], "num_epochs=0: at least 1"),
        (["--dtype", "half"], "dtype='half': there is no such precision"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, options, message):
    settings = read_settings(["--dataset", write(tmp_path / "rows.jsonl", SUMS), *options])
    with pytest.raises(ValueError, match=message):
        train_sft(settings)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match=r"unknown setting 'modl' on the command line.*Did you mean model"):
        read_settings(["--modl", "x"])


def test_messages_need_a_template_that_says_where_the_assistant_speaks(tiny_folder, tmp_path):
    example = [{"messages": DIALOGUE}]
    with pytest.raises(ValueError, match="tokenizer without a chat template"):
        encode(example, byte_tokenizer(), max_length=100)
    unmarked = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"does not mark the assistant's turns.*generation"):
        encode(example, chat_tokenizer(unmarked), max_length=100)
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="leaves the end of a turn out"):
        encode(example, chat_tokenizer(marked), max_length=100)


@pytest.mark.slow
def test_a_finished_run_and_another_runs_folder_are_refused(trained, sums, tmp_path):
    folder, _ = trained
    with pytest.raises(ValueError, match=r"the run there has finished.*Pass another --output_dir"):
        train_sft(tiny_settings(sums, folder, *QUICK))
    stored = yaml.safe_dump(asdict(tiny_settings(sums, tmp_path / "run", *QUICK, "--seed", "3")))
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(stored)
    with pytest.raises(ValueError, match=r"started with other settings: seed \(stored 3, now 0\)"):
        train_sft(tiny_settings(sums, tmp_path / "run", *QUICK))


@pytest.mark.slow
def test_the_script_ends_with_one_message(sums, tmp_path):
    words = ["sft.py", "--model", "no/model", "--dataset", sums, "--output_dir", tmp_path / "run"]
    done = forked.run(words, cwd=SCRIPT.parent)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: model='no/model': cannot be loaded" in done.stderr


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr("examples.sft.sft.PartialState", lambda: type("State", (), {"num_processes": 3}))
    with pytest.raises(ValueError, match=r"batch_size=16: 3 processes.*multiple of 3"):
        check_settings(SFTSettings())


# The date


def test_examples_have_the_date_they_are_given_and_every_message():
    dated = chat_tokenizer()
    now = datetime(2024, 2, 29)
    marked = "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    dated.chat_template = (
        "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + marked
        + "{% elif m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    question = [{"role": "user", "content": "1+1?"}]
    answered = [*question, {"role": "assistant", "content": "2"}]
    for examples in ([{"prompt": question, "completion": "2"}], [{"messages": answered}]):
        ids = encode(examples, dated, 999, PromptStyle(now=now))["input_ids"][0]
        assert dated.decode(ids).startswith("2024-02-29")
    ids = encode([{"messages": [{"role": "system", "content": "Be brief."}, *answered]}], dated, 999)["input_ids"][0]
    assert "Be brief.\n\n1+1?2" in dated.decode(ids)
    with pytest.raises(ValueError, match="leaves out the text of tool messages"):
        encode([{"messages": [*question, {"role": "tool", "content": "2"}, *answered]}], dated, 999)
