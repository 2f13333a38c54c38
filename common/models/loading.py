"""Load policy and reference, and save the policy. Everything is loaded on the CPU."""

from __future__ import annotations  # for type hints whose import would take seconds

import logging
from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from common.config import RLConfig
from common.environment import cpu_computes_bfloat16
from common.logprobs import has_adapter
from common.models.chat import turn_end_token
from common.models.lora import targets
from common.models.quantization import four_bits, keep_trainable
from common.models.weights import policy_weights
from common.seeds import hashed_seed

logger = logging.getLogger("nanorlhf")

# Of the memory that torch allocates on the CPU, in bytes.
ALIGNMENT = 64

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


def end_token_ids(
    model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The one list of end tokens for sampler, masks and rewards.

    Args:
        model: its generation configuration may name one or several.
        tokenizer: its end token is included, and the token that its chat template ends a turn with, because a base
            model's own end token is often a different one.

    Returns:
        Distinct ids in ascending order, without those beyond the model's embedding, which it can never sample.

    Raises:
        ValueError: if none is left.
    """
    named = model.generation_config.eos_token_id
    ids = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    turn_end = turn_end_token(tokenizer)
    if turn_end is not None:
        ids.add(tokenizer.convert_tokens_to_ids(turn_end))
    size = model.get_input_embeddings().num_embeddings
    if known := sorted(token for token in ids if token < size):
        return tuple(known)
    named = f"{sorted(ids)} as end tokens, and the model has {size} tokens" if ids else "no end token"
    raise ValueError(
        f"the model's generation configuration and its tokenizer name {named}: completions could never end. Set "
        "eos_token_id in generation_config.json."
    )


def unused_token_ids(path: str, tokenizer: transformers.PreTrainedTokenizerBase) -> range:
    """Ids beyond the tokenizer's vocabulary that the model can sample, such as padding of the embedding matrix.

    Args:
        path: hub id or folder of the model.
        tokenizer: its tokenizer.
    """
    return range(max(tokenizer.get_vocab().values()) + 1, num_tokens(path))


def num_tokens(path: str) -> int:
    """How many tokens a model has an embedding for; its tokenizer may have fewer or more.

    Args:
        path: hub id or folder of the model.
    """
    return transformers.AutoConfig.from_pretrained(path).get_text_config().vocab_size


def compute_dtype(config: RLConfig, device: torch.device) -> torch.dtype:
    """Precision of forward passes: the setting `dtype`, "auto" resolved by the device."""
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def warn_of_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Warn of bfloat16 on a CPU that only emulates it.

    Args:
        dtype: of forward passes.
        device: where they run.
    """
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_computes_bfloat16():
        logger.warning(
            "dtype=bfloat16 on a CPU without instructions for it (avx512_bf16 or amx_bf16): every product is "
            "converted, which is slower than float32 and less exact. Leave out --dtype, unless float32 does not fit "
            "into memory."
        )


def load_policy(
    path: str, config: RLConfig, *, dtype: torch.dtype, checkpoint: Path | None = None
) -> transformers.PreTrainedModel | PeftModel:
    """Load the model to train, on the CPU.

    Trained weights are float32 whatever `dtype` is: at usual learning rates most updates are below the resolution of
    bfloat16. With LoRA the frozen base is in `dtype`.

    Args:
        path: hub id or folder.
        config: temperature, LoRA, attention and gradient checkpointing are read.
        dtype: precision of forward passes.
        checkpoint: folder with the weights, or the adapter, to continue from.

    Returns:
        The model in train mode, without dropout.
    """
    if not config.use_lora:
        model = _load(checkpoint or path, config, dtype=torch.float32)
    elif checkpoint is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(_load(path, config, dtype=dtype), checkpoint, is_trainable=True)
    else:
        model = add_adapter(_load(path, config, dtype=dtype), config, task_type="CAUSAL_LM")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def load_reference(path: str, config: RLConfig) -> transformers.PreTrainedModel:
    """Load a frozen second copy of the policy, for training without LoRA.

    It is float32 like the policy's weights: only then is the KL exactly 0 until the policy changes.
    """
    return _load(path, config, dtype=torch.float32).requires_grad_(False).eval()


def load_without_dropout(
    auto_class: type, path: str | Path, config: RLConfig, *, dtype: torch.dtype, **options: Any
) -> transformers.PreTrainedModel:
    """Load a transformers model on the CPU, without dropout.

    Args:
        auto_class: such as AutoModelForCausalLM.
        path: hub id or folder.
        config: attention is read.
        dtype: of the weights.
        options: other options of from_pretrained.
    """
    model_config = transformers.AutoConfig.from_pretrained(path)
    # Dropout would make two passes over the same tokens differ: the ratio would not be 1 where it must be.
    for name, value in vars(model_config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(model_config, name, 0.0)
    model = auto_class.from_pretrained(
        path, config=model_config, dtype=dtype, attn_implementation=config.attn_implementation, **options
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _align(model)
    return model


def _align(model: nn.Module) -> None:
    """Move weights that begin elsewhere than a new tensor would, at a multiple of 64 bytes.

    Weights are read in place from a file, where each begins somewhere else than in another file. Kernels of the CPU
    may round differently there, so a run that is continued from a checkpoint would not write the same digits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _load(path: str | Path, config: RLConfig, *, dtype: torch.dtype) -> transformers.PreTrainedModel:
    options = {}
    if config.load_in_4bit:
        options = {"quantization_config": four_bits(dtype), "device_map": {"": "cpu"}}
    model = load_without_dropout(transformers.AutoModelForCausalLM, path, config, dtype=dtype, **options)
    if config.load_in_4bit:
        keep_trainable(model)
    return model


def lora_config(config: RLConfig, *, task_type: str, target_modules: Collection[str]) -> LoraConfig:
    """Peft's configuration for the LoRA settings.

    Args:
        config: the settings.
        task_type: of peft.
        target_modules: names of modules, or the ends of names.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=target_modules, task_type=task_type
    )


def add_adapter(model: transformers.PreTrainedModel, config: RLConfig, *, task_type: str) -> PeftModel:
    """Add a new LoRA adapter, initialised from the seed, and freeze the model's own weights.

    Raises:
        ValueError: a name matches nothing in a model without the policy's head.
    """
    from peft import get_peft_model

    names = targets(config, model, headless=task_type != "CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(config.seed, "lora"))
        return get_peft_model(model, lora_config(config, task_type=task_type, target_modules=names))


def _without_quantization(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    plain = deepcopy(config)
    vars(plain).pop("quantization_config", None)
    return plain


def save_model(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and vLLM load; with LoRA the merged model, with adapter/ inside.

    Args:
        model: the policy, on the CPU or the device.
        tokenizer: saved in the same folder.
        folder: created if it does not exist.
    """
    if has_adapter(model):
        model.save_pretrained(folder / "adapter", selected_adapters=["default"])
        weights = {name: tensor.detach().cpu().clone() for name, tensor in policy_weights(model)}
        base = model.get_base_model()
        with torch.device("meta"):  # the merged weights are not quantized, so neither is this configuration
            plain = transformers.AutoModelForCausalLM.from_config(_without_quantization(base.config))
        plain.generation_config = base.generation_config
        plain.save_pretrained(folder, state_dict=weights)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
