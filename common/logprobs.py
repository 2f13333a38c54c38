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
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.checkpoint import checkpoint

from common.packing import packing_of
from common.rollouts import Rollouts
from common.sequences import Sequences
from common.sharding import as_forward, gathered_dtype, whole

logger = logging.getLogger("nanorlhf")

# Logits of one chunk: 2^25 float32 are 128 MiB.
MAX_CHUNK_LOGITS = 2**25

# Columns of the logits that trl's fused head has at a time, as in trl.
FUSED_CHUNK = 2**15

# Tokens of the passes that compare the ways to a log-prob.
NUM_COMPARED = 16

# The largest logit of these passes: a soft cap bends large logits only, and a new model's are small.
LARGEST_LOGIT = 100.0

# From the rows of a pass: log-probs and entropies, both (completion tokens,); no entropies if they are not asked for.
Head = Callable[[nn.Module, Sequences, float, bool], tuple[Tensor, Tensor | None]]

_heads: WeakKeyDictionary[nn.Module, Head] = WeakKeyDictionary()


def token_logprobs(
    model: nn.Module, rollouts: Rollouts, temperature: float, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-probability and entropy of each completion token under the model's distribution at `temperature`.

    Args:
        model: a causal language model from `load_policy` or `load_reference`, on the device of `rollouts`.
        rollouts: b rows.
        temperature: above 0; logits are divided by it. The same one each time.
        with_entropy: False: leave the entropy out, a pass over all logits; the log-probs are the same.

    Returns:
        logprobs: (b, C) float32, log softmax(logits / temperature) at the sampled token, with gradient.
        entropy: (b, C) float32 in nats, without gradient; None without. Both are 0 at padding.

    Raises:
        ValueError: at the model's first pass, if a token's logits depend on later tokens.
    """
    return sequence_logprobs(model, Sequences.of(rollouts, packing_of(model)), temperature, with_entropy=with_entropy)


def sequence_logprobs(
    model: nn.Module, sequences: Sequences, temperature: float, *, with_entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` of rows that are laid out; on the device there is nothing to wait for.

    Args:
        model: as there. If its weights have no values (fake tensors), the way to log-probs is not compared with the
            model's own logits: the first that can be tried is taken.
        sequences: b rows with C columns of completions.
        temperature: as there.
        with_entropy: as there.
    """
    base = without_adapter(model)
    if base not in _heads:
        _heads[base] = _cheapest_head(base, sequences.ids.device, temperature)
    logprobs, entropy = _heads[base](base, sequences, temperature, with_entropy)
    return sequences.spread(logprobs), None if entropy is None else sequences.spread(entropy.detach())


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
    if isinstance(next(model.parameters()), FakeTensor):
        return next(iter(_possible_heads(model)), _own)
    # Tokens from the whole vocabulary, the same on every process, whatever rows it has.
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(NUM_COMPARED, device=device) * vocabulary // NUM_COMPARED)[None]  # (1, 16)
    places = torch.arange(NUM_COMPARED - 1, device=device)
    sequences = Sequences(
        ids=ids, sources=places, targets=ids[0, 1:], places=places, first=0, shape=(1, NUM_COMPARED - 1)
    )
    # In full precision where the weights have it: rounded logits would differ between ways that are the same.
    with _without_autocast(model, ids.device):
        _check_causal(model, ids)
        heads = _possible_heads(model)
        rounding = torch.bfloat16 if _has_flash(model) else torch.float32
        with _head_in_float32(model), _large_logits(model) as magnified:
            expected, _ = _own(model, sequences, temperature, False)
            tolerance = max(1e-3, 8 * torch.finfo(rounding).eps * float(expected.abs().max()))
            for head in heads if magnified else ():
                found, _ = head(model, sequences, temperature, False)
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
    if head is None or gathered_dtype(model, head.weight) == torch.float32:
        yield
        return
    copied = deepcopy(head)
    for module in copied.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(whole(parameter).float(), requires_grad=False))
    # Some models call no backbone whose outputs could be float32 already.
    copied.register_forward_pre_hook(lambda _, inputs: tuple(each.float() for each in inputs))
    model.set_output_embeddings(copied)
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
    cap, scales = _scalings(model)
    fused = [partial(_fused, cap=cap, scale=scale) for scale in scales]
    return [*fused, _plain] if head.weight.device.type == "cuda" else [_plain, *fused]


def _scalings(model: nn.Module) -> tuple[float | None, list[float]]:
    """The soft cap on a model's logits, and what they may be multiplied by before it, both as its settings say."""
    settings = model.config.get_text_config().to_dict()
    named = [settings.get(name) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
    if scaling := settings.get("logits_scaling"):  # most divide by it, HyperCLOVA X multiplies
        named += [1 / scaling, scaling]
    return settings.get("final_logit_softcapping"), list(dict.fromkeys([*(scale for scale in named if scale), 1.0]))


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
    is_exact = gathered_dtype(model, next(model.parameters())) == torch.float32 and not _has_flash(model)
    if moved.float().mean() > (0.0 if is_exact else 0.5):
        raise ValueError(
            f"{type(model).__name__} is not causal: the logits before a token depend on the token, so a log-prob "
            "would be that of a token which the model has seen. Training needs a decoder. Pass another --model."
        )


def _fused(
    model: nn.Module,
    sequences: Sequences,
    temperature: float,
    with_entropy: bool,
    *,
    cap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Use trl's fused head, which never stores the logits. Returns both (completion tokens,).

    Its function is called as trl's own `add_fused_lm_head` calls it, which looks for the completion tokens on the
    device and waits for that.
    """
    # Imported here: it takes a second, and small models on the CPU do not need it.
    from trl.kernels import ChunkedLogProbFunction

    def of_states() -> tuple[Tensor, Tensor | None]:
        hidden, head = sequences.states(model.base_model), model.get_output_embeddings()
        outputs = ("entropy",) if with_entropy else ()
        found = (hidden, head.weight, head.bias, sequences.targets, temperature, FUSED_CHUNK, cap, scale, outputs)
        logprobs, entropy, *_ = ChunkedLogProbFunction.apply(*found)
        return logprobs, entropy

    return as_forward(model, of_states)


def _plain(
    model: nn.Module, sequences: Sequences, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute logits of completion tokens only, one chunk at a time. Returns both (completion tokens,)."""

    def of_states() -> tuple[Tensor, Tensor | None]:
        hidden, head = sequences.states(model.base_model), model.get_output_embeddings()
        return _in_chunks(
            head, hidden, sequences.targets, temperature, vocabulary=head.weight.shape[0], entropy=with_entropy
        )

    return as_forward(model, of_states)


def _own(
    model: nn.Module, sequences: Sequences, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Use the model's own logits, those of a whole pass at once. Returns both (completion tokens,)."""
    # The memory of a long prompt's logits is saved where the model can leave them out.
    kept = sequences.ids.shape[1] - sequences.first
    options = {"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}
    logits = sequences.chosen(sequences.outputs(model, **options).logits)  # (n, V)
    vocabulary = logits.shape[-1]
    return _in_chunks(
        nn.Identity(), logits, sequences.targets, temperature, vocabulary=vocabulary, entropy=with_entropy
    )


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the forward pass of a model's class has an argument of this name."""
    return argument in inspect.signature(type(model).forward).parameters


def _in_chunks(
    head: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    vocabulary: int,
    entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and entropies, both (tokens,), where head turns (tokens, ...) inputs into logits."""

    def chunk_logprobs(inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        all_logprobs = torch.log_softmax(head(inputs).float() / temperature, dim=-1)  # (tokens, V)
        chosen = all_logprobs.gather(1, targets[:, None]).squeeze(1)
        return (chosen, _entropy(all_logprobs.detach())) if entropy else (chosen,)

    chunk = max(MAX_CHUNK_LOGITS // vocabulary, 1)
    if len(targets) <= chunk:
        found = chunk_logprobs(inputs, targets)
    else:
        # Chunks are recomputed in the backward pass, so that only one chunk's log-probs exist at a time.
        parts = [
            checkpoint(chunk_logprobs, part, t, use_reentrant=False, preserve_rng_state=False)
            for part, t in zip(inputs.split(chunk), targets.split(chunk), strict=True)
        ]
        found = tuple(torch.cat(each) for each in zip(*parts, strict=True))
    return (found[0], found[1]) if entropy else (found[0], None)


def _entropy(logprobs: Tensor) -> Tensor:
    """(tokens,) entropy in nats of distributions (tokens, V)."""
    # A token that the model rules out, with a logit of -inf, adds 0: 0 times -inf would be NaN.
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)
