"""The sampler without vLLM: a decoding loop on the policy itself.

Each pass adds one token; the state of earlier tokens is cached in the model's own way, and finished rows are removed.
How tokens are drawn says drawing.py.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from common.logprobs import without_adapter
from common.models.decoding_support import Decoding, decoding_of, new_cache
from common.rollouts import Completion
from common.sampling.drawing import draw, uniform
from common.sampling.protocol import Finished, SamplingSettings, check_request

logger = logging.getLogger("nanorlhf")


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
    weights_dtype = None
    samples_apart = False

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
        self._has_sampled = False

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
            self._say_once_if_slow(policy)
            for start in range(0, len(prompt_ids), at_once):
                prompts = prompt_ids[start : start + at_once]
                noise = None
                if seeds is not None:
                    row_seeds = [seed + i for seed in seeds[start : start + at_once] for i in range(num_generations)]
                    generators = [torch.Generator().manual_seed(seed) for seed in row_seeds]
                    noise = torch.stack([uniform((settings.max_tokens,), each) for each in generators])
                    noise = noise.to(self._device)  # (rows, C)
                drawn = decode(policy, prompts, settings, num_generations, noise)
                completions += drawn
                for i in range(len(prompts) if finished else 0):
                    finished(start + i, drawn[i * num_generations : (i + 1) * num_generations])
        return completions

    def _say_once_if_slow(self, policy: nn.Module) -> None:
        model = without_adapter(policy)
        if not self._has_sampled and decoding_of(model).cache_argument is None:
            logger.info(
                "sampler=transformers: %s has no cache that gives what a pass over the whole sequence gives, so each "
                "token takes such a pass: slow for long completions.",
                type(model).__name__,
            )
        self._has_sampled = True

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
    how = decoding_of(without_adapter(model))
    together = [list(range(len(prompt_ids)))]
    if not how.takes_padding:
        together = _of_equal_length(prompt_ids)
    drawn: dict[int, list[Completion]] = {}
    for prompts in together:
        rows = [prompt * num_generations + i for prompt in prompts for i in range(num_generations)]
        state = _Cached if how.cache_argument else _Recomputed
        passes = state(model, [prompt_ids[prompt] for prompt in prompts], how)
        completions = _decode(passes, settings, num_generations, noise if noise is None else noise[rows])
        drawn |= zip(rows, completions, strict=True)
    return [drawn[row] for row in range(len(prompt_ids) * num_generations)]


def _of_equal_length(prompt_ids: list[list[int]]) -> list[list[int]]:
    """Indices of the prompts, those of one length together."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompt_ids):
        by_length.setdefault(len(prompt), []).append(i)
    return list(by_length.values())


def _decode(
    passes: "_Cached | _Recomputed", settings: SamplingSettings, num_generations: int, noise: Tensor | None
) -> list[Completion]:
    """Continue the prompts of `passes`; see decode."""
    # Each prompt goes through the model once; its rows share the result.
    logits = passes.first().repeat_interleave(num_generations, 0)  # (rows, V)
    device, rows = logits.device, len(logits)
    passes.select(torch.arange(rows // num_generations, device=device).repeat_interleave(num_generations))
    stops = torch.tensor(settings.stop_token_ids, device=device)
    active = torch.arange(rows, device=device)  # rows that still go through the model
    token_ids = torch.zeros(rows, settings.max_tokens, dtype=torch.int64, device=device)
    logprobs = torch.zeros(rows, settings.max_tokens, device=device)
    lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # 0: not finished
    for step in range(settings.max_tokens):
        if noise is None:
            chosen, distribution = logits.argmax(-1), logits.log_softmax(-1)
        else:
            distribution = _cut(logits, settings)
            chosen = draw(distribution, noise[active, step])  # which makes them log-probs
        token_ids[active, step] = chosen
        logprobs[active, step] = distribution.gather(1, chosen[:, None]).squeeze(1)
        lengths[active[torch.isin(chosen, stops) & (lengths[active] == 0)]] = step + 1
        unfinished = lengths[active] == 0
        if step + 1 == settings.max_tokens or not unfinished.any():
            break
        # Removing rows copies the whole cache, so wait until it is worth it.
        if unfinished.sum() <= 0.75 * len(active):
            passes.select(unfinished.nonzero().squeeze(1))
            active, chosen = active[unfinished], chosen[unfinished]
        logits = passes.next(chosen)
    truncated = lengths == 0
    lengths[truncated] = settings.max_tokens
    columns = zip(token_ids.tolist(), logprobs.tolist(), lengths.tolist(), truncated.tolist(), strict=True)
    return [Completion(tokens[:end], values[:end], cut) for tokens, values, end, cut in columns]


class _Cached:
    """Passes of a model that keeps the state of earlier tokens: one token of each row goes through it.

    Args:
        model: in evaluation mode.
        prompt_ids: token ids of each prompt, of equal length unless the model takes padding.
        how: the model is decoded.
    """

    def __init__(self, model: nn.Module, prompt_ids: list[list[int]], how: Decoding) -> None:
        self._model = model
        self._how = how
        self._cache = new_cache(without_adapter(model))
        device = next(model.parameters()).device
        width = max(map(len, prompt_ids))
        self._prompts = torch.tensor([[0] * (width - len(p)) + p for p in prompt_ids], device=device)  # (prompts, P)
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompt_ids]
        self._mask = torch.tensor(mask, device=device)  # (rows, tokens so far)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)  # (rows, tokens of the pass)

    def first(self) -> Tensor:
        """(prompts, V) float32 logits after each prompt."""
        return self._logits(self._prompts)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 indices, some of them several times."""
        self._cache.reorder_cache(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows, -1:]

    def next(self, tokens: Tensor) -> Tensor:
        """(rows, V) float32 logits after (rows,) tokens."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions + 1
        return self._logits(tokens[:, None])

    def _logits(self, ids: Tensor) -> Tensor:
        options: dict[str, Any] = {self._how.cache_argument: self._cache, "use_cache": True}
        if self._how.takes_padding:
            options["attention_mask"] = self._mask
        if self._how.takes_positions:
            options["position_ids"] = self._positions
        if self._how.takes_last_only:
            options["logits_to_keep"] = 1
        return self._model(input_ids=ids, **options).logits[:, -1].float()


class _Recomputed:
    """Passes of a model without such a state: the whole sequence goes through it for each token.

    Args:
        model: in evaluation mode.
        prompt_ids: token ids of each prompt, of equal length.
        how: the model is decoded.
    """

    def __init__(self, model: nn.Module, prompt_ids: list[list[int]], how: Decoding) -> None:
        self._model = model
        self._options = {"logits_to_keep": 1} if how.takes_last_only else {}
        self._ids = torch.tensor(prompt_ids, device=next(model.parameters()).device)  # (rows, tokens so far)

    def first(self) -> Tensor:
        """See _Cached."""
        return self._model(input_ids=self._ids, **self._options).logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        """See _Cached."""
        self._ids = self._ids[rows]

    def next(self, tokens: Tensor) -> Tensor:
        """See _Cached."""
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        return self.first()


def _cut(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """(rows, V) logits of the distribution to draw from: temperature first, then top_k, then top_p of the rest."""
    logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[1]:
        least = logits.topk(settings.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if settings.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        above = probabilities.cumsum(-1) - probabilities  # probability of the more likely ones
        logits = logits.masked_fill((above >= settings.top_p).gather(1, order.argsort(1)), -torch.inf)
    return logits


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
