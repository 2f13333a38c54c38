"""Prompts are encoded once for the same data, tokenizer and style, and are then read in place."""

import copy
import json
import logging
import os
import pty
import signal
import subprocess
import sys
import termios
import time
import traceback
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import PreTokenizer

from common.config import RLConfig
from common.data import encoding, mapping
from common.data.prompts import PromptSet, PromptStyle
from common.data.rows import split_held_out
from common.runs.prompt_record import describe_prompts
from common.tasks.prompts import read_prompts
from tests.test_chat import KEPT
from tests.test_data import CHAT_TEMPLATE, START, word_tokenizer
from tests.test_prompt_record import DATED
from tests.toy import ROOT

ROLES = [["user"], ["system", "user"], ["user", "assistant"], ["user", "assistant", "user"]]
CHATS = [[{"role": role, "content": f"w{i} w{i % 7} say"} for role in ROLES[i % 4]] for i in range(40)]
ROWS = [{"prompt": f"w{i} add" if i % 5 == 0 else CHATS[i], "n": i} for i in range(40)]
THINKING = CHAT_TEMPLATE + "{% if enable_thinking is defined %}w{{ 1 if enable_thinking else 0 }}{% endif %}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of data, into which every set goes, encoded by two processes."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "MIN_CACHED", 0)
    monkeypatch.setattr(encoding, "BATCH", 7)
    return tmp_path / "cache" / "nanorlhf"


@pytest.fixture
def file(tmp_path):
    """ROWS as a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def prompt_set(rows, tokenizer=None, **settings) -> PromptSet:
    return PromptSet(
        rows, tokenizer or word_tokenizer(CHAT_TEMPLATE), **{"max_prompt_length": 99, "seed": 0} | settings
    )


def templated(tokenizer, template: str):
    """A copy of a tokenizer with a chat template."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = template
    return chat


def folders(cache: Path) -> list[str]:
    return sorted(folder.name for folder in cache.glob("prompts-*/"))


def content(prompts: PromptSet) -> tuple:
    return list(prompts.texts), list(prompts.ids), prompts.columns, prompts.raw, prompts.num_dropped


def test_in_memory_in_place_and_on_several_processes_prompts_are_the_same(cache, file, monkeypatch):
    found = prompt_set(read_prompts(file, "train"))
    assert len(folders(cache)) == 1
    monkeypatch.setattr(mapping, "ROWS_PER_PROCESS", 10)
    monkeypatch.setattr(encoding, "code_digest", lambda *modules: "other code")
    monkeypatch.setattr(mapping.os, "sched_getaffinity", lambda process: range(2))
    several = prompt_set(read_prompts(file, "train"))
    assert len(folders(cache)) == 2 and len(list(cache.glob("*/prompts_*_of_00002.arrow"))) == 2
    monkeypatch.setattr(encoding, "MIN_CACHED", 10**9)
    in_memory = prompt_set(ROWS)
    assert content(found) == content(several) == content(in_memory) and len(folders(cache)) == 2
    # One by one, as the tokenizer and its template write them.
    tokenizer, switches = word_tokenizer(CHAT_TEMPLATE), {"add_generation_prompt": True}
    for row, ids in zip(ROWS, found.ids, strict=True):
        if isinstance(row["prompt"], str):
            assert ids == tokenizer(row["prompt"])["input_ids"]
        elif row["prompt"][-1]["role"] == "user":
            assert ids == tokenizer.apply_chat_template(row["prompt"], return_dict=False, **switches)


@pytest.mark.parametrize("name", KEPT)
def test_every_template_writes_the_same_in_memory_and_in_place(name, cache, tokenizer, monkeypatch):
    rows = [{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(9)]
    kept = prompt_set(rows, templated(tokenizer, KEPT[name]), max_prompt_length=9999)
    monkeypatch.setattr(encoding, "MIN_CACHED", 99)
    assert len(folders(cache)) == 1
    assert content(kept) == content(prompt_set(rows, templated(tokenizer, KEPT[name]), max_prompt_length=9999))


def test_the_second_start_encodes_nothing(cache, file, monkeypatch):
    def start(num_held_out: int, **settings: int) -> list[PromptSet]:
        parts = split_held_out(read_prompts(file, "train"), num_held_out)
        return [prompt_set(part, **settings) for part in parts]

    first = start(4)
    assert len(folders(cache)) == 2  # the training rows are most of the table, and it is encoded whole
    monkeypatch.setattr(encoding._Batch, "__call__", None)
    second = start(4)
    assert [content(part) for part in first] == [content(part) for part in second]
    record = {"tokenizer": word_tokenizer(), "style": PromptStyle(), "now": datetime(2026, 1, 1)}
    assert describe_prompts(*first, **record) == describe_prompts(*second, **record)
    shorter = start(4, max_prompt_length=9, seed=3)[0]
    assert 0 < shorter.num_dropped < 36 and max(map(len, shorter.ids)) <= 9
    training = prompt_set(split_held_out(read_prompts(file, "train"), 7)[0])  # other rows of the same table
    assert set(training.columns["n"]) < set(range(40)) and len(training) == 33


def other_vocabulary():
    tokenizer = word_tokenizer(THINKING)
    tokenizer.add_tokens(["w0 w0"])
    return tokenizer


CHANGES = {
    "nothing": {},
    "the seed and the limit": {"seed": 1, "max_prompt_length": 50},
    "the progress bar": {"progress": False},
    "a template": {"tokenizer": word_tokenizer(THINKING + " ")},
    "the vocabulary": {"tokenizer": other_vocabulary()},
    "a prompt file": {"style": PromptStyle(template="now {prompt}")},
    "thinking": {"style": PromptStyle(enable_thinking=True)},
    "no thinking": {"style": PromptStyle(enable_thinking=False)},
    "a row": {"rows": [*ROWS[:-1], {"prompt": "w9", "n": 39}]},
    "a column": {"rows": [*ROWS[:-1], ROWS[-1] | {"n": 40}]},
    "the order": {"rows": ROWS[::-1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_the_prompts_is_encoded_anew_and_nothing_else(cache, change, monkeypatch):
    settings = {"rows": ROWS, "tokenizer": word_tokenizer(THINKING)}
    prompt_set(**settings)
    changed = prompt_set(**settings | CHANGES[change])
    same = change in ("nothing", "the seed and the limit", "the progress bar")
    assert len(folders(cache)) == (1 if same else 2)
    monkeypatch.setattr(encoding, "MIN_CACHED", 99)
    assert content(changed) == content(prompt_set(**settings | CHANGES[change]))


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d %b %Y')",
        'strftime_now ( "%d %b %Y" )',
        "strftime_now('%d %b %Y') if strftime_now is defined else 'no date'",
        "strftime_now('%d ' + '%b')",
        "strftime_now('\\u0025d %b')",
        "(strftime_now)('%d %b')",
        "strftime_now(format='%d %b')",
    ],
)
def test_a_template_with_the_date_is_encoded_once_a_day(cache, call, tokenizer):
    tokenizer = templated(tokenizer, DATED.replace("strftime_now('%d %b %Y')", call))
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]

    def text(*time: int) -> str:
        return prompt_set(rows, tokenizer, style=PromptStyle(now=datetime(*time))).texts[0]

    assert text(2026, 11, 27, 9) == text(2026, 11, 27, 17) and "27 Nov" in text(2026, 11, 27, 9)
    hours = 1 if "%d %b %Y" in call else 2  # a format that the template puts together may have the hour in it
    assert len(folders(cache)) == hours and "28 Nov" in text(2026, 11, 28, 9)
    assert len(folders(cache)) == hours + 1
    prompt_set(rows, tokenizer)  # by the clock, which nobody has written down
    assert len(folders(cache)) == hours + 1


def test_a_template_that_leaves_a_message_out_is_refused_at_every_start(cache):
    rows = [{"prompt": CHATS[0]}, {"prompt": CHATS[3]}]
    user_only = CHAT_TEMPLATE.replace("message in messages", "message in messages if message['role'] == 'user'")
    for _ in range(2):
        with pytest.raises(ValueError, match="leaves out the text of assistant messages"):
            prompt_set(rows, word_tokenizer(user_only))
    assert not folders(cache) and not list(cache.glob(".*"))


def test_rows_that_json_cannot_write_are_encoded_in_memory(cache):
    rows = [{"prompt": "w1", "odd": {1, 2}}, {"prompt": "w2", "odd": b"x"}]
    assert prompt_set(rows).columns == {"odd": [{1, 2}, b"x"]} and not cache.exists()


def test_without_a_cache_that_can_be_written_prompts_are_in_main_memory(cache, caplog):
    cache.parent.write_text("a file is in the way")
    assert content(prompt_set(ROWS)) == content(prompt_set(ROWS))
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("progress", [True, False])
def test_a_log_file_gets_one_line_before_a_long_encoding_and_none_without_progress(cache, caplog, capsys, progress):
    with caplog.at_level(logging.INFO, "nanorlhf"):
        for _ in range(2):
            config = RLConfig(progress=progress, max_prompt_length=99)
            PromptSet.of(ROWS, word_tokenizer(CHAT_TEMPLATE), config)
    assert caplog.text.count("encoding 40 prompts") == int(progress)
    assert capsys.readouterr().err == ""


def test_a_row_that_cannot_be_encoded_is_named_as_in_the_file(cache, file):
    rows = read_prompts(file, "train")
    _, held_out = split_held_out(rows, 1)
    number = 1 + [row["n"] for row in rows].index(held_out[0]["n"])
    assert rows.select([5, 7]).where(1).endswith("rows.jsonl: row 8")
    assert held_out.where(0).endswith(f"rows.jsonl: row {number}")
    with pytest.raises(ValueError, match=r"row 1 has the character '\\ud83d' in its prompt: half of a pair"):
        prompt_set([{"prompt": "w1"}, {"prompt": "w\ud83d"}])


def test_the_backend_gives_the_ids_of_the_tokenizer_whatever_was_asked_before(tokenizer):
    texts = [row["prompt"] for row in ROWS if isinstance(row["prompt"], str)] + ["3 5 make 8\n" * 20, "é ü", START]
    for each in (word_tokenizer(), tokenizer):
        each.pad_token = each.pad_token or START
        each(texts, truncation=True, max_length=3, padding="max_length")
        for add in (True, False):
            found = encoding._Batch([], each, str)._tokenize(texts, add_special_tokens=add)
            assert found == each(texts, add_special_tokens=add)["input_ids"]


def test_another_name_for_the_clock_is_one(cache, tokenizer):
    renamed = "{% set clock = strftime_now %}" + DATED.replace("strftime_now(", "clock(")
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]
    for day in (27, 28):
        style = PromptStyle(now=datetime(2026, 11, day))
        assert f"{day} Nov" in prompt_set(rows, templated(tokenizer, renamed), style=style).texts[0]


def test_a_tokenizer_with_python_code_in_it_is_used_without_the_cache(cache):
    class Words:
        def pre_tokenize(self, text) -> None:
            text.split(lambda number, part: part.split(" ", "removed"))

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Words())
    assert prompt_set([{"prompt": "w1 add"}] * 3, tokenizer).ids[0] == [0, 13, 7] and not cache.exists()


# Several processes


@pytest.fixture
def two_processes(cache, monkeypatch):
    """Ten rows are enough for a second process."""
    monkeypatch.setattr(mapping, "ROWS_PER_PROCESS", 10)
    monkeypatch.setattr(mapping.os, "sched_getaffinity", lambda process: range(2))


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_mistake_in_another_process_is_a_message_and_a_fault_keeps_its_traceback(
    two_processes, file, is_ours, monkeypatch
):
    def refuse(self, number: int, row: dict) -> str:
        if not is_ours:
            return int("a fault")
        raise ValueError(f"row {number} is refused")

    monkeypatch.setattr(encoding._Batch, "_kind", refuse)
    with pytest.raises(ValueError, match="row 0 is refused" if is_ours else "invalid literal") as refusal:
        prompt_set(read_prompts(file, "train"))
    frame = traceback.extract_tb(refusal.value.__traceback__)[-1]
    assert (Path(frame.filename) == Path(mapping.__file__) and frame.line.startswith("raise ValueError")) is is_ours


START_OF_MANY = """
import json, signal, sys, time
from pathlib import Path
import common
from common.cli import run_script
from common.data import encoding, mapping
from common.tasks.prompts import read_prompts
from tests.test_encoding import prompt_set

encoding.MIN_CACHED, encoding.BATCH, mapping.ROWS_PER_PROCESS = 0, 7, 10
mapping.os.sched_getaffinity = lambda process: range(2)
folder, whole = Path(sys.argv[1]), encoding._Batch.__call__

def slow(batch, numbers):
    (folder / f"{mapping.os.getpid()}.started").write_text("")
    time.sleep(60)
    return whole(batch, numbers)

encoding._Batch.__call__ = slow
signal.signal(signal.SIGINT, signal.default_int_handler)
run_script(lambda: prompt_set(read_prompts(sys.argv[2], "train"), progress=False), interrupted="as said")
"""


def alive(process: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_that_encode_end_with_the_script(tmp_path, file, end):
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", START_OF_MANY, str(tmp_path), file]
    options = {"env": environment, "stderr": subprocess.PIPE, "text": True, "start_new_session": True, "cwd": ROOT}
    with subprocess.Popen(command, **options) as script:
        workers: list[int] = []
        while len(workers) < 2:
            assert script.poll() is None, script.stderr.read()
            time.sleep(0.05)
            workers = [int(path.stem) for path in tmp_path.glob("*.started")]
        if end == signal.SIGINT:
            os.killpg(script.pid, end)  # as a terminal does
        else:
            script.send_signal(end)
        said = script.communicate(timeout=30)[1]
    status, message = {
        signal.SIGINT: (130, "\ninterrupted: as said\n"),
        signal.SIGTERM: (143, "SIGTERM: as said\n"),
        signal.SIGKILL: (-9, ""),
    }[end]
    assert script.returncode == status and said == message
    limit = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(alive, workers))


# Token ids in the data


def test_prompt_ids_are_taken_as_they_are(tmp_path):
    path = tmp_path / "ids.jsonl"
    rows = [
        {"prompt_ids": [0, 7, 8], "n": 1},
        {"prompt_ids": [9, 9], "prompt": "what rewards see", "n": 2},
        {"prompt": "add one", "n": 3},
        {"prompt_ids": [7], "prompt": CHATS[0], "n": 4},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = prompt_set(read_prompts(str(path), "train"), word_tokenizer())  # no template is needed
    assert prompts.ids == [[0, 7, 8], [9, 9], [0, 7, 8], [7]]
    assert prompts.raw == ["<s> add one", "what rewards see", "add one", CHATS[0]]
    assert prompts.texts[:3] == ["<s> add one", "two two", "add one"]
    assert prompts.columns == {"n": [1, 2, 3, 4]}
    train, held_out = split_held_out(read_prompts(str(path), "train"), 2)
    assert len(train) == len(held_out) == 2


@pytest.mark.parametrize("ids", [[], [1.5], "12", [True], [None], [[1]]])
def test_prompt_ids_that_are_none_are_refused_by_row(tmp_path, ids):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt_ids": ids}))
    with pytest.raises(ValueError, match=r"row 2 has prompt_ids=.*a list of token ids is needed"):
        read_prompts(str(tmp_path / "ids.jsonl"), "train")


@pytest.mark.parametrize("token", [62, -1])
def test_prompt_ids_outside_the_vocabulary_are_refused_by_row(tmp_path, token):
    (tmp_path / "ids.jsonl").write_text('{"prompt_ids": [61, 0]}\n' + json.dumps({"prompt_ids": [1, token]}))
    with pytest.raises(ValueError, match=r"ids\.jsonl: row 2 has prompt_ids=.*integers from 0 to 61, which are those"):
        prompt_set(read_prompts(str(tmp_path / "ids.jsonl"), "train"), word_tokenizer())


def test_nothing_can_be_put_around_prompt_ids():
    with pytest.raises(ValueError, match=r"prompt_file with a column prompt_ids.*Leave prompt_file out"):
        prompt_set([{"prompt_ids": [1]}], style=PromptStyle(template="now {prompt}"))
    with pytest.raises(ValueError, match=r"enable_thinking=True with prompts that are plain text"):
        prompt_set([{"prompt_ids": [1]}], style=PromptStyle(enable_thinking=True))


def test_of_many_chats_the_one_that_the_template_refuses_is_shown(cache):
    refusing = CHAT_TEMPLATE + "{% if 'w37' in messages[0].content %}{{ raise_exception('no w37') }}{% endif %}"
    with pytest.raises(ValueError, match=r"does not write the messages \(system: 'w37 .*\): no w37\. Use a model"):
        prompt_set(ROWS[::-1], word_tokenizer(refusing))


BAR = """
import sys
import common
from common.data import encoding, mapping
from tests.test_encoding import ROWS, CHAT_TEMPLATE, prompt_set
encoding.MIN_CACHED = 0
prompt_set(ROWS, progress=sys.argv[1] == "True")
"""


@pytest.mark.slow
@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_gets_a_bar_unless_progress_is_off(tmp_path, progress):
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, 100))
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with open(terminal, "rb", buffering=0) as screen:
        subprocess.run([sys.executable, "-c", BAR, str(progress)], env=environment, stderr=end, check=True, cwd=ROOT)
        os.close(end)
        shown = b""
        with suppress(OSError):  # how a terminal says that everything was read
            while part := screen.read(1000):
                shown += part
    assert (b"Encoding prompts: 100%" in shown) is progress and (progress or not shown)
