"""Rows from a folder of `datasets`; files are in the tests of the tasks that read them."""

import datasets
import pytest

from common.config import RLConfig
from common.data.rows import read_rows
from common.embedded.policy import build_tokenizer
from common.tasks import load_task

ROWS = [{"question": f"What is {a} + 1?", "answer": f"#### {a + 1}"} for a in range(6)]


def test_a_saved_data_set_is_read_like_a_file(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "rows")
    assert read_rows(str(tmp_path / "rows"), "train", ["question", "answer"]) == ROWS
    task = load_task(RLConfig(task="gsm8k", dataset=str(tmp_path / "rows"), num_eval_prompts=2), build_tokenizer())
    assert (len(task.train), len(task.eval)) == (4, 2)


def test_of_a_folder_with_splits_the_named_one_is_read(tmp_path):
    splits = {"train": datasets.Dataset.from_list(ROWS[:4]), "test": datasets.Dataset.from_list(ROWS[4:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "rows")
    assert read_rows(str(tmp_path / "rows"), "test", None) == ROWS[4:]
    with pytest.raises(ValueError, match="dataset_split=validation: the folder has the splits train, test"):
        read_rows(str(tmp_path / "rows"), "validation", None)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="a folder, but not one that datasets' save_to_disk wrote"):
        read_rows(str(tmp_path), "train", None)
