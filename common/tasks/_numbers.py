r"""Numbers as people and models write them, read exactly: ``9,500``, ``- 5``, ``2\frac{1}{2}``, ``1.5e3``, ``$4``.

Reading is careful: what could also mean another number is not read. The text is untrusted, and nothing is evaluated
but one fraction or power; length and exponents are bounded, so every text takes microseconds.
"""

import math
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from common.tasks._arithmetic import evaluate

MAX_CHARACTERS = 500  # of a text that should hold one number
TAIL_CHARACTERS = 2000  # where the last number of a text is looked for
MAX_EXPONENT = 60  # of a power of ten
MAX_POWER = 10**6  # a larger power of another base is a sum to do, not an answer


class Number(NamedTuple):
    """A number that was read.

    Attributes:
        value: its exact value.
        decimals: digits after the point; 0 for fractions, powers and whole numbers.
    """

    value: Fraction
    decimals: int


# Characters that stand for others. Full-width and other digits stay: a model that writes them is not understood.
_DASHES = "\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{SMALL HYPHEN-MINUS}"
_SPACES = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t"
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
_VULGAR = [chr(code) for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))]
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
CHARACTERS = {
    **dict.fromkeys(map(ord, _DASHES), "-"),
    **dict.fromkeys(map(ord, _SPACES), " "),
    **dict.fromkeys(map(ord, _INVISIBLE), ""),
    **{ord(each): " " + unicodedata.normalize("NFKC", each).replace("\u2044", "/") + " " for each in _VULGAR},
    **{ord(each): f"^{power}" for power, each in enumerate(_RAISED)},
    ord("\u2044"): "/",
    ord("\N{RIGHT SINGLE QUOTATION MARK}"): "'",
}
_SIGNS = CHARACTERS | {
    **dict.fromkeys(map(ord, "\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}\N{DOT OPERATOR}\N{BULLET OPERATOR}"), "*"),
    ord("\N{DIVISION SIGN}"): "/",
    ord("\N{ALMOST EQUAL TO}"): "=",
    ord("\N{DEGREE SIGN}"): " degrees ",
}

CURRENCIES = "$\u20ac\u00a3\u00a5\u20b9\u20bd\u20a9\u20ba"
_STYLE_NAMES = """
boxed fbox text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf mathtt mathnormal
boldsymbol bm mbox hbox emph underline
"""
STYLES = _STYLE_NAMES.split()
_DECLARATION_NAMES = """
bf it rm sf tt em bfseries itshape displaystyle textstyle tiny small normalsize large Large LARGE huge Huge
"""
DECLARATIONS = _DECLARATION_NAMES.split()
_STYLE = re.compile(rf"\\(?:{'|'.join(STYLES)}|operatorname)\s*\{{([^{{}}]*)\}}")
_PART = r"\{\s*([-+]?)\s*([\d.,]+)\s*\}|()(\d)"
_FRACTION = re.compile(rf"\\[dtc]?frac\s*(?:{_PART})\s*(?:{_PART})")
# LaTeX and Markdown that changes how a number looks, in the order in which it is replaced.
_LOOKS = [
    (re.compile(r"(?:\\text)?\{,\}(?:\\!)?|,\s*\\!\s*"), ","),
    (re.compile(r"\\!|\\left(?![a-z])|\\right(?![a-z])"), ""),
    (re.compile(rf"\\(?:[,;: ]|q?quad(?![a-z])|(?:{'|'.join(DECLARATIONS)})(?![A-Za-z]))|~"), " "),
    (re.compile(r"\\(?=[%$#&_])"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-z])"), " degrees "),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-z])"), "*"),
    (re.compile(r"\\div(?![a-z])"), "/"),
    (re.compile(r"\\approx(?![a-z])"), "="),
    (re.compile(r"(?<![\w)*])\*\*(?=\S)([^*\n]+)\*\*(?![\w(*])|(?<!\w)__(?=\S)([^_\n]+)__(?!\w)"), r" \1\2 "),
    (
        re.compile(r"(?:^|(?<=[A-Za-z:=]\s))([*_]{1,3})(?=[^\s*_])([^*_\n]+)(?<=\S)\1(?=[\s.,]|$)", re.MULTILINE),
        r" \2 ",
    ),  # *5*
    (re.compile(r"(?<=\d)\*\*(?=[-+]?\d)"), "^"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)"), "*"),
    (re.compile(r"(?<!\w)'([-+]?\d[\d.,]*)'(?!\w)"), r" \1 "),
    (re.compile(r"(?<=\d)\s*([ap])\.\s?m\b\.?"), r" \1m "),
    (re.compile(rf"([{CURRENCIES}]\s*\d[\d.,]*)\s*m(?![A-Za-z])"), r"\1 million "),  # $5m are no meters
    (re.compile(r"</?[A-Za-z][^<>\n]*>"), "\n"),
    (re.compile(r"`|\\[()\[\]]"), " "),
    (re.compile(rf"(?<=\d)\s*[{CURRENCIES}](?=\d)"), " | "),  # 4$50 is not 450
    (re.compile(rf"(?<=[A-Za-z])[{CURRENCIES}]|\b(?:USD|EUR|GBP|INR|Rs\.?)(?=\s*\d)"), " "),
    (re.compile(rf"[{CURRENCIES}]"), ""),
    (re.compile(r"%"), " percent "),
    (re.compile(r"\^\s*(?:\{\s*([-+]?\d+)\s*\}|\(\s*([-+]?\d+)\s*\))"), r"^\1\2"),
    (re.compile(r"(?<![\w}^/])\{\s*([-+]?[\d.,]+)\s*\}"), r"\1"),
    (re.compile(r"\b(?:negative|minus)\s+(?=[\d.])", re.IGNORECASE), "-"),
]

_GROUPS = r"[1-9]\d{0,2}(?:(?:,\d{3})+|(?:[ ]\d{3})+|(?:_\d{3})+|(?:'\d{3})+)(?!,?\d)"
_WHOLE = rf"(?:{_GROUPS}|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    rf"""
    (?P<whole>{_WHOLE})(?:\ +|\ +and\ +)(?P<top>\d+)\ ?/\ ?(?P<bottom>\d+)(?![\d.,]*\d)
    | (?P<over>{_DECIMAL})\ */\ *(?P<under_sign>[-+]?)(?P<under>{_DECIMAL})
    | (?P<mantissa>{_DECIMAL})(?:\ *\*\ *10\ *\^\ *|[eE])(?P<ten>[-+]?\d{{1,3}})(?![\d.])
    | (?P<base>{_DECIMAL})\ *\^\ *(?P<exponent>[-+]?\d{{1,3}})(?![\d.])
    | (?P<plain>{_DECIMAL})
    """,
    re.VERBOSE | re.ASCII,
)
_SIGNED = re.compile(rf"(?P<sign>(?:[-+]\s*)?)(?P<number>{_NUMBER.pattern})", re.VERBOSE | re.ASCII)

# Words before a number that take it back, and words after it that change it.
_HEDGE = re.compile(
    r"\b(?:isn't|than|least|most|under|over|below|above|between|nearly|almost|up to|except|instead of)\s+[-+]?\s*$"
    r"|\b(?:not|no|never|neither|nor|without|cannot|[a-z]+n't)(?:\s+[a-z]+){0,3}\s+[-+]?\s*$",
    re.IGNORECASE,
)
_CHANGED = re.compile(
    r"\b(?:tens|hundreds?|thousands?|millions?|billions?|trillions?|dozens?|gross|mil|mill|mn|mln|bn|bln|tn|grand"
    r"|lakhs?|lacs?|crores?|doz|half|halves|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?"
    r"|tenths?|twelfths?|hundredths?|thousandths?|millionths?|squared|cubed|factorial|mod|modulo|or|and a quarter"
    r"|pi|below|at (?:most|least|best|worst)"
    r"|wrong|incorrect|false|impossible|cannot|can't|(?:is|are|was|were)(?:\s+(?:not|never)|n't))\b"
    r"|^\W*(?:not|never|minus|plus)\b|\b(?:not|n't|never)\s+(?:[a-z]+\s+)?(?:right|correct|true|it|possible)\b",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*[*\N{BULLET}]\s+")
_UNIT_POWER = re.compile(r"(?:(?<=[A-Za-z]{2})|(?<=\d m)|(?<=\dm))\s?\^\s?\{?\d\}?")  # cm^2
# A command that is left, a relation or a root: no plain number.
_EXPRESSION = re.compile(r"\\[A-Za-z]|[<>\u2260\u2264\u2265\u00b1\u221a\u221b]")
# What follows a number that is part of a larger expression: an operator, a parenthesis without words, a variable.
_OPERATION = re.compile(
    r"[\s)\]]*(?:[+*/^<>|~\\_{\[!\u0370-\u03ff]|-(?!\s+[A-Za-z]{2})|\((?!\s*[A-Za-z]{2})"
    r"|(?![aghlmsL])[A-Za-z](?![A-Za-z])|\.\.)|\."
)
# The only letters that may touch a number: 5cm and 5th, but neither 5x nor 5k.
_TOUCHING_WORDS = """
mm cm dm m km g kg mg lb lbs oz ft in yd yds mi ml mL cl l L mph kph kmh hr hrs h min mins sec secs am pm yr yrs
wk wks KB MB GB TB Wh kWh kW st nd rd th degrees percent
"""
_TOUCHING = frozenset(_TOUCHING_WORDS.split())
_COMPOUND = re.compile(  # 5-hour
    r"-(?:second|minute|hour|day|week|month|year|inch|foot|mile|meter|kilometer|acre|ounce|pound|gallon|liter|dollar"
    r"|cent|page|piece|point|person)\b"
)
# 5 apples for 3 kids: the second number belongs to a phrase that follows a noun.
_PHRASE = re.compile(
    r"\s+(?:(?!(?:per|every|each|with|an?|times)\s)[A-Za-z]{2,}\s+){1,3}?(?:for|in|after|during)\s+(?:the\s+)?"
    r"|\s+of\s+the\s+|\s+(?:[A-Za-z]{2,}\s+)?(?:left|remaining)\s+(?:from|of|out of)\s+(?:the\s+)?"
)
_ANNOTATION = re.compile(r"<<[^<>]*>>")  # 16 - 7 = <<16-7=9>>9 in the solutions of GSM8K
_ARROW = re.compile(r"^\s*(?:=+>|-+>|[\u2192\u21d2]|\\(?:implies|[Rr]ightarrow)(?![A-Za-z]))")
_NEGATED = re.compile(r"-\s*\(\s*(\d[\d.,]*)\s*\)")
_ROOT = re.compile(r"(-?)\s*(?:\\sqrt\s*(?:\{\s*(\d{1,12})\s*\}|(\d))|\u221a\s*(\d{1,12}))\.?")
_PARTS = re.compile(r"(?P<before>.*\d\s+[A-Za-z].*\S)\s*\((?P<parts>[^()]*)\)\.?", re.DOTALL)
_PART_LIST = re.compile(
    r"\s*\d{1,9}(?:\s+[A-Za-z]+){1,3}(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+|\s*\+\s*)\d{1,9}(?:\s+[A-Za-z]+){1,3})+\s*"
)


def plain_text(text: str) -> str:
    r"""A text without the LaTeX, Markdown and typography that change how a number looks but not what it is.

    Args:
        text: at most a few thousand characters.

    Returns:
        Numbers in it are digits with `.`, `,`, `/`, `^`, `*` and a sign; other commands stay as they are.
    """
    text = text.translate(_SIGNS)
    for _ in range(4):  # styles inside styles
        text, count = _STYLE.subn(r" \1 ", text)
        if not count:
            break
    for pattern, replacement in _LOOKS:
        text = pattern.sub(replacement, text)
    return _FRACTION.sub(_slashed, text)


def exact_number(text: str) -> Number | None:
    """The number that a text is, without any word beside it; None if it is something else."""
    found = _SIGNED.fullmatch(plain_text(text).strip()) if len(text) <= MAX_CHARACTERS else None
    return found and _value(found)


def read_number(text: str) -> Fraction | None:
    """The number that a short text gives as its answer; None if there is none, or more than one may be meant.

    Units, currencies, emphasis and a few words around it are no fault: ``It is **$9,500**.`` An equation gives its
    right side, ``x = 5`` and ``6 * 7 = 42``, unless its sides differ. Text that goes on after the number is not read
    as a second one in ``5 apples for 3 kids`` or ``5 apples (2 red and 3 green)``; but ``5 or 6``, ``5 apples per 2
    days``, ``5 is wrong`` and ``5 million`` are no number.

    Args:
        text: what stands between the tags; longer than 500 characters is not read.
    """
    text = text.strip().removeprefix("####")
    if len(text) > MAX_CHARACTERS:
        return None
    text = _ARROW.sub("", _ANNOTATION.sub("", text).translate(_SIGNS))
    sides = [side.strip() for side in re.split(r"(?<![<>!])=", plain_text(text))]
    if not all(sides[1:]):  # 5 =
        return None
    numbers = [number for number in map(_number_in_words, sides) if number is not None]
    values = numbers + [value for value in map(_sum, sides) if value is not None]
    if not numbers or any(value != values[0] for value in values):
        return None
    return numbers[-1]


def last_number(text: str) -> Fraction | None:
    """The last number of a text, whatever it is; None without one."""
    text = plain_text(text[-TAIL_CHARACTERS:])
    last = None
    for found in _NUMBER.finditer(text):
        before = text[: found.start()]
        if before[-1:].isalpha() or before[-1:] == "_":  # x5, H2O
            continue
        number = _value(found)
        if re.match(r"!(?!=)", text[found.end() : found.end() + 2]):  # a factorial
            last = None
        elif number is not None:
            is_negative = before.endswith("-") and not (before[-2:-1].isalnum() or before[-2:-1] == ")")
            last = -number.value if is_negative else number.value
    return last


def _slashed(found: re.Match) -> str:
    """A LaTeX fraction of two numbers as top/bottom, with one sign in front."""
    top_sign, top, _, top_digit, bottom_sign, bottom, _, bottom_digit = (part or "" for part in found.groups())
    sign = "-" if (top_sign == "-") != (bottom_sign == "-") else ""
    space = "" if found.string[: found.start()].endswith(("-", "+")) else " "
    return f"{space}{sign}{top or top_digit}/{bottom or bottom_digit} "


def _number_in_words(text: str) -> Fraction | None:
    """The number that words around it do not change; None if there is none, or more than one may be meant."""
    text = _NEGATED.sub(r"-\1", text) if _NEGATED.fullmatch(text) else text
    root = _ROOT.fullmatch(text)
    if root:
        square = int(root[2] or root[3] or root[4])
        size = math.isqrt(square)
        return Fraction(-size if root[1] else size) if size * size == square else None
    parts = _PARTS.fullmatch(text)
    if parts and _PART_LIST.fullmatch(parts["parts"]):  # 5 apples (2 red and 3 green)
        total = _number_in_words(parts["before"])
        return total if total == sum(map(int, re.findall(r"\d+", parts["parts"]))) else None
    text = _UNIT_POWER.sub("", _BULLET.sub("", text))
    if _EXPRESSION.search(text):
        return None
    found = list(_SIGNED.finditer(text))
    if not found:
        return None
    first = found[0]
    if len(found) > 1 and not _PHRASE.fullmatch(text[first.end() : found[1].start()]):
        return None
    before, after = text[: first.start()], text[first.end() :]
    if not _may_precede(before, first["sign"]) or not _may_follow(after):
        return None
    number = _value(first)
    return number and number.value


def _may_precede(before: str, sign: str) -> bool:
    if before[-1:].isalnum() or before[-1:] in ("_", "\\", "^", ".", "{"):
        return False
    if _HEDGE.search(before) or (sign and re.search(r"(?<![A-Za-z])[A-Za-z]\s*$", before)):  # not 5, x -5
        return False
    last = before.rstrip()[-1:]
    if sign and (sign != sign.strip() or before[-1:] == last):  # "- 5" and "(-5": not after a word
        return last == "" or last in ":([\"',;"
    return last not in tuple("-+*/^<>|~\\_{")


def _may_follow(after: str) -> bool:
    touching = re.match(r"[A-Za-z]+", after)
    if (touching and touching[0] not in _TOUCHING) or after.startswith(("!", "'", "{", "_")):
        return False
    after = _COMPOUND.sub(" ", after, count=1) if _COMPOUND.match(after) else after
    return not _OPERATION.match(after) and not _CHANGED.search(after)


def _sum(text: str) -> Fraction | None:
    """The value of a side of an equation that is arithmetic: 6 * 7."""
    try:
        return evaluate(text).value
    except ValueError:
        return None


def _value(found: re.Match) -> Number | None:
    """The value of a match of a number; None for a division by zero, a mixed number of 3 7/2, or a huge power."""
    groups = found.groupdict()
    sign = -1 if (groups.get("sign") or "").strip() == "-" else 1
    if groups["whole"]:
        whole, top, bottom = (_digits(groups[name]) for name in ("whole", "top", "bottom"))
        return Number(sign * (whole + top / bottom), 0) if top < bottom else None
    if groups["over"]:
        top, bottom = _digits(groups["over"]), _digits(groups["under"])
        if groups["under_sign"] == "-":
            bottom = -bottom
        return Number(sign * top / bottom, 0) if bottom else None
    if groups["mantissa"]:
        exponent = int(groups["ten"])
        value = _digits(groups["mantissa"]) * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
    elif groups["base"]:
        value = _power(_digits(groups["base"]), int(groups["exponent"]))
        sign = sign if value is None or sign == 1 else -1  # -2^2 is -4
    else:
        decimals = groups["plain"].partition(".")[2]
        return Number(sign * _digits(groups["plain"]), len(decimals))
    return None if value is None else Number(sign * value, 0)


def _digits(text: str) -> Fraction:
    return Fraction("0" + re.sub(r"[ ,_']", "", text).removesuffix("."))


def _power(base: Fraction, exponent: int) -> Fraction | None:
    if base == 0 or abs(exponent) > MAX_EXPONENT:
        return None
    value = base**exponent
    return value if base == 10 or 1 / MAX_POWER <= value <= MAX_POWER else None
