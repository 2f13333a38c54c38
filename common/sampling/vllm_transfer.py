"""A NCCL group of a trainer and the workers of a server, of the kind that vLLM's backend nccl joins."""

from typing import Any

import torch

from common.sampling import vllm_support


def join(address: str, port: int, world_size: int, device: torch.device) -> Any:
    """The trainer's end, rank 0; it leaves the default group of the process alone.

    Args:
        address: of this machine, whose store listens there.
        port: of the store.
        world_size: the trainer and all workers.
        device: CUDA device of the tensors.

    Returns:
        vLLM's PyNcclCommunicator.
    """
    with vllm_support.imported():
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        group = StatelessProcessGroup.create(host=address, port=port, rank=0, world_size=world_size)
        return PyNcclCommunicator(group, device=device)
