"""Log-probs of completions.

Every log-prob of the project comes from `token_logprobs`, so old, new and reference log-probs differ only by the
weights: the ratio before the first optimizer step is exactly 1, the KL before the first update exactly 0.
"""

import sys

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.rollouts import Rollouts

# Logits of one chunk of the plain path: 2^25 float32 are 128 MiB.
MAX_CHUNK_LOGITS = 2**25

# Settings of model configurations that change logits after the head. Only the fused head applies them.
_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


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
    positions = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)[None, :]  # (1, L)
    is_completion = (positions >= prompt_lengths[:, None]) & (positions < rollouts.total_lengths[:, None])  # (b, L)
    base = without_adapter(model)
    # The fused head reads the head's weight, and would pass over an adapter on it.
    has_plain_head = not hasattr(base.get_output_embeddings(), "base_layer")
    if (sequence_ids.device.type == "cuda" and has_plain_head) or changes_logits(base):
        logprobs, entropy = _fused(base, sequence_ids, is_completion, temperature)
    else:
        logprobs, entropy = _plain(base, sequence_ids, is_completion, temperature)
    # Both are flat, row by row; masked_scatter fills the mask in the same order.
    mask = rollouts.completion_mask
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy.detach())  # (b, C) both


def has_adapter(model: nn.Module) -> bool:
    """Whether peft wraps a model; importing peft takes seconds, and if nothing imported it, it wraps nothing."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def without_adapter(model: nn.Module) -> nn.Module:
    """The transformers model inside peft, with its LoRA layers; any other model as it is."""
    return model.get_base_model() if has_adapter(model) else model


def changes_logits(model: nn.Module) -> bool:
    """Whether the model's configuration changes logits after the head, which only the fused head computes."""
    settings = vars(model.config.get_text_config())
    return any(settings.get(name) is not None for name in _LOGIT_SETTINGS)


def _fused(model: nn.Module, ids: Tensor, is_completion: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Use trl's fused head, which never stores the logits. Returns both (completion tokens,)."""
    if "fused_temperature" not in vars(model):
        # Imported here: it takes a second, and small models on the CPU do not need it.
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
        model.fused_temperature = temperature
    assert model.fused_temperature == temperature, "the head of a model has one temperature"
    labels = torch.where(is_completion, ids, -100)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    chosen = is_completion[:, 1:]
    return output.log_probs[chosen].float(), output.entropy[chosen].float()


def _plain(model: nn.Module, ids: Tensor, is_completion: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute logits of completion tokens only, one chunk at a time. Returns both (completion tokens,)."""
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
    # Chunks are recomputed in the backward pass, so that only one chunk's logits exist at a time.
    parts = [
        checkpoint(chunk_logprobs, h, t, use_reentrant=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])
