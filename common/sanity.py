"""Checks that run in every step of every run: what the first optimizer step after sampling must look like."""

import logging

import torch

logger = logging.getLogger("nanorlhf")

# Mean |sampler's log-prob - trainer's log-prob| above which something is wrong, not only rounded.
MAX_LOGPROB_DIFF = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def check_first_step(metrics: dict[str, float], *, step: int, dtype: torch.dtype) -> None:
    """Warn if the policy that was updated does not look like the policy that sampled.

    Args:
        metrics: the step's; policy/first_ratio and sampler/logprob_diff are read where they are there.
        step: the step.
        dtype: precision of forward passes.
    """
    ratio = metrics.get("policy/first_ratio", 1.0)
    if ratio != 1.0:
        logger.warning(
            "step %d: the ratio before the first optimizer step is %.8f, not 1: two forward passes over the same "
            "tokens differ. Look for dropout or other randomness in the model.",
            step,
            ratio,
        )
    difference, bound = metrics.get("sampler/logprob_diff", 0.0), MAX_LOGPROB_DIFF[dtype]
    if difference > bound:
        logger.warning(
            "step %d: log-probs of sampler and trainer differ by %.4f on average, more than %.4f: the sampler may "
            "hold other weights. Try --sampler transformers to find out.",
            step,
            difference,
            bound,
        )
