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


@dataclass(kw_only=True)
class _Tenant:
    """A model with its optimizer, where they live, and how often they moved."""

    module: nn.Module
    optimizer: Optimizer | None = None
    # Entered while the model is in use; for a reference that is the policy with its adapter off.
    context: Callable[[], AbstractContextManager] = nullcontext
    home: dict[Tensor, Tensor] = field(default_factory=dict)


class ModelPool:
    """Models that share one device.

    Args:
        device: where they are used.
        offload: "always" or "never" move them; "auto" is settled by `plan` once all models are known.
        watch: charges the time of moves to the phase "offload".

    Attributes:
        resident: names of the models on the device now.
    """

    def __init__(
        self, device: torch.device, offload: str, watch: Callable[[str], AbstractContextManager] = nullcontext
    ) -> None:
        self.device = device
        self._watch = watch
        self.offload = offload
        self.resident: set[str] = set()
        self._tenants: dict[str, _Tenant] = {}
        self._sharing: dict[str, str] = {}

    def add(self, name: str, module: nn.Module, *, optimizer: Optimizer | None = None) -> None:
        """Take in a model that lives on the CPU."""
        self._tenants[name] = _Tenant(module=module, optimizer=optimizer)

    def add_view(self, name: str, of: str, context: Callable[[], AbstractContextManager]) -> None:
        """Give a model a second name under which it is used inside `context`, such as a policy without its adapter."""
        self._tenants[name] = _Tenant(module=self._tenants[of].module, context=context)
        self._sharing[name] = of

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
        owners = [tenant for name, tenant in self._tenants.items() if name not in self._sharing]
        weights = sum(p.nbytes for tenant in owners for p in tenant.module.parameters())
        # A gradient and two moments of Adam, as large as the float32 weight each.
        training = 3 * sum(p.nbytes for t in owners if t.optimizer for p in t.module.parameters() if p.requires_grad)
        device = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0
        # A quarter for activations and fragmentation: what a micro-batch needs is not known before it runs.
        reserve = device // 4
        if self.offload == "auto":
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
        owner = self._sharing.get(name, name)
        with self._watch("offload"):
            if self.offload == "always":
                for other in self.resident - {owner}:
                    self._leave(other)
            self._arrive(owner, train=train)
        with self._tenants[name].context():
            yield self._tenants[name].module

    def evict(self) -> None:
        """Send every model home, before something else needs the whole device."""
        with self._watch("offload"):
            for name in list(self.resident) if self.offload == "always" else ():
                self._leave(name)

    def _arrive(self, name: str, *, train: bool) -> None:
        tenant = self._tenants[name]
        self.resident.add(name)
        for tensor in _tensors(tenant, with_optimizer=train):
            if self.offload == "always" and tensor not in tenant.home:
                tenant.home[tensor] = self._pinned(tensor.data)
                # copy=True: with the CPU as device too the move is a real one, which tests can see.
                tensor.data = tenant.home[tensor].to(self.device, non_blocking=True, copy=True)
            elif self.offload != "always":
                tensor.data = tensor.data.to(self.device)

    def _leave(self, name: str) -> None:
        tenant = self._tenants[name]
        moments = _optimizer_tensors(tenant)
        for tensor in moments:
            if tensor not in tenant.home:  # made by the first optimizer step
                tenant.home[tensor] = self._pinned(torch.empty_like(tensor, device="cpu"))
        trained = [p for p in tenant.module.parameters() if p.requires_grad and tenant.optimizer is not None]
        for tensor in [*trained, *moments]:
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


def _tensors(tenant: _Tenant, *, with_optimizer: bool) -> list[Tensor]:
    tensors = [*tenant.module.parameters(), *tenant.module.buffers()]
    return tensors + (_optimizer_tensors(tenant) if with_optimizer else [])


def _optimizer_tensors(tenant: _Tenant) -> list[Tensor]:
    """Moments of the optimizer; its step counters stay on the CPU, where reading them costs nothing."""
    if tenant.optimizer is None:
        return []
    states = tenant.optimizer.state.values()
    return [value for state in states for value in state.values() if torch.is_tensor(value) and value.dim() > 0]
