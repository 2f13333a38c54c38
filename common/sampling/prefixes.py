"""Completions that begin with given tokens.

A state of the policy is a prompt and the tokens chosen since, so sampling from it is sampling a completion that begins
with these tokens. The algorithm decides what such completions are for.
"""

from dataclasses import replace

from torch import Tensor

from common.rollouts import Completion, PromptBatch, Rollouts
from common.sampling.protocol import Sampler, SamplingSettings


def states(
    rollouts: Rollouts, rows: Tensor, places: Tensor, *, step: int, max_completion_length: int
) -> tuple[PromptBatch, list[Completion]]:
    """Intermediate states of completions, as prompts and prefixes of new completions.

    Args:
        rollouts: B rows.
        rows: (S,) int64, which completion each state belongs to.
        places: (S,) int64, how many of its tokens belong to the state: 0 (the prompt alone) or more, but not all.
        step: the step.
        max_completion_length: the setting, in tokens.

    Returns:
        S prompts and S prefixes. The seeds of their completions are functions of (seed, step, row, place).
    """
    chosen = rollouts[rows]
    prompts = PromptBatch(
        step=step,
        rows=(chosen.rows * max_completion_length + places).tolist(),
        prompt_ids=[ids[mask].tolist() for ids, mask in zip(chosen.prompt_ids, chosen.prompt_mask, strict=True)],
        prompts=chosen.prompts,
        columns=chosen.columns,
        raw_prompts=chosen.raw_prompts,
    )
    tokens = zip(chosen.completion_ids, chosen.sampling_logprobs, places.tolist(), strict=True)
    prefixes = [Completion(ids[:n].tolist(), logprobs[:n].tolist(), truncated=True) for ids, logprobs, n in tokens]
    return prompts, prefixes


class PrefixSampler:
    """Draws completions that begin with given tokens; a sampler draws the rest.

    The prefix belongs to the completion: it counts towards max_tokens and comes back with it.

    Args:
        sampler: draws the rest; awake and with weights.
        prefixes: one for each prompt of later requests, each shorter than max_tokens.
        max_prompt_length: this plus max_tokens is the longest sequence that the sampler takes.
    """

    def __init__(self, sampler: Sampler, prefixes: list[Completion], *, max_prompt_length: int) -> None:
        self._sampler = sampler
        self._prefixes = prefixes
        self._max_prompt_length = max_prompt_length

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
    ) -> list[Completion]:
        """See Sampler.generate."""
        whole = [ids + prefix.token_ids for ids, prefix in zip(prompt_ids, self._prefixes, strict=True)]
        left = [settings.max_tokens - len(prefix.token_ids) for prefix in self._prefixes]
        drawn: dict[int, list[Completion]] = {}
        for request in self._requests(whole, left, self._max_prompt_length + settings.max_tokens):
            completions = self._sampler.generate(
                [whole[i] for i in request],
                replace(settings, max_tokens=left[request[0]]),
                num_generations=num_generations,
                seeds=seeds and [seeds[i] for i in request],
            )
            for position, i in enumerate(request):
                rest = completions[position * num_generations : (position + 1) * num_generations]
                drawn[i] = [_joined(self._prefixes[i], completion, settings.max_tokens) for completion in rest]
        return [completion for i in range(len(whole)) for completion in drawn[i]]

    @staticmethod
    def _requests(whole: list[list[int]], left: list[int], max_length: int) -> list[list[int]]:
        """Group prompts, by index, into requests; the first prompt of a request has the most tokens left.

        A request has one token limit, so its other prompts may get a few tokens more than they have left; these are
        cut off. The longest prompt of a request plus the limit must fit into the sampler.
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


def _joined(prefix: Completion, rest: Completion, max_tokens: int) -> Completion:
    """Join both into one completion of at most max_tokens."""
    ids, logprobs = prefix.token_ids + rest.token_ids, prefix.logprobs + rest.logprobs
    return Completion(ids[:max_tokens], logprobs[:max_tokens], rest.truncated or len(ids) > max_tokens)
