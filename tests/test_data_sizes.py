"""Data that would cost far more than its size, or end in a traceback, is refused with its file and line."""

import bz2
import gzip
import json
import lzma
import resource
import time

import pyarrow
import pytest

from common.data import files as data_files
from common.data.rows import read_rows
from common.models.configs import read_settings
from common.tasks.math import gold_answer


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


def refused(path) -> str:
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        read_rows(str(path), "train", None)
    message = str(caught.value)
    assert str(path) in message and len(message) < 600 and "\x1b" not in message
    assert time.process_time() - began < 20
    return message


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_small_file_that_expands_enormously_costs_no_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "FREE_BYTES", 8 * 2**20)
    path = tmp_path / f"bomb.jsonl.{kind}"
    path.write_bytes(COMPRESS[kind]((b'{"prompt":"' + b"a" * 2**20 + b'"}\n') * 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(path)
    assert "MB that expand to more than" in message and "decompress the file" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("kind", COMPRESS)
def test_ordinary_text_is_read_whatever_compresses_it(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "FREE_BYTES", 0)
    rows = [{"prompt": f"What is {n} + {n * n}?"} for n in range(3000)]
    (tmp_path / f"a.jsonl.{kind}").write_bytes(
        COMPRESS[kind]("".join(map("{}\n".format, map(json.dumps, rows))).encode())
    )
    assert read_rows(str(tmp_path / f"a.jsonl.{kind}"), "train", None) == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("deep.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "line 2 is not JSON (nested"),
        ("deeper.jsonl", b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}\n", "line 1 is nested more than 100 deep"),
        ("deep.json", b'[{"a": ' + b"[" * 300 + b"]" * 300 + b"}]", "row 1 is nested more than 100 deep"),
        ("deep2.json", b"[" * 200_000, "nested too deeply"),
        ("digits.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}\n", "line 2 is not JSON (a number of more than"),
        ("digits.json", b"[" + b"1" * 5000 + b"]", "a number of more than"),
        ("bytes.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "byte 8 of line 2"),
        ("zeros.jsonl", b'{"a": 1}\n{"a": "\0"}\n', "line 2 has zero bytes"),
        ("long.jsonl", b'{"a": 1}\n{"a": "' + b"x" * 3000 + b'"}\n', "line 2 has more than"),
        ("endless.jsonl", b'{"a": "' + b"x" * 3000, "line 1 has more than"),
        ("utf16.jsonl", "\ufeff".encode("utf-16le") + ("x" * 3000).encode("utf-16le"), "line 1 has more than"),
        ("quote.csv", b'a,b\n1,"' + b"x\n" * 3000, "field larger than field limit"),
        ("columns.csv", b"a," * 200 + b"a\n", "each differently"),
        ("names.jsonl", b'"\x1b[2J"\n'.replace(b"\x1b", b"\\u001b"), "row 1 holds a str"),
    ],
)
def test_what_no_row_is_has_a_message_with_file_and_line(name, content, said, tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_LINE", 2500 if "deep" not in name and "digits" not in name else 10**6)
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


def test_a_list_of_rows_is_read_as_a_whole_only_up_to_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_JSON", 1000)
    (tmp_path / "rows.json").write_text("[" + ",\n".join(['{"a": "xxxxxxxxxx"}'] * 100) + "]")
    assert "Write one row per line" in refused(tmp_path / "rows.json")


def test_a_header_of_a_hundred_thousand_columns_takes_no_minute(tmp_path):
    (tmp_path / "a.csv").write_text(",".join(f"c{n}" for n in range(100_000)) + "\n1,2\n")
    assert "names 100000 columns: c0, c1" in refused(tmp_path / "a.csv")


def test_names_of_columns_are_shown_escaped_and_not_all(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"\x1b[2J\n": 1} | {f"c{n}": 1 for n in range(500)}) + "\n")
    with pytest.raises(ValueError, match=r"holds \\x1b\[2J\\n, c0, .* \(481 more\); the task needs") as caught:
        read_rows(str(tmp_path / "a.jsonl"), "train", ["prompt"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", "\xff", "[1]"])
def test_settings_of_a_model_that_cannot_be_read_are_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"model: config\.json .*Fetch it again"):
        read_settings(tmp_path / "config.json", "model", "Fetch it again.")


@pytest.mark.parametrize("text", ['["' + '"],["' * 3, '["a", ' + "[" * 100_000, '["a", ' + "1" * 5000 + "]"])
def test_an_answer_that_looks_like_a_list_stays_text(text):
    gold_answer({"problem": "x", "answer": text})
