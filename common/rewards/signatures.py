"""What a reward function can be called with, read from its signature before anything is sampled.

Arguments are passed by name, as trl passes them, and only those that the function takes.
"""

import difflib
import inspect
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import transformers
from torch import nn

from common.rewards.rules import is_rule, name_of

# One value per completion, and one value per call: what is given besides the columns of the data set.
PER_ROW = ("prompts", "completions", "completion_ids")
PER_CALL = ("trainer_state", "log_metric", "log_extra")
_GIVEN = (*PER_ROW, *PER_CALL)

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

# Of a signature, in a message.
_SHORTEN = reprlib.Repr()
_SHORTEN.maxother = _SHORTEN.maxstring = 20
_LONGEST = 100

Parameters = Mapping[str, inspect.Parameter]


def parameters_of(function: Any) -> Parameters | None:
    """Parameters by name; None if Python cannot tell, as for some functions of C libraries."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def taken(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes by name; all of them if Python cannot tell."""
    parameters = parameters_of(function)
    if parameters is None or _takes_any(parameters):
        return arguments
    return {name: value for name, value in arguments.items() if names(function, name)}


def names(function: Any, name: str) -> bool:
    """Whether a function has a parameter of this name, which can be passed by it."""
    parameter = (parameters_of(function) or {}).get(name)
    return parameter is not None and parameter.kind in _BY_NAME


def check_signature(name: str, function: Any) -> None:
    """Refuse what cannot score completions, whatever the data.

    Args:
        name: of the reward.
        function: what was given for it.

    Raises:
        ValueError: names the reward, its signature, and what it would get.
    """
    if isinstance(function, type):
        raise ValueError(
            f"reward {name!r} is the class {function.__name__}, and a reward is one of its objects. Make one, "
            f"`judge = {function.__name__}(...)`, and pass that."
        )
    if not callable(function):
        hint = " A reward model is named in the setting `rewards`." if isinstance(function, str) else ""
        raise ValueError(
            f"reward {name!r} is a {type(function).__name__}, which cannot be called. Need a function with "
            f"the parameters prompts, completions and columns of the data; pass one.{hint}"
        )
    if isinstance(function, nn.Module) and isinstance(function, transformers.PreTrainedModel):
        raise ValueError(
            f"reward {name!r} is a {type(function).__name__}, which scores token ids, not completions. Save it with "
            "its tokenizer, and name the folder or hub id of the reward model in the setting `rewards`."
        )
    if any(inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code) for code in _calls(function)):
        raise ValueError(
            f"reward {name!r}: {shown(function)} yields its values one by one. Need a list with one number for each "
            "completion. Return a list."
        )
    parameters = parameters_of(function)
    if parameters is not None:
        _check_parameters(name, function, parameters)


def _check_parameters(name: str, function: Any, parameters: Parameters) -> None:
    by_position = [
        p.name for p in parameters.values() if p.kind is p.POSITIONAL_ONLY and p.default is inspect.Parameter.empty
    ]
    if by_position:
        raise ValueError(
            f"reward {name!r}: {shown(function)} takes {', '.join(by_position)} by position only, but a reward gets "
            f"its arguments by name: {_gets()}. Write a function with such parameters that calls it."
        )
    sees = [each for each in ("completions", "completion_ids") if names(function, each)]
    if not sees and not _takes_any(parameters):
        needed = [each for each in required(function) if each not in _GIVEN]
        raise ValueError(
            f"reward {name!r}: {shown(function)} has no parameter `completions`, so it would not see what it scores. "
            f"A reward gets by name what it has parameters for: {_gets()}.{_rename(needed)} "
            + _factory(function, needed)
        )
    if is_rule(function) and (wanted := {"log_metric", "log_extra"}.intersection(required(function))):
        raise ValueError(
            f"reward {name!r}: {shown(function)} is a rule and needs {' and '.join(sorted(wanted))}. A rule runs in "
            "another process, one completion at a time, from which nothing can be logged. Leave out @rule, or give "
            "the parameter the default None."
        )


def check_columns(name: str, function: Any, columns: Collection[str], rows: str = "the data set") -> None:
    """Refuse data without a column that a function needs.

    Args:
        name: of the reward.
        function: a reward function.
        columns: names of the data's columns.
        rows: what the data are, for the message.

    Raises:
        ValueError: names the reward, the missing and the existing columns, and the signature.
    """
    missing = [each for each in required(function) if each not in {*_GIVEN, *columns}]
    if missing:
        raise ValueError(
            f"reward {name!r} needs the columns {', '.join(missing)}; {rows} has "
            f"{', '.join(columns) or 'only the prompt'}. Pass data with these columns, or give the parameters of "
            f"{shown(function)} default values. It also gets {_gets(columns=False)}.{_rename(missing)}"
        )


def required(function: Any) -> list[str]:
    """Parameters without a default that are passed by name."""
    parameters = (parameters_of(function) or {}).values()
    return [p.name for p in parameters if p.kind in _BY_NAME and p.default is p.empty]


def shown(function: Any) -> str:
    """A function with its parameters, for messages."""
    parameters = parameters_of(function) or {}
    parts = []
    for parameter in parameters.values():
        plain = parameter.replace(annotation=parameter.empty)
        has_default = parameter.default is not parameter.empty
        parts.append(f"{parameter.name}={_SHORTEN.repr(parameter.default)}" if has_default else str(plain))
    text = ", ".join(parts)
    return f"{name_of(function)}({text if len(text) < _LONGEST else text[:_LONGEST] + '...'})"


def _takes_any(parameters: Parameters) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _calls(function: Any) -> tuple[Any, Any]:
    """The function and, of an object, the method that runs when it is called."""
    return function, inspect.getattr_static(type(function), "__call__", None)


def _gets(*, columns: bool = True) -> str:
    return ", ".join(_GIVEN) + columns * " and every column of the data"


def _rename(missing: list[str]) -> str:
    """For names that are nearly those of what is given."""
    near = {name: difflib.get_close_matches(name, _GIVEN, n=1, cutoff=0.8) for name in missing}
    return "".join(f" Did you mean {match[0]} by {name}?" for name, match in near.items() if match)


def _factory(function: Any, needed: list[str]) -> str:
    """For a function that makes reward functions, such as those of trl.rewards whose names begin with get_."""
    call = f"{name_of(function)}({', '.join(f'{each}=...' for each in needed)})"
    return (
        f"Name a parameter `completions`. Or, if it makes a reward, call it: {call}; on the command line "
        f"file.py:{call} or module:{call}."
    )
