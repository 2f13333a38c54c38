"""A resumed run has the prompts, and the date, of its start."""

import copy
import json
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from transformers import AutoTokenizer

from common.data.prompts import PromptSet, PromptStyle
from common.runs.prompt_record import check_record, describe_prompts, time_of_run
from GRPO.grpo_trainer import GRPOTrainer
from tests.forked import launch
from tests.toy import metrics_of, save_toy_policy, toy_config, toy_task

DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SETTINGS = {"num_steps": 2, "save_every": 1, "eval_every": 1, "max_prompt_length": 200, "max_completion_length": 4}
SETTINGS |= {"prompts_per_step": 2, "num_generations": 2}


class Clock(datetime):
    """A clock that the tests set."""

    shift = timedelta()

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + cls.shift


@pytest.fixture
def days_later(monkeypatch):
    """Sets the clock of this project and of chat templates."""
    monkeypatch.setattr(Clock, "shift", timedelta())
    monkeypatch.setattr("common.runs.prompt_record.datetime", Clock)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return lambda days: monkeypatch.setattr(Clock, "shift", timedelta(days=days))


@pytest.fixture
def chat_folder(tmp_path):
    """The toy policy with a chat template that writes the date."""
    return with_template(save_toy_policy(tmp_path / "model"), DATED)


def with_template(folder: Path, template: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def chat_task(*, first: str = ""):
    """The toy task as chat messages; `first` stands before the first training prompt."""
    task = toy_task()

    def as_chat(rows: list[dict], start: str) -> list[dict]:
        return [
            row | {"prompt": [{"role": "user", "content": (start if number == 0 else "") + row["prompt"].strip()}]}
            for number, row in enumerate(rows)
        ]

    return replace(task, train=as_chat(task.train, first), eval=as_chat(task.eval, ""))


def begin(model: Path, folder: Path, task=None, **settings: object) -> GRPOTrainer:
    config = toy_config(model, folder, **(SETTINGS | settings))
    return GRPOTrainer(config, task=task or chat_task())


def begun(model: Path, folder: Path, **settings: object) -> GRPOTrainer:
    """A run that was killed in its first step."""
    trainer = begin(model, folder, **settings)
    (folder / "metrics.jsonl").touch()
    return trainer


def test_a_run_that_is_continued_on_another_day_is_the_same_run(chat_folder, tmp_path, days_later):
    whole = begin(chat_folder, tmp_path / "whole")
    whole.train()
    started = begin(chat_folder, tmp_path / "run")
    step = started.step
    started.step = lambda prompts: step(prompts) if prompts.step == 1 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        started.train()
    days_later(3)
    continued = begin(chat_folder, tmp_path / "run")
    today = datetime.now().strftime("Today: %d %b %Y")
    assert continued.run.first_step == 2 and continued.prompts.texts == started.prompts.texts
    assert all(text.startswith(today) for text in [*continued.prompts.texts, *continued.eval_prompts.texts])
    continued.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    other = begin(chat_folder, tmp_path / "other")
    assert not other.prompts.texts[0].startswith(today)  # a new run has its own date


def test_a_start_that_failed_leaves_no_date(chat_folder, tmp_path, days_later):
    begin(chat_folder, tmp_path / "run")  # ends before its first line of metrics
    assert (tmp_path / "run" / "prompts.json").exists()
    days_later(3)
    second = begin(chat_folder, tmp_path / "run", learning_rate=1e-4)
    assert second.start_time.date() == Clock.now().date()
    assert json.loads((tmp_path / "run" / "prompts.json").read_text())["now"][:10] == str(Clock.now().date())


def test_reward_models_see_the_date_of_the_start(chat_folder, tmp_path, days_later, monkeypatch):
    times = []
    monkeypatch.setattr("common.rewards.scorer.Scorer.load", lambda self, models, now: times.append(now))
    first = begun(chat_folder, tmp_path / "run").start_time
    days_later(3)
    begin(chat_folder, tmp_path / "run")
    assert times == [first] * 2


CHANGES = {
    "template": ("the text of the training prompts and the text of the held-out prompts", "chat template has"),
    "prompt_file": (
        "the text of the training prompts and the text of the held-out prompts",
        "text of prompt_file has",
    ),
    "tokenizer": ("the token ids of the training prompts and the token ids of the held-out", "tokenizer has"),
    "question": ("the text of the training prompts", "data have"),
    "count": ("the number of the training prompts", "data have"),
    "answer": ("the columns of the training prompts", "data have"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_prompts_is_refused_and_says_what_differs(change, tokenizer, tmp_path):
    def record(change: str) -> dict:
        chat, task, now = copy.deepcopy(tokenizer), chat_task(first="Please: " * (change == "question")), Clock.now()
        chat.chat_template = DATED.replace("Today", "Date") if change == "template" else DATED
        style = PromptStyle(template="{prompt}!" if change == "prompt_file" else "{prompt}", now=now)
        if change == "tokenizer":
            chat.add_tokens(["assistant"])
        if change == "count":
            task.train.pop()
        if change == "answer":
            task.train[0]["total"] += 1
        sets = [PromptSet(rows, chat, max_prompt_length=999, seed=0, style=style) for rows in (task.train, task.eval)]
        return describe_prompts(*sets, tokenizer=chat, style=style, now=now)

    check_record(tmp_path, record("nothing"), is_new=True)
    what, cause = CHANGES[change]
    refused = pytest.raises(ValueError, match=rf"output_dir=.*: {what} .*differ, because .*{cause}.*--output_dir")
    with refused if change != "nothing" else nullcontext():
        check_record(tmp_path, record(change), is_new=False)


def test_the_prompt_beside_token_ids_is_compared(tokenizer, tmp_path):
    def record(prompt: str) -> dict:
        rows = [{"prompt_ids": [5, 6], "prompt": prompt, "n": 1}]
        prompts = PromptSet(rows, tokenizer, max_prompt_length=9, seed=0)
        return describe_prompts(prompts, None, tokenizer=tokenizer, style=PromptStyle(), now=datetime(2026, 1, 1))

    check_record(tmp_path, record("what rewards see"), is_new=True)
    check_record(tmp_path, record("what rewards see"), is_new=False)
    with pytest.raises(ValueError, match="the columns of the training prompts differ, because the data have changed"):
        check_record(tmp_path, record("something else"), is_new=False)


def test_a_run_that_was_refused_continues_without_its_record(chat_folder, tmp_path):
    begun(chat_folder, tmp_path / "run")
    with_template(chat_folder, DATED.replace("Today", "Date"))
    with pytest.raises(ValueError, match=r"other prompts.* delete .*prompts\.json"):
        begin(chat_folder, tmp_path / "run")
    (tmp_path / "run" / "prompts.json").unlink()
    begin(chat_folder, tmp_path / "run")


def test_a_run_from_before_there_were_records_resumes(chat_folder, tmp_path):
    begun(chat_folder, tmp_path / "run")
    (tmp_path / "run" / "prompts.json").unlink()
    begin(chat_folder, tmp_path / "run")
    assert (tmp_path / "run" / "prompts.json").exists()


@pytest.mark.parametrize("version", [None, 2])
def test_a_record_of_an_older_version_is_compared_by_token_ids_and_renewed(chat_folder, tmp_path, version):
    begun(chat_folder, tmp_path / "run")
    file = tmp_path / "run" / "prompts.json"
    new, old = json.loads(file.read_text()), json.loads(file.read_text())
    old["version"] = version
    for part in ("training", "held-out"):
        old[part] |= {"text": "0123456789abcdef", "columns": "0123456789abcdef"}  # digests were made in another way
    file.write_text(json.dumps(old))
    begin(chat_folder, tmp_path / "run")
    assert json.loads(file.read_text()) == new
    old["training"]["token ids"] = "0123456789abcdef"
    file.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="the token ids of the training prompts differ"):
        begin(chat_folder, tmp_path / "run")


def test_a_record_that_cannot_be_read_is_named(chat_folder, tmp_path):
    begun(chat_folder, tmp_path / "run")
    for content in ("", "{}", "[]", '{"now": "yesterday"}', "\x00"):
        (tmp_path / "run" / "prompts.json").write_text(content)
        with pytest.raises(ValueError, match=r"prompts\.json: not readable.*delete it"):
            begin(chat_folder, tmp_path / "run")


def test_what_cannot_be_written_as_json_is_no_difference(tokenizer):
    """Objects and sets are written in another way by each process."""

    def record() -> dict:
        rows = [
            {"prompt": f"{n} make {n}\n", "odd": value} for n, value in enumerate([object(), {1, 2}, b"x", "\ud800"])
        ]
        prompts = PromptSet(rows, tokenizer, max_prompt_length=30, seed=0)
        common = {"tokenizer": tokenizer, "style": PromptStyle(), "now": datetime(2026, 1, 1)}
        return describe_prompts(prompts, None, **common)

    assert record() == record() and record()["held-out"] is None


def test_a_model_of_a_run_is_found_by_any_of_its_folders(tmp_path):
    for folder in ("run/final/adapter", "run/checkpoint-2/policy", "elsewhere/final"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("num_steps: 1\n")
    record = {"now": "2026-02-28T23:59:00", "chat_template": "", "prompt_file": "", "training": {}, "held-out": None}
    (tmp_path / "run" / "prompts.json").write_text(json.dumps(record))
    for folder in ("run", "run/final", "run/final/adapter", "run/checkpoint-2", "run/checkpoint-2/policy"):
        assert time_of_run(tmp_path / folder) == datetime(2026, 2, 28, 23, 59)
    assert time_of_run(tmp_path / "elsewhere/final") is None and time_of_run("Qwen/Qwen3-0.6B") is None


@pytest.mark.slow
def test_all_processes_have_one_date_and_one_set_of_prompts(chat_folder, tmp_path):
    """The clocks of the two processes are a day apart; then their data differ."""
    code = """
import os, sys
import common
from datetime import timedelta
from pathlib import Path
import common.runs.prompt_record as record
from tests import test_prompt_record as test
rank = int(os.environ["RANK"])
test.Clock.shift = timedelta(days=rank)
record.datetime = test.chat_template_utils.datetime = test.Clock
model, folder = sys.argv[1:]
trainer = test.begin(Path(model), Path(folder) / "same")
said = trainer.prompts.texts[0]
try:
    test.begin(Path(model), Path(folder) / "other", test.chat_task(first="x" * rank))
except ValueError as error:
    said += str(error)
Path(folder, str(rank)).write_text(said)
trainer.accelerator.state.destroy_process_group()
"""
    (tmp_path / "start.py").write_text(code)
    launch(2, [tmp_path / "start.py", chat_folder, tmp_path])
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith("Today: ")
    assert "the prompts of process 1 are not those of process 0" in said[0]
