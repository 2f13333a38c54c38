"""Load policy and reference. Everything is loaded on the CPU; with shard=full, each process reads its own part."""

from __future__ import annotations  # for type hints whose import would take seconds

import logging
from collections.abc import Collection
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from common.config import RLConfig
from common.environment import cpu_computes_bfloat16
from common.mistakes import first_line
from common.models.attention import attention_for
from common.models.bases import base_from_here
from common.models.chat import turn_end_token
from common.models.configs import describe_multimodal, model_class, read_config, setting
from common.models.files import check_report, without_report
from common.models.generation import AsShipped
from common.models.lora import load_adapter, read_by_kernels, targets
from common.models.outputs import keep_outputs, parts, use_plain_outputs
from common.models.parts import WITHOUT_STORAGE, is_spread, read_parts
from common.models.quantization import four_bits, keep_trainable
from common.models.ties import settle_ties
from common.models.unread import check_unexpected
from common.seeds import hashed_seed
from common.sharding import is_part, of_all, own_part

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
        model: its generation configuration may name one or several; if it names none, its configuration may.
        tokenizer: its end token is included, and the token that its chat template ends a turn with, because a base
            model's own end token is often a different one.

    Returns:
        Distinct ids in ascending order, without those beyond the model's embedding, which it can never sample.

    Raises:
        ValueError: if none is left.
    """
    named = model.generation_config.eos_token_id
    if named is None:
        named = model.config.get_text_config().eos_token_id
    ids = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    turn_end = turn_end_token(tokenizer)
    if turn_end is not None:
        ids.add(tokenizer.convert_tokens_to_ids(turn_end))
    size = len(model.get_input_embeddings().weight)  # an adapted embedding has no num_embeddings
    if known := sorted(token for token in ids if 0 <= token < size):
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
    return read_config(path).get_text_config().vocab_size


def compute_dtype(config: RLConfig, device: torch.device) -> torch.dtype:
    """Precision of forward passes: the setting `dtype`, resolved by the device."""
    return resolve_dtype(config.dtype, device)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """What a value of the setting `dtype` is on a device.

    Args:
        name: "float32" or "bfloat16"; "auto": bfloat16 on CUDA; "fast": bfloat16 where the device computes in it.
        device: where forward passes run.
    """
    native = device.type == "cuda" or (name == "fast" and cpu_computes_bfloat16())
    return torch.bfloat16 if name == "bfloat16" or (name in ("auto", "fast") and native) else torch.float32


def trained_dtype(config: RLConfig, dtype: torch.dtype) -> torch.dtype:
    """Precision in which all of a model's weights are on the device if all are trained; adapters are float32.

    float32 whatever `dtype` is: at usual learning rates most updates are below the resolution of bfloat16. With
    optimizer=adamw_host these are only what forward passes read, in `dtype`; what is trained are float32 masters.

    Args:
        config: the optimizer is read.
        dtype: precision of forward passes.
    """
    return dtype if config.optimizer == "adamw_host" else torch.float32


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

    Its weights are in `trained_dtype`. With LoRA the frozen base is in `dtype`, and the adapter in float32.

    Args:
        path: hub id or folder.
        config: optimizer, LoRA, attention and gradient checkpointing are read.
        dtype: precision of forward passes.
        checkpoint: folder with the weights, or the adapter, to continue from.

    Returns:
        The model, ready to train: nothing in it is random; see `set_mode`.

    Raises:
        ValueError: weights are missing, or it cannot be loaded with attn_implementation.
    """
    if not config.use_lora:
        weights = _load(checkpoint or path, config, dtype=trained_dtype(config, dtype), says=True)
        model = _freeze_all_but_text(weights)
    elif checkpoint is not None:
        model = load_adapter(_load(path, config, dtype=dtype, says=True), checkpoint, is_trainable=True)
    else:
        base = _load(path, config, dtype=dtype, says=True)
        model = add_adapter(base, config, task_type="CAUSAL_LM")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return set_mode(model)


def load_reference(path: str, config: RLConfig, *, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """Load a frozen second copy of the policy, for training without LoRA.

    It is rounded like the policy's weights: only then is the KL exactly 0 until the policy changes.

    Args:
        path: hub id or folder.
        config: as in load_policy.
        dtype: precision of forward passes.
    """
    return _load(path, config, dtype=trained_dtype(config, dtype)).requires_grad_(False).eval()


def load_frozen(
    path: str, config: RLConfig, *, dtype: torch.dtype, adapter: Path | None = None
) -> transformers.PreTrainedModel | PeftModel:
    """Load a model that is not trained and not made of the policy, in `dtype`, which passes read anyway.

    It has the attention that fits it, whatever the policy's is, and is never in 4 bits.

    Args:
        path: hub id or folder.
        config: trust_remote_code and shard are read.
        dtype: precision of forward passes.
        adapter: folder of a LoRA adapter on top of it, which stays in float32 beside the weights.
    """
    plain = replace(config, load_in_4bit=False, attn_implementation="auto")
    model = _load(path, plain, dtype=dtype)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model.requires_grad_(False).eval()


def set_mode(model: nn.Module) -> nn.Module:
    """Put a model that is trained in evaluation mode, except for the modules that checkpoint gradients.

    What is random in train mode would make two passes over the same tokens differ, and the ratio would not be 1 where
    it must be: dropout, jitter of routers, skipped layers, experts that are drawn. Some read no setting (PhiMoE's
    router), and others cannot be set to 0 (its jitter is a threshold too). Gradients are the same in both modes.
    Modules that checkpoint gradients do so in train mode only; their own dropout is 0 from `load_without_dropout`.

    Args:
        model: with gradient checkpointing on or off.

    Returns:
        The same model.
    """
    model.eval()
    for module in model.modules():
        # An attribute of layers and of some models, set by gradient_checkpointing_enable.
        module.training = bool(vars(module).get("gradient_checkpointing"))
    return model


def load_without_dropout(
    auto_class: type,
    path: str | Path,
    config: RLConfig,
    *,
    dtype: torch.dtype,
    says: bool = False,
    **options: Any,
) -> transformers.PreTrainedModel:
    """Load a transformers model on the CPU, without dropout, with its own attention and plain outputs.

    Its configuration and its generation configuration are as in its folder, to be saved so. With shard=full and
    several processes, all of them call this together, and each has its own part of every weight: see read_parts.

    Args:
        auto_class: such as AutoModelForCausalLM.
        path: hub id or folder.
        config: attention, trust_remote_code and shard are read.
        dtype: of the weights.
        says: log what becomes of attn_implementation=auto and of inputs that are no text, if it is unusual.
        options: other options of from_pretrained.

    Raises:
        ValueError: weights are missing, or it cannot be loaded with attn_implementation.
    """
    model_config = read_config(path, trust_remote_code=config.trust_remote_code)
    quiet = _without_dropout(model_config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention, reason = attention_for(
        model_config,
        config.attn_implementation,
        device,
        dtype=compute_dtype(config, device),
        cls=model_class(model_config, auto_class),
    )
    has_attention = setting(model_config.get_text_config(), "num_attention_heads") is not None
    if says and reason and has_attention:
        logger.info("attention: %s, since sdpa cannot be used: %s", attention, reason)
    if says and describe_multimodal(model_config):
        logger.info("%s", describe_multimodal(model_config))
    in_parts = is_spread(config)
    if in_parts:
        options |= WITHOUT_STORAGE
    try:
        with without_report():
            model, found = auto_class.from_pretrained(
                path,
                config=quiet,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_report names them
                trust_remote_code=False,
                **options,
            )
    except (OSError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"model={str(path)!r}: cannot be loaded: {reason}. Pass --model with another.") from error
    check_report(found, f"model={str(path)!r}")
    check_unexpected(found, model, model_config, f"model={str(path)!r}")
    if in_parts:
        read_parts(model, path, device)
    _check_finite(model, f"model={str(path)!r}", in_parts=in_parts)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    _keep_shipped(model, model_config)
    _align(model)
    settle_ties(model)
    return model


def _check_finite(model: transformers.PreTrainedModel, label: str, *, in_parts: bool) -> None:
    """Refuse weights that are NaN or infinite: every log-prob would be. All processes refuse if one must."""
    with torch.no_grad():
        own = ((name, own_part(each)) for name, each in model.named_parameters())
        floats = ((name, each) for name, each in own if each.is_floating_point())
        broken = [name for name, each in floats if not each.sum(dtype=torch.float32).isfinite()]
    if in_parts:
        broken = list(dict.fromkeys(name for names in of_all(broken) for name in names))
    if broken:
        what = "weight is" if len(broken) == 1 else "weights are"
        raise ValueError(
            f"{label}: {len(broken)} {what} NaN or infinite, such as {broken[0]}, so that its log-probs could not be "
            "numbers. Download the model again, or pass an earlier checkpoint of the run that wrote it."
        )


def _without_dropout(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig:
    """A copy whose dropout is 0 and whose outputs are plain, in all parts; some modules read both at each call."""
    quiet = deepcopy(config)
    use_plain_outputs(quiet)
    for _, part in parts(quiet):
        for name, value in vars(part).items():
            if isinstance(value, float) and "drop" in name:
                setattr(part, name, 0.0)
    return quiet


def _freeze_all_but_text(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Leave out of training what reads images or sound: prompts are text, so it gets no gradient."""
    if model.config.get_text_config() is not model.config:
        model.requires_grad_(False)
        for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()):
            part.requires_grad_(True)
    return model


def _keep_shipped(model: transformers.PreTrainedModel, config: transformers.PreTrainedConfig) -> None:
    """Give the model the settings that its folder has, which are saved with it; its modules keep theirs."""
    shipped = deepcopy(model.config)
    originals = {type(part): part for _, part in parts(config)}  # a wrapper's language model may be loaded alone
    for _, part in parts(shipped):
        for name, value in vars(originals[type(part)]).items():
            if "drop" in name:
                setattr(part, name, value)
    model.config = shipped
    keep_outputs(model, config)
    if model.can_generate():
        model.generation_config = AsShipped.of(model.generation_config)


def _align(model: nn.Module) -> None:
    """Move weights that begin elsewhere than a new tensor would, at a multiple of 64 bytes.

    Weights are read in place from a file, where each begins somewhere else than in another file. Kernels of the CPU
    may round differently there, so a run that is continued from a checkpoint would not write the same digits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if is_part(tensor):  # a new tensor
            continue
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _load(
    path: str | Path, config: RLConfig, *, dtype: torch.dtype, says: bool = False
) -> transformers.PreTrainedModel:
    options: dict[str, Any] = {"says": says}
    if config.load_in_4bit:
        with torch.device("meta"):
            empty = transformers.AutoModelForCausalLM.from_config(
                read_config(path, trust_remote_code=config.trust_remote_code), trust_remote_code=False
            )
        options |= {"quantization_config": four_bits(dtype, empty, read_by_kernels(empty))}
        options |= {"device_map": {"": "cpu"}}
    model = load_without_dropout(transformers.AutoModelForCausalLM, path, config, dtype=dtype, **options)
    if config.load_in_4bit:
        keep_trainable(model)
    model.name_or_path = model.config.name_or_path = base_from_here(path)  # what an adapter and its card record
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
