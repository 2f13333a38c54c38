"""What stands for a CUDA device where there is none: functions that allocate what CUDA's kernels do.

Fake tensors on the device cuda abort a process without CUDA, so a pass runs on fake tensors of the CPU.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Flash(torch.autograd.Function):
    """Allocates what flash attention 2 allocates, and computes nothing. Tensors are (b, heads, L, head size)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Sums in float32, and a gradient for each head where several share keys and values.
        sums = torch.empty(q.shape, dtype=torch.float32), torch.empty_like(lse)
        of_heads = (torch.empty_like(q), torch.empty_like(out)) if k.shape[1] != q.shape[1] else ()
        del sums, of_heads
        return dq, dk, dv


def _flash_for_sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for torch's scaled_dot_product_attention."""
    return _Flash.apply(query, key, value)


class _NoKernel:
    """A Triton kernel that writes into what it is given, and allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@contextmanager
def standing_for_cuda(does: bool) -> Iterator[None]:
    """Within it, attention and trl's head allocate what they do on CUDA.

    Args:
        does: False: nothing changes.
    """
    if not does:
        yield
        return
    import trl.kernels.chunked_logprob as head
    import trl.trainer.utils as trl_utils

    there = {
        (head, "triton"): types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
        (head, "_use_triton"): lambda device: True,
        (trl_utils, "_use_triton"): lambda device: True,
        (torch.nn.functional, "scaled_dot_product_attention"): _flash_for_sdpa,
        (head, "_forward_kernel"): _NoKernel(),
        (head, "_backward_kernel"): _NoKernel(),
        (head, "_addmm_fp32"): lambda total, a, b: total,  # one call of cuBLAS, which needs no temporary
    }
    before = {(module, name): vars(module).get(name) for module, name in there}
    for (module, name), value in there.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
