"""The bytes of all tensors that are alive, and their peak, on real and on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bytes(TorchDispatchMode):
    """Counts the bytes of the storages that are alive: those given, and those that operators make within it.

    What a kernel allocates and frees by itself is not seen.

    Args:
        alive: tensors that exist already.

    Attributes:
        now: bytes alive.
        peak: the most since the beginning, or since `reset`.
        at: the operator that reached the peak.
    """

    def __init__(self, *alive: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at: object = None
        self._sizes: dict[int, int] = {}  # by the address of the storage in C++
        for tensor in alive:
            self.follow(tensor, None)
        self.reset()

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak, self.at = self.now, None

    def follow(self, tensor: Tensor, operator: object) -> None:
        """Count a tensor's storage until it is freed; one that is counted already is not counted twice."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        # There is one Python object for each storage in C++ as long as it lives.
        weakref.finalize(storage, self._forget, storage._cdata)
        if self.now > self.peak:
            self.peak, self.at = self.now, operator

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and count what it made."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.follow(leaf, func)
        return result

    def __enter__(self) -> Self:
        """Begin to count what operators make."""
        return super().__enter__()
