"""How noise becomes tokens, in both samplers: with the same noise they draw the same tokens, up to rounding.

The cumulative distribution is inverted: one random number per token, so that a row does not depend on other rows.
"""

import torch
from torch import Tensor

# A CPU draws from so many numbers at a time that they stay in its cache: 2^18 float32 are 1 MiB. From 128 rows of
# 49,152 tokens together it takes six times as long.
_CACHED = 2**18


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw a token for each row: where the cumulative distribution first exceeds the noise.

    Args:
        logits: (rows, V) float32 of the distribution to draw from; afterwards they are its log-probs.
        noise: (rows,) float64 in [0, 1), from `uniform`.

    Returns:
        (rows,) int64.
    """
    vocabulary = logits.shape[1]
    at_once = len(logits) if logits.device.type != "cpu" else _CACHED // vocabulary
    drawn = []
    for part, numbers in zip(logits.split(max(at_once, 1)), noise.split(max(at_once, 1)), strict=True):
        part.copy_(part.log_softmax(-1))
        cumulative = part.exp().cumsum(-1, dtype=torch.float64)
        drawn.append(torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True).squeeze(1))
    return torch.cat(drawn).clamp(max=vocabulary - 1)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise of the shape, float64 in [0, 1), from the generator alone; one number at a time gives the same ones."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)
