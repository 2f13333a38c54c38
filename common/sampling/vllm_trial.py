"""Tries out a new vLLM engine before any weights are loaded: a push of zeros that take no memory, and a completion.

vLLM fails for some models only when weights come or a token is sampled, and others it takes without all of their
weights: they would sample from something that is not the policy. Here both end before the policy is loaded.
"""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.sampling.vllm_memory import start_remedy

WAY_OUT = "Pass --sampler transformers"
# Longest reason of vLLM's that is passed on.
_MAX_REASON = 300
# Warnings and errors of these are about what is refused here in a line: some 50 lines for a class that cannot be
# imported.
_LOGGERS = ("vllm.model_executor.models.registry", "vllm.config.model", "vllm.model_executor.models.utils")


@contextmanager
def refused(model: str, what: str) -> Iterator[None]:
    """Turn every exception of vLLM into our refusal of the model; our own pass.

    Args:
        model: hub id or folder.
        what: what vLLM does inside, for the message: "vLLM cannot <what> <model>".

    Raises:
        Refused: with vLLM's reason, and what to do.
        ValueError: for too little memory.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        text = reason(error)
        if help_in_memory := start_remedy(error):
            raise ValueError(f"vLLM cannot {what} {model}: {text} {help_in_memory} {WAY_OUT} otherwise.") from error
        remedy = f"Install what it is in, or p{WAY_OUT[1:]}." if isinstance(error, ImportError) else f"{WAY_OUT}."
        raise Refused(f"vLLM cannot {what} {model}: {text}", remedy) from error
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class Refused(ValueError):
    """A model that vLLM does not sample from, or not rightly.

    Args:
        reason: in a sentence.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str = f"{WAY_OUT}.") -> None:
        super().__init__(f"{reason} {remedy}")
        self.reason = reason


def reason(error: BaseException) -> str:
    """What vLLM's error says in a line, without the frame that pydantic puts around it."""
    lines = [line for line in str(error).splitlines() if "validation error" not in line and "pydantic.dev" not in line]
    text = " ".join(" ".join(lines).split()).removeprefix("Value error, ").split(" [type=")[0]
    text = re.split(r"\. The available parameters| Please check the logs|\. Supported architectures", text)[0]
    if not text:  # of an assertion
        text = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if not isinstance(error, ValueError | RuntimeError):  # a KeyError says its key only
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text[:_MAX_REASON].rstrip(". ") + "."


class _Readings(TorchFunctionMode):
    """Notes which of some tensors are read inside: handed to a function that gives or changes a tensor.

    Looking at a shape or dtype is not reading.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unread: dict[int, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if result is None or any(True for _ in _tensors(result)):  # None: of an assignment
            for tensor in _tensors([args, kwargs]):
                self.unread.pop(id(tensor), None)
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def zeros_of(shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A tensor of zeros for each weight; all of them share one number, so that they take no memory."""
    zero = torch.zeros((), dtype=dtype, device=device)
    return {name: zero.expand(shape) for name, shape in shapes.items()}


@contextmanager
def all_read(weights: dict[str, Tensor], model: str) -> Iterator[None]:
    """Refuse a model of vLLM that, inside, loads not all of the weights.

    Args:
        weights: by checkpoint name; they must be handed to vLLM as they are.
        model: vLLM's class, for the message.

    Raises:
        ValueError: with the names of those that were not read.
    """
    readings = _Readings()
    readings.unread = {id(tensor): name for name, tensor in weights.items()}
    with readings:
        yield
    dropped = list(readings.unread.values())
    if dropped:
        raise Refused(
            f"vLLM drops {len(dropped)} of {len(weights)} weights, such as {dropped[0]}: its {model} "
            f"has no place for them, so it would not sample from the policy."
        )
