"""Answers that could cost much or reach Python's interpreter: compared at once, and only numerals are evaluated."""

import re
import time

import pytest
import sympy.parsing.sympy_parser

from common.tasks._arithmetic import evaluate, plain_expression
from common.tasks._meaning import MAX_DIGITS, means_the_same
from common.tasks._numbers import exact_number, last_number, read_number
from common.tasks.math import warm_up

ANSWERS = [
    "9" * 299,
    "9" * 5000,
    "9^9^9^9",
    "9**9**9**9",
    "10^{10^{10}}",
    "2^{99999999}",
    "99999999!",
    "((5!)!)!",
    "5" + "!" * 100,
    "\\binom{99999999}{5000000}",
    "\\frac{" * 20 + "1" + "}{2}" * 20,
    "{" * 150 + "1" + "}" * 149,
    "+".join(f"\\frac{{1}}{{{n}}}" for n in range(2, 24)),
    "1." + "3" * 290,
    "\\sqrt{" + "9" * 250 + "}",
    "1e999",
    "1E99999999",
    "e^{e^{e^{e^{9}}}}",
    "(x+y+z+w)^{49}",
    "x^{99999999}",
    "\\sum_{i=1}^{10^9} i",
    "\\tan(" + "9" * 200 + ")",
    "\\frac{" + "9" * 100 + "}{" + "7" * 100 + "}",
    "().__class__",
    "__import__('os').getpid()",
    "\\text{__import__('os')}",
    "\\operatorname{eval}(1)",
    "lambda: 0",
    "x.__class__.__base__",
    "x_{__import__}",
    "\\frac{1.__class__}{2}",
    "0x" + "f" * 200,
    "1;print(1)",
]


@pytest.fixture(scope="module", autouse=True)
def _warm():
    warm_up()


@pytest.fixture
def evaluated(monkeypatch):
    """The code that sympy's parser evaluates meanwhile."""
    codes, evaluate_code = [], sympy.parsing.sympy_parser.eval_expr

    def spy(code, *scopes):
        codes.append(code)
        return evaluate_code(code, *scopes)

    monkeypatch.setattr(sympy.parsing.sympy_parser, "eval_expr", spy)
    return codes


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer[:20])
def test_a_costly_answer_is_compared_well_within_the_limit_of_a_row(answer, evaluated):
    for gold in ("5", "\\frac{1}{3}", "x^2+1"):
        for pair in ((gold, answer), (answer, gold)):
            began = time.process_time()
            assert means_the_same(*pair) is False
            assert time.process_time() - began < 1
    began = time.process_time()
    for read in (plain_expression, exact_number, read_number, last_number):
        read(answer)
    try:
        evaluate(plain_expression(answer))
    except ValueError as error:
        assert len(str(error)) < 200
    assert time.process_time() - began < 0.2
    # Of a model's text, sympy's parser evaluates numerals alone.
    for code in evaluated:
        assert re.fullmatch(r"(?:Integer|Float) ?\('?[\d.]+'? ?\)\s*", code) and len(code) < MAX_DIGITS + 20, code


def test_numerals_do_reach_the_evaluator_that_is_watched(evaluated):
    assert means_the_same("\\sqrt{7}+1", "1 + \\sqrt{7}")
    assert evaluated


def test_a_numeral_of_many_digits_is_compared_without_the_evaluator(evaluated):
    digits = "123456789" * 30
    assert means_the_same(digits, f"{digits[:-3]},{digits[-3:]}") is False or not evaluated
    assert means_the_same(digits, digits)
    assert not means_the_same(f"\\sqrt{{{digits}}}", "5")
    assert all(len(code) < MAX_DIGITS + 20 for code in evaluated)
