"""A decoding loop on a transformers model: one token per pass, keys and values cached, finished rows left out.

It draws by inverting the cumulative distribution, with one number of noise per token, so that a row does not depend on
the other rows. Seeds, modes and devices are the caller's business.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from common.rollouts import Completion


@dataclass(kw_only=True, frozen=True)
class SamplingSettings:
    """The distribution completions are drawn from, and where they end.

    Attributes:
        temperature: 0, which is greedy, or between 0.01 and 2.
        top_p: least probability of the set of most likely tokens that are kept, above 0; 1 keeps all.
        top_k: how many of the most likely tokens are kept; 0 keeps all.
        max_tokens: where completions are cut off.
        stop_token_ids: a completion ends with the first of these, and includes it.
        show_progress: draw a bar.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    show_progress: bool = False

    def __post_init__(self) -> None:
        # vLLM takes 0.01 for what is below, and refuses what is above 2.
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:
            raise ValueError(
                f"temperature={self.temperature}: need 0, which is greedy, or between 0.01 and 2, the range of vLLM. "
                "Pass 0.7, say."
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k}: top_p is a probability above 0, top_k a number of tokens. "
                "top_p=1 and top_k=0 keep all tokens."
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: a completion has at least one token. Pass 1 or more.")


def decode(
    model: nn.Module,
    prompt_ids: list[list[int]],
    settings: SamplingSettings,
    num_generations: int,
    noise: Tensor | None,
) -> list[Completion]:
    """Continue each prompt several times, one token per pass.

    Args:
        model: in evaluation mode, without gradients.
        prompt_ids: token ids of each prompt, at least one prompt.
        settings: for all prompts.
        num_generations: completions per prompt.
        noise: (rows, C) in [0, 1) with rows = prompts x num_generations and C = max_tokens; None: greedy.

    Returns:
        One completion per row, those of a prompt adjacent.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompt_ids], device=device)  # (prompts, P)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache()
    # Each prompt goes through the model once; its rows share the result.
    logits = _next_logits(model, ids, mask, positions, cache).repeat_interleave(num_generations, 0)  # (rows, V)
    cache.batch_repeat_interleave(num_generations)
    mask, positions = (t.repeat_interleave(num_generations, 0) for t in (mask, positions[:, -1:]))
    stops = torch.tensor(settings.stop_token_ids, device=device)
    live = torch.arange(len(mask), device=device)  # rows that go through the model
    token_ids = torch.zeros(len(mask), settings.max_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(mask), settings.max_tokens, device=device)
    lengths = torch.zeros(len(mask), dtype=torch.int64, device=device)  # 0: not finished
    for step in range(settings.max_tokens):
        distribution = _log_distribution(logits, settings)
        chosen = distribution.argmax(-1) if noise is None else _draw(distribution, noise[live, step])
        token_ids[live, step] = chosen
        logprobs[live, step] = distribution.gather(1, chosen[:, None]).squeeze(1)
        lengths[live[torch.isin(chosen, stops) & (lengths[live] == 0)]] = step + 1
        going_on = lengths[live] == 0
        if step + 1 == settings.max_tokens or not going_on.any():
            break
        # Leaving rows out copies the whole cache, so wait until it is worth it.
        if going_on.sum() <= 0.75 * len(live):
            cache.batch_select_indices(going_on.nonzero().squeeze(1))
            live, chosen, mask, positions = (t[going_on] for t in (live, chosen, mask, positions))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions + 1
        logits = _next_logits(model, chosen[:, None], mask, positions, cache)
    truncated = lengths == 0
    lengths[truncated] = settings.max_tokens
    rows = zip(token_ids.tolist(), logprobs.tolist(), lengths.tolist(), truncated.tolist(), strict=True)
    return [Completion(tokens[:end], values[:end], cut) for tokens, values, end, cut in rows]


def _next_logits(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """(rows, V) float32 logits after the last column of ids; keys and values go into the cache."""
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


def _log_distribution(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """(rows, V) log-probabilities that are drawn from: temperature first, then top_k, then top_p of what is left."""
    if settings.temperature > 0:
        logits = logits / settings.temperature
        if 0 < settings.top_k < logits.shape[1]:
            least = logits.topk(settings.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if settings.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probabilities = ordered.softmax(-1)
            above = probabilities.cumsum(-1) - probabilities  # probability of the more likely ones
            logits = logits.masked_fill((above >= settings.top_p).gather(1, order.argsort(1)), -torch.inf)
    return logits.log_softmax(-1)


def _draw(distribution: Tensor, noise: Tensor) -> Tensor:
    """(rows,) tokens: where the cumulative distribution first exceeds the noise, (rows,) in [0, 1)."""
    cumulative = distribution.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=distribution.shape[1] - 1)
