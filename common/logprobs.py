"""Log-probs of completions.

Every log-prob of the project comes from `token_logprobs`, so old, new and reference log-probs differ only by the
weights: the ratio before the first optimizer step is exactly 1, the KL before the first update exactly 0.

What a log-prob is, the model's own logits say. There are two ways to them that need less memory, and each model shows
once which of them give the same: architectures scale, cap or project their logits in too many ways to list.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.rollouts import Rollouts

logger = logging.getLogger("nanorlhf")

# Logits of one chunk: 2^25 float32 are 128 MiB.
MAX_CHUNK_LOGITS = 2**25

# Tokens of the passes that compare the ways to a log-prob.
NUM_COMPARED = 16

# The largest logit of these passes: a soft cap bends large logits only, and a new model's are small.
LARGEST_LOGIT = 100.0

# From the ids (b, L) and which of them belong to a completion: log-probs and entropies, both (completion tokens,).
Head = Callable[[nn.Module, Tensor, Tensor, float], tuple[Tensor, Tensor]]

_heads: WeakKeyDictionary[nn.Module, Head] = WeakKeyDictionary()


def token_logprobs(model: nn.Module, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each completion token under the model's distribution at `temperature`.

    Args:
        model: a causal language model from `load_policy` or `load_reference`, on the device of `rollouts`.
        rollouts: b rows.
        temperature: above 0; logits are divided by it. The same one each time.

    Returns:
        logprobs: (b, C) float32, log softmax(logits / temperature) at the sampled token, with gradient.
        entropy: (b, C) float32 in nats, without gradient. Both are 0 at padding.

    Raises:
        ValueError: at the model's first pass, if a token's logits depend on later tokens.
    """
    sequence_ids, prompt_lengths = rollouts.sequences()  # (b, L), (b,)
    positions = torch.arange(sequence_ids.shape[1], device=sequence_ids.device)[None, :]  # (1, L)
    is_completion = (positions >= prompt_lengths[:, None]) & (positions < rollouts.total_lengths[:, None])  # (b, L)
    base = without_adapter(model)
    if base not in _heads:
        _heads[base] = _cheapest_head(base, sequence_ids.device, temperature)
    logprobs, entropy = _heads[base](base, sequence_ids, is_completion, temperature)
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


@torch.no_grad()
def _cheapest_head(model: nn.Module, device: torch.device, temperature: float) -> Head:
    """The first way to log-probs, in the order of their cost, that agrees with the model's own logits.

    Raises:
        ValueError: if a token's logits depend on later tokens.
    """
    # Tokens from the whole vocabulary, the same on every process, whatever rows it has.
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(NUM_COMPARED, device=device) * vocabulary // NUM_COMPARED)[None]  # (1, 16)
    is_completion = torch.ones_like(ids, dtype=torch.bool)
    # In full precision where the weights have it: rounded logits would differ between ways that are the same.
    with _without_autocast(model, ids.device):
        _check_causal(model, ids)
        heads = _possible_heads(model)
        rounding = torch.bfloat16 if _has_flash(model) else torch.float32
        with _head_in_float32(model), _large_logits(model) as magnified:
            expected, _ = _own(model, ids, is_completion, temperature)
            tolerance = max(1e-3, 8 * torch.finfo(rounding).eps * float(expected.abs().max()))
            for head in heads if magnified else ():
                found, _ = head(model, ids, is_completion, temperature)
                if (found - expected).abs().max() <= tolerance:
                    return head
    logger.info(
        "%s makes its logits in a way of its own, so all of a pass exist at once: if memory is short, lower "
        "--max_tokens_per_microbatch.",
        type(model).__name__,
    )
    return _own


def _has_flash(model: nn.Module) -> bool:
    return model.config._attn_implementation.startswith("flash_attention")


def _without_autocast(model: nn.Module, device: torch.device) -> AbstractContextManager:
    """Passes in the precision of the weights; flash attention has none for float32 and keeps that of training."""
    if _has_flash(model):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _head_in_float32(model: nn.Module) -> Iterator[None]:
    """A copy of the head in float32 in its place: with one in bfloat16, a scale of 1.05 would pass as rounding."""
    head = model.get_output_embeddings()
    if head is None or head.weight.dtype == torch.float32:
        yield
        return
    model.set_output_embeddings(deepcopy(head).float())
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def _possible_heads(model: nn.Module) -> list[Head]:
    """Ways that can be tried beside the model's own logits, the cheapest first."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    # The fused head reads the head's weight, and would pass over an adapter on it.
    if "peft" in sys.modules and isinstance(head, sys.modules["peft"].tuners.tuners_utils.BaseTunerLayer):
        return [_plain]
    return [_fused, _plain] if head.weight.device.type == "cuda" else [_plain, _fused]


@contextmanager
def _large_logits(model: nn.Module) -> Iterator[list[bool]]:
    """Magnify what the backbone gives to the head; the list gets an entry in each pass where that is possible."""
    magnified: list[bool] = []

    def magnify(backbone: nn.Module, inputs: tuple, output: dict) -> None:
        head = model.get_output_embeddings()
        hidden = output.get("last_hidden_state")
        # Some models put more than the head between the two, or call no backbone of their own.
        if head is not None and hidden is not None and head.weight.shape[-1] == hidden.shape[-1]:
            hidden = hidden.to(head.weight.dtype)
            output["last_hidden_state"] = hidden * (LARGEST_LOGIT / head(hidden).abs().max())
            magnified.append(True)

    hook = model.base_model.register_forward_hook(magnify)
    try:
        yield magnified
    finally:
        hook.remove()


def _check_causal(model: nn.Module, ids: Tensor) -> None:
    """Refuse a model whose logits (1, L, V) in the first half of a row depend on the tokens of the second."""
    half = ids.shape[1] // 2
    changed = ids.clone()
    changed[0, half:] = ids[0, : ids.shape[1] - half]
    logits, others = (model(input_ids=each, use_cache=False).logits[:, :half].float() for each in (ids, changed))
    moved = (logits - others).abs().amax(-1) > 0.02 * logits.abs().max()  # (1, half)
    # Rounding differs a little with the other rows of a matrix. In 16 bits that can send a few tokens to another
    # expert, which is no look ahead; a model that looks ahead does so at most tokens.
    if moved.float().mean() > (0.0 if model.dtype == torch.float32 and not _has_flash(model) else 0.5):
        raise ValueError(
            f"{type(model).__name__} is not causal: the logits before a token depend on the token, so a log-prob "
            "would be that of a token which the model has seen. Training needs a decoder. Pass another --model."
        )


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
    return _in_chunks(head, hidden, targets, temperature, vocabulary=head.weight.shape[0])


def _own(model: nn.Module, ids: Tensor, is_completion: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Use the model's own logits, those of a whole pass at once. Returns both (completion tokens,)."""
    # The memory of a long prompt's logits is saved where the model can leave them out.
    first = int((~is_completion[:, 1:].any(0)).cumprod(0).sum())
    options = {"logits_to_keep": ids.shape[1] - first} if takes(model, "logits_to_keep") else {}
    logits = model(input_ids=ids, use_cache=False, **options).logits[:, :-1]  # (b, L - 1 or fewer, V)
    left_out = ids.shape[1] - 1 - logits.shape[1]
    predicts_completion = is_completion[:, 1 + left_out :]
    targets = ids[:, 1 + left_out :][predicts_completion]
    return _in_chunks(nn.Identity(), logits[predicts_completion], targets, temperature, vocabulary=logits.shape[-1])


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of a model's class has an argument of this name."""
    return argument in inspect.signature(type(model).forward).parameters


def _in_chunks(
    head: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, temperature: float, *, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, both (tokens,), where head turns (tokens, ...) inputs into logits."""

    def chunk_logprobs(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        all_logprobs = torch.log_softmax(head(inputs).float() / temperature, dim=-1)  # (tokens, V)
        known = all_logprobs.detach()
        # A token that the model rules out, with a logit of -inf, adds 0: 0 times -inf would be NaN.
        entropy = -(known.exp() * known.clamp(min=torch.finfo(known.dtype).min)).sum(-1)
        return all_logprobs.gather(1, targets[:, None]).squeeze(1), entropy

    chunk = max(MAX_CHUNK_LOGITS // vocabulary, 1)
    if len(targets) <= chunk:
        return chunk_logprobs(inputs, targets)
    # Chunks are recomputed in the backward pass, so that only one chunk's log-probs exist at a time.
    parts = [
        checkpoint(chunk_logprobs, part, t, use_reentrant=False)
        for part, t in zip(inputs.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])
