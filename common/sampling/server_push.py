"""The trainer's end of a push to a server: over gloo on the CPU, over NCCL between GPUs.

The main process alone holds one of these. The group is made once, and again after a failure or a new server.
"""

import socket
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor

from common.mistakes import first_line
from common.sampling import server_transfer
from common.sampling.server_client import QUICK, About, ServerClient, ServerFailed, ServerRefused
from common.sampling.threads import in_thread

# Bytes of weights that are announced to NCCL's end together: one request for each would take longer than most of them,
# and they are all in memory at once. A larger tensor goes alone.
_ANNOUNCED = 128 * 2**20


class Transfer(Protocol):
    """Sends weights to the workers of a server, between its start and its end of an update."""

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send all weights.

        Args:
            weights: (checkpoint name, tensor); whatever it raises passes.

        Raises:
            ServerFailed: the server did not take them.
        """
        ...


def connect(client: ServerClient, about: About) -> Transfer:
    """Join the workers of a server in a process group.

    Args:
        client: of the server.
        about: what it is.

    Raises:
        ServerFailed: it cannot be joined.
    """
    kinds = {"gloo": _Gloo, "nccl": _Nccl}
    if about.backend not in kinds:
        raise ServerFailed(
            f"sampler_url={client.url}: weights come to this server by {about.backend}; need nccl on GPUs or gloo on "
            "the CPU. Start it by the command of this run with --serve added."
        )
    if about.backend == "nccl" and not torch.cuda.is_available():
        raise ServerFailed(
            f"sampler_url={client.url}: weights come to this server from GPU to GPU (nccl), and this run has no GPU. "
            "Start the server on a machine without one too, or with CUDA_VISIBLE_DEVICES= in front."
        )
    return kinds[about.backend](client, about)


class _Gloo:
    def __init__(self, client: ServerClient, about: About) -> None:
        self._client = client
        options = {"world_size": 1 + about.world_size, "timeout": client.timeout}
        self._group = _joined(client, options, lambda *place: server_transfer.join(*place, rank=0, **options))

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        answer = in_thread(lambda: _update(self._client, {}))  # each tensor says itself what it is
        problem = None
        try:
            server_transfer.send(self._group, weights)
        except server_transfer.PeerLeft as error:
            problem = error
        _finish(self._client, answer, problem)


class _Nccl:
    """vLLM's backend nccl, unpacked, in chunks; what its documentation calls one update of several chunks."""

    def __init__(self, client: ServerClient, about: About) -> None:
        from common.sampling import vllm_transfer

        self._client = client
        world_size = 1 + about.world_size
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._group = _joined(
            client, {"world_size": world_size}, lambda *place: vllm_transfer.join(*place, world_size, self._device)
        )

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        chunk: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in weights:
            values = tensor.detach().to(self._device).contiguous()
            if chunk and size + values.nbytes > _ANNOUNCED:
                self._send(chunk)
                chunk, size = [], 0
            chunk.append((name, values))
            size += values.nbytes
            del values
        if chunk:
            self._send(chunk)

    def _send(self, chunk: list[tuple[str, Tensor]]) -> None:
        info = {
            "names": [name for name, _ in chunk],
            "dtype_names": [str(values.dtype).removeprefix("torch.") for _, values in chunk],
            "shapes": [list(values.shape) for _, values in chunk],
        }
        answer = in_thread(lambda: _update(self._client, info))
        stream = torch.cuda.current_stream(self._device)
        for _, values in chunk:
            self._group.broadcast(values, src=0, stream=stream)
        _finish(self._client, answer, None)
        stream.synchronize()  # the tensors must stay until they are sent


def _joined(client: ServerClient, options: dict[str, Any], join: Callable[[str, int], Any]) -> Any:
    """The trainer's end of a group that the server's workers join at the same time.

    Args:
        client: of the server.
        options: what else the workers are told.
        join: joins at an address and a port of this machine.
    """
    address, port = _place(client)
    info = {"master_address": address, "master_port": port, "rank_offset": 1} | options
    group = in_thread(lambda: join(address, port))
    client.call("/init_weight_transfer_engine", {"init_info": info}, timeout=client.timeout)
    try:
        return group.result(timeout=client.timeout)
    except (RuntimeError, TimeoutError) as error:
        raise ServerFailed(
            f"sampler_url={client.url}: the server's workers cannot reach this process at {address}:{port} "
            f"({first_line(error)}). Open the ports between the two machines, or run both on one."
        ) from error


def _place(client: ServerClient) -> tuple[str, int]:
    """This machine's address as the server sees it, and a free port."""
    parts = urlsplit(client.url)
    with socket.create_connection((parts.hostname, parts.port or 443), timeout=client.timeout) as connection:
        address = connection.getsockname()[0]
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]


def _update(client: ServerClient, info: dict[str, Any]) -> None:
    client.call("/update_weights", {"update_info": info}, timeout=client.timeout)


def start(client: ServerClient) -> None:
    """Begin an update of the server's weights, after one that a trainer did not finish too."""
    try:
        client.call("/start_weight_update", {}, timeout=client.timeout)
    except ServerRefused:
        with suppress(ServerRefused):
            _update(client, {"none": []})  # of no backend: an update that fails is over
        client.call("/start_weight_update", {}, timeout=client.timeout)


def _finish(client: ServerClient, answer: "Future[Any]", problem: BaseException | None) -> None:
    """Wait until the server has taken what was sent; its own words say most of what went wrong."""
    try:
        answer.result(timeout=client.timeout if problem is None else QUICK)
    except TimeoutError:
        problem = problem or TimeoutError(f"no answer for {client.timeout:.0f} s")
    if problem is not None:
        raise ServerFailed(
            f"sampler_url={client.url}: the connection to the server's workers broke ({first_line(problem)}). Start "
            "this command again, which continues from the last checkpoint, if there is one."
        ) from problem
