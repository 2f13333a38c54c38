"""ModelPool: who is on the device now.

Models take turns. `with pool.use("ref") as model:` brings a model to the device; it goes home when another one comes,
so that using the same one twice costs one move. What never changes is not copied back: its copy at home stays and the
one on the device is dropped. Optimizer state travels with its model, only when the model is trained. Moving is copying
bits, so results do not depend on `offload`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.models.quantization import scales


@dataclass(kw_only=True)
class _Tenant:
    """A model with its optimizer, and where they live.

    Attributes:
        module: what is used.
        tensors: parameters, buffers and scales of quantized weights that are its own.
        optimizer: trains some of them.
        needs: the model whose tensors it uses too.
        context: entered while the model is in use; for a reference that is the policy with its adapter off.
        home: copies on the CPU of what is on the device.
    """

    module: nn.Module
    tensors: list[Tensor]
    optimizer: Optimizer | None = None
    needs: str | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    home: dict[Tensor, Tensor] = field(default_factory=dict)

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
        offload: "always" or "never" move them; "auto" is settled by `plan`, and again when a model comes later.
        stopwatch: charges the time of moves to the phase "offload".

    Attributes:
        resident: names of the models on the device now.
    """

    def __init__(
        self, device: torch.device, offload: str, stopwatch: Callable[[str], AbstractContextManager] = nullcontext
    ) -> None:
        self.device = device
        self._stopwatch = stopwatch
        self._sampler_bytes = 0
        self._is_auto = offload == "auto"
        self.offload = offload
        self.resident: set[str] = set()
        self._tenants: dict[str, _Tenant] = {}

    def add(
        self,
        name: str,
        module: nn.Module,
        *,
        optimizer: Optimizer | None = None,
        needs: str | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Take in a model that lives on the CPU; it replaces a model of the same name.

        Args:
            name: its name here.
            module: the model. What it shares with `needs` stays that model's.
            optimizer: its state travels with the model.
            needs: a model that must be on the device too while this one is used, such as one it shares weights with.
            context: entered while this one is used.
        """
        others = set(self._tenants[needs].tensors) if needs else set()
        own = [t for t in [*module.parameters(), *module.buffers(), *scales(module)] if t not in others]
        self._tenants[name] = _Tenant(module=module, tensors=own, optimizer=optimizer, needs=needs, context=context)
        if self.offload != "auto":
            self.plan(sampler_bytes=self._sampler_bytes)

    def add_view(self, name: str, of: str, context: Callable[[], AbstractContextManager]) -> None:
        """Give a model a second name under which it is used inside `context`, such as a policy without its adapter."""
        self.add(name, self._tenants[of].module, needs=of, context=context)

    def __contains__(self, name: str) -> bool:
        """True when there is a model of that name."""
        return name in self._tenants

    def plan(self, *, sampler_bytes: int) -> dict[str, float]:
        """Settle offload="auto": move models only if everything together would not fit.

        Args:
            sampler_bytes: what the sampler keeps on the device while models work.

        Returns:
            The plan in GB: weights, gradients and optimizer state, sampler, reserve for activations, device.
        """
        self._sampler_bytes = sampler_bytes
        tenants = self._tenants.values()
        weights = sum(tensor.nbytes for tenant in tenants for tensor in tenant.tensors)
        # A gradient and two moments of Adam, as large as the float32 weight each.
        training = 3 * sum(tensor.nbytes for tenant in tenants for tensor in tenant.trained)
        device = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0
        # A quarter for activations and fragmentation: what a micro-batch needs is not known before it runs.
        reserve = device // 4
        if self._is_auto:
            fits = weights + training + sampler_bytes + reserve <= device
            self.offload = "never" if fits or self.device.type == "cpu" else "always"
        plan = {"weights": weights, "training": training, "sampler": sampler_bytes, "reserve": reserve}
        return {name: round(size / 1e9, 3) for name, size in (plan | {"device": device}).items()}

    @contextmanager
    def use(self, name: str, *, train: bool = False) -> Iterator[nn.Module]:
        """Have a model on the device; it goes home when the next one needs the place.

        Args:
            name: which model.
            train: bring its optimizer's state too.

        Yields:
            The model.
        """
        tenant = self._tenants[name]
        needed = {name, tenant.needs or name}
        with self._stopwatch("offload"):
            if self.offload == "always":
                for other in self.resident - needed:
                    self._leave(other)
            for other in needed:
                self._arrive(other, train=train and other == name)
        with tenant.context():
            yield tenant.module

    def evict(self) -> None:
        """Send every model home, before something else needs the whole device."""
        with self._stopwatch("offload"):
            for name in list(self.resident) if self.offload == "always" else ():
                self._leave(name)

    def _arrive(self, name: str, *, train: bool) -> None:
        tenant = self._tenants[name]
        self.resident.add(name)
        for tensor in [*tenant.tensors, *(tenant.moments if train else ())]:
            if self.offload == "always" and tensor not in tenant.home:
                tenant.home[tensor] = self._pinned(tensor.data.cpu())  # on the device if all fitted until now
                # copy=True: with the CPU as device too the move is a real one, which tests can see.
                tensor.data = tenant.home[tensor].to(self.device, non_blocking=True, copy=True)
            elif self.offload != "always":
                tensor.data = tensor.data.to(self.device)

    def _leave(self, name: str) -> None:
        tenant = self._tenants[name]
        changed = {*tenant.trained, *tenant.moments}
        for tensor in [*tenant.tensors, *tenant.moments]:
            if tensor not in tenant.home:  # a moment of the first optimizer step, or all models fitted until now
                tenant.home[tensor] = self._pinned(torch.empty_like(tensor, device="cpu"))
                changed.add(tensor)
        for tensor in changed:
            tenant.home[tensor].copy_(tensor.data, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for tensor, home in tenant.home.items():
            tensor.data = home
        tenant.home.clear()
        self.resident.discard(name)

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Pinned memory makes copies fast and asynchronous; a tensor keeps its pinned buffer once it has one."""
        return tensor if self.device.type != "cuda" or tensor.is_pinned() else tensor.pin_memory()
