"""GSM8K: numbers are read from the answer tags alone, each rule judges what it says, real answers score full marks."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import pytest

from common.config import RLConfig
from common.embedded.policy import build_tokenizer
from common.tasks import load_task
from common.tasks.gsm8k import (
    SYSTEM_TEXT,
    correct_reward,
    gold_number,
    length_reward,
    lenient_accuracy,
    read_problems,
    soft_format_reward,
    strict_format_reward,
    tags_reward,
)

RECORDS = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"


def layout(answer, reasoning="So it is."):
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"


def correct(completion, gold):
    return correct_reward(["p"], [completion], answer=[gold])[0]


# The number


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[(text, "42") for text in ("42", " 42 ", "42.", "42.0", "42.00", "042", "$42", "$42.00", "\\$42", "42$")],
        *[(text, "42") for text in ("42%", "42 apples", "It is 42", "= 42", "x = 42.", "\\boxed{42}", "**42**")],
        *[(text, "42") for text in ("42\n", "\n\n42", "84/2", "\\frac{84}{2}", "6 * 7 = 42", "(42)", "42,", "US$42")],
        *[(text, "-5") for text in ("-5", "-$5", "$-5", "-5.0", "\N{MINUS SIGN}5", "-10/2", "-\\frac{10}{2}", "x=-5")],
        *[(text, "1234567") for text in ("1234567", "1,234,567", "$1,234,567.00", "1,234,567 dollars", "1234567.")],
        *[
            (text, "0.5")
            for text in ("0.5", ".5", "1/2", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac{1}{2}", "0.5000001")
        ],
        *[(text, "2.5") for text in ("2.5", "2 1/2", "5/2", "2 \\frac{1}{2}", "$2.50")],
        *[(text, "0") for text in ("0", "0.0", "-0", "0/7", "$0")],
    ],
)
def test_a_right_number_counts_in_any_spelling(answer, gold):
    assert correct(layout(answer), gold) == 1.0


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[
            (text, "42")
            for text in (
                "42 or 43",
                "",
                "forty-two",
                "43",
                "4",
                "420",
                "-42",
                "4.2",
                "42.1",
                "41.99",
                "42/2",
                "42 1/2",
            )
        ],
        *[(text, "42") for text in ("1/0", "0/0", "\\frac{42}{0}", "41 or 42", "42" * 300, "9" * 400)],
        *[(text, "42") for text in ("\u0664\u0662", "\uff14\uff12", "__import__('os')", "0x2a", "nan", "inf")],
        *[(text, "1") for text in ("1/2", "2 1/2", "\\frac{1}{2}", "1.5", "-1")],
        *[(text, "387420489") for text in ("9**9", "9^9", "9**9**9")],
    ],
)
def test_a_wrong_number_and_what_is_none_score_nothing(answer, gold):
    assert correct(layout(answer), gold) == 0.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        *[(text, 1.0) for text in ("<<16-7-4=5>>5", "'5'", "*5*", "5m\u00b2", "=> 5", "\\sqrt{25}", "5 p.m.")],
        *[(text, 0.0) for text in ("5\u03c0", "$5 bn", "5 tenths", "5 is wrong", "can't be 5", "5 per 2 days", "5=")],
    ],
)
def test_what_stands_around_a_number_may_change_it(answer, right):
    assert correct(layout(answer), "5") == lenient_accuracy(["p"], [layout(answer)], answer=["5"])[0] == right


def test_an_answer_is_compared_with_a_fraction():
    assert [correct(layout(text), gold_number("#### 1/3")) for text in ("1/3", "2/6", "0.3333333", "0.33")] == [
        1,
        1,
        1,
        0,
    ]


def test_only_the_last_answer_tags_count_and_there_is_no_fall_back_to_the_text():
    assert correct(layout("41") + "Wait, " + layout("42"), "42") == 1.0
    assert correct(layout("42") + "Wait, " + layout("41"), "42") == 0.0
    for text in (
        "42",
        "The answer is 42.",
        "<answer>42",
        "42</answer>",
        "</answer>42<answer>",
        layout("42") + "<answer>",
    ):
        assert correct(text, "42") == 0.0


def test_an_answer_inside_the_thoughts_does_not_count():
    inside = "<answer>\n42\n</answer>"
    assert correct(layout("41", reasoning=inside), "42") == 0.0
    assert correct(layout("42", reasoning="<answer>\n41\n</answer>"), "42") == 1.0
    assert correct(f"<reasoning>\n{inside}", "42") == correct(f"<think>{inside}</think>", "42") == 0.0
    assert correct(f"<think>a</think>{inside}", "42") == correct(inside, "42") == 1.0


@pytest.mark.parametrize(
    ("completion", "lenient"),
    [
        (layout("42"), 1.0),
        (layout("41") + " or 42", 0.0),
        ("She sold 40 + 2 = 42 clips.", 1.0),
        ("The answer is **$42.00**.", 1.0),
        ("It is \\boxed{42}. That took 3 days.", 1.0),
        ("It is \\boxed{41}, not 42", 0.0),
        ("#### 42", 1.0),
        ("<think>42</think> 41", 0.0),
        ("42 of 43", 0.0),
        ("-42", 0.0),
        ("41-42", 1.0),
        ("x42", 0.0),
        ("no number", 0.0),
        ("So it is = 42!", 0.0),
    ],
)
def test_the_lenient_accuracy_takes_the_last_box_or_number(completion, lenient):
    assert lenient_accuracy(["p"], [completion], answer=["42"]) == [lenient]


def test_the_lenient_accuracy_is_no_reward(tmp_path):
    task = load_task(config(dataset=write(tmp_path / "rows.jsonl", ROWS)), build_tokenizer())
    assert task.lenient_accuracy is lenient_accuracy and lenient_accuracy not in task.rewards.values()


# Shape and length


@pytest.mark.parametrize(
    ("completion", "strict", "soft"),
    [
        (layout("42"), 1.0, 1.0),
        (layout("42").removesuffix("\n"), 1.0, 1.0),
        (layout("4\n2", reasoning="one\n\ntwo"), 1.0, 1.0),
        ("<reasoning>a</reasoning><answer>b</answer>", 0.0, 1.0),
        ("<reasoning>a\nb</reasoning> \n\n <answer>\nc</answer> bye", 0.0, 1.0),
        (layout("42") + "\n", 0.0, 1.0),
        (layout("42") + "bye", 0.0, 1.0),
        (layout("42", reasoning="<answer>\n1\n</answer>"), 0.0, 1.0),
        ("Well. " + layout("42"), 0.0, 0.0),
        ("<answer>\n42\n</answer>\n<reasoning>\na\n</reasoning>\n", 0.0, 0.0),
        ("<reasoning>\na\n</reasoning>\nthen\n<answer>\n42\n</answer>\n", 0.0, 0.0),
        ("<reasoning>\na\n<answer>\n42\n</answer>\n", 0.0, 0.0),
        ("<reasoning>\na\n</reasoning>\n<answer>\n42\n", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_two_shapes(completion, strict, soft):
    assert strict_format_reward(["p"], [completion]) == [strict]
    assert soft_format_reward(["p"], [completion]) == [soft]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (layout("42"), 1.0),
        (layout("42") + "\nbye", 1.0 - 0.002 * 5),
        (layout("42") + "x" * 1000, 1.0 - 0.002 * 1001),
        ("<reasoning>\na\n</reasoning>\n", 0.5),
        ("<reasoning>\n<reasoning>\na\n</reasoning>\n<answer>\n42\n</answer>", 0.75),
        ("<reasoning>a</reasoning><answer>42</answer>", 0.0),
        ("42", 0.0),
    ],
)
def test_each_tag_with_its_line_breaks_earns_a_quarter_and_text_after_the_answer_costs(completion, reward):
    assert tags_reward(["p"], [completion]) == pytest.approx([reward])


def test_the_length_is_that_of_the_reasoning_in_tokens():
    tokenizer = build_tokenizer()

    def length(completion):
        return length_reward(["p"], [completion], tokenizer=tokenizer, full_length=100)[0]

    for thought in ("a", "hello there", "<think>" * 10):  # <think> is one token of seven characters
        num_tokens = len(tokenizer(thought)["input_ids"])
        assert length(f"<reasoning>{thought}</reasoning><answer>{'x' * 90}</answer>") == num_tokens / 100
    assert length(f"<reasoning>{'x' * 1000}</reasoning>") == 1.0
    assert length("x" * 90) == length("<reasoning>" + "x" * 90) == length("x" * 90 + "</reasoning>") == 0.0


def test_hostile_completions_are_judged_at_once():
    pieces = ("1", "-", "1,", "1 ", "<answer>", "</answer>", "<answer>1", "<reasoning>\n", "(", "\\frac{1", "\u0663")
    hostile = [layout(piece * (100_000 // len(piece))) for piece in pieces]
    hostile += [piece * (100_000 // len(piece)) for piece in pieces]
    start = time.perf_counter()
    for reward in (correct_reward, strict_format_reward, soft_format_reward, tags_reward):
        assert len(reward(["p"] * len(hostile), hostile, answer=["7"] * len(hostile))) == len(hostile)
    assert correct_reward(["p"] * len(hostile), hostile, answer=["7"] * len(hostile)) == [0.0] * len(hostile)
    assert time.perf_counter() - start < 5


# Data


def config(**changes):
    return replace(RLConfig(task="gsm8k", model="tiny", num_eval_prompts=2), **changes)


ROWS = [{"question": f"{i} + 1000?", "answer": f"It is <<{i}+1000>>.\n#### 1,{i:03}", "note": 0} for i in range(9)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_local_file_is_split_by_a_seed_of_its_own(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    task, other = (load_task(config(dataset=path, seed=seed), build_tokenizer()) for seed in (1, 2))
    assert (len(task.train), len(task.eval)) == (7, 2)
    assert sorted(row["answer"] for row in task.train + task.eval) == [f"100{i}" for i in range(9)]
    assert task.train == other.train and task.eval == other.eval
    assert task.rewards.keys() == task.reward_weights.keys()
    assert task.accuracy == "correct"


def test_of_the_hub_set_the_first_test_problems_are_held_out(monkeypatch):
    splits = {"train": ROWS[:6], "test": ROWS[6:]}
    asked = []

    def load_dataset(*names, split):
        asked.append((":".join(names), split))
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(config(), build_tokenizer())
    assert asked == [("openai/gsm8k:main", "train"), ("openai/gsm8k:main", "test")]
    assert [row["answer"] for row in task.train] == [f"100{i}" for i in range(6)]
    assert [row["answer"] for row in task.eval] == ["1006", "1007"]
    with pytest.raises(ValueError, match="num_eval_prompts=4: the split for evaluation has 3 rows"):
        load_task(config(num_eval_prompts=4), build_tokenizer())


def test_prompts_ask_for_the_layout_that_scores(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    tokenizer = build_tokenizer()
    plain = load_task(config(dataset=path), tokenizer).train[0]["prompt"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    system, user = load_task(config(dataset=path), tokenizer).train[0]["prompt"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert system["content"] in plain and user["content"] in plain
    example = SYSTEM_TEXT[SYSTEM_TEXT.index("<reasoning>") :]
    assert strict_format_reward(["p"], [example]) == soft_format_reward(["p"], [example]) == [1.0]
    assert tags_reward(["p"], [example]) == [1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a"}, "row 2 holds question; the task needs the columns question, answer"),
        ({"question": "a", "answer": "no number"}, "row 2 has question='a' and answer='no number'"),
        ({"question": "a", "answer": "#### x"}, "row 2 has"),
        ({"question": "a", "answer": "#### 5 million"}, "row 2 has"),
        ({"question": None, "answer": "#### 1"}, "row 2 has question=None"),
        ({"question": " ", "answer": "#### 1"}, "row 2 has question=' '"),
        *[({"question": "a", "answer": answer}, "row 2 has") for answer in (None, True, [1], {"value": 1}, "", "nan")],
        *[({"question": "a", "answer": answer}, "row 2 has") for answer in (float("nan"), "#### ", "#### 5 or 6")],
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_number(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=message):
        load_task(config(dataset=path), build_tokenizer())


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        *(("a #### 1,234", "1234"), ("#### $5.50", "5.50"), ("#### - 5", "-5"), ("#### \N{MINUS SIGN}5", "-5")),
        *((42, "42"), (42.0, "42"), (2.5, "2.5"), ("#### 9 500", "9500"), ("#### 18.", "18"), ("007", "7")),
        *(("#### 50%", "50"), ("#### 5 apples", "5"), ("#### 1/2", "1/2"), ("#### 2 1/2", "5/2"), (0.1, "0.1")),
    ],
)
def test_the_gold_number_is_read_as_people_write_it(answer, number):
    assert gold_number(answer) == number


@pytest.mark.skipif(not RECORDS.is_file(), reason="the GSM8K records are not here")
def test_all_gold_answers_score_full_marks_and_those_of_other_problems_none():
    answers = [row["answer"] for row in read_problems(str(RECORDS), "train", str)]
    assert len(answers) == 1319
    completions = [layout(answer) for answer in answers]
    for reward in (correct_reward, strict_format_reward, soft_format_reward, tags_reward):
        assert reward(completions, completions, answer=answers) == [1.0] * 1319
    pairs = [(a, b) for a, b in pairwise(answers) if float(a) != float(b)][:500]
    gold, wrong = (list(column) for column in zip(*pairs, strict=True))
    assert correct_reward(gold, [layout(answer) for answer in wrong], answer=gold) == [0.0] * 500
