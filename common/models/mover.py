"""Mover: copies of tensors between the device and the host, and who waits for them.

`copy` starts a copy, `record` marks all copies started so far, and `wait` waits for a mark. Before a wait for its mark
nothing may read what is copied into, or change what is copied from. Both may be dropped at any time: the mover keeps
them until somebody has waited. What is copied, and when, is up to pool.py.
"""

import logging
import weakref
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from common.host import host_memory, processes_here

logger = logging.getLogger("nanorlhf")

# Of the host memory that is left when the first tensor gets a pinned copy. The kernel cannot take pinned memory back,
# and the other half is for loading, data, the rules' processes and the file cache.
PINNED_SHARE = 0.5


@dataclass(kw_only=True, eq=False)
class Mark:
    """A point in the row of copies.

    Attributes:
        number: marks are numbered in their order.
        event: when all copies before it have ended; None: when it was made.
    """

    number: int = 0
    event: torch.cuda.Event | None = None


class Mover:
    """Copies that have ended when `copy` returns; for a device that is the host."""

    def home(self, tensor: Tensor) -> Tensor:
        """Host memory for a tensor, of its shape and type and with any numbers in it."""
        return torch.empty_like(tensor, device="cpu")

    def would_pin(self, tensor: Tensor) -> bool:
        """Whether the home of a tensor on the host would be pinned memory, and the tensor is not."""
        return False

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start copying, once everything is done that the device was asked for so far.

        Args:
            source: on the host or the device.
            target: of the same shape, type and layout. On the device: allocated on the current stream.
        """
        target.copy_(source)

    def record(self) -> Mark:
        """A mark after all copies that were started."""
        return Mark()

    def wait(self, mark: Mark, *, host: bool) -> None:
        """Wait for a mark.

        Args:
            mark: from `record`.
            host: whether this process waits, as it must before it reads or changes host memory. Else the device does,
                before whatever it is asked for from now on, on the current stream.
        """


class CudaMover(Mover):
    """Copies on a stream of their own, asynchronous where the host's side is pinned.

    Memory on the device always belongs to the stream that computes: the stream of copies waits for it when a copy
    starts, and it waits for the copies at `wait`. So what is freed after a wait can be used again at once, and
    Tensor.record_stream is not needed. Not run on a GPU yet.

    Args:
        device: a CUDA device.
        pinned: memory for homes; None: of half the host memory that is available.
    """

    def __init__(self, device: torch.device, pinned: "PinnedMemory | None" = None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.pinned = pinned or PinnedMemory()
        self._started: list[Tensor] = []
        self._marks = 0
        # Tensors of copies that nobody has waited for, with their mark's number.
        self._kept: deque[tuple[int, list[Tensor]]] = deque()

    def home(self, tensor: Tensor) -> Tensor:
        """See Mover; pinned while there is room."""
        return self.pinned.like(tensor)

    def would_pin(self, tensor: Tensor) -> bool:
        """See Mover."""
        return not tensor.is_pinned() and tensor.nbytes > 0 and self.pinned.has_room(tensor.nbytes)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """See Mover. From or to pageable memory it has ended on return: read earlier, it would hold anything."""
        host = target if source.is_cuda else source
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=host.is_pinned())
        self._started += [source, target]

    def record(self) -> Mark:
        """See Mover."""
        self._marks += 1
        self._kept.append((self._marks, self._started))
        self._started = []
        return Mark(number=self._marks, event=self._stream.record_event())

    def wait(self, mark: Mark, *, host: bool) -> None:
        """See Mover."""
        assert mark.event is not None
        if host:
            mark.event.synchronize()
        else:
            torch.cuda.current_stream(self._device).wait_event(mark.event)
        while self._kept and self._kept[0][0] <= mark.number:
            self._kept.popleft()


def mover_for(device: torch.device) -> Mover:
    """The mover of a device."""
    return CudaMover(device) if device.type == "cuda" else Mover()


def pinned_bytes(size: int) -> int:
    """What torch allocates for `size` bytes of pinned memory: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


class PinnedMemory:
    """Host memory that is pinned up to a budget, and pageable beyond it, which is slower and not asynchronous.

    Args:
        budget: bytes; None: PINNED_SHARE of what is available at first use, shared with the processes of this host.

    Attributes:
        used: bytes that are pinned now.
    """

    def __init__(self, budget: int | None = None) -> None:
        self._budget = budget
        self._has_spoken = False
        self.used = 0

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more are within the budget; the first time they are not, a line says so."""
        if self._budget is None:
            self._budget = int(PINNED_SHARE * host_memory(processes=processes_here()).available)
        fits = self.used + pinned_bytes(size) <= self._budget
        if not fits:
            self._say(f"the budget is {self._budget / 1e9:.1f} GB")
        return fits

    def like(self, tensor: Tensor) -> Tensor:
        """Memory for a tensor, of its shape and type."""
        if self.has_room(tensor.nbytes):
            try:
                return self._count(torch.empty_like(tensor, device="cpu", pin_memory=True))
            except RuntimeError as error:  # the system has a limit of its own
                self._budget = self.used
                self._say(str(error).splitlines()[0])
        return torch.empty_like(tensor, device="cpu")

    def _count(self, buffer: Tensor) -> Tensor:
        size = pinned_bytes(buffer.nbytes)
        self.used += size
        weakref.finalize(buffer.untyped_storage(), self._give_back, size)
        return buffer

    def _give_back(self, size: int) -> None:
        self.used -= size

    def _say(self, reason: str) -> None:
        if not self._has_spoken:
            logger.warning(
                "pinned host memory ends at %.1f GB (%s): the other weights that leave the device move more slowly, "
                "with the same bits. A host with more memory would pin them all.",
                *(self.used / 1e9, reason),
            )
        self._has_spoken = True
