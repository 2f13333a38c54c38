"""Replacing the weights of a vLLM model that runs, so that it samples as if it had been loaded from disk with them.

On the CPU every push is a first load again. On CUDA it is vLLM's layerwise reload, which keeps the storage that
captured graphs read. vllm_engine.py calls this within the engine; nothing here knows of requests or caches.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.sampling.vllm_trial import Refused

Weights = Iterable[tuple[str, Tensor]]


def reload(model: nn.Module, weights: Weights, config: Any) -> None:
    """Load weights into a model of vLLM and prepare them for its kernels.

    Args:
        model: vLLM's model.
        weights: (checkpoint name, tensor) of every weight.
        config: vLLM's VllmConfig of the engine.

    Raises:
        ValueError: if vLLM leaves weights of the model as they were.
        Exception: whatever `weights` raises. After any error, the model must not be used before a reload succeeds.
    """
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    load = load_again if current_platform.is_cpu() else load_layerwise
    with torch.no_grad(), set_current_vllm_config(config):
        load(model, weights, config.model_config)


def load_again(model: nn.Module, weights: Weights, config: Any) -> None:
    """Bring the model back to where its first load began, load, and prepare the weights as a first load does.

    On the CPU, vLLM's layerwise reload is not enough (0.31). It does not pack experts, tied heads and convolutions of
    state-space models again, and it drops what a model copies into its parameters without their weight loaders, as
    gpt_oss does its experts (on CUDA, the trial push refuses gpt_oss for that before weights are loaded). And there
    are no graphs on the CPU that it would have to protect.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    for layer in model.modules():
        if isinstance(layer, FusedMoEMethodBase):
            layer.moe_kernel = None  # with a kernel, vLLM takes the weights for packed ones
    for layer in model.modules():
        _restore_parameters(layer)
    for layer in model.modules():
        _restore_views(layer)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(torch.nan)
    model.load_weights(weights)
    _check_loaded({name for name, parameter in model.named_parameters() if parameter.isnan().all()})
    process_weights_after_loading(model, config, torch.device("cpu"))


def _restore_parameters(layer: nn.Module) -> None:
    """Give a layer the parameters that its weight loaders expect.

    A parameter that vLLM has not reshaped since is kept: other layers may share it, and buffers may be views of it.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_meta_tensor, restore_layer_refs

    recorded = get_layerwise_info(layer).restore_metadata[0]
    for name in layer._parameters.keys() - recorded.keys() - SKIP_TENSORS:
        del layer._parameters[name]
    for name, form in recorded.items():
        current, form = layer._parameters.get(name), restore_layer_refs(form, layer)
        if current is not None and _layout(current) == _layout(form):
            current.__class__, current.__dict__ = form.__class__, form.__dict__.copy()
        else:
            layer.register_parameter(name, materialize_meta_tensor(form))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _restore_views(layer: nn.Module) -> None:
    """Let a layer's buffers be views of its parameters again, as Mamba 2's `conv_weights` is of `conv1d.weight`.

    Packing gives such a parameter new storage, and the kernel reads the buffer.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS

    # vLLM records all buffers but these.
    views = layer._non_persistent_buffers_set - get_layerwise_info(layer).restore_metadata[1].keys() - SKIP_TENSORS
    for name in views:
        buffer = layer._buffers[name]
        storages = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        if buffer is None or buffer.untyped_storage().data_ptr() in storages:
            continue
        [parameter] = [each for each in layer.parameters() if each.numel() == buffer.numel()]
        parameter.data = buffer.view(parameter.shape)


def load_layerwise(model: nn.Module, weights: Weights, config: Any) -> None:
    """Load with vLLM's layerwise reload: what its `reload_weights` does, and a check that every layer got weights.

    It copies one layer at a time into the storage that captured graphs read, and repeats the processing after loading,
    which model.load_weights would skip; vLLM documents it for waking from sleep level 2.
    """
    from vllm.model_executor.model_loader.reload.layerwise import (
        finalize_layerwise_reload,
        get_layerwise_info,
        initialize_layerwise_reload,
    )

    try:
        initialize_layerwise_reload(model)
        model.load_weights(weights)
        forgotten = _without_weights(model)
    except BaseException:
        # Incomplete layers get their old weights back. Without this, the next push would count tensors of this one as
        # its own, and load only half of its layers.
        for layer in model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0
        finalize_layerwise_reload(model, config)
        raise
    finalize_layerwise_reload(model, config)
    _check_loaded(forgotten)


def _without_weights(model: nn.Module) -> set[str]:
    """Names of parameters for which no weight loader was called, before the reload is finalized.

    vLLM gives them their old values back and prints a warning.
    """
    from vllm.model_executor.layers import attention
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    try:
        is_deferred = attention.is_deferred_attention_layer
    except AttributeError:  # before vLLM 0.28
        is_deferred = _is_attention
    complete = {id(parameter) for parameter in model.parameters()}  # a tied head shares the embeddings' parameter
    names = set()
    for prefix, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if info.can_load() and info.load_numel == 0 and not is_deferred(layer):
            old = info.kernel_tensors[0]
            names |= {f"{prefix}.{name}" for name in info.restore_metadata[0] if id(old.get(name)) not in complete}
    return names


def _is_attention(layer: nn.Module) -> bool:
    """Whether vLLM prepares a layer after all others, up to 0.27."""
    from vllm.model_executor.layers.attention import Attention, MLAAttention

    return isinstance(layer, Attention | MLAAttention)


def _check_loaded(missing: set[str]) -> None:
    if missing:
        raise Refused(
            f"vLLM leaves {len(missing)} weights of its model as they were, such as {min(missing)}, since the policy "
            "has none for them or vLLM cannot replace them: it would not sample from the policy."
        )
