"""One push over NCCL; test_push_cuda.py starts it by torchrun on two GPUs. Arguments: the model's folder."""

import os
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

import common  # noqa: F401
from common.models.loading import load_policy
from common.models.parts import spread
from common.models.weights import policy_weights
from common.sampling.pushing import push_policy
from tests.toy import toy_config


class Keeping:
    """A sampler in bfloat16 that keeps what it gets, on the host."""

    needs_push, weights_dtype = True, torch.bfloat16

    def __init__(self) -> None:
        self.got: dict[str, Tensor] = {}

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            assert tensor.is_cuda
            self.got[name] = tensor.cpu()


def main() -> None:
    """Load in parts, spread, push, and compare with the whole model."""
    folder = sys.argv[1]
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl")
    whole = load_policy(folder, toy_config(folder, folder), dtype=torch.float32)
    policy = load_policy(folder, toy_config(folder, folder, shard="full", sampler="vllm"), dtype=torch.float32)
    spread(policy, torch.device("cuda"))
    assert all(parameter.to_local().is_cuda for parameter in policy.parameters())
    assert all(buffer.is_cuda for buffer in policy.buffers())
    sampler = Keeping()
    push_policy(sampler, policy, None)
    expected = dict(policy_weights(whole))
    assert sampler.got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(sampler.got[name], tensor.bfloat16() if tensor.dim() > 1 else tensor), name
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
