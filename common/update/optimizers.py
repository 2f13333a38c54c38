"""AdamW in three ways, which differ in where its numbers are and how many bits they have.

`adamw` keeps weights and moments in float32 on the device. `adamw_host` keeps the weights there as forward passes read
them, and float32 master weights and moments on the host. `adamw_8bit` keeps the moments in 8 bits, by bitsandbytes.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from common.config import RLConfig

# Between device and host, numbers go through pinned buffers of this size. Pinned memory is scarce, and its allocator
# rounds up to powers of two, so they are few and small.
BUFFER_BYTES = 2**26
NUM_BUFFERS = 4

# bitsandbytes has a scale in float32 for each block of this many numbers in 8 bits.
_BLOCK = 256

# Begins a copy from the first tensor to the second, and gives what waits for its end.
Copy = Callable[[Tensor, Tensor], Callable[[], None]]


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
    fused = torch.cuda.is_available() or None
    optimizer = AdamW(groups, **settings, fused=fused)
    if fused:
        optimizer.register_step_pre_hook(lambda optimizer, *_: keep_counters_beside_weights(optimizer))
    return optimizer


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

    Its `param_groups` are those of the weights, its `state` is empty: nothing of it is ever on the device.

    Args:
        groups: parameter groups of weights.
        staging: how numbers move between a GPU and the host; None: made when the first gradient comes from one.
        settings: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, staging: "Staging | None" = None, **settings: Any) -> None:
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
        gradient, weight.grad, master = weight.grad, None, self.masters[weight]
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
            if self._staging is not None and weight.is_contiguous():
                self._staging.to_device(master, weight.data)
            else:
                weight.copy_(master)
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
    return weight.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)


class Staging:
    """Moves numbers between a device and the host through a few buffers, each used again when its copy has ended.

    The host works on what has arrived while more is on its way, so a backward pass is not held up.

    Args:
        copy: between a buffer and the device.
        pinned: buffers in pinned memory, from which a GPU copies by itself.
    """

    def __init__(self, copy: Copy, *, pinned: bool) -> None:
        self._copy = copy
        self._free = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(NUM_BUFFERS)]
        # Of each buffer in use: what waits for its copy, the buffer, and what is then to be done.
        self._moving: deque[tuple[Callable[[], None], Tensor, Callable[[], object] | None]] = deque()

    def to_host(self, source: Tensor, target: Tensor, *, add: bool) -> None:
        """Copy a tensor from the device, or add it to what is there; after `finish` it is done.

        Args:
            source: on the device, of any floating point type.
            target: contiguous, on the host, of the same shape.
            add: add instead of overwriting.
        """
        for piece, place in _pieces(source.reshape(-1), target.view(-1)):
            buffer = self._buffer()
            arrived = buffer[: piece.nbytes].view(piece.dtype)
            wait = self._copy(piece, arrived)
            self._moving.append((wait, buffer, partial(place.add_ if add else place.copy_, arrived)))

    def to_device(self, source: Tensor, target: Tensor) -> None:
        """Copy a tensor to the device, rounded to the type it has there; after `finish` it is done.

        Args:
            source: contiguous, on the host.
            target: contiguous, on the device, of the same shape.
        """
        for place, piece in _pieces(target.view(-1), source.view(-1)):
            buffer = self._buffer()
            leaving = buffer[: place.nbytes].view(place.dtype).copy_(piece)
            self._moving.append((self._copy(leaving, place), buffer, None))

    def finish(self) -> None:
        """Wait for all copies, and do what is to be done with what has arrived."""
        while self._moving:
            self._end_of_oldest()

    def _buffer(self) -> Tensor:
        if not self._free:
            self._end_of_oldest()
        return self._free.pop()

    def _end_of_oldest(self) -> None:
        wait, buffer, then = self._moving.popleft()
        wait()
        if then is not None:
            then()
        self._free.append(buffer)


def _pieces(on_device: Tensor, on_host: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of two vectors of equal length, such that the first one's fit into a buffer."""
    size = BUFFER_BYTES // on_device.element_size()
    return zip(on_device.split(size), on_host.split(size), strict=True)


def on_side_stream(device: torch.device) -> Copy:
    """Copies on a stream of their own, behind what the current stream has been given so far. It has never been run.

    Args:
        device: a GPU. The other side of each copy is in pinned memory.
    """
    stream = torch.cuda.Stream(device)

    def copy(source: Tensor, target: Tensor) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            ended = stream.record_event()
        # Its memory is given to nobody else before the copy has ended.
        (source if source.is_cuda else target).record_stream(stream)
        return ended.synchronize

    return copy
