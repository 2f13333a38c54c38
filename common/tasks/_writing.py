r"""One way of writing for what LaTeX, Markdown and typography can write in many: styles, sizes, spaces, symbols.

Math-Verify does not know ``90°``, ``x \geqslant 3``, ``0.\overline{3}``, ``2*pi``, ``0.5i`` and many styles of text,
or reads them as something else. So an answer is rewritten here before it is compared.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache

from common.tasks._numbers import CHARACTERS, DECLARATIONS, STYLES
from common.tasks._places import closing_brace
from common.tasks._quantities import LETTERS, UNITS

MAX_BINOMIAL = 500  # of the upper number, in the data's answers

_SYMBOLS = CHARACTERS | {
    ord(character): f"\\{command} "
    for character, command in {
        "\N{MULTIPLICATION SIGN}": "times", "\N{MIDDLE DOT}": "cdot", "\N{DOT OPERATOR}": "cdot",
        "\N{DIVISION SIGN}": "div", "\N{INFINITY}": "infty", "\N{LESS-THAN OR EQUAL TO}": "leq",
        "\N{GREATER-THAN OR EQUAL TO}": "geq", "\N{NOT EQUAL TO}": "neq", "\N{ALMOST EQUAL TO}": "approx",
        "\N{UNION}": "cup", "\N{INTERSECTION}": "cap", "\N{ELEMENT OF}": "in", "\N{EMPTY SET}": "emptyset",
        "\N{PLUS-MINUS SIGN}": "pm", "\N{GREEK SMALL LETTER PI}": "pi", "\N{GREEK SMALL LETTER THETA}": "theta",
        "\N{GREEK SMALL LETTER ALPHA}": "alpha", "\N{GREEK SMALL LETTER BETA}": "beta",
        "\N{LATIN CAPITAL LETTER O WITH STROKE}": "emptyset", "\N{SQUARE ROOT}": "sqrt",
    }.items()
} | {
    ord("\N{DEGREE SIGN}"): "^\\circ ",
    **{ord(sign): f"\\mathbb{{{letter}}}"
       for sign, letter in zip("\u211d\u2124\u2115\u211a\u2102", "RZNQC", strict=True)},
    **{code: f" \\frac{{{text.strip().split('/')[0]}}}{{{text.strip().split('/')[1]}}}"
       for code, text in CHARACTERS.items() if "/" in text.strip()[1:]},
}  # fmt: skip
# Styles of mathematics; the others are of words.
_LOUD = ("boxed", "fbox", "underline", "boldsymbol", "bm", "emph")
_STYLE = re.compile(rf"\\(?P<style>{'|'.join(STYLES)}|operatorname)\s*\{{(?P<inside>[^{{}}]*)\}}")
_OPENING = re.compile(rf"\\(?:{'|'.join(STYLES)})\s*\{{")
_SQUARED = re.compile(r"(?<=[\d ])([cdkm]?m)([\N{SUPERSCRIPT TWO}\N{SUPERSCRIPT THREE}])|(?<=\d )(m)(\^[23])$")
_UNIT_POWER = re.compile(r"(?<=[a-z])\^\{-?(\d)\}(?=[^{}]*\})")  # in a style, whose braces may hold no others
_UNIT_FRACTION = re.compile(
    rf"\\[dt]?frac\s*\{{\s*\\(?:{'|'.join(STYLES)})\{{([^{{}}]*)\}}\s*\}}"
    rf"\s*\{{\s*\\(?:{'|'.join(STYLES)})\{{([^{{}}]*)\}}(\^\d)?\s*\}}$"
)
_LETTER_UNIT = rf"[{''.join(sorted(LETTERS))}]"
_COMPOUND_UNIT = re.compile(
    rf"\s*(?:[a-z]{{0,2}}{_LETTER_UNIT}(?:\^\d)?)(?:\s*/\s*[a-z]{{0,2}}{_LETTER_UNIT}(?:\^\d)?)?\s*"
)
# What may stand between a number and its unit.
_AFTER_NUMBER = re.compile(r"[\d})/\2](?:\\[,;: !]|\\q?quad|~|\s|\\cdot)*$")
_COUNTED = re.compile(r"\s*(-?\d[\d.,/]*)\s+([A-Za-z][^\d]*)")
_SIZED = re.compile(rf"\\(?:{'|'.join(DECLARATIONS)})(?![A-Za-z])")
_BASES = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_REPLACED = [
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
    (re.compile(r",\s*\\!\s*"), ","),
    (re.compile(r"\\(?:[,;: ]|(?:q?quad|enspace|thinspace)(?![A-Za-z]))|~|\s+"), " "),
    (re.compile(r"\\!|\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|\\(?:limits|nolimits)(?![A-Za-z])"), ""),
    (re.compile(r"\\[()]|\\[\[\]]|`"), ""),
    (re.compile(r"\*\*(?=\S)([^*]+)\*\*(?![\w(])|(?<!\w)__(?=\S)([^_]+)__(?!\w)"), r"\1\2"),
    (re.compile(r"\\(?:[dtcsx]|nice)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\^\s*-\s*(\d+|[a-z](?![A-Za-z]))"), r"^{-\1}"),
    (re.compile(r"(?<=\d)\s*\^\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?"), ""),
    (re.compile(r"\\[hv]space\*?\s*\{[^{}]*\}"), " "),
    (re.compile(r"\0\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm)\s*\]"), "\0"),
    (re.compile(r"\bUS(?=\s*\\?\$\s*\d)"), ""),
    (re.compile(r"\\euro?(?![A-Za-z])(?:\{\})?"), "\N{EURO SIGN}"),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])(?:\{\})?"), "\N{POUND SIGN}"),
    (re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)"), r"\\times "),
    (re.compile(r"^\s*(?:\\text\{)?\s*all real(?: number)?s?\s*\}?\s*$", re.IGNORECASE), r"\\mathbb{R}"),
    (
        re.compile(rf"_\s*\{{?\s*\\text\{{\s*({'|'.join(_BASES)})\s*\}}\s*\}}?"),
        lambda found: f"_{{{_BASES.index(found[1]) + 2}}}",
    ),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\geqslant(?![A-Za-z])|\\ge(?![A-Za-z])|>="), r"\\geq "),
    (re.compile(r"\\leqslant(?![A-Za-z])|\\le(?![A-Za-z])|<="), r"\\leq "),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\ast(?![A-Za-z])|(?<!\*)\*(?!\*)"), r"\\cdot "),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"(?<![\\A-Za-z{])(pi|theta|alpha|beta|infinity|sqrt|sin|cos|tan|ln|log)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\infinity"), r"\\infty"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*(\d{2,})"), r"\\sqrt{\1}"),  # as it is meant; LaTeX would take one digit
    (re.compile(r"^\s*(?:\\(?:approx|therefore|Rightarrow|implies|Longrightarrow)(?![A-Za-z])|=)"), ""),
    (re.compile(r"(?<=\d)i(?![A-Za-z])"), " i"),
    # Digits in groups of three: 10{,}000 and 10 000. A comma alone may also separate two numbers of a list.
    (re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:\{,\}\d{3})+(?!\d)"), lambda found: found[0].replace("{,}", "")),
    (re.compile(r"(?<![\d.,])(?<!\d )[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?\d)"), lambda found: found[0].replace(" ", "")),
    (
        re.compile(r"(\d*)\.(\d*)(?:\\(?:overline|bar)\{(\d+)\}|\\dot\{(\d)\}|\((\d+)\))"),
        lambda found: _repeating(*found.groups()),
    ),
]
_PREAMBLE = re.compile(
    r"^(?:\\text\{)?\s*(?:so|thus|hence|therefore)?,?\s*(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is)?\s*[:=]?\s*\}?\s*(?=\S)"
    r"|^(?:\\text\{)?\s*(?:choice|option)\s+(?:\})?\s*(?=\(?[A-J]\b)"
    r"|^\\text\{\s*there (?:are|is)\s*\}\s*(?=\d)|^there (?:are|is)\s+(?=\d)",
    re.IGNORECASE,
)


@lru_cache(maxsize=4096)
def tidy(latex: str) -> str:
    """An answer in one way of writing: without styles, sizes and delimiters, with one name per command."""
    latex = _SQUARED.sub(r"\\text{\1\3}\2\4", latex)
    latex = _UNIT_FRACTION.sub(r"\\text{\1/\2\3}", _UNIT_POWER.sub(r"^\1", latex))
    latex = latex.translate(_SYMBOLS).replace("\\\\", "\0")  # the end of a row of a matrix is no command
    for _ in range(4):  # styles inside styles
        latex, count = _STYLE.subn(_unstyled, latex)
        if not count:
            break
    latex = _without_large_styles(latex)
    latex = _SIZED.sub(" ", latex).replace("\1", "\\text{").replace("\2", "}")
    if latex.endswith("\\"):
        latex = latex[:-1]  # of a space at the end
    for pattern, replacement in _REPLACED:
        latex = pattern.sub(replacement, latex)
    latex = _PREAMBLE.sub("", latex.strip())
    latex = re.sub(r"(?<!\\)\$", "", latex).strip().rstrip(".;,").strip()
    while latex.startswith("{") and closing_brace(latex, 1) == len(latex) - 1:
        latex = latex[1:-1].strip()
    # Math-Verify takes a line break before a letter for a command.
    return re.sub(r" {2,}", " ", latex).replace("\0", "\\\\ ")


def _unstyled(found: re.Match) -> str:
    r"""What is in a style: words stay in \text, between \1 and \2 for now, and so do units such as m."""
    inside = found["inside"]
    if found["style"] == "operatorname" and inside.strip() not in UNITS:
        return found[0]
    if counted := _COUNTED.fullmatch(inside):
        return f" {counted[1]} \1 {counted[2]}\2"
    is_unit = _COMPOUND_UNIT.fullmatch(inside) and _AFTER_NUMBER.search(found.string[: found.start()])
    is_word = found["style"] not in _LOUD and re.search(r"[A-Za-z]{2}|[a-z]\.[a-z]\.", inside) and "\1" not in inside
    return f"\1{inside}\2" if is_unit or is_word else f" {inside} "


def _without_large_styles(latex: str) -> str:
    """A text without the styles that are left: those around LaTeX with braces of its own."""
    while style := _OPENING.search(latex):
        end = closing_brace(latex, style.end())
        end = len(latex) if end is None else end
        latex = f"{latex[: style.start()]} {latex[style.end() : end]} {latex[end + 1 :]}"
    return latex


def _repeating(whole: str, start: str, *repeated: str | None) -> str:
    """A decimal number whose last digits repeat for ever, as a fraction."""
    cycle = next(filter(None, repeated))
    fraction = Fraction(
        int(whole + start + cycle) - int("0" + whole + start), 10 ** len(start) * (10 ** len(cycle) - 1)
    )
    return f"\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}"


def with_binomials(latex: str, *, computed: bool) -> str:
    """An answer with its binomials written out, those of two numbers only if they are to be computed."""

    def written_out(found: re.Match) -> str:
        upper, lower = found[1].strip(), found[2].strip()
        if upper.isdecimal() and lower.isdecimal():
            return str(math.comb(int(upper), int(lower))) if computed and int(upper) <= MAX_BINOMIAL else found[0]
        if not (lower.isdecimal() and 0 < int(lower) <= 5) or upper.isdecimal():
            return found[0]
        factors = "\\cdot ".join(f"({upper}-{number})" for number in range(int(lower)))
        return f"\\frac{{{factors}}}{{{math.factorial(int(lower))}}}"

    return re.sub(r"\\binom\s*\{([^{}]{1,9})\}\s*\{([^{}]{1,9})\}", written_out, latex)
