"""The page of a run shows what the run's files hold, as text whatever it is, and needs nothing but itself."""

import json
import re
import shutil
import time
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from common.cli import run_script
from common.samples.command import main
from common.samples.page import MAX_TEXT, PAGE_PARTS, _hash, read_run, spread_evenly, write_page
from tests.toy import samples_of, toy_trainer

HOSTILE = [
    "</script><img src=x onerror=\"document.title='broken'\">",
    "<script>document.title='broken'</script>",
    "<!--<script>",
    "]]>&lt;b&gt;$title ${script}",
    "\u2028\u202e\x00\ud800 half a pair",
    "<svg/onload=\"document.title='broken'\">",
    "\x1b[31m\x1b]0;title\x07\x08\x7f\u009b a terminal's escapes",
]


class Outline(HTMLParser):
    """Tags, attributes and the text of each script of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.open = [], {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open = tag
        for name, value in attributes:
            self.attributes.setdefault(name, []).append(value)

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, data):
        if self.open in ("script", "style"):
            self.scripts.append(data)


def data_of(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])


def row(step=1, completion="1+2", split="eval", **values):
    return {
        "step": step,
        "split": split,
        "prompt": "1 2 make 3\n",
        "completion": completion,
        "score": 0.5,
        "parts": {"sum": 1.0, "digits": None},
        "length": 3,
        "truncated": False,
    } | values


def write_run(folder, rows, metrics=({"step": 1, "score": 0.5},), config="num_steps: 9\nsamples_every: 5\n"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run with three evaluations of three completions per held-out prompt."""
    folder = tmp_path_factory.mktemp("samples") / "run"
    toy_trainer(tiny_folder, folder, num_steps=2, eval_every=1, eval_num_samples=3, kl_coef=0.1).train()
    return folder


def test_every_evaluation_keeps_one_completion_of_the_same_prompts(finished):
    kept = [one for one in samples_of(finished) if one["split"] == "eval"]
    by_step = [[one["prompt"] for one in kept if one["step"] == step] for step in (0, 1, 2)]
    assert by_step[0] == by_step[1] == by_step[2]
    assert len(set(by_step[0])) == len(by_step[0]) == 4


def test_the_command_writes_the_page_into_the_runs_folder_and_says_where(finished, capsys):
    main([str(finished)])
    assert capsys.readouterr().out.strip() == str(finished / "samples.html")
    main([str(finished)])  # as the run goes on, the page is written anew


def test_the_page_holds_every_sample_metric_and_setting_of_a_real_run(finished):
    data = data_of(write_page([finished]))
    (run,) = data["runs"]
    shown = [one | {"prompt": data["prompts"][one["prompt"]]} for one in run["samples"]]
    assert shown == samples_of(finished)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert run["metrics"]["step"] == [0, 1, 2]
    assert run["metrics"]["eval/score"] == pytest.approx([line["eval/score"] for line in lines])
    assert run["metrics"]["kl"][0] is None  # nothing was trained on in the evaluation before training
    assert run["settings"]["num_generations"] == "4" and "torch" in run["versions"][0]
    assert run["name"] == "run" and run["facts"].endswith("step 2 of 2") and run["notes"] == []


def test_the_page_needs_no_other_file_and_allows_no_script_but_its_own(finished):
    page = write_page([finished]).read_text("utf-8")
    outline = Outline(page)
    assert not {"src", "action", "style", "onclick", "onload"} & set(outline.attributes)
    assert outline.attributes["href"] == ["#curves-section"]
    assert not {"link", "img", "iframe", "base", "object"} & set(outline.tags)
    style, _, script = outline.scripts
    (policy,) = [value for value in outline.attributes["content"] if "default-src" in value]
    assert policy == f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    parts = "".join(path.read_text() for path in PAGE_PARTS.iterdir())
    addresses = set(re.findall(r"\w+://[^\"\s]*", parts))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name in SVG, never fetched
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|@import|url\(", parts)


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_wrote_never_becomes_markup(text, tmp_path):
    plain = Outline(write_page([write_run(tmp_path / "plain", [row()])]).read_text("utf-8"))
    folder = write_run(
        tmp_path / "run",
        [row(completion=text, prompt=text, parts={text: 1.0})],
        metrics=[{"step": 1, f"reward/{text}": 1.0}],
        config=json.dumps({"task": text, "num_steps": 1}),
    )
    path = write_page([folder])
    assert Outline(path.read_text("utf-8")).tags == plain.tags
    data = data_of(path)
    expected = text.replace("\ud800", "\N{REPLACEMENT CHARACTER}")
    assert data["runs"][0]["samples"][0]["completion"] == data["prompts"][0] == expected
    assert data["runs"][0]["samples"][0]["parts"] == {text: 1.0}


def test_of_very_many_metrics_parts_and_lines_the_page_holds_some_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("common.samples.page.MAX_STEPS", 100)
    metrics = [{"step": step, **{f"m{n}": 1.0 for n in range(400)}, "n" * 10_000: 1.0} for step in range(1, 600)]
    samples = [row(parts={f"p{n}": 1.0 for n in range(100_000)})]
    began = time.process_time()
    (run,) = data_of(write_page([write_run(tmp_path / "run", samples, metrics)]))["runs"]
    assert time.process_time() - began < 10
    assert len(run["metrics"]) == 300 and len(run["samples"][0]["parts"]) == 50
    assert run["metrics"]["step"][0] == 1 and run["metrics"]["step"][-1] == 599 and len(run["metrics"]["step"]) < 102
    assert any("of 599 lines of metrics.jsonl" in note for note in run["notes"])
    assert any("first 300 of 402 metrics" in note for note in run["notes"])


@pytest.mark.parametrize(
    "values", [{"kl": 10**17}, {"kl": 1e308}, {"kl": 1e-320}, {"n" * 10_000: 1.0}, {"$\\frac$": 1}]
)
def test_names_and_numbers_that_no_run_writes_do_no_harm(values, tmp_path):
    write_page([write_run(tmp_path / "run", [row()], [{"step": 1} | values, {"step": 2**53} | values])])
    assert (tmp_path / "run" / "samples.html").stat().st_size < 200_000


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("common.samples.page.MAX_LINE", 1000)
    with pytest.raises(ValueError, match=r"samples\.jsonl: line 2 is not one JSON"):
        read_run(write_run(tmp_path / "run", [row(), row(completion="x" * 2000)]))


def test_a_folder_named_like_markup_makes_none(tmp_path):
    page = write_page([write_run(tmp_path / "<b>run & co", [row()])]).read_text("utf-8")
    assert "<b>" not in page and "<title>&lt;b&gt;run &amp; co</title>" in page


def test_a_very_long_completion_keeps_its_beginning_and_its_end(tmp_path):
    text = "begin" + "x" * 100_000 + "<answer>1</answer>"
    (shown,) = read_run(write_run(tmp_path, [row(completion=text)]))["samples"]
    assert shown["completion"].startswith("begin") and shown["completion"].endswith("<answer>1</answer>")
    assert f"{len(text) - MAX_TEXT} characters" in shown["completion"]
    assert len(shown["completion"]) < MAX_TEXT + 100


def test_of_a_long_run_whole_steps_are_left_out_evenly_and_the_page_says_so(tmp_path):
    rows = [row(step=step, split="train", prompt=f"{step}") for step in range(1, 1001) for _ in range(8)]
    rows += [row(step=step) for step in range(0, 1001, 50)]
    kept = spread_evenly(rows, share=0.1)
    assert 900 <= len(kept) <= 1000  # a tenth of MAX_ROWS
    steps = sorted({one["step"] for one in kept if one["split"] == "train"})
    assert steps[0] == 1 and steps[-1] == 1000
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1
    assert {one["step"] for one in kept if one["split"] == "eval"} >= {0, 1000}
    assert all(sum(one["step"] == step and one["split"] == "train" for one in kept) == 8 for step in steps)
    assert spread_evenly(rows) == rows
    assert f"of {len(rows)} completions" in read_run(write_run(tmp_path, rows), share=0.1)["notes"][0]


def test_several_runs_share_a_page_and_their_prompts(finished, tmp_path):
    other = write_run(tmp_path / "a" / "run", [row(prompt=samples_of(finished)[0]["prompt"])])
    path = write_page([finished, other], tmp_path / "new" / "both.html")
    data = data_of(path)
    assert [run["name"] for run in data["runs"]] == [str(finished), str(other)]  # both folders are called run
    assert data["runs"][0]["samples"][0]["prompt"] == data["runs"][1]["samples"][0]["prompt"]


def test_several_runs_share_the_room_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr("common.samples.page.MAX_ROWS", 100)
    runs = [write_run(tmp_path / name, [row(step=step) for step in range(100)]) for name in ("a", "b")]
    shown = [run["samples"] for run in data_of(write_page(runs, tmp_path / "both.html"))["runs"]]
    assert [len(samples) for samples in shown] == [50, 50]


def test_a_running_runs_unfinished_last_lines_are_left_out(tmp_path):
    folder = write_run(tmp_path, [row(), row(2)])
    for name in ("samples.jsonl", "metrics.jsonl"):
        with open(folder / name, "ab") as file:
            file.write('{"step": 3, "completion": "é'.encode()[:-1])
    assert [one["step"] for one in read_run(folder)["samples"]] == [1, 2]


def test_numbers_that_are_not_finite_and_columns_of_other_versions_do_no_harm(tmp_path):
    folder = write_run(
        tmp_path,
        [{"step": 1, "prompt": "p", "completion": "c", "score": float("nan")}],
        metrics=[{"step": 1, "score": float("inf"), "note": "text"}],
    )
    (folder / "config.yaml").unlink()
    (run,) = data_of(write_page([folder]))["runs"]
    assert run["metrics"]["score"] == [None] and run["samples"][0]["score"] is None
    assert run["samples"][0]["parts"] == {} and run["settings"] == {} and run["facts"] == "step 1"


@pytest.mark.parametrize(
    "values",
    [
        {"score": "high", "parts": {"sum": "1", "digits": [1]}, "length": {}},
        {"score": 10**400, "parts": [1, 2], "length": None},
        {"score": -1e308, "parts": "sum", "length": float("inf")},
        {"split": ["eval"], "truncated": "yes"},
        {"split": {"a": 1}, "parts": None},
    ],
)
def test_values_of_another_kind_than_a_run_writes_become_none(values, tmp_path):
    rows = [row(1), row(2) | values]
    (run,) = data_of(write_page([write_run(tmp_path, rows)]))["runs"]
    shown = run["samples"][1]
    assert {shown["score"], shown["length"], *shown["parts"].values()} <= {None, 0.5, 3, 1.0}
    assert shown["split"] in ("eval", None) and shown["completion"] == "1+2"


def test_settings_that_grow_when_they_are_read_are_shown_by_their_beginning(tmp_path):
    levels = [f"k{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    config = "\n".join(["k0: &a0 [x, x, x, x, x, x, x, x, x]", *levels, "num_steps: 9", f"long: {'y' * 100_000}"])
    settings = read_run(write_run(tmp_path, [row()], config=config))["settings"]
    assert len(settings["k9"]) < MAX_TEXT + 100 and settings["k0"] == str(["x"] * 9)
    assert settings["num_steps"] == "9" and len(settings["long"]) < MAX_TEXT + 100


def test_a_few_steps_of_very_many_rows_are_thinned_out(tmp_path):
    rows = [row(step, completion=f"{step} {number}") for step in (1, 2) for number in range(30_000)]
    kept = spread_evenly(rows)
    assert 5_000 < len(kept) <= 10_000 and {one["step"] for one in kept} == {1, 2}


@pytest.mark.parametrize(
    ("split", "config", "said"),
    [
        ("eval", "samples_every: 0", ["samples_every=0", "--samples_every 5"]),
        ("train", "eval_every: 0", ["no evaluation", "--eval_every 10"]),
    ],
)
def test_the_page_says_what_a_run_did_not_keep_and_how_to_keep_it(split, config, said, tmp_path):
    (note,) = read_run(write_run(tmp_path, [row(split=split)], config=config))["notes"]
    assert all(text in note for text in said)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), ["metrics.jsonl", "folder of a run", "Pass the folder"]),
        (lambda folder: (folder / "samples.jsonl").unlink(), ["samples.jsonl", "--samples_every"]),
        (lambda folder: shutil.rmtree(folder), ["metrics.jsonl"]),
        (lambda folder: (folder / "samples.jsonl").write_text('{"step": 1\n{}\n'), ["samples.jsonl: line 1 "]),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1}\n[1]\n\n'), ["metrics.jsonl: line 2 "]),
        (lambda folder: (folder / "samples.jsonl").write_bytes(b'"\xff"\n'), ["samples.jsonl: line 1 "]),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), ["config.yaml", "YAML mapping"]),
        (lambda folder: (folder / "config.yaml").write_bytes(b"a: \xff"), ["config.yaml", "YAML mapping"]),
        (lambda folder: (folder / "config.yaml").write_text("a: 2026-99-99"), ["config.yaml", "YAML mapping"]),
        (lambda folder: (folder / "config.yaml").write_text("[" * 9_000), ["config.yaml", "YAML mapping"]),
        (lambda folder: (folder / "samples.jsonl").write_text("[" * 200_000 + "\n"), ["samples.jsonl: line 1 "]),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": -1}\n'), ["metrics.jsonl: line 1 "]),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1' + "0" * 400 + "}\n"), ["line 1 "]),
        (
            lambda folder: (folder / "samples.html").write_text("mine"),
            ["samples.html", "overwrites nothing", "--output"],
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_and_nothing_is_written(prepare, said, tmp_path, capsys):
    folder = write_run(tmp_path / "run", [row()])
    prepare(folder)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit_status:
        run_script(lambda: main([str(folder)]))
    message = capsys.readouterr().err
    assert exit_status.value.code == 2 and message.startswith("error: ")
    assert all(text in message for text in said)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_the_page_of_several_runs_needs_a_place(tmp_path):
    folders = [write_run(tmp_path / name, [row()]) for name in "ab"]
    with pytest.raises(ValueError, match=r"2 runs without --output.*Pass --output FILE"):
        write_page(folders)


def test_the_page_is_part_of_an_installation():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["common"]
    installed = {path for pattern in patterns for path in (PAGE_PARTS.parents[1]).glob(pattern)}
    assert set(PAGE_PARTS.iterdir()) <= installed


@pytest.mark.parametrize("output", ["file/page.html", "page.html/"], ids=["below a file", "a folder"])
def test_a_page_that_cannot_be_written_is_said(output, tmp_path):
    folder = write_run(tmp_path / "run", [row()])
    (tmp_path / "file").write_text("")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ValueError, match=r"output=.*Pass --output with a"):
        write_page([folder], tmp_path / output)
