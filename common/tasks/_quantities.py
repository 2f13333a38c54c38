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
    "am": "AM", "pm": "PM", "C": "Celsius",
    "F": "Fahrenheit", "gallon": "gal", "acre": "", "hectare": "ha", "mph": "", "kph": "kmh", "unit": "",
    "percent": "percentage pct",
}  # fmt: skip
UNITS = {word: unit for unit, words in _SPELLINGS.items() for word in (unit, *words.split())}
LETTERS = frozenset("mgslhLCFKJNWVA")  # units of one letter; only in \text, since 3s may also be 3 times s
_COMPOUND = {"mph": ("mi", "h"), "kph": ("km", "h"), "unit": ()}
_WORDS = "|".join(sorted((f"{word}s?" for word in UNITS if len(word) > 1), key=len, reverse=True))
_POWER = r"\s*(?:\^\s*\{?\s*-?(?P<power>\d)\s*\}?)?"
_TEXT_UNIT = re.compile(rf"^(?P<core>.*[^\s,(=^/*+-])\s*\\text\{{(?P<unit>[^{{}}]*)\}}{_POWER}$", re.DOTALL)
_BARE_UNIT = re.compile(
    rf"^(?P<core>.*[\d}})])\s*(?P<unit>(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_WORDS})"
    rf"(?:\s?(?:/|per)\s?(?:{_WORDS}|[mhsl]))?){_POWER}$",
    re.DOTALL,
)
_DEGREES = re.compile(r"^(?P<core>.*\S)\s*\^\\circ\s*(?:(?:\\text\{)?\s*(?P<scale>[CF])\s*\}?)?$", re.DOTALL)
_FEET = re.compile(r"^(?P<core>.*\d)\s*(?P<primes>'{1,2})$", re.DOTALL)
# 5 a.m., but not 5am, which is also 5 times a and m.
_HALF_DAY = re.compile(
    r"(?:(?P<minutes>:\d\d)|(?<=\d))\s*(?P<text>\\text\{)?\s*(?P<half>[ap])(?P<dot>\.?)\s?m\.?\s*\}?$", re.IGNORECASE
)
_PERCENT = re.compile(
    r"^(?P<core>.*?\S)\s*(?:\\?%|\\text\{\s*(?:percent(?:age)?|pct)\s*\}|(?<![A-Za-z])(?:percent(?:age)?|pct))$",
    re.DOTALL,
)
# Words after a number that change it, or ask for something to be done with it.
CHANGES = re.compile(
    r"(?:^|[\d\s{])(?:squared|cubed)\b"
    r"|\b(?:hundreds?|thousands?|millions?|billions?|trillions?|dozens?|gross|half|halves|thirds?|fourths?|quarters?"
    r"|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|twelfths?|sixteenths?|hundredths?|thousandths?|millionths?"
    r"|mille|factorial|plus|minus|over|choose|remainder|mod|modulo|below|above|under|zero|pi|wrong|incorrect|false"
    r"|divided|multiplied|times(?=\s*[^\s}]))\b",
    re.IGNORECASE,
)
# Words in \text after a number that are no unit but part of the answer.
_NO_UNIT = re.compile(
    r"\b(?:or|and|not|if|when|where|than|more|less|fewer|least|most|to|base|is|are|does|no|else|otherwise|for)\b"
    r"|(?<![A-Za-z^])\d|\N{PER MILLE SIGN}",
    re.IGNORECASE,
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")


def quantity(latex: str) -> Quantity:
    """Take the unit, the currency or the percent sign off an answer."""
    units: tuple[str, ...] = ()
    for sign, unit in zip(("\\$", *CURRENCIES[1:]), ("dollar", "euro", *["money"] * 9), strict=False):
        if sign in latex:
            latex, units = latex.replace(sign, "").strip(), (unit,)
    latex = _HALF_DAY.sub(_half_day, latex)
    latex = re.sub(r"\}(?:\^\s*\{?\s*-?\d\s*\}?)?\s*/\s*\\text\{", "/", latex)  # one unit from m and s
    if percent := _PERCENT.match(latex):
        return Quantity(percent["core"], units, True)
    if _FUNCTION.search(latex):
        return Quantity(latex, units, False)
    if degrees := _DEGREES.match(latex):
        return Quantity(degrees["core"], ("degree", *filter(None, [degrees["scale"]])), False)
    if feet := _FEET.match(latex):
        return Quantity(feet["core"], ("ft",) if feet["primes"] == "'" else ("in",), False)
    text = _TEXT_UNIT.match(latex)
    if text and (_NO_UNIT.search(text["unit"]) or CHANGES.search(text["unit"])):
        return Quantity(latex, units, False)
    found = text or _BARE_UNIT.match(latex)
    if not found or found["core"].endswith("\\cdot"):
        return Quantity(latex, units, False)
    return Quantity(found["core"].strip(), units or _known_units(found["unit"], found["power"] or ""), False)


def _half_day(found: re.Match) -> str:
    if not (found["minutes"] or found["text"] or found["dot"]):
        return found[0]
    return f"{found['minutes'] or ''}\\text{{{found['half'].lower()}m}}"


_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


def _known_units(text: str, power: str) -> tuple[str, ...]:
    """The units in a text that are known, each in one spelling with its power; `power` is that of the last one."""
    units: list[str] = []
    raised = ""  # by the word before
    for word, own in re.findall(r"([A-Za-z]+)(?:\s*\^\s*-?(\d))?", text):
        if word.lower() in ("squared", "cubed") and units:
            units[-1] = _raised(units[-1], _POWERS[word.lower()])
        elif word.lower() in _POWERS:
            raised = _POWERS[word.lower()]
        else:
            forms = (word, word.removesuffix("s"), word.lower().removesuffix("s"))
            unit = next((UNITS[form] for form in forms if form in UNITS), None)
            known = _COMPOUND.get(unit, (unit,)) if unit else ()
            units += [_raised(each, own or raised) for each in known]
            raised = ""
    if units:
        units[-1] = _raised(units[-1], power)
    return tuple(units)


def _raised(unit: str, power: str) -> str:
    return f"{unit}^{power}" if power not in ("", "1") else unit


def units_agree(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Whether units are the same, or one side has none; of degrees only one side may say Celsius or Fahrenheit."""
    if not first or not second or first == second:
        return True
    return first[0] == second[0] == "degree" and 1 in (len(first), len(second))
