"""The task for any prompts: rows travel whole, nothing held out is trained on, a score has to be asked for."""

import json
from dataclasses import replace

import pytest

from common.config import RLConfig
from common.data.prompts import PromptSet
from common.data.rows import split_held_out
from common.embedded.policy import build_tokenizer
from common.tasks import load_task


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(dataset, **changes):
    settings = {"dataset": dataset, "num_eval_prompts": 2, "rewards": ["reward.py:score"], **changes}
    return load_task(replace(RLConfig(task="prompts", model="tiny"), **settings), build_tokenizer())


TEXTS = [{"prompt": f"Say {i}.", "answer": i, "note": [i, "x"]} for i in range(9)]
CHATS = [{"prompt": [{"role": "user", "content": f"Say {i}."}], "answer": i} for i in range(9)]


@pytest.mark.parametrize("rows", [TEXTS, CHATS])
def test_prompts_and_all_columns_are_kept_as_they_are(tmp_path, rows):
    task = load(write(tmp_path / "rows.jsonl", rows))
    assert (len(task.train), len(task.eval)) == (7, 2)
    assert sorted([*task.train, *task.eval], key=lambda row: row["answer"]) == rows
    assert task.rewards == task.reward_weights == {} and task.accuracy is None


def test_a_column_that_a_row_lacks_is_none_there(tmp_path):
    rows = [{"prompt": "a", "answer": 1}, {"note": "n", "prompt": "b"}]
    task = load(write(tmp_path / "rows.jsonl", rows), num_eval_prompts=0)
    assert sorted(task.train, key=lambda row: row["prompt"]) == [
        {"prompt": "a", "answer": 1, "note": None},
        {"prompt": "b", "answer": None, "note": "n"},
    ]


def test_chat_messages_reach_the_policy_through_its_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    task = load(write(tmp_path / "rows.jsonl", CHATS[:1]), num_eval_prompts=0)
    prompts = PromptSet(task.train, tokenizer, max_prompt_length=100, seed=0)
    assert prompts.texts == ["[user]Say 0."] and prompts.columns == {"answer": [0]}


def test_what_is_held_out_depends_on_the_data_alone(tmp_path):
    path = write(tmp_path / "rows.jsonl", TEXTS)
    assert load(path, seed=1).eval == load(path, seed=2).eval
    assert load(path, num_eval_prompts=0).eval == []
    assert load(path, num_eval_prompts=4).eval[:2] == load(path).eval


@pytest.mark.parametrize("rows", [TEXTS[:3] * 3, CHATS[:3] * 3])
def test_a_held_out_prompt_is_not_trained_on_in_another_row(rows):
    train, held_out = split_held_out(rows, 1)
    assert len(train) == 6 and held_out[0] not in train


def test_without_data_or_rewards_the_task_says_what_to_pass(tmp_path):
    with pytest.raises(ValueError, match="without a data set"):
        load(None)
    with pytest.raises(ValueError, match="no rewards of its own"):
        load(write(tmp_path / "rows.jsonl", TEXTS), rewards=None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TEXTS[0], {"question": "a", "answer": 1}], "row 2 has the columns question, answer; a prompt must be text"),
        ([{"prompt": ""}], "row 1 has prompt=''"),
        ([{"prompt": 5}], "row 1 has prompt=5"),
        ([{"prompt": []}], "row 1 has prompt="),
        ([{"prompt": ["a"]}], "row 1 has prompt="),
        ([{"prompt": [{"role": "user"}]}], "row 1 has prompt="),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "row 1 has prompt="),
        ([TEXTS[0], "text"], "row 2 holds a str"),
        (TEXTS[:2], "num_eval_prompts=2: the data has 2 rows"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_number(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "rows.jsonl", rows))
