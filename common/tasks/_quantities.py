"""Quantities: the value of an answer, and the units, the currency or the percent sign that it has.

Units are taken off here because Math-Verify takes ``3t`` for 3 tons, and so for 3. One letter after a number is a
variable, unless it stands in a style of text.
"""

import re
from typing import NamedTuple

from common.tasks._numbers import CURRENCIES


class Quantity(NamedTuple):
    """An answer without its unit.

    Attributes:
        core: the LaTeX of the rest.
        units: the units that are known, in one spelling each.
        is_percent: it had a percent sign.
    """

    core: str
    units: tuple[str, ...]
    is_percent: bool


# Spellings of a unit; plurals are found too. Units that are not listed are dropped and not compared.
_SPELLINGS = {
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "dm": "decimeter decimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "mg": "milligram", "g": "gram gm", "kg": "kilogram", "lb": "pound", "oz": "ounce", "l": "liter litre L",
    "ml": "milliliter millilitre mL", "s": "second sec", "min": "minute", "h": "hour hr", "day": "", "week": "",
    "month": "", "year": "yr", "degree": "deg", "radian": "rad", "dollar": "USD", "cent": "", "euro": "EUR",
    "gallon": "gal", "acre": "", "hectare": "ha", "mph": "", "kph": "kmh", "unit": "", "percent": "percentage pct",
}  # fmt: skip
UNITS = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}
LETTERS = frozenset("mgslhLCFKJNWVA")  # units of one letter; only in \text, since 3s may also be 3 times s
_COMPOUND = {"mph": ("mi", "h"), "kph": ("km", "h"), "unit": ()}
_WORDS = "|".join(sorted((f"{word}s?" for word in UNITS if len(word) > 1), key=len, reverse=True))
_POWER = r"\s*(?:\^\s*\{?\s*-?\d\s*\}?)?"
_TEXT_UNIT = re.compile(rf"^(?P<core>.*[^\s,(=^/*+-])\s*\\text\{{(?P<unit>[^{{}}]*)\}}{_POWER}$", re.DOTALL)
_BARE_UNIT = re.compile(
    rf"^(?P<core>.*[\d}})])\s*(?P<unit>(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_WORDS})"
    rf"(?:\s?(?:/|per)\s?(?:{_WORDS}|[mhsl]))?){_POWER}$",
    re.DOTALL,
)
_DEGREES = re.compile(r"^(?P<core>.*\S)\s*\^\\circ\s*(?:\\text\{\s*[CF]\s*\}|[CF])?$", re.DOTALL)
_PERCENT = re.compile(
    r"^(?P<core>.*?\S)\s*(?:\\?%|\\text\{\s*(?:percent(?:age)?|pct)\s*\}|(?<![A-Za-z])(?:percent(?:age)?|pct))$",
    re.DOTALL,
)
# Words in \text after a number that are no unit but part of the answer.
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|when|where|than|more|less|fewer|least|most|to|hundred|thousand|million|billion|trillion"
    r"|dozen|half|mod|base|is|are|does|no|else|otherwise|for)\b",
    re.IGNORECASE,
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


def quantity(latex: str) -> Quantity:
    """Take the unit, the currency or the percent sign off an answer."""
    units: tuple[str, ...] = ()
    for sign, unit in zip(("\\$", *CURRENCIES[1:]), ("dollar", "euro", *["money"] * 9), strict=False):
        if sign in latex:
            latex, units = latex.replace(sign, "").strip(), (unit,)
    latex = re.sub(r"\}(?:\^\s*\{?\s*-?\d\s*\}?)?\s*/\s*\\text\{", "/", latex)  # one unit from m and s
    if percent := _PERCENT.match(latex):
        return Quantity(percent["core"], units, True)
    if _FUNCTION.search(latex):
        return Quantity(latex, units, False)
    if degrees := _DEGREES.match(latex):
        return Quantity(degrees["core"], ("degree",), False)
    text = _TEXT_UNIT.match(latex)
    if text and _NO_UNIT.search(text["unit"]):
        return Quantity(latex, units, False)
    found = text or _BARE_UNIT.match(latex)
    if not found or found["core"].endswith("\\cdot"):
        return Quantity(latex, units, False)
    return Quantity(found["core"].strip(), units or _known_units(found["unit"]), False)


def _known_units(text: str) -> tuple[str, ...]:
    """The units in a text that are known, each in one spelling."""
    units = []
    for word in re.findall(r"[A-Za-z]+", text):
        forms = (word, word.removesuffix("s"), word.lower().removesuffix("s"))
        unit = next((UNITS[form] for form in forms if form in UNITS), None)
        units += _COMPOUND.get(unit, (unit,)) if unit else ()
    return tuple(units)
