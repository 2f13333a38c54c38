"""Models of an algorithm that are not trained, such as a teacher: they give log-probs of the policy's tokens."""

import torch
import transformers
from torch import nn

from common.config import OtherModel, RLConfig
from common.models.loading import load_reference


def frozen_models(config: RLConfig) -> list[OtherModel]:
    """Those of the algorithm's other models that are not trained."""
    return [other for other in config.other_models if not other.is_trained]


def check_frozen(other: OtherModel, config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Refuse a model that cannot judge the policy's tokens, before anything is loaded.

    Raises:
        ValueError: says what is wrong with it.
    """
    if other.path is None:
        raise ValueError(
            f"{other.setting}=None: the algorithm needs this model, and there is no default for it. Pass "
            f"--{other.setting} with a hub id or a folder."
        )


def load_frozen(other: OtherModel, config: RLConfig, *, dtype: torch.dtype) -> nn.Module:
    """Load it on the CPU, in the precision of forward passes."""
    return load_reference(other.path, config, dtype=dtype)


def check_differs(other: OtherModel, model: nn.Module, policy: nn.Module | None) -> None:
    """Refuse a model that is the policy itself."""
