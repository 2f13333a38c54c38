"""AdamW in three ways, which differ in where its numbers are and how many bits they have.

`adamw` keeps weights and moments in float32 on the device. `adamw_host` keeps the weights there as forward passes read
them, and float32 master weights and moments on the host. `adamw_8bit` keeps the moments in 8 bits, by bitsandbytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from common.config import RLConfig
from common.sharding import own_part
from common.update.staging import Staging, on_side_stream

# bitsandbytes has a scale in float32 for each block of this many numbers in 8 bits.
_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class BytesPerWeight:
    """Memory of each trained weight.

    Attributes:
        weight: on the device.
        gradient: on the device; 0 if gradients leave it one parameter at a time, as soon as each is finished.
        state: on the device, between and during optimizer steps.
        host: in main memory, of each process.
        saved: in a checkpoint, beside the weight itself.
    """

    weight: float
    gradient: float
    state: float
    host: float
    saved: float

    @property
    def device(self) -> float:
        """On the device: weight, gradient and state."""
        return self.weight + self.gradient + self.state


def bytes_per_weight(optimizer: str, weight: torch.dtype, *, embedding: bool = False) -> BytesPerWeight:
    """What a trained weight takes, next to what forward and backward passes need.

    Args:
        optimizer: as the setting.
        weight: type of the weight on the device, from `trained_dtype`; adapters are float32.
        embedding: of a weight in an embedding, whose moments adamw_8bit leaves in float32.
    """
    size = weight.itemsize
    if optimizer == "adamw_host":  # on the host master, gradient and two moments, all float32
        return BytesPerWeight(weight=size, gradient=0, state=0, host=16, saved=12)
    has_8_bits = optimizer == "adamw_8bit" and not embedding
    moments = 2 * (1 + 4 / _BLOCK) if has_8_bits else 8.0
    return BytesPerWeight(weight=size, gradient=size, state=moments, host=0, saved=moments)


def check_optimizer(config: RLConfig) -> None:
    """Refuse an optimizer that is not installed.

    Raises:
        ValueError: saying how to install it.
    """
    if config.optimizer != "adamw_8bit":
        return
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"optimizer=adamw_8bit, but bitsandbytes cannot be imported ({error}). Run pip install bitsandbytes, or "
            "pass --optimizer adamw_host, which keeps even less on the device and needs no package."
        ) from error


def make_optimizer(module: nn.Module, config: RLConfig) -> Optimizer:
    """The optimizer that the settings name.

    Args:
        module: a model on the CPU; its parameters that require a gradient are trained.
        config: optimizer, learning rate, betas and weight decay are read.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.weight_decay,
    }
    groups = _groups(parameters, config.weight_decay)
    if config.optimizer == "adamw_host":
        return HostAdamW(groups, **settings)
    if config.optimizer == "adamw_8bit":
        return _with_8_bits(groups, embedding_weights(module), settings)
    # On CUDA the default would need 4 more bytes per weight during a step. On the CPU it stays: the fused one differs
    # from it in the last bit.
    if not torch.cuda.is_available():
        return AdamW(groups, **settings)
    return stay_fused(AdamW(groups, **settings, fused=True))


def embedding_weights(module: nn.Module) -> set[nn.Parameter]:
    """The weights of a model's embeddings, which may be those of its head too."""
    return {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}


def _with_8_bits(groups: list[dict[str, Any]], exact: set[nn.Parameter], settings: dict[str, Any]) -> Optimizer:
    """AdamW of bitsandbytes with moments in 8 bits; those of `exact`, and of tensors below 4096 numbers, in float32.

    As the paper recommends for embeddings (huggingface.co/papers/2110.02861, 2.3): in 8 bits they cost most of what
    is lost.
    """
    from bitsandbytes.optim import AdamW8bit

    class MostlyAdamW8bit(AdamW8bit):
        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": 32} if group["params"][pindex] in exact else config

    return MostlyAdamW8bit(groups, **settings)


def stay_fused(optimizer: Optimizer) -> Optimizer:
    """Have a fused optimizer take fused steps also after the state of another one was loaded, and from the CPU."""

    def set_in_groups(optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group |= {"fused": True, "foreach": False}

    optimizer.register_load_state_dict_post_hook(set_in_groups)
    optimizer.register_step_pre_hook(lambda optimizer, *_: keep_counters_beside_weights(optimizer))
    return optimizer


def keep_counters_beside_weights(optimizer: Optimizer) -> None:
    """Move step counters to the device of their weights, where a fused step reads them.

    They are loaded from a checkpoint while the weights are on the CPU, and the pool moves moments only.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and state["step"].device != parameter.device:
                state["step"] = state["step"].to(parameter.device)


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """The parameters in the optimizer's groups: weight decay spares biases, norms and all other vectors.

    These are the parameters that transformers' Trainer spares by their names, and the scalars of state-space layers.
    """
    if not weight_decay:
        return [{"params": parameters}]
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class HostAdamW(Optimizer):
    """AdamW on float32 master weights and moments in main memory, for weights of any precision on any device.

    Weights in bfloat16 alone would not learn: at usual learning rates most updates are below its resolution. After a
    step the weights are the masters, rounded. Gradients are added up in float32, also those of several micro-batches:
    in bfloat16 a sum of hundreds no longer changes.

    Its `param_groups` are those of the weights, its `state` is empty: nothing of it is ever on the device. Of weights
    that are spread over processes, each process has the masters and moments of its own parts.

    Args:
        groups: parameter groups of weights.
        staging: how numbers move between a GPU and the host; None: made when the first gradient comes from one.
        settings: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, staging: Staging | None = None, **settings: Any) -> None:
        super().__init__([dict(group) for group in groups], settings)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self.masters: dict[nn.Parameter, Tensor] = {weight: _master(weight) for weight in weights}
        of_masters = [group | {"params": [self.masters[w] for w in group["params"]]} for group in groups]
        # Eight times as fast on a CPU as the default.
        self._adam = AdamW(of_masters, **settings, fused=True)
        self._sums: dict[nn.Parameter, Tensor] = {}  # memory of the gradients, kept from step to step
        self._staging = staging

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Within it, backward passes leave no gradient on the device: each is moved as soon as it is finished."""
        weights = [weight for weight in self.masters if weight.requires_grad]
        hooks = [weight.register_post_accumulate_grad_hook(self._receive) for weight in weights]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def with_gradient(self, weights: list[nn.Parameter]) -> list[Tensor]:
        """The masters of weights, with all of the gradient that backward passes have given so far."""
        for weight in weights:
            if weight.grad is not None:
                self._receive(weight)
        if self._staging is not None:
            self._staging.finish()
        return [self.masters[weight] for weight in weights]

    @torch.no_grad()
    def _receive(self, weight: nn.Parameter) -> None:
        """Take a weight's gradient off the device, and add it to what has come before."""
        gradient, weight.grad, master = own_part(weight.grad), None, self.masters[weight]
        is_first = master.grad is None
        if weight not in self._sums:
            self._sums[weight] = torch.empty_like(master)
        master.grad = self._sums[weight]
        if gradient.is_cuda and self._staging is None:
            self._staging = Staging(on_side_stream(gradient.device), pinned=True)
        if self._staging is not None:
            self._staging.to_host(gradient, master.grad, add=not is_first)
        elif is_first:
            master.grad.copy_(gradient)
        else:
            master.grad.add_(gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient, also the part of it that is on its way to the host or there."""
        super().zero_grad(set_to_none=True)
        if self._staging is not None:
            self._staging.finish()
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on the masters that have a gradient; then the weights are these masters, rounded."""
        self.with_gradient([*self.masters])
        for group, of_masters in zip(self.param_groups, self._adam.param_groups, strict=True):
            of_masters["lr"] = group["lr"]
        self._adam.step()
        for weight, master in self.masters.items():
            if master.grad is None:
                continue
            own = own_part(weight)
            if self._staging is not None and own.is_contiguous():
                self._staging.to_device(master, own.data)
            else:
                own.copy_(master)
        if self._staging is not None:
            self._staging.finish()

    def state_dict(self) -> dict[str, Any]:
        """Moments and groups as AdamW has them, and the masters in the order of the groups."""
        return self._adam.state_dict() | {"masters": [*self.masters.values()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; the weights themselves are loaded with their model."""
        masters = state_dict["masters"]
        self._adam.load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for mine, loaded in zip(self.masters.values(), masters, strict=True):
            mine.copy_(loaded)


def _master(weight: nn.Parameter) -> Tensor:
    weight = own_part(weight)
    return weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
