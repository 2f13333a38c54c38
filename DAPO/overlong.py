"""The soft overlong punishment of DAPO (huggingface.co/papers/2503.14476), equation 13, and its settings."""

import math
from dataclasses import dataclass

from torch import Tensor

from common.config import ClippedConfig


@dataclass(kw_only=True)
class OverlongConfig(ClippedConfig):
    """Settings of a price of length."""

    overlong_buffer: int | None = None
    """Tokens before max_completion_length over which the punishment of length grows; None: a fifth of it; 0: none."""
    overlong_penalty: float = 1.0
    """What a completion of max_completion_length tokens loses of its score."""

    def __post_init__(self) -> None:
        """Check the punishment after the clip.

        Raises:
            ValueError: what was given, what is needed and why, what to do.
        """
        super().__post_init__()
        buffer, limit = self.overlong_buffer, self.max_completion_length
        if buffer is not None and not 0 <= buffer <= limit:
            raise ValueError(
                f"overlong_buffer={buffer} with max_completion_length={limit}: it is the last part of the tokens that "
                "a completion may have, so it must be from 0 to all of them. Pass --overlong_buffer 0 for no "
                "punishment, or leave it out for a fifth of the limit."
            )
        if not 0 <= self.overlong_penalty < math.inf:
            raise ValueError(
                f"overlong_penalty={self.overlong_penalty}: it is subtracted from the score of a completion that is "
                "as long as it may be, so it must be a finite number, 0 or more. Pass --overlong_penalty 1."
            )

    @property
    def overlong_tokens(self) -> int:
        """Tokens before the limit that cost something; by default a fifth, as in the paper: 4096 of 20,480."""
        return self.max_completion_length // 5 if self.overlong_buffer is None else self.overlong_buffer

    def idle_settings(self) -> dict[str, str]:
        """Those of every clipped algorithm, and one half of a punishment that is switched off by the other."""
        idle = super().idle_settings()
        if not self.overlong_penalty:
            idle["overlong_buffer"] = "overlong_penalty is 0"
        if not self.overlong_tokens:
            idle["overlong_penalty"] = "no token before max_completion_length is in the buffer of overlong_buffer"
        return idle


def overlong_penalty(lengths: Tensor, config: OverlongConfig) -> Tensor:
    """What completions lose of their scores for their length.

    Nothing up to max_completion_length - overlong_buffer tokens; from there it grows linearly to overlong_penalty at
    max_completion_length. The paper's third case, even longer completions, does not exist: there sampling ends.

    Args:
        lengths: (B,) int, in tokens, the end token counted.
        config: of the run.

    Returns:
        (B,) float32, from 0 to overlong_penalty.
    """
    buffer = config.overlong_tokens
    over = (lengths - (config.max_completion_length - buffer)).clamp(min=0).float()
    return config.overlong_penalty * over / max(buffer, 1)
