"""The page of a run shows what the run's files hold, as text whatever it is, and needs nothing but itself."""

import html
import json
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from common.cli import run_script
from common.samples.page import MAX_TEXT, PAGE_PARTS, _hash, main, read_run, spread_evenly, write_page
from tests.toy import samples_of, toy_trainer

HOSTILE = [
    "</script><img src=x onerror=\"document.title='broken'\">",
    "<script>document.title='broken'</script>",
    "<!--<script>",
    "]]>&lt;b&gt;$title ${script}",
    "\u2028\u202e\x00\ud800 half a pair",
    "<svg/onload=\"document.title='broken'\">",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


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
    assert outline.attributes["href"] == ["#completions"]
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


VERBS = """
const said = [], say = (value) => said.push(value), one = (query) => document.querySelector(query);
const all = (query) => [...document.querySelectorAll(query)], count = () => say(one("#count").value);
const set = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
  return new Promise((go) => setTimeout(go, 300));
};
const end = () => document.body.append(el("pre", { id: "said" }, JSON.stringify(said)));
"""


def in_browser(path, code, folder):
    """Let `code` act on the page as a reader does, and give back what it says with say(...)."""
    script = f"{VERBS} (async () => {{ {code} }})().catch((error) => say(error.stack)).finally(end);"
    page = path.read_text("utf-8").replace("script-src ", f"script-src '{_hash(script)}' ", 1)
    (folder / "acted.html").write_text(page.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=9000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", f"file://{folder}/acted.html"]
    dumped = subprocess.run(command, capture_output=True, timeout=120).stdout.decode()
    return json.loads(html.unescape(re.search(r'<pre id="said">(.*?)</pre>', dumped, re.S)[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser_hostile_text_stays_text(tmp_path):
    rows = [row(step, completion=text, prompt=text) for step in (0, 5) for text in HOSTILE]
    path = write_page([write_run(tmp_path / "run", rows, config="task: <img src=x>")])
    title, elements, texts = in_browser(
        path,
        "all('input[name=view]')[1].click(); await set('sort', 'step'); say(document.title);"
        "say(all('img, main script, svg[onload]').length);"
        "say(all('.card .text:not(.prompt)').map((text) => text.textContent));",
        tmp_path,
    )
    assert title == "run" and elements == 0
    assert texts == [one["completion"].replace("\ud800", "\ufffd") for one in rows]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_in_a_browser_the_completions_of_a_real_run_can_be_filtered_and_followed(finished, tmp_path):
    rows = samples_of(finished)
    first = next(one for one in rows if one["split"] == "eval")
    answers = in_browser(
        write_page([finished], tmp_path / "page.html"),
        """
        count(); say(all(".panel").length); say(all(".strip .card h4").map((step) => step.textContent));
        say(one(".strip .text").textContent); say(all(".matrix tbody button").length);
        await set("split", "train"); count(); await set("split", "");
        await set("part", "part:sum"); await set("condition", "less"); count(); await set("condition", "");
        await set("from", 2); count(); await set("from", "");
        await set("text", "4 4 MAKE"); count(); await set("text", "");
        all(".matrix tbody button")[4].click();
        say(document.activeElement.dataset.step); say(one(".prompt").textContent);
        one(".panel svg").dispatchEvent(new KeyboardEvent("keydown", { key: "Home", bubbles: true }));
        say(one(".readout").textContent);
        """,
        tmp_path,
    )
    total = len(rows)

    def count(wanted):
        return f"{sum(map(wanted, rows))} of {total} completions"

    score = json.loads((finished / "metrics.jsonl").read_text().splitlines()[1])["score"]
    assert answers[0] == f"{total} of {total} completions"
    assert answers[1] == 8  # score, accuracy, length, KL, entropy, parts, seconds, another
    assert answers[2] == ["step 0", "step 1", "step 2"]
    assert answers[3] == (first["completion"] or "(empty)")
    assert answers[4] == 4 * 3  # held-out prompts x evaluations
    assert answers[5] == count(lambda one: one["split"] == "train")
    assert answers[6] == count(lambda one: one["parts"]["sum"] < 1)
    assert answers[7] == count(lambda one: one["step"] >= 2)
    assert answers[8] == count(lambda one: one["prompt"].startswith("4 4 make"))
    assert answers[9] == "1" and answers[10] != first["prompt"]
    assert answers[11] == f"step 1{float(f'{score:.3g}'):g}"
