"""Rows from files of every kind, from folders, and in place: as written, refused by line, kept for the next start."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from common.config import RLConfig
from common.data import rows as data_rows
from common.data.files import is_data_file
from common.data.rows import read_rows, rows_of_dataset, split_held_out
from common.data.table import kept_table
from common.embedded.policy import build_tokenizer
from common.tasks import load_task
from common.tasks.prompts import read_prompts

ROWS = [{"question": f"What is {a} + 1?", "answer": f"#### {a + 1}"} for a in range(6)]
TEXT = 'prompt,answer\nSay é.,007\n"a, b\n""c""",\nNA,1e3\n'
TEXT_ROWS = [
    {"prompt": "Say é.", "answer": "007"},
    {"prompt": 'a, b\n"c"', "answer": None},
    {"prompt": "NA", "answer": "1e3"},
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of data, into which every file goes."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_rows, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr(data_rows, "MIN_CACHED_ROWS", 0)
    return tmp_path / "cache" / "nanorlhf"


def lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# Files


@pytest.mark.parametrize("name", ["rows.csv", "ROWS.CSV", "rows.csv.gz", "rows.v2.csv"])
def test_the_cells_of_a_csv_file_stay_text_and_empty_ones_are_missing(tmp_path, name):
    content = TEXT.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_rows(str(tmp_path / name), "train", None) == TEXT_ROWS


@pytest.mark.parametrize(("name", "sign"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t")])
def test_tabs_and_the_semicolons_of_spreadsheets_part_cells(tmp_path, name, sign):
    (tmp_path / name).write_text(f'prompt{sign}answer\r\n"a, {sign}b"{sign}1\r\n\r\nc{sign}2\r\n', newline="")
    assert read_rows(str(tmp_path / name), "train", None) == [
        {"prompt": f"a, {sign}b", "answer": "1"},
        {"prompt": "c", "answer": "2"},
    ]


def test_chat_messages_in_a_csv_cell_are_messages_if_they_are_json(tmp_path):
    path, messages = tmp_path / "a.csv", [{"role": "user", "content": "Hi, you"}]
    quoted = json.dumps(messages).replace('"', '""')
    path.write_text(f'prompt,note\n"{quoted}","[1, 2]"\n"[{{""a"": 1}}]",[x]\n')
    assert read_rows(str(path), "train", None) == [
        {"prompt": messages, "note": "[1, 2]"},
        {"prompt": '[{"a": 1}]', "note": "[x]"},
    ]
    path.write_text(f'prompt\n"{messages}"\n')
    with pytest.raises(ValueError, match=r"line 2 has chat messages as Python prints them.*json\.dumps"):
        read_rows(str(path), "train", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "ends in line 3 has 3 cells, but the first line names 2 columns: a, b"),
        ("a,b\n1\n", "ends in line 2 has 1 cells"),
        ("a,a\n1,2\n", "first line must name the columns, each differently; it has 'a', 'a'"),
        ("a,\n1,2\n", "each differently; it has 'a', ''"),
        ("", "each differently; it has nothing"),
        ('a,b\n1,"2\n', "begins in line 2 is not CSV"),
        ("a,b\n", "it has no rows"),
    ],
)
def test_a_csv_file_that_does_not_fit_its_header_is_refused_by_line(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / "a.csv"), "train", None)


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("prompt\n" + "x" * 200_000 + "\n")
    assert read_rows(str(tmp_path / "a.csv"), "train", None) == [{"prompt": "x" * 200_000}]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "A.JSONL", "a.Json", "a.ndjson", "a.json.gz", "a.jsonl.bz2", "a.JSONL.XZ", "a.jsonl.zst"]
)
def test_json_is_read_under_all_its_names(tmp_path, name):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    pack[".zst"] = lambda content: bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    content = lines(ROWS).encode()
    (tmp_path / name).write_bytes(pack.get(Path(name).suffix.lower(), bytes)(content))
    assert is_data_file(name) and read_rows(str(tmp_path / name), "train", None) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", lines(TEXT_ROWS)), ("a.csv", TEXT), ("a.json", json.dumps(TEXT_ROWS))]
)
def test_a_byte_order_mark_says_the_encoding(tmp_path, name, content, encoding):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / name).write_bytes((mark + content).encode(encoding))
    assert read_rows(str(tmp_path / name), "train", None) == TEXT_ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "caf\xe9"}\n',
            r"byte 11 of line 2 is 0xe9, which is not UTF-8: .*caf.*iconv -f latin1",
        ),
        ("a.csv", b"a\ncaf\xe9\n", r"byte 4 of line 2 is 0xe9.*iconv -f latin1 -t utf8 \S+a\.csv > new\.csv"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), r"zero bytes.*iconv -f utf-16le"),
        ("a.jsonl", b'\xff\xfe{"a": 1}\n', "mark of UTF-16, but is not"),
        (
            "a.jsonl",
            b'{"a": "\\u00e9"}\n{"a": "x \\ud83d y"}\n',
            r"line 2 has the character '\\ud83d' in a: half of a pair",
        ),
        ("a.json", b'[{"a": ["\\uDE00"]}]', r"row 1 has the character '\\ude00' in a"),
        ("a.jsonl.gz", b"nothing", "unreadable gzip file"),
        ("a.jsonl.xz", b"nothing", "unreadable xz file"),
        ("a.jsonl.bz2", b"nothing", "unreadable bzip2 file"),
        ("a.jsonl.zst", b"nothing", "unreadable zstd file"),
        ("a.txt", b"nothing", r"a file of another kind. What is read: \.jsonl .*\.csv, \.tsv .*\.parquet"),
        ("a.parquet.gz", b"nothing", "a file of another kind"),
        ("a.json", b'{"rows":\n []}', "holds one JSON dict; a list of rows"),
    ],
)
def test_what_cannot_be_read_is_refused_by_place_with_a_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_rows(str(tmp_path / name), "train", None)
    assert str(refusal.value).count("\n") < 8 and len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    "name", ["/gone/data", "./gone", "a/b/c", "gone.txt", "Gone.XLSX", "gone.csv", "gone.parquet"]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(ValueError, match="there is no such file"):
        read_rows(name, "train", None)


def test_a_whole_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_rows(str(tmp_path / "a.jsonl"), "train", None) == [{"a": "\N{GRINNING FACE}"}]


def test_values_stay_as_json_has_them(tmp_path, cache):
    """Arrow would give a column one type, and every dict the keys of all."""
    rows = [
        {"prompt": "a", "x": 1, "y": {"k": None}},
        {"prompt": "b", "x": [1.5, "s"], "y": {"other": 10**30}},
        {"prompt": "c", "x": None, "y": True},
    ]
    (tmp_path / "a.jsonl").write_text(lines(rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.json"):
        found = read_prompts(str(tmp_path / name), "train")
        assert found == rows and type(found[1]["y"]["other"]) is int
    assert len(list(cache.glob("rows-*/rows.arrow"))) == 2


# Folders


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


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_copy_of_a_hub_data_set_is_read_by_its_splits(tmp_path, kind, metadata):
    parts = {"train-00000-of-00002": ROWS[:2], "train-00001-of-00002": ROWS[2:4], "test-00000-of-00001": ROWS[4:]}
    (tmp_path / "data").mkdir()
    for name, rows in parts.items():
        write = {
            "parquet": datasets.Dataset.to_parquet,
            "csv": datasets.Dataset.to_csv,
            "jsonl": datasets.Dataset.to_json,
        }
        write[kind](datasets.Dataset.from_list(rows), tmp_path / "data" / f"{name}.{kind}")
    (tmp_path / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/test-*.{kind}\n---\n"
        * metadata
    )
    assert read_rows(str(tmp_path), "train", None) == (ROWS[4:] if metadata else ROWS[:4])
    if not metadata:
        assert read_rows(str(tmp_path), "test", ["question", "answer"]) == ROWS[4:]
    with pytest.raises(ValueError, match="dataset_split=other: the folder has the splits train"):
        read_rows(str(tmp_path), "other", None)


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a folder without data.*\.jsonl.*save_to_disk"):
        read_rows(str(tmp_path / "rows"), "train", None)


def test_messages_from_arrow_have_only_the_keys_that_they_had(tmp_path):
    chats = [
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "n": 1}]},
        ],
        [
            {"role": "user", "content": "c", "name": "me"},
            {"role": "assistant", "content": "d", "tool_calls": [{"name": "g"}]},
        ],
    ]
    rows = [{"prompt": chat, "extra": {"k": None}, "none": None} for chat in chats]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_prompts(str(tmp_path / "a.parquet"), "train") == rows


# In place


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_read_once_and_then_in_place(tmp_path, cache, kind, monkeypatch):
    rows = [{"prompt": f"p{i % 40}", "n": i, "odd": [i]} for i in range(2500)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(lines(rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first = read_prompts(str(path), "train")
    written = {file: file.stat().st_mtime_ns for file in cache.rglob("*")}
    assert written and not list(cache.glob(".*"))  # nothing half made is left
    monkeypatch.setattr(data_rows, "json_rows", None)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", None)
    again = read_prompts(str(path), "train")
    monkeypatch.undo()
    assert first == again == rows and first.fingerprint == again.fingerprint
    assert {file: file.stat().st_mtime_ns for file in written} == written
    train, held_out = split_held_out(again, 3)
    assert (list(train), list(held_out)) == split_held_out(rows, 3)
    assert pickle.loads(pickle.dumps(train)) == list(train) and len(pickle.dumps(again)) < 2000
    assert train[5:9] == list(train)[5:9] and train[-1] == list(train)[-1]


def test_a_file_that_has_changed_is_read_again_even_with_its_old_size_and_time(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "one"}]))
    status = path.stat()
    assert read_prompts(str(path), "train") == [{"prompt": "one"}]
    path.write_text(lines([{"prompt": "two"}]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read_prompts(str(path), "train") == [{"prompt": "two"}]


def test_a_run_keeps_its_rows_when_the_file_changes_under_it(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": f"p{i}"} for i in range(100)]))
    found = read_prompts(str(path), "train")
    path.write_text("")
    assert found[99] == {"prompt": "p99"}


def test_a_file_with_a_mistake_is_refused_again_and_leaves_nothing(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "a"}, {"prompt": 5}]))
    for _ in range(2):
        with pytest.raises(ValueError, match="row 2 has prompt=5"):
            read_prompts(str(path), "train")
    assert [file.suffix for file in cache.iterdir()] == [".lock"]


def test_a_complete_cache_is_read_where_nothing_can_be_written(tmp_path, cache, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "a"}]))
    read_prompts(str(path), "train")
    for lock in list(cache.glob("*.lock")):
        lock.unlink()
        lock.mkdir()  # cannot be opened, by root neither
    assert read_prompts(str(path), "train") == [{"prompt": "a"}] and not caplog.text


def test_a_damaged_or_half_made_folder_of_the_cache_is_made_anew(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "a"}]))
    read_prompts(str(path), "train")
    (file,) = cache.glob("rows-*/rows.arrow")
    file.write_bytes(file.read_bytes()[:-50])
    (cache / f".{file.parent.name}-killed").mkdir()
    assert read_prompts(str(path), "train") == [{"prompt": "a"}] and not list(cache.glob(".*"))


@pytest.mark.parametrize("reason", ["a file is in the way", "no space"])
def test_without_a_cache_that_can_be_written_rows_are_in_main_memory(tmp_path, cache, monkeypatch, caplog, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "a"}]))
    if reason == "no space":
        cache.mkdir(parents=True)
        (cache / "full").symlink_to("/dev/full")
        real = pyarrow.OSFile
        monkeypatch.setattr(pyarrow, "OSFile", lambda name, mode: real(str(cache / "full"), mode))
    else:
        cache.parent.write_text("")
    assert read_prompts(str(path), "train") == read_prompts(str(path), "train") == [{"prompt": "a"}]
    assert caplog.text.count("cannot be written") == 1 and "HF_DATASETS_CACHE" in caplog.text
    assert reason != "no space" or not list(cache.glob("*rows-*/"))


# Values of mixed types


MIXED = [
    {
        "prompt": [{"role": "user", "content": "Hi", "tool_calls": [{"arguments": {"a": 1}}]}],
        "tests": [1, "s"],
        "meta": {"x": None},
    },
    {
        "prompt": [{"role": "user", "content": "Ho", "tool_calls": [{"arguments": {"b": "z"}}]}],
        "tests": [{"k": 1}],
        "meta": 5,
    },
    {"prompt": "Say hi", "tests": None, "meta": ["t"]},
]


@pytest.mark.parametrize("kind", ["saved", "parquet", "in place", "data set"])
@pytest.mark.parametrize("count", [2, 3])  # without the third, JSON is inside the messages only
def test_values_of_mixed_types_are_as_they_were_given(tmp_path, kind, count, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data_rows, "MIN_CACHED_BYTES", 0 if kind == "in place" else 10**9)
    data = datasets.Dataset.from_list(MIXED[:count], on_mixed_types="use_json")
    assert "Json" in str(data.features["prompt"])
    if kind == "saved":
        data.save_to_disk(tmp_path / "rows")
    else:
        data.to_parquet(tmp_path / "rows.parquet")
    path = tmp_path / ("rows" if kind == "saved" else "rows.parquet")
    found = rows_of_dataset(data) if kind == "data set" else read_prompts(str(path), "train")
    assert list(found) == data.to_list() == MIXED[:count] and found[1] == MIXED[1]
    assert pickle.loads(pickle.dumps(found)) == found


# Parquet files of a folder


def parquet_folder(folder: Path, tables: list[pyarrow.Table]) -> str:
    folder.mkdir()
    for number, table in enumerate(tables):
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet")
    return str(folder)


REQUIRED = pyarrow.schema([pyarrow.field("prompt", pyarrow.string(), nullable=False)])
UNLIKE = {
    "a column less": ({"prompt": ["a"], "x": [1]}, {"prompt": ["b"]}, [1, None]),
    "no value": ({"prompt": ["a"], "x": [None]}, {"prompt": ["b"], "x": ["s"]}, [None, "s"]),
    "order": ({"prompt": ["a"], "x": [1]}, {"x": [2], "prompt": ["b"]}, [1, 2]),
    "fractions": ({"prompt": ["a"], "x": [1]}, {"prompt": ["b"], "x": [2.5]}, [1.0, 2.5]),
    "long texts": ({"prompt": ["a"]}, {"prompt": pyarrow.array(["b"], pyarrow.large_string())}, None),
    "required": (pyarrow.table({"prompt": ["a"]}, schema=REQUIRED), {"prompt": ["b"]}, None),
}


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("case", UNLIKE)
def test_parquet_files_with_somewhat_different_columns_are_one_table(tmp_path, cache, case, is_large, monkeypatch):
    monkeypatch.setattr(data_rows, "MIN_CACHED_BYTES", 0 if is_large else 10**9)
    *tables, values = UNLIKE[case]
    tables = [pyarrow.table(table) if isinstance(table, dict) else table for table in tables]
    rows = read_prompts(parquet_folder(tmp_path / "rows", tables), "train")
    expected = [{"prompt": prompt} for prompt in "ab"]
    if values:
        expected = [row | {"x": value} for row, value in zip(expected, values, strict=True)]
    assert rows == expected and len(list(cache.glob("parquet-*/"))) == is_large


@pytest.mark.parametrize("is_large", [False, True])
def test_parquet_files_that_make_no_table_are_refused(tmp_path, cache, is_large, monkeypatch, caplog):
    monkeypatch.setattr(data_rows, "MIN_CACHED_BYTES", 0 if is_large else 10**9)
    unlike = [pyarrow.table({"prompt": ["a"], "x": [1]}), pyarrow.table({"prompt": ["b"], "x": ["s"]})]
    with pytest.raises(ValueError, match=r"types do not go together \(.*int64 vs string.*same type in all files"):
        read_prompts(parquet_folder(tmp_path / "types", unlike), "train")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array([1])], names=["prompt", "prompt"])
    with pytest.raises(ValueError, match=r"train-0\.parquet has more than one column of the name prompt"):
        read_prompts(parquet_folder(tmp_path / "names", [twice]), "train")
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"p{i}" for i in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[200:240] = b"\xff" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: unreadable parquet file \(Corrupt snappy.*fetch it again"):
        read_prompts(str(path), "train")
    assert "cannot be written" not in caplog.text


# What was damaged


@pytest.mark.parametrize("damage", ["zeros", "zeros at the end", "digests", "no folder"])
def test_a_cache_that_lost_its_content_is_made_anew(tmp_path, cache, damage):
    path, rows = tmp_path / "a.jsonl", [{"prompt": f"p{i}", "text": "x" * 1000} for i in range(1500)]
    path.write_text(lines(rows))
    assert read_prompts(str(path), "train") == rows
    (file,) = cache.glob("rows-*/rows.arrow")
    size = file.stat().st_size
    if damage.startswith("zeros"):
        kept = file.read_bytes()[: size // 2 * (damage != "zeros")]
        file.unlink()  # the rows that were read are still mapped
        file.write_bytes(kept + bytes(size - len(kept)))
    elif damage == "digests":
        (file.parent / "digests.json").write_bytes(b"\xff\xfe")
    else:
        shutil.rmtree(file.parent)
        file.parent.write_text("")
    assert read_prompts(str(path), "train") == rows and file.stat().st_size == size


def test_a_folder_of_the_cache_that_arrow_cannot_read_is_made_anew(cache):
    def make(folder: Path) -> None:
        made.append(folder)
        if len(made) == 1:
            (folder / "a.arrow").write_bytes(b"nothing")
            return
        table = pyarrow.table({"a": [1]})
        with pyarrow.OSFile(str(folder / "a.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)

    made: list[Path] = []
    table, files = kept_table("name", make)
    assert table["a"].to_pylist() == [1] and files == [cache / "name" / "a.arrow"] and len(made) == 2


# What spreadsheets write


@pytest.mark.parametrize(
    "content",
    [
        "\n\r\nprompt,answer\nHi,1\n",
        "sep=;\r\nprompt;answer\r\nHi;1\r\n",
        '"sep=\t"\nprompt\tanswer\nHi\t1\n',
    ],
)
def test_a_csv_file_may_begin_with_empty_lines_or_its_delimiter(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, newline="")
    assert read_rows(str(tmp_path / "a.csv"), "train", None) == [{"prompt": "Hi", "answer": "1"}]
    (tmp_path / "a.csv").write_text(content + "only one cell\n", newline="")
    line = content.count("\n") + 1
    with pytest.raises(ValueError, match=f"the row that ends in line {line} has 1 cells"):
        read_rows(str(tmp_path / "a.csv"), "train", None)


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("prompt;price,unit", ["prompt", "price,unit"]),
        ('"prompt";"a, b, c"', ["prompt", "a, b, c"]),
        ('"a;b",prompt', ["a;b", "prompt"]),
        ("prompt,a;b,c", ["prompt", "a;b", "c"]),
    ],
)
def test_the_sign_that_parts_most_names_is_the_delimiter(tmp_path, header, names):
    sign = ";" if names[0] == "prompt" and len(names) == 2 else ","
    (tmp_path / "a.csv").write_text(f"{header}\n{sign.join('x' * len(names))}\n")
    assert read_rows(str(tmp_path / "a.csv"), "train", None) == [dict.fromkeys(names, "x")]


def test_a_quote_that_is_not_closed_is_named_by_the_line_of_its_row(tmp_path):
    (tmp_path / "a.csv").write_text('a,b\n1,2\n\n3,"4\n' + "5,6\n" * 50)
    with pytest.raises(
        ValueError, match=r"row that begins in line 4 is not CSV \(a quote that is opened there is not"
    ):
        read_rows(str(tmp_path / "a.csv"), "train", None)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_told_from_latin_1(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes('{"a": "é"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=f"line 1 has zero bytes.*iconv -f {encoding.replace('16-', '16')} "):
        read_rows(str(tmp_path / "a.jsonl"), "train", None)


@pytest.mark.parametrize(
    ("value", "reason"), [("[" * 100_000 + "]" * 100_000, "nested too deeply"), ("1" * 5000, "more than 4300 digits")]
)
def test_what_python_cannot_hold_is_refused_by_line(tmp_path, value, reason):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ' + value + "}\n")
    (tmp_path / "a.json").write_text('[{"a": ' + value + "}]")
    (tmp_path / "a.csv").write_text('a\n"[{""role"": ""user"", ""content"": ' + value + '}]"\n')
    with pytest.raises(ValueError, match=f"line 2 is not JSON .*{reason}"):
        read_rows(str(tmp_path / "a.jsonl"), "train", None)
    with pytest.raises(ValueError, match=f"not JSON .*{reason}"):
        read_rows(str(tmp_path / "a.json"), "train", None)
    assert type(read_rows(str(tmp_path / "a.csv"), "train", None)[0]["a"]) is str


# What a folder or a file has beside


def data_in(folder: Path, **files: str) -> str:
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return str(folder)


def test_files_of_a_folder_that_are_left_out_are_named(tmp_path, caplog):
    row = lines([{"prompt": "a"}])
    assert len(read_prompts(data_in(tmp_path / "one", a_jsonl=row, b_jsonl=row, c_csv="prompt\nc\n"), "train")) == 2
    assert caplog.text.count("(.jsonl), not c.csv") == 1
    caplog.clear()
    data_in(tmp_path / "two", train_jsonl=row, test_jsonl=row, notes_txt="", a_py="")
    chosen = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n---\n"
    data_in(tmp_path / "three", a_jsonl=row, b_csv="prompt\nb\n", README_md=chosen)
    assert (
        len(read_prompts(str(tmp_path / "two"), "train")) == len(read_prompts(str(tmp_path / "three"), "train")) == 1
    )
    assert not [record for record in caplog.records if record.name == "nanorlhf"]


def test_a_folder_that_the_library_cannot_read_is_refused(tmp_path):
    row = lines([{"prompt": "a"}])
    with pytest.raises(ValueError, match=r"without data that can be read \(Dataset scripts are no longer"):
        read_prompts(data_in(tmp_path / "script", script_py="", train_jsonl=row), "train")
    with pytest.raises(ValueError, match=r"without data that can be read \(File is not a zip file"):
        read_prompts(data_in(tmp_path / "zip", a_zip="PK"), "train")
    card = "---\nconfigs:\n- config_name: main\n  data_files: main/*\n- config_name: soc\n  data_files: soc/*\n---\n"
    folder = data_in(tmp_path / "card", README_md=card, main__a_jsonl=row, soc__a_jsonl=row)
    with pytest.raises(ValueError, match=r"with the configurations main, soc\. Pass --dataset with the files of one"):
        read_prompts(folder, "train")
    assert read_prompts(f"{folder}/main", "train") == [{"prompt": "a"}]


def test_a_split_of_a_single_file_is_mentioned_once_unless_it_is_the_default(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(lines([{"prompt": "a"}]))
    for split in ("train", "nosuch", "nosuch"):
        assert read_prompts(str(tmp_path / "a.jsonl"), split) == [{"prompt": "a"}]
    assert caplog.text.count("dataset_split=nosuch: a single file has no splits, so all its rows are read") == 1
    assert "=train:" not in caplog.text
