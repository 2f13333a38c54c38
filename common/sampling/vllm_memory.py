"""What vLLM says when memory is short, and which settings of ours help: at its start, a push, sampling, sleep, wake.

vLLM names its own arguments, and the allocator of its sleep mode raises a bare RuntimeError. All of that becomes one
ValueError of ours; every other error passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from common.mistakes import first_line
from common.update.out_of_memory import is_out_of_memory

# By what vLLM does: what helps. All of these settings may change when a run goes on.
_REMEDIES = {
    "sample": "a smaller --vllm_memory_share (its cache takes what is left of that), a smaller "
    "--vllm_max_num_seqs, or --offload always, so that the trainer's models leave the device meanwhile",
    "take the new weights": "--offload always, or a smaller --vllm_memory_share: the policy and vLLM's copy of it are "
    "on the device together",
    "go to sleep": "--vllm_sleep_level 2, which drops its weights: level 1 copies them to the host, which lacks the "
    "memory",
    "wake up": "--offload always, so that the trainer's models leave the device before, or a smaller "
    "--vllm_memory_share",
}


def start_remedy(error: BaseException) -> str | None:
    """Which settings help if an engine could not start for want of memory; None if memory is not the cause."""
    text = " ".join(str(error).split())
    if "Free memory on device" in text:
        return "Pass a smaller --vllm_memory_share, or end other processes that use this GPU."
    if "warming up" in text and "out of memory" in text:
        return "Pass a smaller --vllm_max_num_seqs, or a smaller --vllm_memory_share."
    if "No available memory" in text or "gpu_memory_utilization" in text:
        return "Pass a larger --vllm_memory_share or a smaller --max_completion_length."
    if _is_short(error):
        return (
            "Its weights and first pass do not fit beside what is on the device. Pass --offload always, a smaller "
            "--vllm_max_num_seqs, or --vllm_enforce_eager true, or end other processes that use this GPU."
        )
    return None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Say which settings help where memory is short inside.

    Args:
        what: vLLM does inside: "sample", "take the new weights", "go to sleep" or "wake up".

    Raises:
        ValueError: with vLLM's words and the remedy.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_short(error):
            raise
        raise ValueError(
            f"out of memory: vLLM cannot {what}: {first_line(error)}.\nStart the same command again with "
            f"{_REMEDIES[what]}; it continues from the last checkpoint, if there is one. --sampler transformers needs "
            "no memory of its own, in a run of another --output_dir."
        ) from error


def _is_short(error: BaseException) -> bool:
    # The allocator of sleep mode: "CUDA Error: out of memory at .../cumem_allocator.cpp".
    return is_out_of_memory(error) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())
