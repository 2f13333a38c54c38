"""The page of completions in a real browser: what a reader sees, clicks, sends to others and is spared."""

import json
import time

import pytest

from common.samples.page import make_page, read_run, write_page
from tests.browser import browser, needs_browser
from tests.test_samples import HOSTILE, row, write_run
from tests.test_samples import finished as finished  # a fixture
from tests.toy import samples_of

pytestmark = [pytest.mark.slow, needs_browser]

STEPS = range(0, 41, 4)
PROMPTS = [f"{number} {number} make {2 * number}" for number in range(8)]
STEP_TITLES = "[...document.querySelectorAll('.strip h4')].map((title) => title.textContent)"
CHOSEN = "document.querySelector('.chosen th').textContent"
SEEN = """(element) => { const box = element.getBoundingClientRect();
    return box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.top < innerHeight - 50; }"""


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(window):
    """The browser's page, in whose script nothing may go wrong."""
    window.errors.clear()
    window.resize(1280, 800)
    yield window
    assert window.errors == []


def score(step, prompt):
    """Prompt 5 gets better by most, prompt 2 gets worse by less, others go up and down and end where they began."""
    last = step == STEPS[-1]
    return {5: 0.1 + step / 50, 2: 0.6 - step / 100}.get(prompt, 0.3 if step == 0 or last else (step + prompt) % 9 / 9)


def held_out(steps=STEPS, score=score):
    text = "<think>\n" + "1*2=2 low\n" * 40 + "</think>\n<answer>(1*2)</answer>"
    return [
        row(step, completion=f"{text} {step}", prompt=PROMPTS[number], score=score(step, number), parts={"sum": 1.0})
        for step in steps
        for number in range(len(PROMPTS))
    ]


@pytest.fixture
def folder(tmp_path):
    training = [row(4, f"answer {number}", "train", prompt="9 make 9", score=number / 99) for number in range(100)]
    metrics = [{"step": step, "score": step / 40, "length": 40.0, "grad": 1.0, "time/step": 2.0} for step in range(41)]
    return write_run(tmp_path / "run", held_out() + training, metrics)


def write_live(folder, path, *, refresh=0.3):
    """The page as --watch writes it, with an impatient wait."""
    path.write_text(make_page([read_run(folder)], refresh=refresh), "utf-8")
    return path


# What is seen first


def test_it_begins_with_the_prompt_whose_score_changed_most_its_completions_side_by_side_on_the_first_screen(
    folder, page
):
    page.open(write_page([folder]))
    assert page("[innerWidth, innerHeight, scrollY]") == [1280, 800, 0]
    assert page(CHOSEN) == PROMPTS[5]
    assert page("document.querySelector('.prompt').textContent") == PROMPTS[5]
    assert page("document.querySelector('.strip .card .text').getBoundingClientRect().top") < 650
    seen = f"[...document.querySelectorAll('.strip .card')].filter({SEEN}).map((card) => Number(card.dataset.step))"
    assert page(seen)[0] == 0 and page(seen)[-2:] == [36, 40]
    assert page("document.querySelector('.chosen').closest('.scroll').getBoundingClientRect().top") > 0


def test_several_runs_begin_on_the_first_screen_too(folder, tmp_path, page):
    other = write_run(tmp_path / "other", held_out(score=lambda step, prompt: 0.9 if step and prompt == 7 else 0.0))
    page.open(write_page([folder, other], tmp_path / "both.html"))
    assert page("document.querySelector('.prompt').textContent") == PROMPTS[7]
    assert page("document.querySelector('.strip .card .text').getBoundingClientRect().top") < 750
    assert page("document.querySelectorAll('.strip').length") == 2


def test_a_prompt_that_gets_better_comes_before_one_that_gets_worse_by_as_much(tmp_path, page):
    rows = held_out(score=lambda step, prompt: {3: step / 40, 1: 1 - step / 40}.get(prompt, 0.5))
    page.open(write_page([write_run(tmp_path, rows)]))
    assert page(CHOSEN) == PROMPTS[3]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen_and_text_can_be_read(dark, folder, page):
    page.resize(360, 640, dark=dark)
    page.open(write_page([folder]))
    page("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    assert page("document.documentElement.scrollWidth") <= 360
    light = """(name) => { const [r, g, b] = getComputedStyle(document.body)[name].match(/\\d+/g)
        .map((part) => part / 255).map((part) => (part <= 0.04 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
    ink, surface = page(f"['color', 'backgroundColor'].map({light})")
    assert (max(ink, surface) + 0.05) / (min(ink, surface) + 0.05) > 7  # WCAG 2, AAA
    assert (ink > surface) == dark


# Filters


def test_the_completions_of_a_real_run_can_be_filtered_and_followed(finished, tmp_path, page):
    rows = samples_of(finished)
    first = [one for one in rows if one["split"] == "eval" and one["step"] == 0]

    def count(wanted):
        return f"{sum(map(wanted, rows))} of {len(rows)} completions"

    def is_counted(wanted):
        page.wait(f"document.getElementById('count').value === {json.dumps(count(wanted))}")

    page.open(write_page([finished], tmp_path / "page.html"))
    is_counted(lambda one: True)
    assert page("document.querySelectorAll('.panel').length") == 8
    assert page(STEP_TITLES) == ["step 0", "step 1", "step 2"]
    assert page("document.querySelectorAll('.matrix tbody button').length") == 4 * 3  # held-out prompts x evaluations
    page.choose("split", "train")
    is_counted(lambda one: one["split"] == "train")
    page.choose("split", "")
    page.choose("part", "part:sum")
    page.choose("condition", "less")
    is_counted(lambda one: one["parts"]["sum"] < 1)
    page.choose("condition", "")
    page.choose("from", "2")
    is_counted(lambda one: one["step"] >= 2)
    page.choose("from", "")
    page.choose("text", "4 4 MAKE")
    is_counted(lambda one: one["prompt"].startswith("4 4 make"))
    page.choose("text", "")
    is_counted(lambda one: True)
    page.click(".matrix tbody tr:nth-child(2) td:nth-of-type(2) button")
    assert page("document.activeElement.dataset.step") == "1"
    assert page("document.querySelector('.prompt').textContent") == first[1]["prompt"]
    shown = page("[...document.querySelectorAll('.strip .text')].map((text) => text.textContent)")
    assert shown == [one["completion"] or "(empty)" for one in rows if one["prompt"] == first[1]["prompt"]]
    page("document.querySelector('.panel svg').focus()")
    page.press("Home")
    score = json.loads((finished / "metrics.jsonl").read_text().splitlines()[1])["score"]
    assert page("document.querySelector('.readout').textContent") == f"step 1{float(f'{score:.3g}'):g}"


def test_a_view_is_in_the_address_and_opens_again_from_it(folder, page):
    path = write_page([folder])
    page.open(path)
    page.click("#filter-title")
    page.choose("split", "train")
    page.wait("location.hash === '#split=train'")
    page.choose("condition", "range")
    page.choose("low", "0.5")
    page.click("input[value=list]")
    page.choose("sort", "-score")
    page.wait("location.hash.includes('sort')")
    view = page("location.hash.slice(1)")
    assert set(view.split("&")) == {"split=train", "is=range", "min=0.5", "view=list", "sort=-score"}
    count, text = page(
        "[document.getElementById('count').value, document.querySelector('.card .text:not(.prompt)').textContent]"
    )
    assert count == "50 of 188 completions" and text == "answer 99"
    page.open(path, view)
    assert page("document.getElementById('count').value") == count
    assert page("document.querySelector('.card .text:not(.prompt)').textContent") == text
    assert page("document.getElementById('filter-box').open")  # what is in use is seen
    assert page("document.getElementById('filter-title').textContent") == "Filters (3 in use)"
    page.click("button[type=reset]")
    page.wait("location.hash === '' && document.getElementById('count').value === '188 of 188 completions'")


def test_a_prompt_and_a_step_are_in_the_address(folder, page):
    path = write_page([folder])
    page.open(path)
    page.click(".matrix tbody tr:nth-child(3) td:nth-of-type(4) button")
    view = page("location.hash.slice(1)")
    assert view.endswith("&step=12")
    page.open(path, view)
    assert page(CHOSEN) == PROMPTS[2]
    assert page("document.querySelector('.card.here').dataset.step") == "12"
    assert page(f"({SEEN})(document.querySelector('.card.here'))")


def test_the_back_button_returns_to_the_view_before(folder, page):
    page.open(write_page([folder]))
    page.click("#next")
    assert page(CHOSEN) == PROMPTS[6]
    page.choose("split", "eval")
    page.wait("location.hash.includes('split')")
    page.click("#filter-title")
    page("document.getElementById('text').focus()")
    for letter in "make":
        page.write(letter)
        time.sleep(0.2)
    page.wait("location.hash.includes('q=make')")
    page.back()  # what was typed goes at once
    assert page("document.getElementById('text').value") == ""
    page.back()
    assert page("document.getElementById('split').value") == "" and page(CHOSEN) == PROMPTS[6]
    page.back()
    assert page(CHOSEN) == PROMPTS[5] and page("location.hash") == ""


def test_an_address_can_be_edited_and_what_it_does_not_know_is_ignored(folder, page):
    page.open(write_page([folder]), "split=none&from=x&sort=;&view=1&prompt=1&step=-1&q=%F&part=part:other&min=")
    assert page("document.getElementById('text').value") == "%F"
    page.go("min=0.25&max=0.75&split=train")
    page.wait("document.getElementById('count').value === '50 of 188 completions'")
    page.go("<img src=x onerror=alert(1)>=1&q=<b>")
    page.wait("document.querySelector('#results .note')")
    page.go("q=")
    page.wait("document.querySelector('.strip')")


# A reader's place


def test_a_page_that_is_loaded_again_is_where_it_was(folder, page):
    page.open(write_page([folder]))
    page("document.getElementById('settings').open = true")
    page.click(".matrix tbody tr:nth-child(2) td:nth-of-type(6) button")
    page("document.querySelector('[data-step=\"20\"] .text').scrollTop = 70")
    page.choose("metric", "grad")
    page("document.getElementById('previous').focus(); scrollTo(0, 60)")
    place = """[scrollY, document.querySelector('[data-step="20"] .text').scrollTop,
        document.querySelector('.strip').scrollLeft, document.activeElement.id, location.hash,
        document.getElementById('settings').open, document.getElementById('metric').value]"""
    before = page(place)
    assert before[:2] == [60, 70] and before[2] > 100 and before[3] == "previous" and before[5:] == [True, "grad"]
    page.reload()
    assert page(place) == before


def test_what_was_shown_of_a_list_is_shown_again(folder, page):
    page.open(write_page([folder]), "view=list")
    page.click("#results > p button")
    page("document.querySelectorAll('.card')[90].scrollIntoView()")
    cards, top = page("[document.querySelectorAll('.card').length, scrollY]")
    assert cards == 120 and top > 1000
    page.reload()
    assert page("[document.querySelectorAll('.card').length, scrollY]") == [cards, top]


def add_step(folder, path, step=44, **live):
    """A further evaluation, in which another prompt changes by more than all before."""
    with open(folder / "samples.jsonl", "a") as file:
        for one in held_out([step], score=lambda step, prompt: 1.0 if prompt == 0 else 0.5):
            file.write(json.dumps(one) + "\n")
    return write_live(folder, path, **live)


def test_a_page_left_alone_loads_newer_completions_and_stays_at_its_prompt(folder, tmp_path, page):
    page.open(write_live(folder, tmp_path / "live.html"))
    assert "step 44" not in page(STEP_TITLES)
    add_step(folder, tmp_path / "live.html", refresh=30)
    page.wait(f"{STEP_TITLES}.includes('step 44')")
    assert page("document.querySelector('.prompt').textContent") == PROMPTS[5]
    assert page(f"({SEEN})([...document.querySelectorAll('.card')].at(-1))")  # the strip was at its end


def test_a_page_that_is_read_offers_newer_completions_and_waits(folder, tmp_path, page):
    page.open(write_live(folder, tmp_path / "live.html"))
    page.press("Tab")
    page("scrollTo(0, 50)")
    add_step(folder, tmp_path / "live.html", refresh=30)
    page.wait("document.getElementById('load')")
    assert "step 44" not in page(STEP_TITLES)
    assert page(f"({SEEN})(document.getElementById('load'))")
    assert page("document.getElementById('newer').getAttribute('role')") == "status"
    page.click("#load")
    page.wait(f"{STEP_TITLES}.includes('step 44')")
    assert page("scrollY") == 50


def test_a_page_with_selected_text_waits(folder, tmp_path, page):
    page.open(write_live(folder, tmp_path / "live.html"))
    page("getSelection().selectAllChildren(document.querySelector('.strip .text'))")
    page.wait("document.getElementById('load')")
    born = page("(getSelection().removeAllRanges(), performance.timeOrigin)")
    page.wait(f"performance.timeOrigin > {born}")


def test_the_page_of_a_run_that_has_written_nothing_for_long_is_loaded_more_rarely(folder, tmp_path, page):
    data = read_run(folder)
    path = tmp_path / "live.html"
    path.write_text(make_page([data | {"written": data["written"] - 3600}], refresh=0.3), "utf-8")
    page.open(path)
    born = page("performance.timeOrigin")
    time.sleep(1.5)
    assert page("performance.timeOrigin") == born


def test_the_page_of_a_finished_run_is_never_loaded_again(folder, page):
    page.open(write_page([folder]))
    born = page("performance.timeOrigin")
    time.sleep(1.5)
    assert page("performance.timeOrigin") == born
    assert page("document.getElementById('newer').textContent") == ""
    assert "newer" not in page("document.getElementById('header').textContent")


# By keyboard, and for those who do not see


def test_everything_can_be_done_with_the_keyboard(folder, page):
    page.open(write_page([folder]))
    reached = []
    for _ in range(30):
        page.press("Tab")
        where = page(
            "[document.activeElement.id || document.activeElement.tagName, document.activeElement.textContent]"
        )
        reached.append(where[0])
        if where[0] == "to-curves":
            break
    assert reached[-1] == "to-curves" and "SUMMARY" in reached
    page.press("Enter")
    assert page("[document.activeElement.id, location.hash]") == ["curves-section", ""]
    page.press("Tab")
    assert page("document.activeElement.tagName") == "svg"
    page("document.getElementById('filter-title').focus()")
    page.press("Tab")  # one stop for all scores, at the last of the prompt that is shown
    assert page("document.activeElement.getAttribute('aria-label')") == f"score 0.9 at step 40, {PROMPTS[5]}"
    page.press("Tab")
    assert page("document.activeElement.id") == "prompt"
    page("document.querySelector('.matrix [tabindex=\"0\"]').focus()")
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowRight"):
        page.press(key)
    page.press("Enter")
    assert page("document.activeElement.matches('.card.here[data-step=\"36\"]')")
    assert page(CHOSEN) == PROMPTS[4]
    page("document.getElementById('next').focus()")
    page.press("Enter")
    assert page(CHOSEN) == PROMPTS[5] and page("document.activeElement.id") == "next"


@pytest.mark.parametrize("view", ["", "view=list"])
def test_every_control_has_a_name_and_no_two_the_same_id(view, folder, tmp_path, page):
    page.open(write_live(folder, tmp_path / "live.html", refresh=60), view)
    controls = "[...document.querySelectorAll('input, select, button, a, summary, [tabindex=\"0\"]')]"
    is_named = "(one) => one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim()"
    assert page(f"{controls}.filter((one) => !({is_named})(one)).map((one) => one.outerHTML)") == []
    ids = page("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(set(ids)) == len(ids)
    names = page("[...document.querySelectorAll('[data-keep]')].map((element) => element.dataset.keep)")
    assert len(set(names)) == len(names)


# What a model, or somebody, wrote


def test_hostile_text_stays_text(tmp_path, page):
    rows = [row(step, completion=text, prompt=text, parts={text: 1.0}) for step in (0, 5) for text in HOSTILE]
    metrics = [{"step": step, f"reward/{HOSTILE[0]}": 1.0, HOSTILE[1]: 2.0} for step in (1, 2)]
    path = write_page([write_run(tmp_path / "run", rows, metrics, config="task: <img src=x>")])
    expected = [one["completion"].replace("\ud800", "\ufffd") for one in rows]
    page.open(path, "view=list")
    assert page("document.title") == "run"
    assert page("document.querySelectorAll('img, main script, svg[onload], b b').length") == 0
    texts = page("[...document.querySelectorAll('.card .text:not(.prompt)')].map((text) => text.textContent)")
    assert texts == expected
    for prompt in expected[: len(HOSTILE)]:
        page.open(path)
        page.choose("prompt", str(expected.index(prompt)))
        assert page("document.querySelector('.prompt').textContent") == prompt
        assert page("document.title") == "run"
        page.choose("text", prompt)
        page.wait(f"document.querySelector('mark')?.textContent === {json.dumps(prompt)}")
        page.reload()
        assert page("[document.title, document.getElementById('text').value]") == ["run", prompt.replace("\n", "")]


def opens_quickly(page, path, view=""):
    began = time.monotonic()
    page.open(path, view)
    assert (
        page("document.getElementById('count').value") and page("document.querySelector('#results .card')") is not None
    )
    return time.monotonic() - began


@pytest.mark.parametrize(
    "values",
    [
        [10**17, 10**17 + 16],
        [1e300, -1e300],
        [5e-324, 0.0],
        [float("nan"), float("inf")],
        [10**400, 1],
        [0.1 + 0.2, 0.3],
    ],
)
def test_any_numbers_can_be_drawn(values, tmp_path, page):
    metrics = [
        {"step": step, "kl": value, "time/step": value, "eval/accuracy": value, "eval/accuracy_ci95": value}
        for step, value in enumerate(values, start=1)
    ]
    rows = [row(step, score=value, length=value, parts={"a": value}) for step, value in enumerate(values, start=1)]
    path = write_page([write_run(tmp_path / "run", rows, metrics)])
    assert opens_quickly(page, path) < 20
    assert page("document.querySelectorAll('.panel text').length") < 200
    assert opens_quickly(page, path, "view=list&sort=-score") < 20


def large(kind):
    if kind == "evaluations":  # of 8 prompts, as long as a page holds
        return [row(step, completion="word " * 200, prompt=PROMPTS[step % 8]) for step in range(10_000)]
    if kind == "one step":
        return [row(1, completion=f"answer {number}", prompt="p") for number in range(40_000)]
    if kind == "prompts":
        return [row(number, prompt=f"{number} " + "word " * 300, split="train") for number in range(10_000)]
    if kind == "megabytes":
        return [row(step, completion="<think>\\boxed{" * 70_000, prompt="x" * 2**20) for step in range(10)]
    return [row(step, parts={f"part {number}": 1.0 for number in range(200)}) for step in range(200)]


@pytest.mark.parametrize("kind", ["evaluations", "one step", "prompts", "megabytes", "parts"])
def test_a_page_of_very_many_or_very_long_completions_opens_and_answers(kind, tmp_path, page):
    path = write_page([write_run(tmp_path / "run", large(kind))])
    assert path.stat().st_size < 40e6
    assert opens_quickly(page, path) < 20
    assert page("document.querySelectorAll('*').length") < 60_000
    began = time.monotonic()
    page.choose("text", "e")
    page.wait("location.hash === '#q=e'")
    page.click("input[value=list]")
    page.wait("location.hash.includes('list')")
    assert page("document.querySelectorAll('*').length") < 100_000
    assert time.monotonic() - began < 20
