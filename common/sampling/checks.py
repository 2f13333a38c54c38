"""Whether a run can load, adapt and sample from its policy, asked of the model's configuration and empty modules.

A run asks this first, before it reads data: what fails later fails after minutes. With LoRA, `check_policy`
imports peft, and `check_sampling` imports vLLM if that samples; each takes seconds.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import torch
import transformers

from common.config import RLConfig
from common.models.loading import compute_dtype
from common.models.lora import check_targets
from common.models.positions import check_room


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
