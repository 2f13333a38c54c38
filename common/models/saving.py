"""Writing the policy as a folder that transformers and vLLM load."""

from __future__ import annotations  # for type hints whose import would take seconds

from copy import deepcopy
from pathlib import Path

import torch
import transformers
from torch import nn

from common.logprobs import has_adapter, without_adapter
from common.models.bases import name_base_from_folder
from common.models.lora import save_adapter
from common.models.outputs import restore_outputs
from common.models.weights import policy_weights


def save_model(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and vLLM load; with LoRA the merged model, with adapter/ inside.

    Args:
        model: the policy, on the CPU or the device.
        tokenizer: saved in the same folder.
        folder: created if it does not exist.
    """
    if has_adapter(model):
        save_adapter(model, folder / "adapter")
        name_base_from_folder(folder / "adapter")
        base = model.get_base_model()
        with torch.device("meta"):  # the merged weights are not quantized, so neither is this configuration
            plain = transformers.AutoModelForCausalLM.from_config(
                _without_quantization(base.config), trust_remote_code=False
            )
        plain.generation_config = base.generation_config
        save_weights(plain, copied_weights(model), folder)
    else:
        model.save_pretrained(folder)
    restore_outputs(without_adapter(model), folder)
    tokenizer.save_pretrained(folder)


def copied_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What policy_weights yields, in new tensors on the CPU."""
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in policy_weights(model)}


def save_weights(
    model: transformers.PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path, **options: str
) -> None:
    """Write a model's configurations with the weights of a checkpoint.

    Args:
        model: only its configurations are used.
        weights: under the names of a checkpoint, no two of them in the same storage. It is emptied.
        folder: created if it does not exist.
        options: of save_pretrained, such as max_shard_size.
    """
    # The layout is the checkpoint's already: a second conversion would find nothing, or the wrong weights.
    model.save_pretrained(folder, state_dict=weights, save_original_format=False, **options)
    restore_outputs(model, folder)


def _without_quantization(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    plain = deepcopy(config)
    vars(plain).pop("quantization_config", None)
    return plain
