"""Out of memory in a forward or backward pass: what it is, what is said, and the smaller token budget that follows.

batches.py does the passes again; this module holds nothing that exists once per run.
"""

import gc
import traceback

import torch

from common.config import RLConfig
from common.mistakes import TooLargePass, TooLargeRow

# What errors say that are no torch.OutOfMemoryError: of the host's allocator, and of CUDA's libraries, which allocate
# for themselves.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class StepAgain(BaseException):
    """The step's passes begin anew at a smaller token budget; no weight has changed in the step.

    No Exception: code of users that handles errors must not stop it.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory for a tensor was missing, of the device or of the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def let_go(error: BaseException) -> None:
    """Free what the frames of a caught error hold: the graph of the pass that failed."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = error.__context__ = None


def free_memory() -> None:
    """Give unused memory back; outside of `except`, where the error still holds some."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def smaller_budget(budget: int, failed: int) -> int:
    """Half the budget; or as many halves as it takes to split the pass that did not fit.

    Args:
        budget: padded tokens per pass.
        failed: padded tokens of the smallest pass, of several rows, that did not fit.
    """
    budget //= 2
    while budget >= failed:
        budget //= 2
    return budget


def too_large_pass(budget: int, failed: int) -> TooLargePass:
    """The error for a pass of a sharded model: its layers are gathered by all processes together.

    Args:
        budget: padded tokens per pass.
        failed: padded tokens of the pass, which has several rows.
    """
    smaller = smaller_budget(budget, failed)
    return TooLargePass(
        f"out of memory in a pass of {failed} tokens, padding included, and max_tokens_per_microbatch={budget}. With "
        "shard=full all processes go through the layers together, so the others, in the middle of theirs, cannot do "
        f"this pass again in parts, and the run ends. Pass --max_tokens_per_microbatch {smaller} and start the same "
        "command again: it goes on from the last checkpoint, and no result changes but for rounding."
    )


def too_large_row(num_tokens: int, config: RLConfig) -> TooLargeRow:
    """The error for a row that does not even fit into memory alone.

    Args:
        num_tokens: its length, prompt and completion.
        config: the run's; what it has already is not proposed.
    """
    in_this_run = [] if config.gradient_checkpointing else ["--gradient_checkpointing true"]
    if torch.cuda.is_available():
        in_this_run += [] if config.offload == "always" else ["--offload always"]
        if config.sampler == "vllm" and config.vllm_sleep_level < 2:
            in_this_run.append("--vllm_sleep_level 2")
    in_another = ["a smaller --max_completion_length or --max_prompt_length"]
    in_another += [] if config.use_lora else ["--use_lora true"]
    now = f"To need less, pass {' or '.join(in_this_run)} and start the same command again; or " if in_this_run else ""
    return TooLargeRow(
        f"out of memory: a row of {num_tokens} tokens, prompt and completion, does not fit although it is alone in "
        f"its pass, so a smaller --max_tokens_per_microbatch cannot help.\n{now or 'To need less, '}begin a run, in "
        f"another --output_dir, with {', '.join(in_another)}, a smaller model, or more memory."
    )
