"""Linear layers in 4 bits without storage: they allocate what bitsandbytes' do, and need no bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.models.lora import read_by_kernels


class _Unpacked(torch.autograd.Function):
    """As bitsandbytes' MatMul4Bit: the weight is unpacked for each product and not kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return nn.functional.linear(inputs, inputs.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class PackedLinear(nn.Linear):
    """A frozen linear layer of two weights a byte, which computes in `compute`."""

    compute: torch.dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., out) in the dtype of the (..., in) inputs, copied as peft does around such a layer."""
        outputs = _Unpacked.apply(inputs.to(self.compute), self.weight, (self.out_features, self.in_features))
        if self.bias is not None:
            outputs = outputs + self.bias.to(self.compute)
        return outputs.to(inputs.dtype).clone()


def pack(model: nn.Module, compute: torch.dtype) -> None:
    """Put packed layers in the place of those that are loaded in 4 bits.

    Args:
        model: of transformers, on the device meta.
        compute: dtype of forward passes.
    """
    from transformers.quantizers.base import get_keys_to_not_convert  # takes a second

    kept = {*get_keys_to_not_convert(model), *read_by_kernels(model)}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not any(name == each or name.endswith(f".{each}") for each in kept):
            weight = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
            module.__class__ = PackedLinear
            module.compute = compute
            module.weight = nn.Parameter(weight, requires_grad=False)
