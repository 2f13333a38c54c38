"""The soft overlong punishment of DAPO (huggingface.co/papers/2503.14476), equation 13."""

import math

from torch import Tensor

from common.config import ClippedConfig, check_not_negative


def check_overlong(config: ClippedConfig) -> None:
    """Refuse a buffer that is longer than a completion, a penalty that is none, and rounds below 0.

    Args:
        config: refill_rounds, overlong_buffer, overlong_penalty and max_completion_length are read.

    Raises:
        ValueError: what was given, what is needed and why, what to do.
    """
    check_not_negative(config, "refill_rounds")
    buffer, limit = config.overlong_buffer, config.max_completion_length
    if buffer is not None and not 0 <= buffer <= limit:
        raise ValueError(
            f"overlong_buffer={buffer} with max_completion_length={limit}: it is the last part of the tokens that a "
            "completion may have, so it must be from 0 to all of them. Pass --overlong_buffer 0 for no punishment, or "
            "leave it out for a fifth of the limit."
        )
    if not 0 <= config.overlong_penalty < math.inf:
        raise ValueError(
            f"overlong_penalty={config.overlong_penalty}: it is subtracted from the score of a completion that is as "
            "long as it may be, so it must be a finite number, 0 or more. Pass --overlong_penalty 1."
        )


def overlong_penalty(lengths: Tensor, config: ClippedConfig) -> Tensor:
    """What completions lose of their scores for their length.

    Nothing up to max_completion_length - overlong_buffer tokens; from there it grows linearly to overlong_penalty.

    Args:
        lengths: (B,) int, in tokens.
        config: see check_overlong; a buffer of None is a fifth of max_completion_length, as in the paper.

    Returns:
        (B,) float32, from 0 to overlong_penalty.
    """
    limit = config.max_completion_length
    buffer = limit // 5 if config.overlong_buffer is None else config.overlong_buffer
    over = (lengths - (limit - buffer)).clamp(min=0).float()
    return config.overlong_penalty * over / max(buffer, 1)
