"""Values from YAML and the command line as the types that settings declare."""

import types
import typing


def as_declared(name: str, value: object, declared: type | types.UnionType) -> object:
    """The value as the declared type, entries of lists too.

    Args:
        name: of the setting, for messages.
        value: as it was read: YAML takes 2e-6 for text and 1 for an integer.
        declared: a type, or a union of types.

    Raises:
        ValueError: if the value is of another type.
    """
    options = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    plain = {typing.get_origin(option) or option: typing.get_args(option) for option in options}
    if isinstance(value, list) and list in plain:
        return [as_declared(name, entry, *plain[list]) for entry in value]
    if float in plain and isinstance(value, str | int) and not isinstance(value, bool):
        return _number(name, value)
    if not isinstance(value, tuple(plain)) or (isinstance(value, bool) and bool not in plain):
        names = " or ".join("null" if option is types.NoneType else option.__name__ for option in plain)
        raise ValueError(
            f"{name}={value!r}: need {names}. Pass --{name} with such a value, or mend it in the YAML file."
        )
    return value


def _number(name: str, value: str | int) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name}={value!r}: need a number. Pass --{name} 1e-6, say.") from None
