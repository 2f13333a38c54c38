"""Staging: numbers on their way between a GPU and the host, through a few pinned buffers.

What gradients and weights are for is in optimizers.py; whole models are moved by the pool.
"""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

# Pinned memory is scarce, and its allocator rounds up to powers of two: so the buffers are few and small, and the
# masters and moments of optimizers, which never move, are not pinned.
BUFFER_BYTES = 2**26
NUM_BUFFERS = 4

# Begins a copy from the first tensor to the second, and gives what waits for its end.
Copy = Callable[[Tensor, Tensor], Callable[[], None]]


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
