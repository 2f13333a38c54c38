"""ModelPool: which models are on the device.

Models take turns. `with pool.use("ref") as model:` moves a model to the device; it returns to the CPU when another one
is used, so using the same one twice costs one move. Frozen tensors are not copied back: their copy on the CPU is kept,
and the one on the device is dropped. Optimizer state moves with its model, only for training. A move copies bits, so
results do not depend on `offload`.

A model that is spread over processes moves in the same turns, but by plain copies: FSDP2 reads its parts by views of
its own, which it makes anew when the whole module moves.

mover.py makes the copies. `use` has the device wait for those to it, and a model that leaves is at home when it has
left, so that its memory on the device can go to somebody else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.models.mover import Mover, mover_for
from common.models.quantization import scales
from common.models.weights import OnDevice
from common.sharding import is_part


@dataclass(kw_only=True)
class _Entry:
    """A model with its optimizer, and where their tensors are.

    Attributes:
        module: the model.
        tensors: its own parameters, buffers and scales of quantized weights.
        optimizer: trains some of them.
        needs: name of another model whose tensors it uses too.
        context: entered while the model is in use; for a reference that is the policy with its adapter off.
        homes: by tensor that is on the device, its copy on the host.
        trains: it is on the device for training, with its optimizer's moments.
        is_spread: its parameters are parts of tensors that are spread over processes.
    """

    module: nn.Module
    tensors: list[Tensor]
    optimizer: Optimizer | None = None
    needs: str | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    homes: dict[Tensor, Tensor] = field(default_factory=dict)
    trains: bool = False
    is_spread: bool = False

    @property
    def trained(self) -> list[Tensor]:
        return [] if self.optimizer is None else [p for g in self.optimizer.param_groups for p in g["params"]]

    @property
    def moments(self) -> list[Tensor]:
        """Moments of the optimizer; its step counters stay on the CPU, where reading them costs nothing."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        return [value for state in states for value in state.values() if torch.is_tensor(value) and value.dim() > 0]


class ModelPool:
    """Models that share one device.

    Args:
        device: where they are used.
        offload: move them "always" or "never"; the memory plan decides which of them "auto" is.
        stopwatch: counts the time of moves as the phase "offload".

    Attributes:
        resident: names of the models on the device now.
    """

    def __init__(
        self, device: torch.device, offload: str, stopwatch: Callable[[str], AbstractContextManager] = nullcontext
    ) -> None:
        self.device = device
        self._stopwatch = stopwatch
        self.offload = offload
        self.resident: set[str] = set()
        self._models: dict[str, _Entry] = {}

    def add(
        self,
        name: str,
        module: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        needs: str | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Add a model that is on the CPU, or on the device if it is sharded; it replaces a model of the same name.

        Args:
            name: its name in the pool.
            module: the model. Tensors that it shares with `needs` remain that model's.
            optimizer: its state moves with the model.
            needs: a model that must be on the device too while this one is used, such as one it shares weights with.
            context: entered while this one is used.
        """
        if name in self.resident and self.offload == "always":
            self._to_cpu(name)
        self.resident -= {name}
        others = set(self._models[needs].tensors) if needs else set()
        own = [t for t in [*module.parameters(), *module.buffers(), *scales(module)] if t not in others]
        is_spread = any(map(is_part, own))
        self._models[name] = _Entry(
            module=module, tensors=own, optimizer=optimizer, needs=needs, context=context, is_spread=is_spread
        )
        if is_spread and self.offload == "always":
            _move_parts(module, torch.device("cpu"))

    def add_view(self, name: str, of: str, context: Callable[[], AbstractContextManager]) -> None:
        """Give a model a second name under which it is used inside `context`, such as a policy without its adapter."""
        self.add(name, self._models[of].module, needs=of, context=context)

    def __contains__(self, name: str) -> bool:
        """True when there is a model of that name."""
        return name in self._models

    @cached_property
    def mover(self) -> Mover:
        """Makes the copies; made with the first one, as it may need a stream and host memory."""
        return mover_for(self.device)

    @contextmanager
    def use(self, name: str, *, train: bool = False) -> Iterator[nn.Module]:
        """Use a model on the device; it stays there until another one is used.

        Args:
            name: which model.
            train: its weights will change; move its optimizer's state too.

        Yields:
            The model.
        """
        entry = self._models[name]
        needed = {name, entry.needs or name}
        with self._stopwatch("offload"):
            if self.offload == "always":
                for other in self.resident - needed:
                    self._to_cpu(other)
            for other in needed:
                self._to_device(other, train=train and other == name)
            if self.offload == "always":
                self.mover.wait(self.mover.record(), host=False)
        with entry.context():
            yield entry.module

    @contextmanager
    def stream(self, name: str) -> Iterator[tuple[nn.Module, OnDevice | None]]:
        """Read a model's weights on the device one by one; with offload, the model itself is not there.

        Args:
            name: which model; it does not change meanwhile.

        Yields:
            The model, and what has its tensors on the device within a context; None without offload, or if the model
            is sharded: they are there.
        """
        if self.offload != "always" or self._models[name].is_spread:
            with self.use(name) as module:
                yield module, None
            return
        self.evict()
        try:
            yield self._models[name].module, self._lend
        finally:  # from here on, homes may change
            self.mover.wait(self.mover.record(), host=True)

    @contextmanager
    def _lend(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Have tensors that are at home on the device."""
        homes = {}
        try:
            for tensor in tensors:
                homes[tensor] = self._start(tensor)
            self.mover.wait(self.mover.record(), host=False)
            yield
        finally:
            for tensor, home in homes.items():
                tensor.data = home

    def evict(self) -> None:
        """Move all models back to the CPU, before something else needs the whole device."""
        with self._stopwatch("offload"):
            for name in list(self.resident) if self.offload == "always" else ():
                self._to_cpu(name)

    def _to_device(self, name: str, *, train: bool) -> None:
        """Move what is not there yet; moments made there while training are."""
        entry = self._models[name]
        is_away, without_moments = name not in self.resident, train and not entry.trains
        arriving = [] if name in self.resident else list(entry.tensors)
        arriving += entry.moments if train and not entry.trains else ()
        self.resident.add(name)
        entry.trains |= train
        if self.offload == "always" and entry.is_spread:
            self._move_spread(entry, self.device, weights=is_away, moments=without_moments)
            return
        for tensor in arriving:
            if self.offload == "always":
                entry.homes[tensor] = self._start(tensor)
            else:
                tensor.data = tensor.data.to(self.device)

    def _to_cpu(self, name: str) -> None:
        """Move a model home, and wait until it is there."""
        entry = self._models[name]
        if entry.is_spread:
            self._move_spread(entry, torch.device("cpu"), weights=True, moments=entry.trains)
        else:
            self._bring_home(entry)
        entry.homes.clear()
        entry.trains = False
        self.resident.discard(name)

    def _bring_home(self, entry: _Entry) -> None:
        changed = {*entry.trained, *entry.moments} if entry.trains else set()
        leaving = [*entry.tensors, *(entry.moments if entry.trains else ())]
        for tensor in leaving:
            has_home = tensor in entry.homes  # not if it was made on the device, or if nothing moved before
            if not has_home:
                entry.homes[tensor] = self.mover.home(tensor.data)
            if not has_home or tensor in changed:
                self.mover.copy(tensor.data, entry.homes[tensor])
        self.mover.wait(self.mover.record(), host=True)
        for tensor in leaving:
            tensor.data = entry.homes[tensor]

    def _move_spread(self, entry: _Entry, device: torch.device, *, weights: bool, moments: bool) -> None:
        """Move a sharded model's own parts, and those of its optimizer's moments."""
        if weights:
            _move_parts(entry.module, device)
        for state in entry.optimizer.state.values() if moments and entry.optimizer is not None else ():
            state |= {key: each.to(device, copy=True) for key, each in state.items() if is_part(each)}

    def _start(self, tensor: Tensor) -> Tensor:
        """Start moving a tensor to the device, by a real copy even if that is the CPU; gives its home."""
        home = self._home_of(tensor)
        there = torch.empty_like(home, device=self.device)
        self.mover.copy(home, there)
        tensor.data = there
        return home

    def _home_of(self, tensor: Tensor) -> Tensor:
        """Its memory on the host, which it keeps; the first time, that may be pinned memory."""
        data = tensor.data
        if data.device.type == "cpu" and not self.mover.would_pin(data):
            return data
        return self.mover.home(data).copy_(data)


def _move_parts(module: nn.Module, device: torch.device) -> None:
    """Move all tensors of a sharded model, by a real copy even if they are there; FSDP2 is told by `_apply`."""
    module._apply(lambda tensor: tensor.to(device, copy=True))
