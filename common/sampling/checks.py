"""Whether a run can load, adapt and sample from its policy, asked of the model's configuration and empty modules.

A run asks this first, before it reads data: what fails later fails after minutes. `check_policy` costs no import;
`check_sampling` may import vLLM, which takes seconds.
"""

import torch
import transformers

from common.config import RLConfig
from common.models.facts import check_memory
from common.models.lora import check_targets


def check_policy(config: RLConfig, model: transformers.PreTrainedModel, device: torch.device) -> None:
    """Refuse a policy that cannot be loaded or trained as the settings say.

    Args:
        config: the run's.
        model: the policy, without storage.
        device: where models are used.

    Raises:
        ValueError: for weights without room, or names of modules that LoRA cannot adapt.
    """
    check_memory(model, config, device)
    if config.use_lora:
        check_targets(model, config)


def check_sampling(config: RLConfig, model: transformers.PreTrainedModel) -> None:
    """Refuse a policy that the sampler of the settings cannot sample from.

    Args:
        config: the run's.
        model: the policy, without storage.

    Raises:
        ValueError: with the reason, and the sampler that can, if there is one.
    """
