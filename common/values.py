"""Values of settings as YAML, the command line and Python give them, in their declared types."""

import types
import typing

ALL_LINEAR = "all-linear"


def as_declared(name: str, value: object, declared: type | types.UnionType) -> object:
    """Convert a value to its declared type, and the entries of a list too.

    Args:
        name: of the setting, for messages.
        value: as read; YAML reads 2e-6 as text and 1 as an integer.
        declared: a type, or a union of types.

    Raises:
        ValueError: if the value is of another type.
    """
    options = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    plain = {typing.get_origin(option) or option: typing.get_args(option) for option in options}
    if isinstance(value, list) and list in plain:
        return [as_declared(name, entry, *plain[list]) for entry in value]
    if str in plain and isinstance(value, str) and {int, float} & plain.keys():
        return _number_or_word(value, int if int in plain else float)
    if float in plain and isinstance(value, str | int) and not isinstance(value, bool):
        return _number(name, value)
    if not isinstance(value, tuple(plain)) or (isinstance(value, bool) and bool not in plain):
        names = " or ".join("null" if option is types.NoneType else option.__name__ for option in plain)
        raise ValueError(
            f"{name}={value!r}: need {names}. Pass --{name} with such a value, or fix it in the YAML file."
        )
    return value


def _number_or_word(text: str, number: type) -> object:
    """A number that was written as text, as on a command line; any other text as it is."""
    try:
        return number(text)
    except ValueError:
        return text


def _number(name: str, value: str | int) -> float:
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name}={value!r:.80}: need a number. Pass --{name} 1e-6, for example.") from None


def module_names(given: object) -> object:
    """The setting lora_target_modules in one form: names with commas between them, each once and without spaces.

    Args:
        given: such a text, or a list of names; anything else is returned as it is.

    Raises:
        ValueError: if it has no name, or all-linear and others.
    """
    parts = given if isinstance(given, list) else [given]
    if not all(isinstance(part, str) for part in parts):
        return given
    names = [name.strip() for part in parts for name in part.split(",")]
    names = list(dict.fromkeys(ALL_LINEAR if name.lower() == ALL_LINEAR else name for name in names if name))
    if not names or (ALL_LINEAR in names and len(names) > 1):
        raise ValueError(
            f"lora_target_modules={given!r}: need names of modules, or {ALL_LINEAR} alone, which is every linear "
            "layer but the head. Pass --lora_target_modules q_proj,v_proj, for example."
        )
    return ",".join(names)
