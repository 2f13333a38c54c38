"""Weights from a trainer to the workers of a server over gloo, one tensor at a time: both ends, without vllm.

vLLM's own backends need CUDA; this one is for the CPU. Each tensor follows a header of fixed size, so that the trainer
needs to know no names and shapes before, and can say in between that it has failed.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from common.mistakes import first_line

# Bytes of a header: a name, a dtype and a shape, as JSON.
_HEADER = 2048
_END, _FAILED = {"end": True}, {"failed": True}


class SenderFailed(ValueError):
    """The trainer could not make all weights, and says why itself."""


class PeerLeft(RuntimeError):
    """The other end closed its connections, or did nothing for the time limit."""


def join(address: str, port: int, *, rank: int, world_size: int, timeout: float) -> Any:
    """A process group of the trainer, rank 0, and all workers; it leaves the default group of a process alone.

    Args:
        address: of the trainer, whose store listens there.
        port: of the store.
        rank: of this process.
        world_size: the trainer and all workers.
        timeout: seconds for each transfer.

    Returns:
        torch's ProcessGroupGloo.
    """
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    limit = timedelta(seconds=timeout)
    store = TCPStore(address, port, world_size, is_master=rank == 0, timeout=limit, wait_for_workers=False)
    return ProcessGroupGloo(PrefixStore("weights", store), rank, world_size, limit)


def send(group: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Send all weights from rank 0; if they cannot all be made, tell the workers so.

    Args:
        group: from `join`.
        weights: (checkpoint name, tensor), on any device; whatever it raises passes.

    Raises:
        PeerLeft: the workers take no more.
    """
    for name, tensor in _or_say_so(group, weights):
        values = tensor.detach().to("cpu").contiguous()
        _header(group, {"name": name, "dtype": str(values.dtype)[6:], "shape": list(values.shape)})
        if values.numel():
            _broadcast(group, values.reshape(-1).view(torch.uint8))
    _header(group, _END)


def _or_say_so(group: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights; if they raise, the workers are told."""
    stream = iter(weights)
    while True:
        try:
            named = next(stream, None)
        except BaseException:
            _header(group, _FAILED)
            raise
        if named is None:
            return
        yield named
        del named  # before the next one is made


def receive(group: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that `send` sends, one by one, on every other rank.

    Args:
        group: from `join`.

    Raises:
        SenderFailed: the trainer has no more weights, but has not sent all.
        PeerLeft: the trainer ended.
    """
    while True:
        content = torch.empty(_HEADER, dtype=torch.uint8)
        _broadcast(group, content)
        header = json.loads(bytes(content.tolist()))
        if header == _FAILED:
            raise SenderFailed("the trainer failed before it had sent all weights. Its own message says why.")
        if header == _END:
            return
        values = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
        if values.numel():
            _broadcast(group, values.view(-1).view(torch.uint8))
        yield header["name"], values
        del values


def _header(group: Any, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    assert len(text) <= _HEADER, header
    _broadcast(group, torch.tensor(list(text.ljust(_HEADER)), dtype=torch.uint8))


def _broadcast(group: Any, values: Tensor) -> None:
    from torch.distributed import BroadcastOptions

    options = BroadcastOptions()
    options.rootRank = 0
    try:
        group.broadcast([values], options).wait()
    except RuntimeError as error:
        raise PeerLeft(first_line(error)) from error
