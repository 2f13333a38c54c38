"""A mover for tests: it copies as late as it may, and writes down what others do too early."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.models.mover import Mark, Mover


@dataclass(kw_only=True, eq=False)
class Copy:
    """A copy that was asked for.

    Attributes:
        number: of the next mark.
        source: the storage, which may have been freed.
        before: its bytes when the copy was asked for.
        value: what is copied.
        target: where to; None once it is made.
        goes_home: from the device.
    """

    number: int
    source: weakref.ref
    before: Tensor
    value: Tensor
    target: Tensor | None
    goes_home: bool


class LateMover(Mover):
    """Device and host are both the CPU, and every copy is made at the last moment that the interface allows.

    Until then its target holds bytes that are NaN in floating point. A copy to the device is made when somebody waits
    for it, a copy to the host when the host waits.

    Attributes:
        faults: what was done too early, or twice.
        arrived, left: by the place of a home, how often it was copied to the device, and from it.
        alive, peak: bytes of copies on the device, now and at most.
        uses: how often operations had a copy on the device among their arguments; only `Uses` counts.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.arrived, self.left = Counter(), Counter()
        self.alive = self.peak = self.uses = 0
        self.pending: list[Copy] = []
        self.on_device: dict[int, weakref.ref] = {}  # by the place of the home
        self.is_copying = False
        self._made: list[Copy] = []  # and the host has not waited yet
        self._homes = weakref.WeakSet()
        self._marks = 0

    def home(self, tensor: Tensor) -> Tensor:
        home = super().home(tensor)
        self._homes.add(home.untyped_storage())
        return home

    def copy(self, source: Tensor, target: Tensor) -> None:
        with self._copying():
            storage, other = source.untyped_storage(), target.untyped_storage()
            goes_home = other in self._homes
            if goes_home:
                self.left[other.data_ptr()] += 1
            else:
                self._homes.add(storage)
                self._arrives(storage.data_ptr(), target)
            self.pending.append(
                Copy(
                    number=self._marks + 1,
                    source=weakref.ref(storage),
                    before=_bytes(storage).clone(),
                    value=source.clone(),
                    target=target,
                    goes_home=goes_home,
                )
            )
            for each in [each for each in self._made if each.source() is other]:
                self._check(each)  # copies follow each other, so this one may write where that one read
                self._made.remove(each)
            _bytes(other).fill_(255)

    def _arrives(self, home: int, target: Tensor) -> None:
        earlier = self.on_device.get(home, lambda: None)
        if earlier() is not None:
            self.faults.append("a tensor crosses to the device although it is there")
        self.arrived[home] += 1
        self.on_device[home] = weakref.ref(target.untyped_storage())
        self.alive += target.nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(target.untyped_storage(), self._leaves, target.nbytes)

    def _leaves(self, size: int) -> None:
        self.alive -= size

    def record(self) -> Mark:
        self._marks += 1
        return Mark(number=self._marks)

    def wait(self, mark: Mark, *, host: bool) -> None:
        with self._copying():
            for each in [e for e in self.pending if e.number <= mark.number and (host or not e.goes_home)]:
                self._check(each)
                each.target.copy_(each.value)
                each.target = None
                self.pending.remove(each)
                self._made.append(each)
            if host:
                self._made, made = [], self._made
                for each in made:
                    # A home that goes to the device must not change meanwhile, as the copy may not have ended.
                    self._check(each)

    def _check(self, copy: Copy) -> None:
        source = copy.source()
        if source is None:
            self.faults.append("a source was freed before its copy had ended")
        elif not torch.equal(_bytes(source), copy.before):
            self.faults.append("a source was changed before its copy had ended")

    @contextmanager
    def _copying(self) -> Iterator[None]:
        self.is_copying = True
        try:
            yield
        finally:
            self.is_copying = False


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Uses(TorchDispatchMode):
    """Sees each operation on tensors: none may have a target of a copy among its arguments before the wait."""

    def __init__(self, mover: LateMover) -> None:
        super().__init__()
        self._mover = mover

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mover = self._mover
        if not mover.is_copying:
            tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            used = {each.untyped_storage() for each in tensors}
            there = {storage for each in mover.on_device.values() if (storage := each()) is not None}
            mover.uses += len(used & there)
            if used & {each.target.untyped_storage() for each in mover.pending}:
                mover.faults.append(f"{function} touches what has not arrived")
        return function(*args, **(kwargs or {}))
