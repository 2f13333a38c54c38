"""hh-rlhf: dialogues become conversations that end with the human, and held-out prompts stay held out."""

import gzip
import json
from pathlib import Path

import pytest

from common.config import RLConfig
from common.data.dialogues import conversation, dialogue, turns
from common.data.prompts import render_prompt
from common.data.rows import read_rows
from common.embedded.policy import build_tokenizer
from common.tasks import Task, load_task
from common.tasks.hh_rlhf import REWARD_MODEL

RECORDS = Path(__file__).parents[2] / "shared" / "data" / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
needs_records = pytest.mark.skipif(not RECORDS.exists(), reason="the real records are not here")

HELLO = "\n\nHuman: Hi\n\nAssistant: Hello! How are you?\n\nHuman: Fine.\n\nAssistant: Good."


def roles_and_contents(messages: list[dict]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def write_dialogues(path: Path, texts: list[str]) -> Path:
    lines = "".join(json.dumps({"chosen": text, "rejected": text}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def load(path: Path, *, num_eval_prompts: int = 2, chat_template: str | None = None) -> Task:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    return load_task(RLConfig(task="hh_rlhf", dataset=str(path), num_eval_prompts=num_eval_prompts), tokenizer)


# From text to messages


def test_the_whole_dialogue_up_to_the_last_human_turn_is_the_prompt():
    assert roles_and_contents(conversation(HELLO)) == [
        ("user", "Hi"),
        ("assistant", "Hello! How are you?"),
        ("user", "Fine."),
    ]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("\n\nHuman: Hi", [("user", "Hi")]),  # no answer yet
        ("\n\nHuman: Hi\n\nAssistant:", [("user", "Hi")]),
        ("Human: Hi\n\nAssistant: Yes", [("user", "Hi")]),  # no blank line before the first turn
        ("\n\nHuman:  Hi \n \n\nAssistant: Yes ", [("user", "Hi")]),
        # A name and a colon within a turn are its words.
        ("\n\nHuman: one\nHuman: two\n\nAssistant: Yes", [("user", "one\nHuman: two")]),
        ("\n\nHuman: a\n\nAssistant: Human: b\n\nHuman: c", [("user", "a"), ("assistant", "Human: b"), ("user", "c")]),
        ("\n\nHuman: is it an\n\nAssistants: thing?", [("user", "is it an\n\nAssistants: thing?")]),
        # Turns of one role in a row, empty turns, a greeting.
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [("user", "a\n\nb")]),
        ("\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c", [("user", "a\n\nb")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: \n\nAssistant: c", [("user", "a")]),
        ("\n\nAssistant: Welcome!\n\nHuman: a\n\nAssistant: b", [("user", "a")]),
        ("A chat.\n\nHuman: a\n\nAssistant: b", [("user", "a")]),
        ("\n\nAssistant: Welcome!", []),
        ("\n\nHuman: \n\nAssistant: b", []),
        ("Hello there", []),
        ("", []),
    ],
)
def test_dialogues_of_every_form(text, messages):
    assert roles_and_contents(conversation(text)) == messages


def test_a_prompt_without_chat_template_is_written_as_the_data_set_writes_it():
    assert dialogue(conversation(HELLO)) == HELLO.removesuffix(" Good.")


@needs_records
def test_every_real_record_becomes_a_conversation():
    rows = read_rows(str(RECORDS), "train", ["chosen", "rejected"])
    assert len(rows) > 2000
    for text in (text for row in rows for text in row.values()):
        messages = conversation(text)
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        assert all(m["content"] and m["content"] == m["content"].strip() for m in messages)
        assert turns(text)[: len(messages)] == messages
        assert messages[-1]["content"].endswith(text.split("\n\nHuman:")[-1].split("\n\nAssistant:")[0].strip())


# The task


def test_chat_messages_with_a_template_and_text_without(tmp_path):
    path = write_dialogues(tmp_path / "a.jsonl", [HELLO, "\n\nHuman: Why?\n\nAssistant: So."])
    template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    task = load(path, num_eval_prompts=1, chat_template=template)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    rendered = {render_prompt(tokenizer, row["prompt"]) for row in task.train + task.eval}
    assert rendered == {"user=Hi;assistant=Hello! How are you?;user=Fine.;", "user=Why?;"}
    task = load(path, num_eval_prompts=1)
    assert {row["prompt"] for row in task.train + task.eval} == {
        HELLO.removesuffix(" Good."),
        "\n\nHuman: Why?\n\nAssistant:",
    }


def test_the_only_column_is_the_prompt_and_the_reward_is_a_model(tmp_path):
    task = load(write_dialogues(tmp_path / "a.jsonl", [f"\n\nHuman: {i}\n\nAssistant: b" for i in range(9)]))
    assert all(row.keys() == {"prompt"} for row in task.train + task.eval)
    assert task.default_rewards == [REWARD_MODEL] and not task.rewards and task.accuracy is None


def test_a_prompt_with_several_answers_counts_once_and_held_out_ones_are_not_trained_on(tmp_path):
    texts = [f"\n\nHuman: {i % 9}\n\nAssistant: answer {i}" for i in range(40)]
    task = load(write_dialogues(tmp_path / "a.jsonl", texts), num_eval_prompts=4)
    train, held_out = ([row["prompt"] for row in rows] for rows in (task.train, task.eval))
    assert len(held_out) == 4 and sorted(train + held_out) == [f"\n\nHuman: {i}\n\nAssistant:" for i in range(9)]
    again = load(tmp_path / "a.jsonl", num_eval_prompts=4)
    assert (again.train, again.eval) == (task.train, task.eval)


@needs_records
def test_real_records_give_disjoint_prompts():
    task = load(RECORDS, num_eval_prompts=200)
    train, held_out = ({row["prompt"] for row in rows} for rows in (task.train, task.eval))
    assert len(held_out) == 200 and len(train) == len(task.train) > 2000 and not train & held_out


def test_no_prompt_left_to_train_on_is_refused(tmp_path):
    path = write_dialogues(tmp_path / "a.jsonl", [HELLO, HELLO, "\n\nHuman: a\n\nAssistant: b"])
    with pytest.raises(ValueError, match=r"num_eval_prompts=2: the data has 2 different prompts"):
        load(path, num_eval_prompts=2)


@pytest.mark.parametrize("text", ["\n\nAssistant: Hello", "no dialogue", None, 3])
def test_a_dialogue_without_a_human_turn_is_refused_by_row(tmp_path, text):
    path = write_dialogues(tmp_path / "a.jsonl", [HELLO, text])
    with pytest.raises(ValueError, match=r"a\.jsonl: row 2 has chosen=.*turn of the human.*[Cc]orrect or remove"):
        load(path)


def test_without_a_data_set_the_hub_is_asked_for_the_real_one(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"dataset=Anthropic/hh-rlhf, dataset_split=train\[:1%\]"):
        load_task(RLConfig(task="hh_rlhf", dataset_split="train[:1%]"), build_tokenizer())


# Compressed files


def test_a_compressed_file_gives_the_same_rows(tmp_path):
    texts = [f"\n\nHuman: schön {i}\n\nAssistant: ja" for i in range(5)]
    plain, packed = (write_dialogues(tmp_path / name, texts) for name in ("a.jsonl", "a.jsonl.gz"))
    assert read_rows(str(plain), "train", ["chosen"]) == read_rows(str(packed), "train", ["chosen"])


def test_a_bad_line_of_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"chosen": "x"}\n\n{"chosen": \n'))
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: line 3 is not JSON"):
        read_rows(str(path), "train", ["chosen"])


def test_a_file_that_is_not_compressed_or_cut_short_is_named(tmp_path):
    path = write_dialogues(tmp_path / "a.jsonl.gz", [HELLO] * 100)
    for content in (b'{"chosen": "x"}\n', path.read_bytes()[:-20], path.read_bytes()[:10] + b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.jsonl\.gz: unreadable gzip file.*fetch it again"):
            read_rows(str(path), "train", ["chosen"])
