"""Exact value of an arithmetic expression that a model wrote: ``+ - * /``, signs, parentheses, decimal numbers.

The text is untrusted. It never reaches Python's `eval`; there is no power operator, and length, nesting and size of
numbers are bounded. So every input gives a value or a ValueError within a millisecond.
"""

import re
from fractions import Fraction
from typing import NamedTuple

# Generous for Countdown (six numbers of a few digits need under 60 characters), small enough to be harmless.
MAX_CHARACTERS = 200
MAX_DIGITS = 15
MAX_DEPTH = 20
MAX_WRITTEN = 500  # characters of an expression with LaTeX in it

# Characters and commands that stand for an operator or a parenthesis, or for nothing at all.
_MEANINGS = str.maketrans(
    {
        **dict.fromkeys(
            "\N{MULTIPLICATION SIGN}\N{MIDDLE DOT}\N{DOT OPERATOR}\N{BULLET OPERATOR}\N{ASTERISK OPERATOR}\N{BULLET}"
            "\N{MULTIPLICATION X}\N{HEAVY MULTIPLICATION X}\N{VECTOR OR CROSS PRODUCT}",
            "*",
        ),
        **dict.fromkeys("\N{DIVISION SIGN}\N{DIVISION SLASH}\N{FRACTION SLASH}", "/"),
        **dict.fromkeys("\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff"),
    }
)
_BRACKETS = str.maketrans("[{]}", "(())")
_PAIRS = {")": "(", "]": "[", "}": "{"}
_WRAPPERS = (("**", "**"), ("\\(", "\\)"), ("\\[", "\\]"))
_LATEX = [
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:left|right|[,;:! ])"), " "),
    (re.compile(r"(?<=[\d)\]}])\s*[xX]\s*(?=[\d(\[{])"), "*"),
]
# A fraction without fractions inside. After a number it may mean a mixed number or a product, and stays.
_FRACTION = re.compile(r"(?<![\d\s])(\s*)\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d)(?!\d))")
_TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|[-+*/()]")
_SPACE = " \t\r\n"


class Arithmetic(NamedTuple):
    """An evaluated expression.

    Attributes:
        value: its exact value.
        numbers: the numbers in it, in order of appearance, without their signs.
    """

    value: Fraction
    numbers: list[Fraction]


def plain_expression(text: str) -> str:
    r"""An expression in the characters that `evaluate` knows, from one as people write it.

    Signs such as ``\times`` and ``\div``, fractions in LaTeX, square brackets and braces that match, all kinds of
    spaces, a point after a whole number, and what is put around an expression: quotes of code, dollars, bold, a full
    stop. Whatever else it holds stays, and is refused.

    Args:
        text: any text.
    """
    text = text.strip()
    if len(text) > MAX_WRITTEN:
        return text
    for _ in range(3):  # one around another
        text = text.strip("`$ \t\r\n").removesuffix(".")
        for opening, closing in _WRAPPERS:
            if text.startswith(opening) and text.endswith(closing) and len(text) > 4:
                text = text[2:-2]
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    for _ in range(MAX_DEPTH):  # fractions in fractions
        text, count = _FRACTION.subn(r"\1((\2\3)/(\4\5))", text)
        if not count:
            break
    text = re.sub(r"(?<![\d.])(\d+)\.(?![\d.])", r"\1", text.translate(_MEANINGS))
    return text.translate(_BRACKETS) if _brackets_match(text) else text


def _brackets_match(text: str) -> bool:
    """Whether no bracket is closed by one of another kind."""
    opened = []
    for character in text:
        if character in "([{":
            opened.append(character)
        elif character in _PAIRS and opened and opened.pop() != _PAIRS[character]:
            return False
    return True


def evaluate(expression: str) -> Arithmetic:
    """Evaluate an expression by recursive descent, with exact fractions.

    ::

        sum     := product (("+" | "-") product)*
        product := factor (("*" | "/") factor | factor)*
        factor  := ("+" | "-")* (number | "(" sum ")")

    Two factors without an operator between them are multiplied if a parenthesis divides them: ``6(3+5)``. After a
    division this is refused, because ``6/2(1+2)`` means 9 to some and 1 to others.

    Args:
        expression: any text; ASCII digits only, white space is allowed between tokens.

    Returns:
        The value and the numbers used.

    Raises:
        ValueError: the text is not such an expression, is too long or too deep, or divides by zero.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"The expression has {len(expression)} characters; at most {MAX_CHARACTERS} are evaluated.")
    return _Parser(_tokens(expression)).parse()


def _tokens(expression: str) -> list[str]:
    """The numbers, operators and parentheses of an expression."""
    tokens, position = [], 0
    while position < len(expression):
        if expression[position] in _SPACE:
            position += 1
            continue
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"{expression[position]!r} at position {position} is not part of an expression.")
        if len(match.group()) > MAX_DIGITS:
            raise ValueError(f"A number has {len(match.group())} digits; at most {MAX_DIGITS} are evaluated.")
        tokens.append(match.group())
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over a list of tokens; each method consumes what it evaluates."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.position = 0
        self.depth = 0
        self.numbers: list[Fraction] = []

    def parse(self) -> Arithmetic:
        """Evaluate all of the tokens."""
        value = self.sum()
        if self.position < len(self.tokens):
            raise ValueError(f"{self.tokens[self.position]!r} follows a complete expression.")
        return Arithmetic(value, self.numbers)

    def next_is(self, *tokens: str) -> bool:
        """Whether the next token is one of these."""
        return self.position < len(self.tokens) and self.tokens[self.position] in tokens

    def next_is_side_by_side(self) -> bool:
        """Whether a factor follows directly, on the other side of a parenthesis."""
        if not 0 < self.position < len(self.tokens):
            return False
        before, after = self.tokens[self.position - 1], self.tokens[self.position]
        return after == "(" or (before == ")" and after[0].isdigit())

    def take(self) -> str:
        """Consume the next token."""
        if self.position == len(self.tokens):
            raise ValueError("The expression ends where a number or a parenthesis is needed.")
        self.position += 1
        return self.tokens[self.position - 1]

    def sum(self) -> Fraction:
        """Products joined by plus and minus."""
        value = self.product()
        while self.next_is("+", "-"):
            if self.take() == "+":
                value += self.product()
            else:
                value -= self.product()
        return value

    def product(self) -> Fraction:
        """Factors joined by times and divided by, or side by side."""
        value, divided = self.factor(), False
        while self.next_is("*", "/") or self.next_is_side_by_side():
            if not self.next_is("*", "/"):
                if divided:
                    raise ValueError(
                        "A product without a sign follows a division: what is divided by what is unclear."
                    )
                value *= self.factor()
                continue
            divided = self.take() == "/"
            if not divided:
                value *= self.factor()
                continue
            divisor = self.factor()
            if divisor == 0:
                raise ValueError("The expression divides by zero.")
            value /= divisor
        return value

    def factor(self) -> Fraction:
        """A number or a sum in parentheses, with any number of signs in front."""
        sign = 1
        while self.next_is("+", "-"):
            sign = -sign if self.take() == "-" else sign
        token = self.take()
        if token[0].isdigit():
            self.numbers.append(Fraction(token))
            return sign * self.numbers[-1]
        if token != "(":
            raise ValueError(f"{token!r} stands where a number or an opening parenthesis is needed.")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"Parentheses are nested more than {MAX_DEPTH} deep.")
        value = self.sum()
        if not self.next_is(")"):
            raise ValueError("A parenthesis is not closed.")
        self.take()
        self.depth -= 1
        return sign * value
