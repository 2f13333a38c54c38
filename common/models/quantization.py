"""Frozen weights in 4 bits (QLoRA, huggingface.co/papers/2305.14314), by bitsandbytes, which is imported on demand.

The adapter is trained as usual. The sampler and the saved model get the weights in floating point with the adapter
merged, so vLLM samples from what was trained, up to rounding.
"""

import sys

import torch
import transformers
from torch import Tensor, nn


def four_bits(dtype: torch.dtype, model: nn.Module, kept: list[str]) -> transformers.BitsAndBytesConfig:
    """How transformers loads linear layers in 4 bits: NF4, its scales quantized too, computing in `dtype`.

    Args:
        dtype: of forward passes.
        model: what is loaded, without storage.
        kept: names of linear layers that stay in `dtype`, beside the head: a kernel that reads a weight itself cannot
            read a packed one.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"load_in_4bit=True, but bitsandbytes cannot be imported ({error}). Run pip install bitsandbytes, or "
            "leave out --load_in_4bit."
        ) from error
    from transformers.quantizers.base import get_keys_to_not_convert

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=[*get_keys_to_not_convert(model), *kept],  # of 4 bits too, whatever its name says
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable(model: nn.Module) -> None:
    """Stop bitsandbytes on the CPU from repacking weights for inference: repacked ones cannot be trained."""
    for module in model.modules():
        if isinstance(module, sys.modules["bitsandbytes"].nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is packed into 4 bits."""
    # If bitsandbytes was never imported, nothing is packed.
    return "bitsandbytes" in sys.modules and isinstance(weight, sys.modules["bitsandbytes"].nn.Params4bit)


def scales(module: nn.Module) -> list[Tensor]:
    """Tensors that belong to the packed weights of a model and are neither parameters nor buffers."""
    found = [scale for weight in module.parameters() for scale in scales_of(weight)]
    return list(dict.fromkeys(found))  # weights share one `code`


def scales_of(weight: Tensor) -> list[Tensor]:
    """Tensors that one weight is unpacked with; none if it is not packed."""
    if not is_quantized(weight):
        return []
    state = weight.quant_state
    return [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


@torch.no_grad()
def in_floating_point(weight: Tensor) -> Tensor:
    """A weight with the numbers that it computes with: unpacked if it is packed, else itself."""
    if not is_quantized(weight):
        return weight
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
