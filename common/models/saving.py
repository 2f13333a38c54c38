"""Writing the policy as a folder that transformers and vLLM load, by one process or by all that it is spread over."""

from __future__ import annotations  # for type hints whose import would take seconds

import os
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
import transformers
from torch import distributed, nn

from common.logprobs import has_adapter, without_adapter
from common.models.bases import name_base_from_folder
from common.models.files import without_report
from common.models.layout import in_checkpoint_layout
from common.models.lora import gathered_adapter, save_adapter
from common.models.outputs import restore_outputs
from common.models.streaming import write_weights
from common.models.weights import merged_layout, merged_weights, policy_weights, weights_layout
from common.sharding import is_part


def save_model(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and vLLM load; with LoRA the merged model, with adapter/ inside.

    Args:
        model: the policy, on the CPU or the device. If it is spread over processes, all of them call this, and each
            tensor is gathered and written before the next.
        tokenizer: saved in the same folder.
        folder: created if it does not exist.
    """
    base, is_spread = without_adapter(model), is_part(next(model.parameters()))
    plain = _without_adapter_or_storage(model) if has_adapter(model) else base
    adapter = gathered_adapter(model) if is_spread and has_adapter(model) else None
    if is_spread:  # all that processes do together comes before what can fail in one of them
        stream_weights(plain, policy_weights(model), weights_layout(model), folder)
    elif has_adapter(model):
        save_weights(plain, copied_weights(model), folder)
    else:
        model.save_pretrained(folder)
    if not is_first(model):
        return
    if has_adapter(model):
        save_adapter(model, folder / "adapter", adapter)
        name_base_from_folder(folder / "adapter")
    restore_outputs(base, folder)
    tokenizer.save_pretrained(folder)


def save_parts(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a policy that is spread over processes, in a file of each of them, or its adapter alone if it has one.

    The folder is one that transformers, peft and vLLM load, as any checkpoint's is. All processes call this.

    Args:
        model: the policy.
        tokenizer: saved in the same folder.
        folder: created if it does not exist.
    """
    if has_adapter(model):
        adapter = gathered_adapter(model)
        if is_first(model):
            save_adapter(model, folder, adapter)
    else:
        layout = weights_layout(model)
        num_bytes = sum(each.numel() * each.element_size() for each in layout.values())
        size = -(-num_bytes // distributed.get_world_size())
        stream_weights(model, policy_weights(model), layout, folder, max_file_size=size)
        if is_first(model):
            restore_outputs(model, folder)
    if is_first(model):
        tokenizer.save_pretrained(folder)


def save_merged(plain: transformers.PreTrainedModel, parts: dict[str, nn.Module], folder: Path) -> None:
    """Write a model that is put together of modules, their adapters merged.

    Args:
        plain: without storage; only its configurations are used.
        parts: each with the beginning of its weights' names in that model; on the CPU or the device, or spread over
            processes, which all call this.
        folder: created if it does not exist.
    """
    if not any(is_part(parameter) for module in parts.values() for parameter in module.parameters()):
        return plain.save_pretrained(folder, state_dict=copied_parts(parts))
    layout = {name: each for prefix, module in parts.items() for name, each in merged_layout(module, prefix).items()}
    weights = (pair for prefix, module in parts.items() for pair in merged_weights(module, prefix))
    names = [*layout]
    layout = dict(in_checkpoint_layout(plain, names, layout.items()))
    stream_weights(plain, in_checkpoint_layout(plain, names, weights), layout, folder)


def copied_parts(parts: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Copies on the CPU of the weights of modules by prefix, adapters merged; gathered if they are spread."""
    return {
        name: tensor.detach().cpu().clone()
        for prefix, module in parts.items()
        for name, tensor in merged_weights(module, prefix)
    }


def stream_weights(
    plain: transformers.PreTrainedModel,
    weights: Iterable[tuple[str, torch.Tensor]],
    layout: dict[str, torch.Tensor],
    folder: Path,
    *,
    max_file_size: int | str = "50GB",
) -> None:
    """As save_weights, by all processes together, for weights that come one at a time.

    Args:
        plain: only its configurations are used.
        weights: under the names of a checkpoint; gathered by all processes.
        layout: see weights_layout.
        folder: created if it does not exist.
        max_file_size: see write_weights.

    Raises:
        OSError: the disk does not take what this process writes.
    """
    is_alone = not distributed.is_initialized()
    process, num_processes = (0, 1) if is_alone else (distributed.get_rank(), distributed.get_world_size())
    ignored = set(plain._keys_to_ignore_on_save or ()) & layout.keys()
    kept = {name: tensor for name, tensor in layout.items() if name not in ignored}
    write_weights(
        ((name, tensor) for name, tensor in weights if name not in ignored),
        kept,
        folder,
        max_file_size=max_file_size,
        process=process,
        num_processes=num_processes,
    )
    if process == 0:
        save_all_but_weights(plain, folder)


def save_all_but_weights(plain: transformers.PreTrainedModel, folder: Path) -> None:
    """Write what save_pretrained writes beside the weights of a model.

    Args:
        plain: any weights that it has are left alone.
        folder: exists. In a folder that it writes to, save_pretrained deletes other files of weights.
    """
    apart = folder / "all but weights"
    with without_report():
        plain.save_pretrained(apart, state_dict={}, save_original_format=False)
    for path in apart.iterdir():
        os.replace(path, folder / path.name)
    apart.rmdir()


def is_first(model: nn.Module) -> bool:
    """Whether this process writes what is written once; of those that a model is spread over, the first does."""
    return not is_part(next(model.parameters())) or distributed.get_rank() == 0


def _without_adapter_or_storage(model: nn.Module) -> transformers.PreTrainedModel:
    """A model of the merged policy's configurations."""
    base = model.get_base_model()
    with torch.device("meta"):  # the merged weights are not quantized, so neither is this configuration
        plain = transformers.AutoModelForCausalLM.from_config(
            _without_quantization(base.config), trust_remote_code=False
        )
    plain.generation_config = base.generation_config
    return plain


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
