"""Run code without its numbers: tensors of floats have a shape only, tensors of integers are real.

Lengths, indices and masks decide what a forward pass allocates; weights and activations do not. So the project's own
code runs as it is, with a model of any size, and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from common.rollouts import Rollouts

aten = torch.ops.aten

# Integers beyond this number are fake too, such as the mask of all pairs of tokens.
MAX_REAL_INTEGERS = 2**24


class Shapes(FakeTensorMode):
    """Within it, new tensors of floats are fake; tensors made of integers only are computed."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute an operator on integers, and only the shape of any other."""
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(t, FakeTensor) or t.is_floating_point() for t in tensors):
            if tensors or _makes_integers(func, args, kwargs):
                result = func(*args, **kwargs)
                return tree_map(self._faked, result)
        elif func is aten._local_scalar_dense.default:
            return _some_number(args[0])
        elif func is aten._grouped_mm.default:
            return self._grouped_product(*args, **kwargs)
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _as_numbers(args[1]), *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _grouped_product(self, a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """Experts' products, of which torch knows the shape in bfloat16 only: rows of one in groups, or both."""
        groups = (len(offsets),) if a.ndim == b.ndim == 2 else (len(a),) if a.ndim == b.ndim == 3 else ()
        with self:
            return a.new_empty(*groups, a.shape[-2], b.shape[-1])

    def _faked(self, value: Any) -> Any:
        """A fake tensor in place of one of floats."""
        if isinstance(value, Tensor) and (value.is_floating_point() or value.numel() > MAX_REAL_INTEGERS):
            return self.from_tensor(value)
        return value

    def rollouts(self, rollouts: Rollouts) -> Rollouts:
        """The same rows, their floats fake."""
        floats = {
            field.name: self.from_tensor(value)
            for field in fields(rollouts)
            if isinstance(value := getattr(rollouts, field.name), Tensor) and value.is_floating_point()
        }
        return replace(rollouts, **floats)

    def place(self, model: nn.Module) -> None:
        """Give fake storage to a model that was made on the device meta; tied weights stay tied.

        `Module.to` fails with fake parameters.
        """
        placed: dict[int, Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in placed:
                        with self:  # integers would be real
                            new = torch.empty(tensor.shape, dtype=torch.float32, device="cpu").to(tensor.dtype)
                        is_weight = isinstance(tensor, nn.Parameter)
                        placed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_weight else new
                    tensors[name] = placed[id(tensor)]


def _makes_integers(func: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether an operator without tensors as arguments makes integers, and not too many, or no tensor at all."""
    if not any(argument.name == "device" for argument in func._schema.arguments):
        return True
    made = func(*args, **(kwargs | {"device": torch.device("meta")}))
    return not made.is_floating_point() and made.numel() <= MAX_REAL_INTEGERS


def _some_number(tensor: Tensor) -> bool | float:
    """What code that looks at one number of a fake tensor gets: a float is 1, a comparison is false."""
    return False if tensor.dtype == torch.bool else 1.0


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks replaced by the numbers of what they choose."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8) and not isinstance(index, FakeTensor)
        numbers += index.nonzero().unbind(1) if is_mask else [index]
    return numbers
