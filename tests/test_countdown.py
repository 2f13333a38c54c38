"""Countdown: the arithmetic is safe and exact, the rewards judge what they say, held-out problems stay held out."""

import json
import re
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import RLConfig
from common.data.rows import split_held_out
from common.embedded.policy import build_tokenizer
from common.tasks import load_task
from common.tasks._arithmetic import evaluate, plain_expression
from common.tasks.countdown import (
    compact_prompt,
    equation_reward,
    format_reward,
    may_be_reached,
    problem_key,
    problems,
    read_problems,
    tries,
)


def formats(completion, prompt="3 5 6 make 48\n", **options):
    return format_reward([prompt], [completion], **options)[0]


def solves(answer, nums=(3, 5, 6), target=48):
    return equation_reward(
        ["p"], [f"<think>a</think>\n<answer>{answer}</answer>"], nums=[list(nums)], target=[target]
    )[0]


# Arithmetic


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("10-4-3", 3),
        ("48/4/2", 6),
        ("1/3*3", 1),
        ("1/3", Fraction(1, 3)),
        (" 2 *\t( 3+4 )\n", 14),
        ("-(2+3)", -5),
        ("3--5", 8),
        ("2.5*4", 10),
        ("0.1+0.2", Fraction(3, 10)),
        ("+3-+2", 1),
        ("6(3+5)", 48),
        ("(3+5)6", 48),
        ("(1+2)(3)-1", 8),
        ("2(3)/2", 3),
    ],
)
def test_expressions_have_their_exact_value(expression, value):
    assert evaluate(expression).value == value


def test_numbers_are_listed_as_they_stand_in_the_expression():
    assert evaluate("(8-3)*2.5+8").numbers == [8, 3, Fraction(5, 2), 8]


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "2*", "+", "(1+2", "1+2)", "()", "2 3", "6/2(3)", "2**3", "1//2", "1/(3-3)"),
        *("1..2", ".5", "1.", "1,5", "1e3", "0x10", "1_0", "a", "__import__('os')", "3+\u0665", "\u00b2", "3\u2003+5"),
        *("1" * 16, "(" * 21 + "1" + ")" * 21, "1+" * 100 + "1"),
    ],
)
def test_what_is_no_bounded_expression_is_refused(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


@pytest.mark.parametrize(
    "written",
    [
        *("(3+5)\N{MULTIPLICATION SIGN}6", "(3+5)\\times 6", "(3 + 5) \N{MIDDLE DOT} 6", "(3+5)\\cdot6", "(3+5) x 6"),
        *(
            "[3+5]*6",
            "{3+5}*6",
            "\\left(3+5\\right)*6",
            "(3+5)*\u00a06",
            "(3+5)*6\u200b",
            "(3\u202f+ 5)*6",
            "(+3+5)*6",
        ),
        *("`(3+5)*6`", "$(3+5)*6$", "$$(3+5)*6$$", "\\((3+5)*6\\)", "\\[ (3+5)*6 \\]", "**(3+5)*6**", "(3+5)*6."),
        *("\n(3+5)*6\n", "(3+5)\r\n*6", "\t(3+5)*6 ", "6(5\N{MINUS SIGN}-3)", "\\frac{(3+5)*6}{1}"),
    ],
)
def test_an_expression_counts_in_any_usual_writing(written):
    assert evaluate(plain_expression(written)).value == 48


@pytest.mark.parametrize(
    "written",
    [
        *("(3+5]*6", "[3+5)*6", "{3+5]*6", "\\left[3+5\\right)*6", "4\\frac{8}{2}", "4 \\frac82", "3..*6"),
        *("\\frac{4\\frac{8}{2}}{1}", "\\frac823", "3. 5"),
        *("(3+5)*6 = 48", "x=(3+5)*6", "\\boxed{(3+5)*6}", "(3+5)*6, 48", "(3+5)*6;", "(3+5)*6 # done", "(3+5)*6!"),
        *(
            "(3+5)**6",
            "(3+5)*6//1",
            "(3+5)*6%49",
            "(3+5)*6<b>",
            "(\uff13+5)*6",
            "int('48')",
            "(3+5)^6",
            "\\sqrt{9}*16",
        ),
    ],
)
def test_what_is_more_than_an_expression_is_none(written):
    with pytest.raises(ValueError):
        evaluate(plain_expression(written))


expressions = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})")
        | inner.map(lambda part: f"-{part}")
    ),
    max_leaves=8,
)


@given(expressions)
def test_evaluation_agrees_with_python(expression):
    fractions = re.sub(r"([0-9]+)", r"Fraction(\1)", expression)
    try:
        expected = eval(fractions, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ValueError):
            evaluate(expression)
    else:
        assert evaluate(expression).value == expected


@given(st.text(alphabet="0123456789+-*/(). \t\n\u0663e", max_size=300))
@settings(max_examples=500)
def test_any_text_gives_a_value_or_a_value_error(text):
    try:
        evaluate(text)
    except ValueError as error:
        assert str(error)


# Rewards


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>3+5=8\n8*6=48</think>\n<answer>(3+5)*6</answer>", 1.0),
        ("<think></think>\n<answer> 3.5 / 2\n</answer>", 1.0),
        ("<think></think>\n<answer>(3.+5)*6</answer>", 1.0),
        ("<think></think>\n<answer>(3+5]*6</answer>", 0.5),
        ("<think></think>\n<answer>1..2</answer>", 0.5),
        ("<think></think>\n<answer>\n[3\u00a0+ 5] \\times 6\n</answer>", 1.0),
        ("<think>a < b</think>\n<answer>(3+5)*6 = 48</answer>", 0.5),
        ("<think>a</think>\n<answer>forty-eight</answer>", 0.5),
        ("<think>a</think>\n<answer>\u0663</answer>", 0.5),
        ("<think>a</think>\n<answer></answer>", 0.5),
        ("<think>a</think><answer>1</answer>", 0.0),
        ("<think>a</think>\n\n<answer>1</answer>", 0.0),
        ("<think>a</think> \n<answer>1</answer>", 0.0),
        ("<think>a</think>\n<answer>1</answer> ", 0.0),
        ("<think>a</think>\n<answer>1</answer>\n", 0.0),
        (" <think>a</think>\n<answer>1</answer>", 0.0),
        ("<think>a<think>b</think>\n<answer>1</answer>", 0.0),
        ("<think>a</think>b</think>\n<answer>1</answer>", 0.0),
        ("<think>a</think>\n<answer>1</answer><answer>2</answer>", 0.0),
        ("<think>a</think>\n<answer>1<answer>2</answer>", 0.0),
        ("<think>a</think>\n<answer>1", 0.0),
        ("<answer>1</answer>", 0.0),
        ("<think></answer>", 0.0),
        ("a</think>\n<answer>1</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward_wants_one_think_block_a_line_break_and_one_answer_block(completion, reward):
    assert formats(completion) == reward


def test_a_think_tag_opened_by_the_prompt_counts_as_part_of_the_completion():
    completion = "a</think>\n<answer>1</answer>"
    assert formats(completion, prompt="Let me see.\n<think>") == 1.0
    assert formats(completion, prompt="Let me see.\n<think>\n") == 1.0
    assert formats("<think>" + completion, prompt="Let me see.\n<think>") == 0.0


def test_after_an_empty_think_block_of_the_prompt_the_answer_block_is_enough():
    prompt = "Go.\n<think>\n\n</think>\n\n"
    assert formats("<answer>1</answer>", prompt=prompt) == 1.0
    assert formats("<answer>one</answer>", prompt=prompt) == 0.5
    assert formats("<think>a</think>\n<answer>1</answer>", prompt=prompt) == 1.0
    for completion in ("a <answer>1</answer>", "<answer>1</answer><answer>2</answer>", "<answer>1</answer> so"):
        assert formats(completion, prompt=prompt) == 0.0
    assert formats("<answer>1</answer>", prompt="<think>a</think>") == 0.0


def test_an_end_token_at_the_end_changes_no_format_reward():
    completion = "<think>a</think>\n<answer>1</answer>"
    assert formats(completion + "<eos>", eos_token="<eos>") == 1.0
    assert formats(completion, eos_token="<eos>") == 1.0
    assert formats(completion + "<eos>") == 0.0


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("(3+5)*6", 1.0),
        (" 6 * (5 + 3) ", 1.0),
        ("6*(5+3", 0.0),
        ("6*8", 0.0),
        ("48", 0.0),
        ("(3+5)*6*1", 0.0),
        ("(3+5)*6+3-3", 0.0),
        ("3+5*6", 0.0),
        ("(3+5)*6=48", 0.0),
        ("3**5*6", 0.0),
        ("", 0.0),
    ],
)
def test_equation_reward_wants_each_number_once_and_the_target(answer, reward):
    assert solves(answer) == reward


@pytest.mark.parametrize(
    "answer",
    [
        *("(3.+5)*6", "[3+5]*6", "6\u2022(3+5)", "(3+5)\u27156", "(3+5)\u2a2f6", "\\cfrac{3+5}{1/6}"),
        *("\\frac{3+5}{\\frac{1}{6}}", "\\frac{3+5}{\\frac16}", "(3+5)\\frac{6}{1}"),
    ],
)
def test_equation_reward_reads_what_is_written_in_other_signs(answer):
    assert solves(answer, nums=(3, 5, 6) if "1" not in answer else (1, 3, 5, 6)) == 1.0


def test_a_number_given_twice_must_be_used_twice():
    assert solves("8*8+3", nums=(3, 8, 8), target=67) == 1.0
    assert solves("8+3", nums=(3, 8, 8), target=11) == 0.0


def test_fractions_on_the_way_are_exact_and_near_misses_fail():
    assert solves("8/(3-8/3)", nums=(3, 3, 8, 8), target=24) == 1.0
    assert solves("1/3", nums=(1, 3), target=0) == 0.0
    assert solves("1/99999", nums=(1, 99_999), target=0) == 0.0
    assert solves("1/100001", nums=(1, 100_001), target=0) == 1.0


def test_digits_of_a_decimal_are_not_two_numbers():
    assert solves("2.5*4", nums=(2, 4, 5), target=10) == 0.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("no tags at all <answer>1+2</answer> and more", 1.0),
        ("<answer>2-1</answer><answer>1+2</answer>", 0.0),
        ("<answer>1+2</answer><answer>1+2</answer>", 1.0),
        ("1+2", 0.0),
        ("<think>maybe <answer>1+2</answer></think>\n<answer>1</answer>", 0.0),
        ("<think>maybe <answer>1</answer></think>\n<answer>1+2</answer>", 1.0),
        ("<think>maybe <answer>1+2</answer>", 0.0),
        ("<think>a</think>\n<answer>1</answer>\n<answer>1+2</answer>", 0.0),
        ("<think>a</think>\n<answer>1</answer></think><answer>1+2</answer>", 0.0),
        ("<think>I write <answer> tags</think>\n<answer>1+2</answer>", 1.0),
        ("I write <answer> tags: <answer>1+2</answer>", 1.0),
        ("<think>a</think> <answer>1+2</answer>", 1.0),
        ("<think>a</think>\r\n\r\n<answer>\r\n1 +\n2\r\n</answer>", 1.0),
        ("<think>\n\n</think>\n\n<think>a</think>\n<answer>1+2</answer>", 1.0),
        ("<think>a</think>\n<answer>1+2", 0.0),
        ("<answer>1+<think>a</think>2</answer>", 0.0),
        ("a <answer>2-1</answer></think><answer>1+2</answer>", 1.0),
        ("<ANSWER>1+2</ANSWER>", 0.0),
    ],
)
def test_equation_reward_reads_the_first_answer_after_the_thoughts_whatever_the_format(completion, reward):
    assert equation_reward(["p"], [completion], nums=[[1, 2]], target=[3]) == [reward]


def test_thoughts_that_the_prompt_began_are_thoughts():
    def judge(completion):
        return equation_reward(["Let me see.\n<think>\n"], [completion], nums=[[1, 2]], target=[3])

    assert judge("maybe <answer>1+2</answer></think><answer>1</answer>") == [0.0]
    assert judge("maybe</think><answer>1+2</answer>") == [1.0]
    assert judge("<answer>1+2</answer>") == [0.0]


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>" * 12_500,
        "<think>" * 14_000,
        "<think>" + "<" * 100_000,
        "<answer>" + "(" * 100_000 + "</answer>",
        "<answer>" + "9" * 100_000 + "</answer>",
        "<answer>" + "-" * 190 + "1</answer>",
        "<answer>9**9**9**9</answer>",
        "<answer>" + "*".join(["999999999999999"] * 12) + "</answer>",
        "<think>" + "</think>\n<answer>" * 6_000 + "</answer>",
        "<answer>\n" * 11_000 + "</answer>",
        "<think>a</think>\n<answer>" + "1+" * 50_000 + "</answer>",
        "\x00\ud800\u0663\u00b2\u2028" * 20_000,
    ],
)
def test_hostile_completions_are_judged_at_once(completion):
    start = time.perf_counter()
    rewards = [formats(completion), *equation_reward(["p"], [completion], nums=[[1, 2]], target=[3])]
    assert time.perf_counter() - start < 5  # milliseconds; what backtracks or computes 9**9**9**9 takes for ever
    assert all(reward in (0.0, 0.5, 1.0) for reward in rewards) and rewards[1] == 0.0


# Data


def test_the_generated_problems_are_1020_and_all_can_be_solved():
    train, held_out = problems()
    assert (len(train), len(held_out)) == (764, 256)
    for problem in train + held_out:
        assert sorted(problem["nums"]) == problem["nums"] and 10 <= problem["target"] <= 50
        hits = [attempt for attempt in tries(tuple(problem["nums"])) if attempt.value == problem["target"]]
        assert hits
        for attempt in hits:
            assert solves(attempt.expression, **problem) == 1.0


@pytest.mark.slow
def test_problems_of_three_and_four_numbers_can_be_solved_and_keep_those_of_three_held_out():
    train, held_out = problems(4)
    assert Counter(len(problem["nums"]) for problem in train) == {3: 764, 4: 9866}
    assert [len(problem["nums"]) for problem in held_out] == [3, 4] * 256
    assert held_out[::2] == problems()[1]
    keys = [{problem_key(**problem) for problem in part} for part in (train, held_out)]
    assert not keys[0] & keys[1] and (len(keys[0]), len(keys[1])) == (len(train), len(held_out))
    for problem in held_out[1::2]:
        hits = [attempt for attempt in tries(tuple(problem["nums"])) if attempt.value == problem["target"]]
        assert hits and all(solves(attempt.expression, **problem) == 1.0 for attempt in hits)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4))
@settings(max_examples=30)
def test_tries_are_exact_use_each_number_once_and_stay_within_1_to_50(nums):
    found = tries(tuple(nums))
    assert len(set(found)) == len(found)
    for steps, value, expression in found:
        evaluated, used = evaluate(expression)
        assert evaluated == value and sorted(used) == sorted(nums)
        results = [int(step.split("=")[1]) for step in steps.split(" ")]
        assert len(results) == len(nums) - 1 and results[-1] == value and all(1 <= result <= 50 for result in results)


def test_a_try_of_four_numbers_as_it_is_written():
    assert ("2*3=6 -5=1 +9=10", 10, "((2*3)-5)+9") in tries((2, 3, 5, 9))


def test_no_held_out_problem_is_trained_on_even_with_its_numbers_in_another_order():
    rows = [{"nums": nums, "target": 6} for nums in ([1, 2, 3], [3, 2, 1], [2, 1, 3], [6, 1, 1], [2, 2, 2], [1, 5, 1])]
    for num_held_out in range(1, 4):
        train, held_out = split_held_out(rows, num_held_out, key=lambda row: problem_key(**row))
        assert len(held_out) == num_held_out
        numbers = [{tuple(sorted(row["nums"])) for row in part} for part in (train, held_out)]
        assert not set.intersection(*numbers)


def test_the_split_is_that_of_the_published_results():
    rows = [{"nums": [1, number], "target": number + 1} for number in range(40)]
    published = datasets.Dataset.from_list(rows).train_test_split(test_size=7, seed=42)
    train, held_out = split_held_out(rows, 7, key=lambda row: problem_key(**row))
    assert train == published["train"].to_list() and held_out == published["test"].to_list()


def config(**changes):
    return replace(RLConfig(task="countdown", model="tiny", num_eval_prompts=2), **changes)


def test_without_a_data_set_the_task_has_generated_problems_in_the_compact_form():
    task = load_task(config(num_eval_prompts=256), build_tokenizer())
    assert (len(task.train), len(task.eval)) == (764, 256)
    row = task.train[0]
    assert row["prompt"] == compact_prompt(row["nums"], row["target"])
    assert task.rewards.keys() == task.reward_weights.keys() == {"format", "equation"}
    assert task.accuracy == "equation"


def test_fewer_evaluation_prompts_leave_the_training_problems_as_they_are():
    few, many = (load_task(config(num_eval_prompts=number), build_tokenizer()) for number in (10, 256))
    assert few.eval == many.eval[:10] and few.train == many.train


@pytest.mark.parametrize(("dataset", "held_out"), [(None, 256), ("generated-3to4", 512)])
def test_more_evaluation_prompts_than_are_held_out_are_refused(dataset, held_out):
    assert len(load_task(config(dataset=dataset, num_eval_prompts=held_out), build_tokenizer()).eval) == held_out
    with pytest.raises(ValueError, match=f"num_eval_prompts={held_out + 1}"):
        load_task(config(dataset=dataset, num_eval_prompts=held_out + 1), build_tokenizer())


def test_with_a_chat_template_the_prompt_ends_in_a_begun_assistant_turn():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
    row = load_task(config(), tokenizer).train[0]
    system, user, assistant = row["prompt"]
    assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
    assert all(str(number) in user["content"] for number in [*row["nums"], row["target"]])
    assert assistant["content"].endswith("\n<think>")


ROWS = [{"nums": [1, 2, number], "target": number + 3, "note": "x"} for number in range(9)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_local_files_of_each_kind_give_the_same_task(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        path.write_text(json.dumps(ROWS) if suffix == "json" else "\n".join(map(json.dumps, ROWS)) + "\n\n")
    task = load_task(config(dataset=str(path)), build_tokenizer())
    assert (len(task.train), len(task.eval)) == (7, 2)
    assert sorted(row["target"] for row in task.train + task.eval) == list(range(3, 12))
    assert task.train[0].keys() == {"prompt", "nums", "target"}


@pytest.mark.parametrize(
    ("nums", "target", "is_reached"),
    [
        *(([1], 1, True), ([1], -1, True), ([1], 2, False), ([1, 2], 100, False), ([1, 2], 10**30, False)),
        *(([3, 5, 6], 48, True), ([3, 5, 6], -48, True), ([1, 2, 3], 9, True), ([1, 2, 3], 10, False)),
        *(([8, 1, 3], 12, True), ([0, 0, 7], 7, True), ([0, 0], 1, False), ([1, 100_001], 0, True)),
        *(([3, 3, 8, 8], 24, True), ([9, 9, 9, 9], 6561, True), ([9, 9, 9, 9], 10**30, False), ([1] * 9, 600, False)),
        *(([10**15 - 1] * 14, 1, False), ([10**15 - 1] * 12, 1, True)),
    ],
)
def test_a_file_is_refused_if_no_expression_reaches_its_only_target(tmp_path, nums, target, is_reached):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"nums": nums, "target": target}))
    if is_reached:
        assert read_problems(str(path), "train") == [{"nums": nums, "target": target}]
    else:
        with pytest.raises(ValueError, match=r"in 1 of 1 rows no expression of up to 200 characters .* such as row 1"):
            read_problems(str(path), "train")


def test_a_few_rows_whose_target_no_expression_reaches_are_left_out_and_said(tmp_path, caplog):
    rows = [{"nums": [3, 5, 6], "target": target} for target in (48, 1000, 14)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_problems(str(path), "train") == [rows[0], rows[2]]
    assert "in 1 of 3 rows" in caplog.text and "row 2 with nums=[3, 5, 6]" in caplog.text


@given(expressions)
@settings(max_examples=200)
def test_what_an_expression_reaches_may_be_reached(expression):
    try:
        value, used = evaluate(expression)
    except ValueError:
        return
    if value.denominator == 1:
        assert may_be_reached([int(number) for number in used], int(value))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", '{"nums": [1], "target": 1}\n{"nums": [1], "targ', "line 2 is not JSON"),
        ("a.jsonl", '{"nums": [1]}', "columns nums, target. Add or rename target"),
        ("a.jsonl", "[1, 2]", "row 1 holds a list"),
        ("a.jsonl", '{"nums": [1], "target": 1}\n{"nums": [1.5], "target": 1}', "row 2 has nums="),
        ("a.jsonl", '{"nums": [1], "target": true}', "row 1 has nums="),
        ("a.jsonl", '{"nums": [-1], "target": 1}', "row 1 has nums="),
        ("a.jsonl", '{"nums": ["1"], "target": 1}', "row 1 has nums="),
        ("a.jsonl", '{"nums": [1], "target": NaN}', "row 1 has nums="),
        ("a.jsonl", '{"nums": [1234567890123456], "target": 1}', "at most 15 digits"),
        ("a.jsonl", '{"nums": [1], "target": 1}', "none would be left"),
        ("a.json", '{"nums": [1], "target": 1}', "a list of rows is needed"),
        ("a.json", "[1,", "not JSON"),
        ("a.parquet", "PAR1", "unreadable parquet"),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(config(dataset=str(tmp_path / name)), build_tokenizer())
    assert name in str(caught.value) or "num_eval_prompts" in str(caught.value)
