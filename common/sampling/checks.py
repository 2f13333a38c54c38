"""Whether a run can load, adapt and sample from its policy, asked of the model's configuration and empty modules.

A run asks this first, before it reads data: what fails later fails after minutes. With LoRA, `check_policy`
imports peft, and `check_sampling` imports vLLM if that samples; each takes seconds.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import logging
import os

import torch
import transformers

from common.config import RLConfig
from common.models.facts import why_no_parts
from common.models.loading import compute_dtype
from common.models.lora import check_targets
from common.models.positions import check_room

logger = logging.getLogger("nanorlhf")


def check_policy(config: RLConfig, model: transformers.PreTrainedModel) -> None:
    """Refuse a policy that cannot be loaded or trained as the settings say.

    Args:
        config: the run's.
        model: the policy, without storage.

    Raises:
        ValueError: for lengths beyond the model's context, or names of modules that LoRA cannot adapt.
    """
    check_room(model, config)
    if config.use_lora:
        check_targets(model, config)


def check_sampling(config: RLConfig, device: torch.device) -> None:
    """Refuse a policy that the sampler of the settings cannot sample from; transformers samples whatever trains.

    Args:
        config: the run's.
        device: where models are used.

    Raises:
        ValueError: with the reason, and the sampler that can, if there is one.
    """
    if config.sampler == "vllm":
        from common.sampling.vllm_support import check_engine

        dtype = str(compute_dtype(config, device)).removeprefix("torch.")
        max_model_len = config.max_prompt_length + config.max_completion_length
        check_engine(
            config.model, dtype=dtype, max_model_len=max_model_len, trust_remote_code=config.trust_remote_code
        )


def check_engines(config: RLConfig, model: transformers.PreTrainedModel, num_processes: int) -> None:
    """Refuse engines of several processes that the processes, or the policy's tensors, cannot be divided into.

    Args:
        config: the run's.
        model: the policy, without storage.
        num_processes: of the run.

    Raises:
        ValueError: with the sizes that are possible.
    """
    size = config.vllm_tensor_parallel
    if size == 1 or config.sampler != "vllm":
        return
    text, kind = model.config.get_text_config(), model.config.model_type
    given = f"vllm_tensor_parallel={size}"
    possible = [n for n in range(2, num_processes + 1) if num_processes % n == 0 and not why_no_parts(text, n)]
    remedy = "--vllm_tensor_parallel " + " or ".join(map(str, [1, *possible]))
    if num_processes == 1:
        raise ValueError(
            f"{given} with one process: {size} processes share an engine, each on a GPU of its own. Start {size} of "
            f"them, or a multiple, with `torchrun --nproc_per_node {size}`, or pass --vllm_tensor_parallel 1."
        )
    if num_processes % size:
        raise ValueError(
            f"{given} with {num_processes} processes: each engine needs {size} of them, and none may be left over. "
            f"Pass {remedy}, or start a multiple of {size} processes."
        )
    if reason := why_no_parts(text, size):
        raise ValueError(
            f"{given}, and {kind} has {reason}: each process of an engine takes a part of every weight. Pass {remedy}."
        )
    on_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    if on_a_node % size and os.environ.get("RANK", "0") == "0":
        logger.info(
            "%s with %d processes on a node: some engines are on two nodes, and every layer's sum goes over the "
            "network between them, which is slow; the result is the same",
            given,
            on_a_node,
        )
