"""Answers as people write them: where they stand, which number is meant, and when two mean the same.

A wrong answer that scores is worse than a right one that does not, so the tables of wrong answers are the longer ones.
"""

import random
from fractions import Fraction

import pytest

from common.tasks._meaning import means_the_same
from common.tasks._numbers import exact_number, last_number, read_number
from common.tasks._places import first_block, last_block, last_box, outside_thoughts

# Places


def test_thoughts_are_left_out_and_their_gap_stays():
    assert outside_thoughts("a<think>b</think>c") == "a<think></think>c"
    assert outside_thoughts("<think>a<think>b</think>c") == "<think></think>c"
    assert outside_thoughts("b</think>c") == outside_thoughts("b</think>c", "p <think>\n") == "c"
    assert outside_thoughts("b", "p <think>") == outside_thoughts("<think>b") == ""
    assert outside_thoughts("a</think>b</think>c") == "b</think>c"
    assert outside_thoughts("<reasoning>a</reasoning>b") == "<reasoning>a</reasoning>b"
    assert outside_thoughts("<reasoning>a</reasoning>b", tags=("think", "reasoning")).endswith("b")


def test_the_first_block_ends_with_the_first_closing_tag_and_the_last_begins_with_the_last_opening_one():
    text = "</a> <a> 1 <a> 2 </a> 3 </a> <a> 4 </a>"
    assert first_block(text, "a") == " 2 " and last_block(text, "a") == " 4 "
    assert first_block("<a> 1", "a") is last_block("<a> 1", "a") is first_block("1 </a>", "a") is None
    assert last_block("<a>1</a> <a>2", "a") is None


def test_the_last_box_is_found_with_any_white_space():
    assert last_box("\\boxed{1} \\boxed {\\frac{1}{2}} end") == ("\\frac{1}{2}", " end")
    assert last_box("\\boxed 12, so") == ("12", " so") and last_box("\\boxed x") == ("x", "")
    assert last_box("\\boxed{1") is last_box("\\boxed{1} \\boxed{2") is last_box("box") is None


def test_many_places_are_read_at_once():
    for text in (
        "<think>",
        "</think>",
        "<think></think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "\\boxed 1 ",
        "\\boxed ",
    ):
        many = text * (100_000 // len(text))
        outside_thoughts(many), first_block(many, "answer"), last_block(many, "answer"), last_box(many)


# Numbers

WRITINGS = {
    "9500": ["9500", "9,500", "9{,}500", "9\\,500", "9,\\!500", "9 500", "9\u202f500", "9\u00a0500", "9_500", "9'500"],
    "-5": ["-5", "- 5", "\u22125", "\u20135", "-$5", "$-5", "\\(-5\\)", "negative 5", "minus 5", "-\\frac{10}{2}"],
    "1000": ["1e3", "1E3", "10^3", "10^{3}", "1 \\times 10^3", "1\\cdot10^{3}", "10\u00b3", "1.0e+3", "1,000.00"],
    "1/2": ["1/2", "1 / 2", "\\frac{1}{2}", "\\frac12", "\\dfrac 1 2", "\\tfrac{1}2", "\u00bd", ".5", "0.50"],
    "5/2": ["2 1/2", "2\\frac{1}{2}", "2\\frac12", "2\u00bd", "2 and 1/2", "5/2", "2.5"],
    "5": ["5", "+5", "05", "5.", "{5}", "$5$", "**5**", "`5`", "\\text{5}", "\\mathbf{5}", "\\bf 5", "\\large 5"],
}  # fmt: skip
IN_WORDS = {
    "9500": ["$9,500", "\\$9,500", "\N{EURO SIGN}9,500", "9500 dollars", "**9500**", "9500<br>", "US$9500", "Rs.9500"],
    "9": ["16 - 3 - 4 = <<16-3-4=9>>9", "<<16-3-4=9>>9", "3**2", "3^2"],
    "1200": ["1.2 x 10^3", "1.2 * 10**3", "1,200,"],
    "5": [
        "x = 5",
        "x_1=5",
        "Answer: 5",
        "#### 5",
        "(5)",
        "5%",
        "5 \\%",
        "5 apples",
        "5 apples for 3 kids",
        "5 cm^2",
        "5 m^2",
        "5 m\u00b2",
        "5m\u00b2",
        "5m",
        "5L",
        "5g",
        "5GB",
        "5kWh",
        "5-hour",
        "5 p.m.",
        "5yrs",
        "5 apples!",
        "*5*",
        "***5***",
        "_5_",
        "'5'",
        "It is *5*.",
        "=> 5",
        "\u21d2 5",
        "\\sqrt{25}",
        "\u221a25",
        "5 apples (2 red and 3 green)",
        "5 apples left from 12",
        "5 of the 12 apples",
        "5 students did not pass",
        "No, it is 5",
    ],
    "-5": ["x=-5", "a loss of -5", "\\textbf{- 5}", "= -5", "-5 degrees", "-5\N{DEGREE SIGN}", "-(5)"],
    "42": ["6 * 7 = 42", "42 = 6*7", "$50 - $8 = $42", "It is 42.", "42 - because", "42 (apples)", "the 42nd"],
}
NO_NUMBER = [
    *("", "five", "\u0665", "\uff15", "5x", "x5", "H2O", "5k", "5 million", "5 dozen", "5 and a half", "not 5", "5!"),
    *("5 or 6", "5 and 6", "5, 6", "12, 5", "12,5", "1,23", "1.234.567", "1000,000", "20-30", "20\N{EN DASH}30"),
    *("5:30", "3 hours 30 minutes", "3-5", "3+5", "5^x", "x - 5", "more than 5", "at least 5", "\\pm 5"),
    *("5/0", "1/2/3", "3 7/2", "1e400", "10^{1000}", "9^9", "9**9", "0x10", "5 = 6", "6*7 = 43", "4$50", "1 2 3"),
    *("5\u03c0", "5 pi", "5 bn", "$5 mn", "5 mil", "5 grand", "5 lakh", "5 crore", "5 tn", "$5m", "5M", "5 tens"),
    *("5 tenths", "5 hundredths", "5 thousandths", "5 quarters", "5 doz.", "5 gross", "cannot be 5", "can't be 5"),
    *("can\u2019t be 5", "wasn't 5", "is not equal to 5", "5 is wrong", "5 is not right", "5 isn't right", "5 !"),
    *("5 below zero", "5=", "5 =", "5..", "5 ...", "5 apples per 2 days", "5 apples per day for 2 days"),
    *("3 boxes with 4 apples each", "5 at most", "5 apples (or 6)", "5 apples (2 red and 4 green)", "5 of 12"),
    *("5-x", "2**3**2", "1,234,5", "-(5) 3", "5 times as many for 2"),
    *("\\sqrt{5}", "x > 5", "9" * 501, "1/" * 200, "5 mod 7", "5 n"),
]


@pytest.mark.parametrize("number", WRITINGS)
def test_a_number_is_read_in_any_writing(number):
    for writing in WRITINGS[number]:
        assert exact_number(writing).value == read_number(writing) == Fraction(number), writing
        if not writing.startswith("- "):  # after words this may also be a dash
            assert last_number(f"So 3 of 7 are {writing}") == Fraction(number), writing


@pytest.mark.parametrize("number", IN_WORDS)
def test_a_number_is_read_among_the_words_that_usually_surround_it(number):
    for text in IN_WORDS[number]:
        assert read_number(text) == Fraction(number), text


def test_what_may_mean_another_number_is_not_read():
    assert {text: read_number(text) for text in NO_NUMBER} == dict.fromkeys(NO_NUMBER)


def test_a_factorial_is_not_the_last_number_of_a_text():
    assert last_number("So x = 5!") is last_number("3 and 5!") is None
    assert last_number("4 != 5") == last_number("5!, so 5") == 5


def test_long_and_hostile_texts_are_read_at_once():
    for piece in (
        "1",
        "1,",
        "1 ",
        "1/",
        "-",
        "10^",
        "\\frac{1",
        "{",
        "\\text{",
        "**",
        "<",
        "1e9 ",
        " ",
        "= ",
        "no ",
        "1 a ",
        "*1",
        "<<",
    ):
        text = piece * (100_000 // len(piece))
        read_number(text), exact_number(text), last_number(text), read_number(text[:500]), exact_number(text[:500])


def writings(number: int) -> list[str]:
    """One number in many ways."""
    sign, size = ("-" if number < 0 else ""), abs(number)
    plain, grouped = f"{sign}{size}", f"{sign}{size:,}"
    return [
        *(
            plain,
            grouped,
            f"{plain}.0",
            f"{sign}0{size}",
            f"{sign}{2 * size}/2",
            f"{sign}\\frac{{{3 * size}}}{{3}}",
            f"${plain}$",
        ),
        *(grouped.replace(",", each) for each in ("{,}", "\\,", ",\\!", "\u202f", "\u00a0")),
        *(f"\\text{{{plain}}}", f"\\mathbf{{{plain}}}", f"**{plain}**", f"{sign}\\${size}", f"{plain}\\text{{ cm}}"),
        *(f"{plain} dollars", f"{plain}\\%", f"x = {plain}", f"{plain}\\cdot 10^0", f"{plain}."),
        f"\N{MINUS SIGN}{size}" if sign else f"+{size}",
    ]


def test_equal_numbers_are_equal_and_different_ones_different_in_every_writing():
    rng = random.Random(0)
    for _ in range(40):
        gold = rng.choice([rng.randint(-20, 20), rng.randint(-99_999, 99_999), rng.randint(10**8, 10**12)])
        wrong = rng.choice(
            [-gold, gold + 1, gold - 1, 10 * gold, 1000 * gold, gold + rng.randint(2, 10**6), gold // 10]
        )
        for right in rng.sample(writings(gold), 6):
            assert means_the_same(str(gold), right) and means_the_same(right, str(gold)), (gold, right)
            assert read_number(right) == gold, right
        for other in writings(wrong) if wrong != gold else []:
            assert not means_the_same(str(gold), other) and not means_the_same(other, str(gold)), (gold, other)
            assert read_number(other) != gold, (gold, other)


def test_different_fractions_and_powers_are_different_in_every_writing():
    rng = random.Random(1)
    for _ in range(12):
        top, bottom, power = rng.randint(1, 60), rng.randint(2, 60), rng.randint(1, 120)
        value, tiny = Fraction(top, bottom), Fraction(1, 2**power)
        assert means_the_same(f"{top}/{bottom}", f"\\frac{{{2 * top}}}{{{2 * bottom}}}")
        assert means_the_same(f"\\frac{{1}}{{2^{{{power}}}}}", f"2^{{-{power}}}")
        for wrong in (value + tiny, value - tiny, value + 1, 1 / value):
            if wrong != value:
                assert not means_the_same(f"\\frac{{{top}}}{{{bottom}}}", f"{wrong.numerator}/{wrong.denominator}")
        assert not means_the_same(f"\\frac{{1}}{{2^{{{power}}}}}", f"\\frac{{1}}{{2^{{{power + 1}}}}}")
    assert not means_the_same("(\\frac{1}{3^{99}}, \\pi)", "(\\frac{1}{3^{98}}, \\pi)")


# Meanings

SAME = [
    ("5\\text{ m}", "5 m"),
    ("5\\text{ m}", "5"),
    ("5\\text{ m}", "5\\mathrm{m}"),
    ("5\\text{ mph}", "5\\text{ miles per hour}"),
    ("5\\text{ cm}^2", "5\\text{ square centimeters}"),
    ("5\\text{ cm}^2", "5\\ \\mathrm{cm}^{2}"),
    ("60\\text{ km/h}", "60\\ \\text{km}/\\text{h}"),
    ("1011_2", "1011_{2}"),
    ("0.1\\pi", "\\frac{\\pi}{10}"),
    ("\\sqrt{2}", "1.414214"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("1,2,3", "1,2,3,3"),
    ("\\$7", "7\\text{ dollars}"),
    ("5", "x+y=5"),
    ("6", "AB=6"),
    ("6", "\\angle ABC = 6"),
    ("6", "P(2)=6"),
    ("6", "\\text{Area} = 6"),
    ("6", "A=2*3=6"),
    ("AB", "BA"),
    ("1", "1^{\\circ}"),
    ("\\textbf{(C)}\\ 42", "C"),
    ("\\textbf{(C)}\\ 42", "(C)"),
    ("\\textbf{(C)}\\ 42", "42"),
    ("C", "\\textbf{(C)} 42"),
    ("C", "(C)"),
    ("C", "C. 42"),
    ("42", "(C) 42"),
    ("9500", "9\\,500"),
    ("9500", "9{,}500"),
    ("9{,}500\\pi", "9500\\pi"),
    ("- 5", "-5"),
    ("-5", "- 5"),
    ("-5", "\\text{negative }5"),
    ("-5", "negative 5"),
    ("1000", "1e3"),
    ("1000", "10^3"),
    ("2.5", "2\xbd"),
    ("0.5", "\xbd"),
    ("x^2", "x\xb2"),
    ("\\sqrt{2}", "\u221a2"),
    ("\\sqrt{2}", "\u221a{2}"),
    ("\\boldsymbol{\\frac{1}{2}}", "0.5"),
    ("0.5", "\\textbf{$\\frac{1}{2}$}"),
    ("0.5", "{\\Large \\frac{1}{2}}"),
    ("0.5", "\\color{red}{0.5}"),
    ("0.5", "\\textcolor{blue}{0.5}"),
    ("5", "**5**"),
    ("5", "`5`"),
    ("2 \\pi", "2*pi"),
    ("\\frac{2\\pi}{3}", "2pi/3"),
    ("\\sqrt{3}/2", "sqrt(3)/2"),
    ("x\\in[1,2]", "1\\leqslant x\\leqslant 2"),
    ("0.1\\overline{6}", "\\frac16"),
    ("0.\\overline{142857}", "\\frac17"),
    ("\\frac{1}{3}", "0.\\dot{3}"),
    ("1", "0.\\overline{9}"),
    ("\\binom{n}{2}", "\\frac{n(n-1)}{2}"),
    ("\\frac{n(n-1)}{2}", "\\binom{n}{2}"),
    ("\\dbinom{5}{2}", "10"),
    ("150\\text{ minutes}", "150"),
    ("x=5", "5"),
    ("(x-1)(x+1)", "x^2-1"),
    ("4", "\\boxed{4}"),
    ("\\frac{1}{2}i", "0.5i"),
    ("Tuesday", "\\text{tuesday}"),
    ("\\text{June 20}", "June 20"),
    ("2024", "2,024"),
    ("2,024", "2024"),
    ("1\\,234", "1234"),
    ("5\\text{ apples}", "5 apples"),
    ("5", "5 apples"),
    ("5", "\\approx 5"),
    ("\\pi", "3.141593"),
    ("100", "100\\text{ percent}"),
    ("\\log 2", "\\ln 2"),
    ("3", "|3|"),
    ("3", "|-3|"),
    ("3", "\\lfloor 3.7 \\rfloor"),
    ("\\{1\\}", "1"),
    ("y = 3x + 2", "3x - y + 2 = 0"),
    ("1:2:3", "1:2:3"),
    ("5^{1/2}", "\\sqrt{5}"),
    ("5^{0.5}", "\\sqrt{5}"),
    ("x^{0.5}", "\\sqrt{x}"),
    ("0.3333333", "\\frac13"),
    ("0.333333333", "\\frac{333333333}{1000000000}"),
    ("1.5", "\\frac{3}{2}"),
    ("\\frac{3}{2}", "1\\frac12"),
    ("-1\\frac12", "-1.5"),
    ("10\\,000", "10000"),
    ("10 000", "10000"),
    ("10000", "10\\,000"),
    ("90", "90\\degree"),
    ("90\xb0", "90"),
    ("(-\\infty,2)", "x<2"),
    ("(0,1)", "0<x<1"),
    ("[2,5]", "2\\le x\\le 5"),
    ("1500", "1.5e3"),
    ("2\\pi", "2*pi"),
    ("\\frac{\\pi}{2}", "pi/2"),
    ("\\frac{1+i}{2}", "0.5+0.5i"),
    ("\\varnothing", "\\emptyset"),
    ("0.\\overline{3}", "\\frac{1}{3}"),
    ("13", "\\boldsymbol{13}"),
    ("13", "\\bf 13"),
    ("13", "\\textit{13}"),
    ("13", "\\mathit{13}"),
    ("13", "13\\ "),
    ("13", "~13"),
    ("13", "\\large 13"),
    ("13", "\\Large{13}"),
    ("13", "\\underline{13}"),
    ("13", "\\fbox{13}"),
    ("13", "The answer is 13"),
    ("\\binom{5}{2}", "10"),
    ("-13", "\u201313"),
    ("6,8", "(6,8)"),
    ("x\\geqslant 3", "x \\ge 3"),
    ("[3,\\infty)", "x\\ge 3"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
    ("\\varnothing", "\\{\\}"),
    ("90", "90\xb0"),
    ("5", "\\text{The answer is }5"),
    ("5", "5\\operatorname{cm}"),
    ("5\\text{ m}^2", "5 m\xb2"),
    ("x=2, y=3", "(2,3)"),
    ("(2,3)", "x=2, y=3"),
    ("(2,3)", "y=3,x=2"),
    ("f(x)=5", "5"),
    ("5\\text{ cm}^2", "5"),
    ("60^\\circ\\text{C}", "60"),
    ("5'", "5\\text{ feet}"),
    ("50\\%", "0.5"),
    ("A_1", "A_1"),
    ("\\text{HHT}", "HHT"),
    ("(1,2,3)", "x=1,y=2,z=3"),
    ("[1,\\infty)", "x\\ge1"),
    ("5\\text{ square cm}", "5\\text{ cm}^2"),
    ("4:30 p.m.", "4:30\\text{ PM}"),
    ("4:30", "4:30\\text{ p.m.}"),
    ("4:30\\text{ p.m.}", "4:30"),
    ("\\{1,2\\}", "2,1"),
    ("e^{-1}", "1/e"),
    ("x^2+1=0", "1+x^2=0"),
    ("5", "5\\,\\text{m}"),
    ("5", "5\\,\\mathrm{m}"),
    ("5", "5~\\text{g}"),
    ("5", "5\\;\\text{s}"),
    ("5", "5\\text{ m/s}"),
    ("5", "5\\,\\mathrm{m/s^2}"),
    ("\\sqrt{3}", "\\sqrt{3}\\,\\text{m}"),
    ("20", "20\\,\\text{N}"),
    ("20", "20\\frac{\\text{m}}{\\text{s}}"),
    ("5", "5\\,\\text{m}^2"),
    ("5\\text{ m/s}", "5"),
    ("5\\text{ m/s}", "5\\,\\mathrm{m/s}"),
    ("5\\text{ m}", "5\\,\\mathrm{m}"),
    ("5", "5\\ \\text{m}"),
    ("5\\text{ cm}^2", "5 cm^2"),
    ("5", "\\text{5 apples}"),
    ("5", "\\text{5 cm}"),
    ("3", "\\textbf{3 apples}"),
    ("5\\text{ cm}", "\\text{5 cm}"),
    ("(1,2)", "\\big(1,2\\big)"),
    ("(1,2)", "\\bigl(1,2\\bigr)"),
    ("(1,2)", "\\Big(1,2\\Big)"),
    ("(1,2)", "\\Bigl(1,2\\Bigr)"),
    ("(1,2)", "\\bigg(1,2\\bigg)"),
    ("1/2", "{1 \\over 2}"),
    ("1/2", "\\nicefrac{1}{2}"),
    ("1/2", "\\sfrac{1}{2}"),
    ("7/3", "2.\\bar{3}"),
    ("x^{-1}", "x^-1"),
    ("5", "5^{\\text{th}}"),
    ("5", "5\\text{th}"),
    ("A", "A)"),
    ("C", "Choice C"),
    ("C", "\\text{Choice C}"),
    ("C", "Option C"),
    ("101_2", "101_{\\text{two}}"),
    ("300000000", "3 x 10^8"),
    ("3 \\times 10^8", "3 x 10^8"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\[4pt]2\\end{pmatrix}"),
    ("3", "\\therefore 3"),
    ("3", "\\Rightarrow 3"),
    ("5", "\\hspace{1cm}5"),
    ("20", "20 m^2"),
    ("20", "US\\$20"),
    ("20", "\\euro 20"),
    ("20", "\\pounds 20"),
    ("5", "\\text{There are }5\\text{ solutions}"),
]
DIFFERENT = [
    ("3t", "3s"),
    ("3t", "3"),
    ("3", "3t"),
    ("2", "2c"),
    ("2", "2g"),
    ("2", "2x"),
    ("2", "2d"),
    ("2", "2s"),
    ("2", "2h"),
    ("2", "2m"),
    ("2", "2 m"),
    ("2", "2l"),
    ("5\\text{ m}", "5\\text{ km}"),
    ("5\\text{ m/s}", "5\\text{ km/h}"),
    ("1011_2", "1011_3"),
    ("0.0000001", "0.0000002"),
    ("\\sqrt{2}\\cdot 10^{-8}", "0.00000001"),
    ("(\\frac{1}{2^{99}},1)", "(\\frac{1}{2^{98}},1)"),
    ("10^{30}+1", "10^{30}"),
    ("12345678901234567890", "12345678901234567891"),
    ("e^{-100}", "e^{-101}"),
    ("\\sqrt{2}", "1.41421"),
    ("2^{100}", "2^{100}+1"),
    ("2^{100}", "1267650600228229401496703205377"),
    ("a_1", "a_2"),
    ("f(x)=x^2", "g(x)=x^2"),
    ("[1,2]", "(1,2)"),
    ("y=2x", "x=2y"),
    ("x<2", "x>2"),
    ("x \\le 2", "x<2"),
    ("30^\\circ", "30\\text{ radians}"),
    ("3:4", "4:3"),
    ("12:30", "12.5"),
    ("5!", "5"),
    ("-5", "5"),
    ("\\frac13", "0.33"),
    ("0.05", "5\\%"),
    ("7", "7 \\text{ or more}"),
    ("7", "7\\text{ million}"),
    ("7", "7 million"),
    ("7", "7k"),
    ("\\$7", "7\\text{ cents}"),
    ("x=1", "x=1,2"),
    ("2", "x^2=2"),
    ("2", "2x=2"),
    ("3", "x+1=3"),
    ("6", "A=2*3=7"),
    ("6", "6=7"),
    ("6", "7=6"),
    ("6", "x\\neq 6"),
    ("6", "x > 6"),
    ("\\text{even}", "\\text{not even}"),
    ("\\text{Evelyn}", "\\text{Evelyn and Bob}"),
    ("\\infty", "-\\infty"),
    ("\\emptyset", "0"),
    ("1", "\\frac{0}{0}"),
    ("42", "42, 43"),
    ("42", "\\{42, 43\\}"),
    ("42", "42 \\cup 43"),
    ("\\textbf{(C)}\\ 42", "B"),
    ("\\textbf{(C)}\\ 42", "(B) 42"),
    ("\\textbf{(C)}\\ 42", "43"),
    ("B", "(A)(B)"),
    ("B+1", "(A)(B+1)"),
    ("0.5", "0,5"),
    ("9500", "9.500"),
    ("0.\\overline{3}", "0.3"),
    ("\\binom{10}{3}", "121"),
    ("10", "\\binom{5}{2}"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("\\frac{1}{20!}", "\\frac{1}{21!}"),
    ("\\frac{1}{200!}", "\\frac{1}{201!}"),
    ("2 \\text{ hours } 30 \\text{ minutes}", "2"),
    ("2", "2 \\text{ hours } 30 \\text{ minutes}"),
    ("i", "0.5i"),
    ("3+4i", "3+4j"),
    ("\\text{A}", "\\text{B}"),
    ("\\text{June 20}", "June 21"),
    ("1", "\\text{one}"),
    ("1,2", "1.2"),
    ("12", "1 2"),
    ("123", "1 23"),
    ("\\pi", "3.14159"),
    ("\\log_{10} 2", "\\ln 2"),
    ("\\sin 30^\\circ", "\\frac12"),
    ("\\frac{\\pi}{6}", "30^\\circ"),
    ("1:2:3", "1:2:4"),
    ("5 > 3", "5 > 2"),
    ("\\frac{a}{b}", "\\frac{b}{a}"),
    ("0.333333", "0.333334"),
    ("-1\\frac12", "-0.5"),
    ("\\frac{1}{2}", "50\\%"),
    ("\\frac{3}{4}", "75\\%"),
    ("1,-2", "(-2,1)"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(2,1)"),
    ("\\frac{11}{2}\\text{ hours}", "\\frac{1}{12}\\text{ hours}"),
    ("12 \\text{ apples}", "1 2 \\text{ apples}"),
    ("\\sqrt{12}\\text{ inches}", "\\sqrt{1}2\\text{ inches}"),
    ("X\\text{ when even}", "x\\text{ when even}"),
    ("2", "2\\text{ squared}"),
    ("2", "2\\text{ factorial}"),
    ("2", "2\\text{ tenths}"),
    ("2", "2\\text{ hundredths}"),
    ("2", "2\\text{ thirds}"),
    ("2", "2\\text{ fifths}"),
    ("2", "2\\text{ quarters}"),
    ("2", "2\\text{ dozens}"),
    ("2", "2\\text{ gross}"),
    ("2", "2\\text{ plus 1}"),
    ("2", "2\\text{ times 3}"),
    ("2", "2\\text{ over 3}"),
    ("2", "2\\text{ minus 1}"),
    ("2", "2\\text{ choose 1}"),
    ("2", "2\\text{ per 3}"),
    ("2", "2\\text{ remainder 2}"),
    ("2", "2\\text{ with remainder 1}"),
    ("2", "2\\text{ modulo 5}"),
    ("2", "2\\text{ below zero}"),
    ("2", "2\\text{ pi}"),
    ("2", "2\\text{ (wrong)}"),
    ("5", "5 \\mod 7"),
    ("2", "2 squared"),
    ("2", "2 dozens"),
    ("f'(x)", "f(x)"),
    ("y'", "y"),
    ("60^\\circ", "60'"),
    ("5", "5'"),
    ("5", "5''"),
    ("5'", "5''"),
    ("f''(x)", "f'(x)"),
    ("5", "5^{\\prime}"),
    ("BCA", "ACB"),
    ("HHT", "THH"),
    ("ABCD", "DCBA"),
    ("x=2, y=3", "(3,2)"),
    ("x=1,y=2,z=3", "(3,2,1)"),
    ("(1,2)", "y=1,x=2"),
    ("(4,3)", "\\{4,3\\}"),
    ("\\{4,3\\}", "(4,3)"),
    ("\\{1\\}", "\\{\\{1\\}\\}"),
    ("\\{3,4\\}", "(4,3)"),
    ("\\text{HHT}", "\\text{THH}"),
    ("4:30\\text{ p.m.}", "4:30\\text{ a.m.}"),
    ("4:30 p.m.", "4:30 a.m."),
    ("5^\\circ C", "5^\\circ F"),
    ("5^\\circ\\text{C}", "5^\\circ\\text{F}"),
    ("5\\text{ cm}^2", "5\\text{ cm}"),
    ("15 cm^2", "15 cm^4"),
    ("15\\text{ square cm}", "15\\text{ cubic cm}"),
    ("15\\text{ square cm}", "15\\text{ cm}"),
    ("0.5", "0.5\\%"),
    ("5", "5\\text{ per mille}"),
    ("4\\text{ PM}", "4\\text{ AM}"),
    ("15 cm^2", "15 cubic cm"),
    ("5\\text{ m/s}^2", "5\\text{ m/s}"),
    ("\\text{(C)}", "\\text{(C)}+1"),
    ("A_1", "A"),
    ("P_0", "P"),
    ("A_{10}", "A"),
    ("n", "N"),
    ("e", "E"),
    ("[1,\\infty)", "[1,\\infty]"),
    ("f(2)=5", "f(3)=5"),
    ("5", "5,5"),
    ("\\frac17", "0.142858"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
]


def test_answers_with_one_meaning_are_the_same():
    assert [pair for pair in SAME if not means_the_same(*pair)] == []


def test_answers_with_two_meanings_are_different():
    assert [pair for pair in DIFFERENT if means_the_same(*pair)] == []


# Pairs of Math-Verify's own tests (tests/ of huggingface/Math-Verify), and what they expect there. Where its tests
# read whole texts, here the answer alone stands: only a box counts, and of several boxes the last.
MATH_VERIFY = [
    ("7425000", "7,425,000", True),
    ("1000", "1 000", True),
    ("1000", "1000.0", True),
    ("1000.0", "1,000.0", True),
    ("0.4", ".4", True),
    ("1000.99", "1,000.99", True),
    ("1000.99", "$1,000.99", True),
    ("1000.99", "1,000.99$", True),
    ("1000.99", "1,000.99€", True),
    ("1000.99", "1,000.99m²", True),
    ("0,111", "0.111", True),
    ("2", "AZYUK2A", False),
    ("10/9", "\\frac{10}{9}", True),
    ("-10/9", "-\\frac{10}{9}", True),
    ("[0,9)", "[0,1)", False),
    ("(0,9)", "[0,9)", False),
    ("1", "-[0,1)", False),
    ("9", " 9 ", True),
    ("10", "(9+1)", True),
    ("1/3", "\\frac13 ", True),
    ("1", "\\frac3{3} ", True),
    ("\\sqrt{3}", "\\sqrt3 ", True),
    ("1/3", "\\cfrac{1}{3} ", True),
    ("1/3", "\\dfrac{1}{3} ", True),
    ("1/3", "\\tfrac{1}{3} ", True),
    ("1/3", " 1/3 ", True),
    ("1/3", "\\left( \\frac{1}{3} \\right)", True),
    ("1/3", "\\boxed{\\frac{1}{3}}", True),
    ("1/3", "\\frac{1}{3} \\text{meters}", True),
    ("1/3", "\\frac{1}{3} \\textbf{meters}", True),
    ("1/3", "k = \\frac{1}{3}", True),
    ("28\\%", "28 percent", True),
    ("28\\%", "28 pct", True),
    ("28\\%", "28 %", True),
    ("28\\%", "28 percentage", True),
    ("28\\%", "28", True),
    ("0.28", "28", False),
    ("28/100", "28", False),
    ("28", "28/100", False),
    ("\\frac{28}{100}", "28", False),
    ("28*\\frac{1}{100}", "28", False),
    ("12\\text{ and }13", "12 $ and $13", True),
    ("14{,}916", "14 {, }916", True),
    ("(3, \\frac{\\pi}{2})", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
    ("125$ miles", "125\\textnormal{ miles}", True),
    (
        "[-1, -\\frac{1}{2}) \\cup (-\\frac{1}{2}, 0) \\cup (0, 1) \\cup (1, \\infty)",
        "[-1, -\\tfrac12) \\cup (-\\tfrac12, 0) \\cup (0, 1) \\cup (1, \\infty)",
        True,
    ),
    ("\\sqrt{2}+\\sqrt{5}", "\\sqrt 2+\\sqrt 5", True),
    ("\\frac{9}{4}\\pi", "\\frac94\\pi", True),
    ("x >= 5", "x \\geq 5", True),
    ("x < 3", "x \\lt 3", True),
    ("x \\leq 2", "x <= 2", True),
    ("x > 5", "x \\gt 5", True),
    ("x != 3", "x \\neq 3", True),
    ("x > 5", "x < 5", False),
    ("x \\geq 5", "x \\leq 5", False),
    ("x \\neq 5", "x != 5", True),
    ("x \\leq 5", "5 \\geq x", True),
    ("x \\geq 5", "5 \\leq x", True),
    ("7 = 11a+c", "11a+c", False),
    ("x = 1/3", "x = 5+5+1 = 1/3 \\approx 11", True),
    ("11", "x=11", True),
    ("11", "x\\approx11", True),
    ("1/3", "x=1/3\\approx1.3", True),
    ("x < 1", "-x > -1", True),
    ("x < 1", "x > -1", False),
    ("x <= 1", "-x >= -1", True),
    ("a +3z = 0", "0", False),
    ("2x + z = 1", "1", False),
    ("a^2 + b = 0", "0", False),
    ("k=1", "1", True),
    ("1", "k=1", True),
    ("z = 1 + 1 = 2", "z = 3+3 = 2", True),
    ("2x+4y-3=0", "y=-\\frac{1}{2}x+\\frac{3}{4}", True),
    ("x^2/4 + y^2/3 = 1", "x^2/16 + y^2/12 = 1/4", True),
    ("\\begin{bmatrix}0 & 0 \\\\0 & 0\\end{bmatrix}", "\\begin{pmatrix}0 & 0 \\\\0 & 0\\end{pmatrix}", True),
    (
        "\\begin{pmatrix}1 & 2 \\\\3 & 4\\end{pmatrix}",
        "\\left[\\begin{array}{cc}1 & 2 \\\\3 & 4\\end{array}\\right]",
        True,
    ),
    (
        "\\begin{pmatrix}\\frac{1}{2} & \\frac{3}{4} \\\\ \\frac{5}{6} & \\frac{7}{8}\\end{pmatrix}",
        "\\begin{pmatrix} \\frac{1}{2} & \\frac{3}{4} \\\\ \\frac{5}{6} & \\frac{7}{8} \\end{pmatrix}",
        True,
    ),
    (
        "\\begin{pmatrix}6 & 8 \\\\ 10 & 12\\end{pmatrix}",
        "\\begin{pmatrix}1 & 2 \\\\ 3 & 4\\end{pmatrix} + \\begin{pmatrix}5 & 6 \\\\ 7 & 8\\end{pmatrix}",
        True,
    ),
    (
        "\\begin{pmatrix}1 & 0 \\\\ 0 & 1\\end{pmatrix}",
        "\\begin{pmatrix}1 & 0 \\\\ 0 & 1\\end{pmatrix} \\begin{pmatrix}1 & 0 \\\\ 0 & 1\\end{pmatrix}",
        True,
    ),
    ("\\begin{pmatrix}1 & 2 \\\\ 3 & 4\\end{pmatrix}", "\\begin{pmatrix}1 & 2 \\\\ 3 & 5\\end{pmatrix}", False),
    ("\\frac{1}{12}", "0.0833333333333333", True),
    ("(1,\\frac{9}{2})", "(1,4.5)", True),
    ("\\frac{x+2}{7}", "\\frac{x}{7}+\\frac{2}{7}", True),
    ("\\tan^2(y)+1", "\\sec^2(y)", True),
    (
        "\\begin{pmatrix}\\frac{1}{3\\sqrt[3]{x}^2}&0&0\\\\0&1&0\\\\-\\sin(x)&0&0\\\\\\end{pmatrix}",
        "\\begin{pmatrix}\\frac{1}{3x^{2/3}}&0&0\\\\0&1&0\\\\-\\sin(x)&0&0\\end{pmatrix}",
        True,
    ),
    ("34x+45y-20z+100=0", "-34x-45y+20z-100=0", True),
    (
        "\\frac{\\sqrt{\\sqrt{11}+\\sqrt{194}}}{15+2\\sqrt{33}}",
        "\\frac{\\sqrt{\\sqrt{11}+\\sqrt{194}}}{2\\sqrt{33}+15}",
        True,
    ),
    ("(a+5)(b+2)", "(+5)(b+2)", False),
    ("2", "\\frac{1+\\sqrt{5}}{2}", False),
    ("4", "\\frac{34}{16}+\\frac{\\sqrt{1358}}{16}", False),
    ("1\\sqrt{19}", "1", False),
    ("x+2n+1", "x+1", False),
    ("[0,1)", "(0, 1)", False),
    ("[-3,2]", "(-\\infty, -3] \\cup [2, \\infty)", False),
    ("16386.20", "\\$16,\\!386.20", True),
    ("12000023", "12,000,023", True),
    ("\\left(\\frac{1}{5},\\frac{1}{6}\\right)", "\\left( \\frac{1}{5}, \\frac{1}{6} \\right)", True),
    ("\\frac{5\\sqrt{42}}{27}", "\\frac{10\\sqrt{10.5}}{27}", True),
    ("20", "20 \\%", True),
    ("[-2, 7]", "x \\in [-2,7]", True),
    ("(\\tfrac{27}{8},\\tfrac{15}{8})", "(0, 0)", False),
    ("(3,1)", "{1,3}", False),
    ("(1,3)", "{1,3}", True),
    ("(-6, 10)", "x \\in (-6, 10)", True),
    ("1112112_3", "1112122_3", False),
    ("\\text{C}", "\\text{(C)}", True),
    ("11111111100", "11,\\! 111,\\! 111,\\! 100", True),
    ("32349", "32,\\! 349", True),
    ("32349", "32, 349", False),
    ("(2, 12) \\cup (12, 102)", "x \\in (2,12) \\cup (12,102)", True),
    ("\\text{E}", "E", True),
    ("1,-2", "-2, 1", True),
    ("-2 \\le x \\le 7", "x \\in [-2,7]", True),
    ("4.123105625617661", "\\sqrt{17}", True),
    ("4", "4\\sqrt{2}", False),
    ("\\frac{1}{3}", "\\frac{1}{3}.", True),
    ("\\frac{1}{3}", "\\frac{1}{3},", True),
    ("\\frac{1}{3}", "\\frac{1}{3} .", True),
    ("\\sqrt{2}", "\\sqrt{2}.", True),
    ("(1,2)", "(1,2).", True),
    ("5", "5 \\text{ cm}.", True),
    ("42", "42.", True),
    ("2", "2^{10}.", False),
    ("1", "1/3.", False),
    ("1, 2, 3", "1, 2, 3, ...", False),
    ("n=2, 3, 4", "n=1, 2, 3", False),
    ("D = (0, 1)", "D = (0, 1.5)", False),
    ("F_n = \\sum_{k=0}^{n-1} F_k F_{n-k-1}", "F_n = \\sum_{k=0}^{n-2} F_k F_{n-k-2}", False),
    ("19, 46, and 82", "19, 46, \\text{ and } 82", True),
    ("19, 46, and 82", "21, 36, and 82", False),
    ("1 - \\frac{1}{\\mathrm{e}}", "1 + \\frac{1}{\\mathrm{e}}", False),
    ("\\pm 2021", "2021", False),
    ("\\pm 2021", "{-2021, 2021}", True),
    ("12:00", "1:00", False),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}", False),
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", False),
    ("40/9", "4 4/9", True),
    ("4", "4 4/9", False),
    ("-40/9", "-4 4/9", True),
    ("71/6", "11 5/6", True),
    ("71/6", "+11 5/6", True),
    ("4/9", "0 4/9", True),
    ("4", "4 0/9", True),
    ("9004/9", "1 000 4/9", True),
    ("4", "4 4/0", False),
    ("11", "11 6/6", False),
    ("12", "11 6/6", False),
    ("10", "11 6/6", False),
    ("73/6", "11 7/6", False),
    ("103/9", "11.0 4/9", False),
    ("103/9", "(11) 4/9", False),
    ("139/90", "11/10 4/9", False),
    ("103/9", "11 + 4/9", True),
    ("95/9", "11 - 4/9", True),
    ("95/9", "11 + 4/9", False),
]
# Pairs that are judged the other way here, and why.
DECIDED = [
    ("1000.99", "1000,99", False, "a comma also separates a list: 1000 and 99"),
    ("1,22", "1.22", False, "a comma also separates a list: 1 and 22"),
    ("2.74", "2,74 $", False, "a comma also separates a list: 2 and 74"),
    ("9", "\n 9 \n", True, "a box may span lines"),
    ("10/9", "\\frac{1}{2} \\$ = \\frac{10}{9}", False, "it says that 1/2 is 10/9"),
    ("x = 11", "x = 5+5+1 = 7 =11", False, "it says that 7 is 11"),
    ("1 = \\zzz = x = 0", "0", False, "a command that nobody knows; the right answer itself says that 1 is 0"),
    (
        "(\\begin{pmatrix}\\frac{1}{3}\\\\ \\frac{1}{5} \\end{pmatrix})",
        "\\begin{pmatrix}0.33\\\\0.2 \\end{pmatrix}",
        False,
        "two digits are not 1/3",
    ),
    ("(\\frac{3}{5},\\frac{8}{3}]", "(0.6,2.6667]", False, "four digits are not 8/3"),
    ("\\frac{1}{3}", "0.3333", False, "four digits are not 1/3; six are"),
    ("x \\in [-2,7]", "-2 \\le x \\le 7", True, "a set means the same in either way"),
    ("\\text{13}", "13", True, "a style does not change a number"),
    (
        "F_n = \\sum_{k=0}^{n-1} F_k F_{n-k-1}",
        "F_n = \\sum_{k=0}^{n-1} F_{n-k-1} F_k",
        False,
        "sums are compared as text: computing them may not end",
    ),
    ("71/6", "11\n5/6", True, "a line break is a space in LaTeX"),
    ("40/900", "4 4/9\\%", False, "the sign is dropped, as in 50\\% for 50, and not computed"),
    ("40/9", "4 4/9\\%", True, "the sign is dropped, as in 50\\% for 50"),
]


@pytest.mark.slow  # seconds of sympy
def test_the_pairs_of_math_verify_are_judged_as_there():
    assert [pair for pair in MATH_VERIFY if means_the_same(pair[0], pair[1]) != pair[2]] == []


def test_the_pairs_of_math_verify_that_are_judged_otherwise_are_so_for_a_reason():
    assert [pair for pair in DECIDED if means_the_same(pair[0], pair[1]) != pair[2]] == []
