"""Completions that begin with given tokens.

A state of the policy is a prompt and the tokens chosen since, so sampling from it is sampling a completion that begins
with these tokens. What such completions are for is the algorithm's business.
"""

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from common.rollouts import Completion, PromptBatch, Rollouts
from common.sampling.protocol import Sampler, SamplingSettings


def states(
    rollouts: Rollouts, rows: Tensor, places: Tensor, *, step: int, max_completion_length: int
) -> tuple[PromptBatch, list[Completion]]:
    """States that completions came through, as prompts and what their completions begin with.

    Args:
        rollouts: B rows.
        rows: (S,) int64, which completion each state belongs to.
        places: (S,) int64, tokens of it that belong to the state; fewer than it has, 0 is the prompt alone.
        step: the step.
        max_completion_length: the setting, in tokens.

    Returns:
        S prompts and S prefixes. The seeds of what is sampled from them are functions of (seed, step, row, place).
    """
    begun = rollouts[rows]
    prompts = PromptBatch(
        step=step,
        rows=(begun.rows * max_completion_length + places).tolist(),
        prompt_ids=[ids[mask].tolist() for ids, mask in zip(begun.prompt_ids, begun.prompt_mask, strict=True)],
        prompts=begun.prompts,
        columns=begun.columns,
        raw_prompts=begun.raw_prompts,
    )
    tokens = zip(begun.completion_ids, begun.sampling_logprobs, places.tolist(), strict=True)
    prefixes = [Completion(ids[:place].tolist(), logs[:place].tolist(), truncated=True) for ids, logs, place in tokens]
    return prompts, prefixes


class PrefixSampler:
    """A sampler whose completions begin with given tokens; another one draws what follows them.

    The prefix belongs to the completion: it counts towards max_tokens and comes back with it.

    Args:
        sampler: draws; sleeps, wakes and gets weights as ever.
        prefixes: one for each prompt of the requests to come, each shorter than max_tokens.
        max_prompt_length: with max_tokens the longest sequence that the sampler takes.
    """

    def __init__(self, sampler: Sampler, prefixes: list[Completion], *, max_prompt_length: int) -> None:
        self._sampler = sampler
        self._prefixes = prefixes
        self._max_prompt_length = max_prompt_length
        self.needs_push, self.resident_bytes = sampler.needs_push, sampler.resident_bytes

    @property
    def has_weights(self) -> bool:
        """See Sampler."""
        return self._sampler.has_weights

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
    ) -> list[Completion]:
        """See Sampler."""
        whole = [ids + prefix.token_ids for ids, prefix in zip(prompt_ids, self._prefixes, strict=True)]
        left = [settings.max_tokens - len(prefix.token_ids) for prefix in self._prefixes]
        drawn: dict[int, list[Completion]] = {}
        for together in self._requests(whole, left, self._max_prompt_length + settings.max_tokens):
            completions = self._sampler.generate(
                [whole[i] for i in together],
                replace(settings, max_tokens=left[together[0]]),
                num_generations=num_generations,
                seeds=seeds and [seeds[i] for i in together],
            )
            for place, i in enumerate(together):
                rest = completions[place * num_generations : (place + 1) * num_generations]
                drawn[i] = [_joined(self._prefixes[i], completion, settings.max_tokens) for completion in rest]
        return [completion for i in range(len(whole)) for completion in drawn[i]]

    @staticmethod
    def _requests(whole: list[list[int]], left: list[int], max_length: int) -> list[list[int]]:
        """Which prompts go into one request, by number; the first of a request may have the most tokens left.

        A request has one limit for all, so the others may draw a few tokens more than they have left, which are cut
        off; the longest of a request and that limit must fit into the sampler.
        """
        requests: list[list[int]] = []
        longest = 0
        for i in sorted(range(len(whole)), key=lambda i: -left[i]):
            longest = max(longest, len(whole[i]))
            if requests and longest + left[requests[-1][0]] <= max_length:
                requests[-1].append(i)
            else:
                requests.append([i])
                longest = len(whole[i])
        return requests

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler."""
        self._sampler.push(weights)

    def sleep(self) -> None:
        """See Sampler."""
        self._sampler.sleep()

    def wake(self) -> None:
        """See Sampler."""
        self._sampler.wake()


def _joined(prefix: Completion, rest: Completion, max_tokens: int) -> Completion:
    """Both as one completion of at most max_tokens."""
    ids, logprobs = prefix.token_ids + rest.token_ids, prefix.logprobs + rest.logprobs
    return Completion(ids[:max_tokens], logprobs[:max_tokens], rest.truncated or len(ids) > max_tokens)
