"""Load policy, reference and tokenizer; log-probs of completions.

Every log-prob of the project comes from `token_logprobs`, so that old, new and reference log-probs differ only by
their weights: the ratio before the first optimizer step and the KL before the first update are exact.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.trainer.utils import add_fused_lm_head

from common.batching import hashed_seed
from common.config import RLConfig
from common.quantization import four_bits, keep_trainable
from common.rollouts import Rollouts
from common.tiny import TINY_POLICIES, build_tokenizer, tiny_policy
from common.weights import policy_weights

# Logits of one chunk of the plain path: 2^25 float32 are 128 MiB.
MAX_CHUNK_LOGITS = 2**25

# Settings of model configurations that change logits after the head: the fused head knows them, the plain one not.
_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


def check_model(model: str) -> None:
    """Refuse a model that is not there, before anything is loaded or built.

    Args:
        model: hub id, folder, or an embedded policy's name.

    Raises:
        ValueError: if there is no such model.
    """
    if model in TINY_POLICIES:
        return
    try:
        AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model={model!r}: cannot be loaded: {reason}. Need a folder with a config.json or a hub id that this "
            "machine can reach. Pass --model with one, or --model tiny for the embedded policy."
        ) from error


def resolve_model(model: str) -> str:
    """Hub id or folder that transformers and vLLM load; an embedded policy is built on first use, in minutes."""
    return str(tiny_policy(TINY_POLICIES[model])) if model in TINY_POLICIES else model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer; a missing pad token is nothing to mend, since masks mark padding here."""
    return build_tokenizer() if model in TINY_POLICIES else AutoTokenizer.from_pretrained(model)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The one list of end tokens for sampler, masks and rewards.

    Args:
        model: its generation configuration may name one or several.
        tokenizer: its end token counts too, and the one that its chat template ends a turn with: a base model's own
            end token is often another one.

    Returns:
        Distinct ids in ascending order.

    Raises:
        ValueError: if neither names one.
    """
    named = model.generation_config.eos_token_id
    ids = {named} if isinstance(named, int) else set(named or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    turn_end = turn_end_token(tokenizer)
    if turn_end is not None:
        ids.add(tokenizer.convert_tokens_to_ids(turn_end))
    if not ids:
        raise ValueError(
            "neither the model's generation configuration nor its tokenizer names an end token: completions could "
            "never end. Set eos_token_id in generation_config.json."
        )
    return tuple(sorted(ids))


def turn_end_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that the chat template writes after an answer; None without a template, or if it writes none."""
    if tokenizer.chat_template is None:
        return None
    said = "what the assistant says"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    rest = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(said)[2]
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return next((token for token in tokenizer.tokenize(rest) if token in special), None)


def unused_token_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> range:
    """Ids that the model can give and the tokenizer has no token for, such as the padding of an embedding matrix.

    Args:
        path: hub id or folder of the model.
        tokenizer: its tokenizer.
    """
    known = max(tokenizer.get_vocab().values()) + 1
    return range(known, AutoConfig.from_pretrained(path).get_text_config().vocab_size)


def compute_dtype(config: RLConfig, device: torch.device) -> torch.dtype:
    """Precision of forward passes: the setting `dtype`, "auto" resolved by the device."""
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if device.type == "cuda" else "float32")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def load_policy(
    path: str, config: RLConfig, *, dtype: torch.dtype, checkpoint: Path | None = None
) -> PreTrainedModel | PeftModel:
    """Load the model to train, on the CPU.

    Trained weights are float32 whatever `dtype` is: at usual learning rates most updates are below the resolution of
    bfloat16. With LoRA the frozen base is in `dtype`.

    Args:
        path: hub id or folder.
        config: temperature, LoRA, attention and gradient checkpointing are read.
        dtype: precision of forward passes.
        checkpoint: folder with the weights, or the adapter, to go on from.

    Returns:
        The model in train mode, without dropout.
    """
    if not config.use_lora:
        model = _load(checkpoint or path, config, dtype=torch.float32)
    elif checkpoint is not None:
        model = PeftModel.from_pretrained(_load(path, config, dtype=dtype), checkpoint, is_trainable=True)
    else:
        model = add_adapter(_load(path, config, dtype=dtype), config, task_type="CAUSAL_LM")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def load_reference(path: str, config: RLConfig) -> PreTrainedModel:
    """Load a frozen second copy of the policy, for training without LoRA.

    float32 like the policy's weights: only then is the KL exactly 0 as long as the policy has not moved.
    """
    return _load(path, config, dtype=torch.float32).requires_grad_(False).eval()


def token_logprobs(model: nn.Module, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each completion token under the model's distribution at `temperature`.

    Args:
        model: a causal language model from `load_policy` or `load_reference`, on the device of `rollouts`.
        rollouts: b rows.
        temperature: above 0; logits are divided by it.

    Returns:
        logprobs: (b, C) float32, log softmax(logits / temperature) at the sampled token, with gradient.
        entropy: (b, C) float32 in nats, without gradient. Both are 0 at padding.
    """
    sequence_ids, prompt_lengths = rollouts.sequences()  # (b, L), (b,)
    places = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)[None, :]  # (1, L)
    is_completion = (places >= prompt_lengths[:, None]) & (places < rollouts.total_lengths[:, None])  # (b, L)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if sequence_ids.device.type == "cuda" or _changes_logits(base):
        logprobs, entropy = _fused(base, sequence_ids, is_completion, temperature)
    else:
        logprobs, entropy = _plain(base, sequence_ids, is_completion, temperature)
    # Both are flat, row by row in the order of the tokens, and so is the completion mask.
    mask = rollouts.completion_mask
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy.detach())  # (b, C) both


@contextmanager
def forward_context(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Autocast to `dtype` where it is below float32."""
    with torch.autocast(device.type, dtype=dtype) if dtype != torch.float32 else nullcontext():
        yield


def load_without_dropout(
    auto_class: type, path: str | Path, config: RLConfig, *, dtype: torch.dtype, **options: Any
) -> PreTrainedModel:
    """Load a model of transformers on the CPU.

    Args:
        auto_class: such as AutoModelForCausalLM.
        path: hub id or folder.
        config: attention is read.
        dtype: of the weights.
        options: of from_pretrained, besides these.
    """
    model_config = AutoConfig.from_pretrained(path)
    # Dropout would make two passes over the same tokens differ: the ratio would not be 1 where it must be.
    for name, value in model_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(model_config, name, 0.0)
    model = auto_class.from_pretrained(
        path, config=model_config, dtype=dtype, attn_implementation=config.attn_implementation, **options
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _load(path: str | Path, config: RLConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    options = {}
    if config.load_in_4bit:
        options = {"quantization_config": four_bits(dtype), "device_map": {"": "cpu"}}
    model = load_without_dropout(AutoModelForCausalLM, path, config, dtype=dtype, **options)
    if config.load_in_4bit:
        keep_trainable(model)
    add_fused_lm_head(model, temperature=config.temperature, outputs=("log_probs", "entropy"))
    model.fused_temperature = config.temperature
    return model


def lora_config(config: RLConfig, *, task_type: str) -> LoraConfig:
    """Peft's configuration for the LoRA settings."""
    targets = config.lora_target_modules
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type=task_type,
    )


def add_adapter(model: PreTrainedModel, config: RLConfig, *, task_type: str) -> PeftModel:
    """Put a LoRA adapter, new and drawn from the seed, around a model whose own weights then rest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(config.seed, "lora"))
        return get_peft_model(model, lora_config(config, task_type=task_type))


def _changes_logits(model: PreTrainedModel) -> bool:
    settings = model.config.get_text_config().to_dict()
    return any(settings.get(name) is not None for name in _LOGIT_SETTINGS)


def _fused(model: PreTrainedModel, ids: Tensor, is_completion: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Trl's fused head: the logits never exist. Returns both (completion tokens,)."""
    assert model.fused_temperature == temperature
    labels = torch.where(is_completion, ids, -100)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    chosen = is_completion[:, 1:]
    return output.log_probs[chosen].float(), output.entropy[chosen].float()


def _plain(model: PreTrainedModel, ids: Tensor, is_completion: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits of completion tokens only, a chunk at a time. Returns both (completion tokens,)."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (b, L, hidden)
    predicts_completion = is_completion[:, 1:]
    hidden, targets = hidden[:, :-1][predicts_completion], ids[:, 1:][predicts_completion]
    head = model.get_output_embeddings()

    def chunk_logprobs(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        all_logprobs = torch.log_softmax(head(hidden).float() / temperature, dim=-1)  # (tokens, V)
        entropy = -(all_logprobs.detach().exp() * all_logprobs.detach()).sum(-1)
        return all_logprobs.gather(1, targets[:, None]).squeeze(1), entropy

    chunk = max(MAX_CHUNK_LOGITS // head.weight.shape[0], 1)
    if len(targets) <= chunk:
        return chunk_logprobs(hidden, targets)
    # Chunks are computed again in the backward pass, so that the logits of one chunk exist at a time.
    parts = [
        checkpoint(chunk_logprobs, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    plain = deepcopy(config)
    vars(plain).pop("quantization_config", None)
    return plain


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder that AutoModelForCausalLM and vLLM load; with LoRA the merged model, and the adapter beside it.

    Args:
        model: the policy, on the CPU or the device.
        tokenizer: saved in the same folder.
        folder: made if it is not there.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(folder / "adapter", selected_adapters=["default"])
        weights = {name: tensor.detach().cpu().clone() for name, tensor in policy_weights(model)}
        base = model.get_base_model()
        with torch.device("meta"):  # a configuration that says nothing of quantization, which the merged weights lack
            plain = AutoModelForCausalLM.from_config(_without_quantization(base.config))
        plain.generation_config = base.generation_config
        plain.save_pretrained(folder, state_dict=weights)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
