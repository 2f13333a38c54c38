"""What a sampler is: the protocol, its settings, and the seeds of its noise.

Samplers take and return token ids, never text. A completion depends on its prompt, its seed and the weights, not on
the other rows of the batch, up to rounding. vllm_sampler.py and torch_sampler.py are the two samplers, prefixes.py
makes their completions begin with given tokens, policy_sampler.py gives a sampler the policy's weights.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from common.rollouts import Completion
from common.seeds import hashed_seed


def sampling_seed(seed: int, step: int, row: int, purpose: str) -> int:
    """The seed of a prompt's completions: 56 bits of a hash, so that no step and no prompt repeats another's noise.

    On the CPU torch uses only the last 32 bits: two of 32 prompts then share noise about once in half a million steps.

    Args:
        seed: of the run.
        step: of the run.
        row: position of the prompt among all prompts of the step, over all processes.
        purpose: such as "train" or "eval"; a different purpose gives different completions.
    """
    return hashed_seed(seed, step, row, f"sampling {purpose}")


@dataclass(kw_only=True, frozen=True)
class SamplingSettings:
    """The distribution that completions are drawn from, and where they end.

    Attributes:
        temperature: 0, which is greedy, or between 0.01 and 2.
        top_p: keeps the fewest most likely tokens with at least this probability together, above 0; 1 keeps all.
        top_k: keeps this many most likely tokens; 0 keeps all.
        max_tokens: completions are cut off at this length.
        stop_token_ids: a completion ends with the first of these, and includes it.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int
    stop_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        # vLLM raises lower temperatures to 0.01, and refuses those above 2.
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:
            raise ValueError(
                f"temperature={self.temperature}: need 0, which is greedy, or between 0.01 and 2, the range of vLLM. "
                "Pass 0.7, for example."
            )
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"top_p={self.top_p}, top_k={self.top_k}: top_p is a probability above 0, top_k a number of tokens. "
                "top_p=1 and top_k=0 keep all tokens."
            )
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: a completion has at least one token. Pass 1 or more.")


# Called with the position of a prompt in the request, and all of its completions.
Finished = Callable[[int, list[Completion]], None]


class Sampler(Protocol):
    """Draws completions.

    Attributes:
        needs_push: it has weights of its own, which `push` replaces.
        has_weights: False until the first push, and after a sleep that dropped them.
        resident_bytes: device memory it keeps while it sleeps.
        weights_dtype: what all its matrices are rounded to when they are pushed; None: not all to one type.
        samples_apart: it draws elsewhere, as a server does: `generate` may run in a thread while models train, and
            beside another `generate`, and it needs no device of this process.
    """

    needs_push: bool
    has_weights: bool
    resident_bytes: int
    weights_dtype: torch.dtype | None
    samples_apart: bool

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        """Draw completions.

        Args:
            prompt_ids: token ids of each prompt, not padded.
            settings: for all prompts.
            num_generations: completions per prompt; 1 if greedy.
            seeds: one per prompt, at least num_generations apart: completion i of a prompt draws from its seed plus i.
                None if greedy.
            finished: called once for each prompt, in any order, as soon as its completions are there.

        Returns:
            len(prompt_ids) x num_generations completions, rows of one prompt adjacent.

        Raises:
            ValueError: if prompts, seeds and settings do not fit together.
        """
        ...

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by these pairs of (checkpoint name, tensor)."""
        ...

    def sleep(self) -> None:
        """Free the device's memory; nothing can be drawn until `wake`."""
        ...

    def wake(self) -> None:
        """Allocate the memory again."""
        ...


class Leaving(Protocol):
    """How processes leave work that is one for all of them, when a run has to end: Stopping of common/runs."""

    def held(self) -> AbstractContextManager[Callable[[], int]]:
        """A context in which no process leaves alone; it gives what this process says when they ask each other."""
        ...

    def leave_together(self, said: int) -> NoReturn:
        """Leave, in all processes, after one of them said more than 0."""
        ...


def check_request(
    prompt_ids: list[list[int]], settings: SamplingSettings, num_generations: int, seeds: list[int] | None
) -> None:
    """Refuse requests that no sampler can serve.

    Raises:
        ValueError: if prompts, seeds and settings do not fit together.
    """
    if not all(prompt_ids):
        raise ValueError(
            "a prompt without tokens: there is nothing to continue. Leave it out, or start it with a token."
        )
    if num_generations < 1:
        raise ValueError(f"num_generations={num_generations}: need at least 1 completion per prompt. Pass 1 or more.")
    if settings.temperature == 0:
        if seeds is not None or num_generations != 1:
            raise ValueError(
                f"temperature=0 with num_generations={num_generations} and {'no ' if seeds is None else ''}seeds: "
                "greedy completions of a prompt are all the same. Pass num_generations=1 and no seeds."
            )
        return
    if seeds is None or len(seeds) != len(prompt_ids):
        raise ValueError(
            f"{0 if seeds is None else len(seeds)} seeds for {len(prompt_ids)} prompts: each prompt needs its own, or "
            "completions would depend on the order in which they are drawn. Pass one sampling_seed per prompt."
        )
    if any(after - before < num_generations for before, after in pairwise(sorted(seeds))):
        raise ValueError(
            f"seeds less than num_generations={num_generations} apart: completion i of a prompt draws from its seed "
            "plus i, so completions of two prompts would share their noise. Pass one sampling_seed per prompt."
        )
