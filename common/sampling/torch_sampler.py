"""The sampler without vLLM: a decoding loop on the policy itself.

Each pass adds one token; keys and values are cached, and finished rows are removed. Tokens are drawn by inverting the
cumulative distribution with one random number per token, so that a row does not depend on the other rows.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import transformers
from torch import Tensor, nn

from common.rollouts import Completion
from common.sampling.protocol import Finished, SamplingSettings, check_request


class TransformersSampler:
    """A decoding loop on the policy itself, for machines without vLLM: push and sleep do nothing.

    Args:
        use_policy: gives a context in which the policy is on the device.
        device: that device.
        dtype: of forward passes.
        max_rows: completions drawn at the same time; fewer need less memory.
    """

    needs_push = False
    has_weights = True
    resident_bytes = 0

    def __init__(
        self,
        use_policy: Callable[[], AbstractContextManager[nn.Module]],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 256,
    ) -> None:
        self._use_policy = use_policy
        self._device = device
        self._dtype = dtype
        self._max_rows = max_rows

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        """See Sampler."""
        check_request(prompt_ids, settings, num_generations, seeds)
        at_once = max(self._max_rows // num_generations, 1)
        autocast = torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)
        completions: list[Completion] = []
        with self._use_policy() as policy, _evaluation_mode(policy), torch.no_grad(), autocast:
            for start in range(0, len(prompt_ids), at_once):
                prompts = prompt_ids[start : start + at_once]
                noise = None
                if seeds is not None:
                    row_seeds = [seed + i for seed in seeds[start : start + at_once] for i in range(num_generations)]
                    noise = torch.stack([_uniform(seed, settings.max_tokens) for seed in row_seeds])
                    noise = noise.to(self._device)  # (rows, C)
                drawn = decode(policy, prompts, settings, num_generations, noise)
                completions += drawn
                for i in range(len(prompts) if finished else 0):
                    finished(start + i, drawn[i * num_generations : (i + 1) * num_generations])
        return completions

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: it draws from the policy itself."""

    def sleep(self) -> None:
        """Nothing to do: it has no memory of its own."""

    def wake(self) -> None:
        """Nothing to do."""


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
    cache = transformers.DynamicCache()
    # Each prompt goes through the model once; its rows share the result.
    logits = _next_logits(model, ids, mask, positions, cache).repeat_interleave(num_generations, 0)  # (rows, V)
    cache.batch_repeat_interleave(num_generations)
    mask, positions = (t.repeat_interleave(num_generations, 0) for t in (mask, positions[:, -1:]))
    stops = torch.tensor(settings.stop_token_ids, device=device)
    active = torch.arange(len(mask), device=device)  # rows that still go through the model
    token_ids = torch.zeros(len(mask), settings.max_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(mask), settings.max_tokens, device=device)
    lengths = torch.zeros(len(mask), dtype=torch.int64, device=device)  # 0: not finished
    for step in range(settings.max_tokens):
        distribution = _log_distribution(logits, settings)
        chosen = distribution.argmax(-1) if noise is None else _draw(distribution, noise[active, step])
        token_ids[active, step] = chosen
        logprobs[active, step] = distribution.gather(1, chosen[:, None]).squeeze(1)
        lengths[active[torch.isin(chosen, stops) & (lengths[active] == 0)]] = step + 1
        unfinished = lengths[active] == 0
        if step + 1 == settings.max_tokens or not unfinished.any():
            break
        # Removing rows copies the whole cache, so wait until it is worth it.
        if unfinished.sum() <= 0.75 * len(active):
            cache.batch_select_indices(unfinished.nonzero().squeeze(1))
            active, chosen, mask, positions = (t[unfinished] for t in (active, chosen, mask, positions))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions + 1
        logits = _next_logits(model, chosen[:, None], mask, positions, cache)
    truncated = lengths == 0
    lengths[truncated] = settings.max_tokens
    rows = zip(token_ids.tolist(), logprobs.tolist(), lengths.tolist(), truncated.tolist(), strict=True)
    return [Completion(tokens[:end], values[:end], cut) for tokens, values, end, cut in rows]


def _next_logits(
    model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: transformers.DynamicCache
) -> Tensor:
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
    """(rows, V) log-probabilities to draw from: temperature first, then top_k, then top_p of the rest."""
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


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module has its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _uniform(seed: int, length: int) -> Tensor:
    """(length,) float64 in [0, 1), a function of the seed alone."""
    return torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
