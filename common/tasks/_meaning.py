r"""Whether two answers in LaTeX mean the same, in any of the forms that people and models write.

Numbers are compared exactly, here. Everything else is parsed and compared by Math-Verify. Only its LaTeX parser is
used. Of a model's text it passes numerals, and nothing else, to sympy's parser, which evaluates them as Python: their
length is bounded. Answers that could take forever to evaluate, such as
9^(9^9), are compared as text only. There is no time limit here, so scores are the same on every machine, unless
scoring exceeds the worker's limit.

Where Math-Verify is wrong for a reward, the answer is changed before it sees it, or its settings are:

* it takes ``3t`` for 3 tons and so for 3: its list of units is off, and `_quantities.py` reads them;
* it takes two numbers for equal if both round to 0, and decimal numbers if six digits agree: `_precision` says how
  many digits it has to look at, and decimal numbers become fractions;
* it does not know many writings: `_writing.py`;
* it takes 7 = 8 for 8, and the point (2, 1) for the numbers 1 and 2.
"""

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache

import mpmath
import sympy
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.functions.combinatorial.factorials import CombinatorialFunction

from common.tasks._numbers import Number, exact_number, read_number
from common.tasks._quantities import CHANGES, quantity, units_agree
from common.tasks._writing import tidy, with_binomials

# Math-Verify warns that its time limits are off. They use signals, which work only in the main thread.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER_LENGTH = 300  # characters; the longest answer of MATH-500 has 53
MAX_DIGITS = 120  # of a numeral, each of which sympy's parser evaluates as Python; decimals have up to 40
MAX_NESTING = 10  # levels of brackets; parsing takes seconds from 40 on
MAX_SIZE = 10_000  # limit of `_size`; comparisons below it take milliseconds, at worst seconds
SYMBOL_SIZE = 30  # a symbolic expression takes far longer to compare than a number with as many parts
MAX_ROOT, MAX_DEGREE = 100, 50  # of a symbol's power; simplifying larger ones takes minutes
ROUNDED_DECIMALS = 6  # a decimal number with so many digits may stand for a fraction such as 1/3

# Commands allowed in a finished answer. Others, such as sums, integrals, binomials and the gamma function, leave
# something to compute, and Math-Verify would compute it, however long it takes.
_FINISHED = """
frac dfrac tfrac cfrac sqrt cdot times div pm mp left right text textbf mbox mathrm mathbf mathbb begin end circ
infty degree angle overline bar hat vec prime in notin cup cap setminus emptyset varnothing subset subseteq le
leq ge geq lt gt ne neq approx equiv mod pmod land lor ldots dots cdots quad qquad displaystyle big Big bigl
bigr lfloor rfloor lceil rceil lvert rvert vert mid langle rangle to sin cos tan sec csc cot arcsin arccos
arctan sinh cosh tanh log ln exp pi alpha beta delta epsilon varepsilon zeta eta theta kappa lambda mu nu
xi rho sigma tau phi varphi chi psi omega Delta Theta Lambda Sigma Phi Psi Omega
"""
_COMMANDS = frozenset(_FINISHED.split())
_COMMAND = re.compile(r"\\([A-Za-z]+)")
# What Math-Verify would evaluate while parsing, or parse in exponential time.
_UNFINISHED = re.compile(
    r"""
    \|\s*\|\s*\|                          # bars in bars
    | matrix\}\s*\^\s*\{?\s*-             # an inverse to compute
    | \|\s*[_^]                              # a value put in
    | \{[vV]matrix                         # a determinant
    | \d\s*[eE]\s*[+-]?\s*\d{3}            # a number of that many digits
    | ^(?=.*\\begin).*(?:[eE]\W*\^|exp)    # the exponential of a matrix
    | (?:\^\s*(?:\\[A-Za-z]+|\w)\s*){4}   # powers of powers without braces
    | (?:(?:\||vert\b)(?:(?!\||vert\b).)*){9}   # many bars, each of which may open or close
    """,
    re.VERBOSE | re.DOTALL,
)
_LONG_NUMERAL = re.compile(rf"(?:\d(?:[.,](?=\d\d\d))?){{{MAX_DIGITS}}}")
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
)
_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALIZATION)]


def means_the_same(gold: str, answer: str) -> bool:
    """Whether an answer means the same as the right one.

    Args:
        gold: the right answer in LaTeX, without a box. Here a binomial is computed; in `answer` it is unfinished.
        answer: what a model wrote, any text.
    """
    gold, answer = gold.strip(), answer.strip()
    if gold.removesuffix(".") == answer.removesuffix("."):
        return gold.removesuffix(".") != ""
    return max(len(gold), len(answer)) <= MAX_ANSWER_LENGTH and _compared(gold, answer)


# A step compares many completions with one answer, and many of them agree.
@lru_cache(maxsize=4096)
def _compared(gold: str, answer: str) -> bool:
    gold_tidy = with_binomials(tidy(gold), computed=True)
    answer_tidy = with_binomials(tidy(answer), computed=False)
    if not answer_tidy or _contradicts_itself(answer_tidy):
        return False
    if _is_another_kind(gold_tidy, answer_tidy):
        return False
    if _words(gold_tidy) == _words(answer_tidy) or _is_same_quantity(gold_tidy, answer_tidy):
        return True
    return _is_same_option(gold_tidy, answer_tidy)


def _words(latex: str) -> str:
    r"""An answer without \text, and without the capitals of its words; without spaces if it is words alone."""
    if not re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", latex):
        return latex
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", latex)
    text = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{3,}", lambda found: found[0].lower(), text)
    if re.search(r"[\d\\^_]", text):
        return re.sub(r"\s+", " ", text).strip()
    return re.sub(r"[{}\s]", "", text)


# Kinds of answers


_PRIME = re.compile(r"(?<![A-Za-z]{2})(?<!\d)'|(?<=\d)'(?!\d{3})|\\prime(?![A-Za-z])")
_CLOSED_INFINITY = re.compile(r"\[\s*-\s*\\infty(?![A-Za-z])|\\infty\s*\]")


def _is_another_kind(gold: str, answer: str) -> bool:
    """Whether two answers differ in what Math-Verify does not look at."""
    letters = [re.sub(r"\\text\{\s*([A-Z]+)\s*\}|\\text\{[^{}]*\}|[{}\s]", r"\1", text) for text in (gold, answer)]
    if all(re.fullmatch(r"[A-Z]{3,}|[A-Za-z]", text) for text in letters) and letters[0] != letters[1]:
        return True  # BCA is an order, and n is not N
    variables = [set(re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text)) for text in letters]
    lowered = [{name.lower() for name in names} for names in variables]
    if "=" not in gold + answer and variables[0] != variables[1] and lowered[0] == lowered[1]:
        return True
    if len({len(re.findall(r"\\[bp]?mod(?![A-Za-z])", text)) for text in (gold, answer)}) == 2:
        return True
    values = (
        [text.rpartition("=")[2] for text in (gold, answer)] if ("=" in gold) != ("=" in answer) else (gold, answer)
    )
    primes = [len(_PRIME.findall(re.sub(r"\\text\{[^{}]*\}", "", text))) for text in values]
    if primes[0] != primes[1] and (primes[1] or quantity(gold).units not in (("ft",), ("in",))):
        return True
    if len(_CLOSED_INFINITY.findall(gold)) != len(_CLOSED_INFINITY.findall(answer)):
        return True
    if re.search(r"(?<!\{),", answer) and exact_number(gold) and "=" not in answer and not _OPTION.fullmatch(answer):
        core = quantity(answer).core  # 5, 5 is not 5
        return not exact_number(core) and bool(re.fullmatch(r"[^()\[\]]*", core))
    is_set, is_tuple = zip(*((_is_listed_set(text), _is_tuple(text)) for text in (gold, answer)), strict=True)
    if (is_set[0] and is_tuple[1]) or (is_tuple[0] and is_set[1]):
        return True
    return len({bool(re.match(r"\\\{\s*\\\{", text)) for text in (gold, answer)}) == 2


def _is_listed_set(latex: str) -> bool:
    return bool(re.fullmatch(r"\\\{(?!\s*[(\[]).*\\\}", latex, re.DOTALL)) and not re.search(
        r"[|:<>]|\\(?:mid|in|leq|geq)", latex
    )


def _is_tuple(latex: str) -> bool:
    return bool(re.fullmatch(r"\([^()]*,.*\)", latex, re.DOTALL))


# Quantities and options


def _contradicts_itself(latex: str) -> bool:
    """Whether an answer says that two different numbers are equal."""
    if "=" not in latex or "," in latex or ";" in latex:
        return False
    numbers = [exact_number(side) for side in _EQUALS.split(latex)]
    values = {number.value for number in numbers if number is not None}
    return len(values) > 1


def _is_same_quantity(gold: str, answer: str) -> bool:
    """Whether values agree, and units where both have one; 50% is 50 and, if the right answer has the sign, 1/2."""
    right, given = quantity(gold), quantity(answer)
    if not units_agree(right.units, given.units):
        return False
    if given.is_percent and not right.is_percent and (number := exact_number(right.core)) and abs(number.value) < 1:
        return False  # 0.5% is not 0.5
    if (
        not given.units
        and len(right.units) == 1
        and re.fullmatch(rf".*[\d}}]\s*{re.escape(right.units[0])}", given.core)
    ):
        given = given._replace(core=given.core.removesuffix(right.units[0]).strip())  # 5 m, if the right answer has m
    if _is_same_value(right.core, given.core):
        return True
    return right.is_percent and not given.is_percent and _is_same_value(f"\\frac{{{right.core}}}{{100}}", given.core)


# A multiple-choice answer: its letter, and what that letter stands for.
_OPTION = re.compile(r"\(([A-J])\)|([A-J])\)?|(?:\(([A-J])\)|([A-J])[.:)]) (?=[-\d\\$.])(.+)")


def _is_same_option(gold: str, answer: str) -> bool:
    """Whether letters agree, or a value with what the letter stands for: (C) 42 is C and also 42."""
    right, given = _OPTION.fullmatch(gold), _OPTION.fullmatch(answer)
    if right and given:
        letters = [next(filter(None, option.groups())) for option in (right, given)]
        values = [option[5] for option in (right, given) if option[5]]
        return letters[0] == letters[1] and (len(values) < 2 or _is_same_quantity(*values))
    if right and right[5]:
        return _is_same_quantity(right[5], answer)
    return bool(given and given[5] and not right) and _is_same_quantity(gold, given[5])


# Values


_EQUALS = re.compile(r"(?<![<>!\\])=")
_NAMED = re.compile(
    r"^(?P<name>(?:[A-Za-z]|\\[a-z]+|\\text\{[^{}]*\})(?:_\s*(?:\w|\{\w+\}))?'*(?:\([a-zA-Z]\)|\(-?\d{1,3}\))?)\s*=\s*(?P<rest>[^=<>]+)$"
)
# What is asked for, such as x, f(2), AB or x + y; 2x and x^2 are not.
_NAME = re.compile(r"(?:\\[A-Za-z]+|_\s*\w|_\s*\{[^{}]*\}|\([^()]*\)|\\text\{[^{}]*\}|[A-Za-z\s'|{}:+-])+")
_BASED = re.compile(r"(?P<digits>(?=[A-Z]*\d)[0-9A-Z]+)\s*_\s*\{?\s*(?P<base>[2-9]|[12]\d|3[0-6])\s*\}?")
_VARIABLE = re.compile(r"(?<![\\A-Za-z{])(?![ei](?![A-Za-z]))[A-Za-z]")
_RELATION = re.compile(r"[=<>]|\\(?:approx|in|equiv|to|begin|text)(?![A-Za-z])")
_DECIMAL = re.compile(r"(\^?)(?<![\d.])(\d*)\.(\d{1,40})(?![\d.(_])(\s*\^)?")


def _is_same_value(gold: str, answer: str) -> bool:
    """Whether two answers without units have the same value."""
    gold, answer = _by_name(gold, answer)
    right, given = _NAMED.match(gold), _NAMED.match(answer)
    if right and given and right["name"].replace(" ", "") == given["name"].replace(" ", ""):
        return _is_same_value(right["rest"].strip(), given["rest"].strip())
    if right and given and re.search(r"\d\)$", right["name"]):
        return False  # f(2) is not f(3)
    if right and not _EQUALS.search(answer):
        gold = right["rest"].strip()
    if not _EQUALS.search(gold) and "," not in gold + answer and _EQUALS.search(answer):
        # Math-Verify takes 2x = 2 for 2.
        name, *sides = map(str.strip, _EQUALS.split(answer))
        sides += [] if _NAME.fullmatch(name) else [name]
        return all(_is_same_value(gold, side) for side in sides)
    numbers = exact_number(gold), exact_number(answer)
    if None not in numbers:
        return _is_same_number(*numbers)
    if gold == answer and answer:
        return True
    based = [_BASED.fullmatch(text) for text in (gold, answer)]
    if any(based):
        return _is_same_in_base(gold, answer, *based)
    if numbers[0] is not None and _VARIABLE.search(answer) and not _RELATION.search(answer):
        is_in_words = re.search(r"[A-Za-z]{3}", answer)  # 5 apples
        return bool(is_in_words and not CHANGES.search(answer)) and read_number(answer) == numbers[0].value
    if {_has_variables(gold), _has_variables(answer)} == {True, False}:
        return False  # comparing them would take long and find nothing
    return _is_same_expression(gold, answer) or (
        "log" in answer + gold
        and "\\ln" in answer + gold  # a logarithm without a base is often the natural one
        and _is_same_expression(*(re.sub(r"\\log(?!\s*_)(?![A-Za-z])", r"\\ln", text) for text in (gold, answer)))
    )


def _by_name(gold: str, answer: str) -> tuple[str, str]:
    """Values with names, x = 2 and y = 3, as the point (2, 3) in the order of the names, if the other is a point."""
    named = [_assignments(text) for text in (gold, answer)]
    if named[0] and named[1]:
        return (_as_point(named[0]), _as_point(named[1])) if named[0].keys() == named[1].keys() else (gold, answer)
    if named[0] and (_is_tuple(answer) or _is_list(answer)):
        return _as_point(named[0]), answer if _is_tuple(answer) else f"({answer})"
    if named[1] and (_is_tuple(gold) or _is_list(gold)):
        return gold if _is_tuple(gold) else f"({gold})", _as_point(named[1])
    return gold, answer


def _assignments(latex: str) -> dict[str, str]:
    """The values of two or more different names, such as x = 2, y = 3; empty for anything else."""
    inside = latex[1:-1] if _is_tuple(latex) else latex
    parts = [part for part in re.split(r"[,;]|\\text\{\s*and\s*\}|\band\b", inside) if part.strip()]
    found = [re.fullmatch(r"\s*([A-Za-z](?:_\s*\{?\w\}?)?)\s*=\s*([^=<>]+)", part) for part in parts]
    names = [part and part[1].replace(" ", "") for part in found]
    if len(parts) < 2 or None in names or len(set(names)) < len(names):
        return {}
    return {name: part[2].strip() for name, part in zip(names, found, strict=True)}


def _as_point(named: dict[str, str]) -> str:
    return f"({','.join(named[name] for name in sorted(named))})"


def _is_same_in_base(gold: str, answer: str, right: re.Match | None, given: re.Match | None) -> bool:
    """Whether digits agree, of which at least one side says the base."""
    if right and given:
        return right["base"] == given["base"] and right["digits"].lstrip("0") == given["digits"].lstrip("0")
    return (right["digits"] if right else gold) == (given["digits"] if given else answer)


def _is_same_number(first: Number, second: Number) -> bool:
    """Whether two numbers are equal, or one is a fraction without end and the other its first six or more digits."""
    if first.value == second.value:
        return True
    return any(
        _is_precise(rounded)
        and not _ends(whole.value)
        and 10**rounded.decimals * (abs(whole.value) - abs(rounded.value)) < 1
        and 10**rounded.decimals * (abs(rounded.value) - abs(whole.value)) <= Fraction(1, 2)
        and first.value * second.value > 0
        for rounded, whole in ((first, second), (second, first))
    )


def _is_precise(number: Number) -> bool:
    """Whether it has enough decimals, and enough digits that are not leading zeros, to stand for what it rounds."""
    digits = abs(number.value) * 10**number.decimals
    return number.decimals >= ROUNDED_DECIMALS and digits >= 10 ** (ROUNDED_DECIMALS - 1)


def _ends(value: Fraction) -> bool:
    """Whether a number has finitely many decimals."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _is_same_expression(gold: str, answer: str) -> bool:
    """Whether Math-Verify finds two answers equal, or one is the other's first six or more digits."""
    if ("matrix" in gold) != ("matrix" in answer):
        gold, answer = _as_tuple(gold), _as_tuple(answer)
    if answer.startswith("(") and answer.endswith(")") and _is_list(gold):
        gold = f"({gold})"  # the numbers 6, 8 are also the point (6, 8), but not (8, 6)
    right, given = _expressions(gold), _expressions(answer)
    if not right or not given:
        return False
    # Two numbers whose digits differ are told apart by these: sympy may take minutes to do so by its rules. What has a
    # comma may be more than the first expression.
    differ = "," not in gold + answer and _differ(right[0], given[0])
    if not differ and verify(
        right,
        given,
        numeric_precision=_precision(right, given),
        allow_set_relation_comp=True,
        timeout_seconds=None,
    ):
        return True
    for number, other in ((exact_number(gold), given[0]), (exact_number(answer), right[0])):
        if number is not None and _is_precise(number) and _is_near(number, other):
            return True
    return False


def _differ(first: sympy.Basic | sympy.MatrixBase | str, second: sympy.Basic | sympy.MatrixBase | str) -> bool:
    """Whether both are numbers, and different ones in their first 20 digits."""
    if not all(isinstance(side, sympy.Expr) and not side.free_symbols for side in (first, second)):
        return False
    try:
        values = [_complex_number(side.evalf(30)) for side in (first, second)]
    except (TypeError, ValueError, ArithmeticError):  # not a number after all, such as infinity
        return False
    return abs(values[0] - values[1]) > mpmath.mpf(10) ** -20 * max(map(abs, values))


def _complex_number(value: sympy.Expr) -> mpmath.mpc:
    """A sympy number with all its digits.

    Raises:
        TypeError: if it is no number.
    """
    real, imaginary = value.as_real_imag()
    if not (isinstance(real, sympy.Float | sympy.Integer) and isinstance(imaginary, sympy.Float | sympy.Integer)):
        raise TypeError(value)
    with mpmath.workdps(30):
        return mpmath.mpc(mpmath.mpf(str(real)), mpmath.mpf(str(imaginary)))


def _has_variables(latex: str) -> bool | None:
    """Whether an expression has free symbols; None if it is no plain expression, such as an equation or a set."""
    found = _expressions(latex)
    plain = bool(found) and isinstance(found[0], sympy.Expr | sympy.MatrixBase)
    return bool(found[0].free_symbols) if plain else None


def _is_near(number: Number, expression: sympy.Basic | sympy.MatrixBase | str) -> bool:
    """Whether a number is the first digits of an irrational one."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols or not expression.is_real:
        return False
    missing = (expression.evalf(50) - sympy.Rational(number.value)) * 10**number.decimals
    if number.value < 0:
        missing = -missing
    return bool(missing < 1 and missing >= sympy.Rational(-1, 2))


def _as_tuple(latex: str) -> str:
    """A matrix of one column or one row as a point; other texts as they are."""
    found = re.fullmatch(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", latex, re.DOTALL)
    if not found or ("&" in found[1] and "\\\\" in found[1].strip().removesuffix("\\\\ ").removesuffix("\\\\")):
        return latex
    return f"({','.join(part.strip() for part in re.split(r'&|' + re.escape(chr(92) * 2), found[1]) if part.strip())})"


def _is_list(latex: str) -> bool:
    """Whether it is numbers with commas between them, and no point, interval, set or equation."""
    return "," in latex and not re.search(r"[()\[\]=<>]|\\[{}]|\\text|\\begin|\\(?:in|leq|geq|pm)(?![A-Za-z])", latex)


def _precision(right: list, given: list) -> int:
    """Digits that tell two numbers apart, however small they are: Math-Verify drops what is below their last one."""
    bits = max(_size(part) for part in (*right, *given) if not isinstance(part, str))
    return 50 + int(min(bits, MAX_SIZE) * math.log10(2))


@lru_cache(maxsize=4096)
def _expressions(latex: str) -> list:
    """What Math-Verify parses from an answer; empty if it is not a finished answer of reasonable size."""
    if _nesting(latex) > MAX_NESTING:
        return []
    if _UNFINISHED.search(latex) or _LONG_NUMERAL.search(latex) or not _COMMANDS.issuperset(_COMMAND.findall(latex)):
        return []
    exact = _DECIMAL.sub(_as_fraction, latex)
    found = parse(f"\\boxed{{{exact}}}", _EXTRACTION, extraction_mode="first_match", parsing_timeout=None)
    is_small = all(isinstance(part, str) or _size(part) <= MAX_SIZE for part in found)
    return found if is_small and not all(isinstance(part, str) for part in found) else []


def _as_fraction(found: re.Match) -> str:
    """A decimal number as a fraction, since Math-Verify rounds decimal numbers."""
    power, whole, decimals, raised = found.groups()
    fraction = f"\\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}"
    if power:
        return f"^{{{fraction}}}{raised or ''}"
    return f"({fraction}){raised}" if raised else fraction


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _size(expression: sympy.Basic | sympy.MatrixBase) -> float:
    """Roughly the bits of an expression once it is evaluated; for 9^(9^9) more than fits in memory."""
    if isinstance(expression, sympy.MatrixBase):
        return sum(map(_size, expression))
    if isinstance(expression, sympy.Rational):
        return expression.p.bit_length() + expression.q.bit_length()
    if isinstance(expression, sympy.Float):
        return 1 + abs(mpmath.mag(expression.num)) if expression else 1
    if not expression.args:
        return SYMBOL_SIZE
    if isinstance(expression, sympy.Pow) and not expression.exp.free_symbols:
        base, exponent = expression.args
        if not isinstance(exponent, sympy.Rational):
            return _size(base) * 2.0 ** min(_size(exponent), 100)
        if base.free_symbols and (exponent.q > MAX_ROOT or abs(exponent) > MAX_DEGREE):
            return math.inf
        num_terms = max(1, len(base.args))  # (x + y)^n expands to many more
        return _size(base) * max(1.0, abs(float(exponent)) * num_terms**2)
    total = sum(map(_size, expression.args))
    if isinstance(expression, sympy.factorial) and expression.args[0].is_Integer and total < 20:
        return 1 + math.lgamma(abs(int(expression.args[0])) + 1) / math.log(2)
    if (
        isinstance(expression, sympy.exp | sympy.sinh | sympy.cosh | CombinatorialFunction)
        and not expression.free_symbols
    ):
        return 2.0 ** min(total, 100)
    is_sum = isinstance(expression, sympy.Add | sympy.Mul | sympy.Set | sympy.Tuple | sympy.core.relational.Relational)
    return total if is_sum else 2 * total
