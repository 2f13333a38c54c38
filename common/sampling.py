"""Sampling completions: the Sampler protocol, vLLM, and a small implementation on the policy itself.

Token ids in, token ids out; text never goes round. A completion depends on its prompt, its seed and the weights, not
on the other rows of the batch, up to rounding. What vLLM needs to be told is in engine.py.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import engine
from common.batching import hashed_seed
from common.config import RLConfig
from common.decoding import SamplingSettings, decode
from common.offload import ModelPool
from common.rollouts import Completion


def sampling_seed(seed: int, step: int, row: int, stream: str) -> int:
    """The seed of a prompt's completions: 56 bits of a hash, so that no step and no prompt repeats another's noise.

    On the CPU torch takes the last 32 of them: two of 32 prompts then share noise about once in half a
    million steps.

    Args:
        seed: of the run.
        step: of the run.
        row: position of the prompt among all prompts of the step, over all processes.
        stream: what the completions are for, such as "train" or "eval".
    """
    return hashed_seed(seed, step, row, f"sampling {stream}")


class Sampler(Protocol):
    """What draws completions.

    Attributes:
        needs_push: it has weights of its own, which `push` replaces.
        has_weights: False until the first push, and after a sleep that dropped them.
        resident_bytes: device memory it keeps while it sleeps.
    """

    needs_push: bool
    has_weights: bool
    resident_bytes: int

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
    ) -> list[Completion]:
        """Draw completions.

        Args:
            prompt_ids: token ids of each prompt, not padded.
            settings: for all prompts.
            num_generations: completions per prompt; 1 if greedy.
            seeds: one per prompt, at least num_generations apart: completion i of a prompt draws from its seed plus i.
                None if greedy.

        Returns:
            len(prompt_ids) x num_generations completions, rows of one prompt adjacent.

        Raises:
            ValueError: if prompts, seeds and settings do not go together.
        """
        ...

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over all weights, as (checkpoint name, tensor)."""
        ...

    def sleep(self) -> None:
        """Give the device's memory back; nothing can be drawn until `wake`."""
        ...

    def wake(self) -> None:
        """Take the memory again."""
        ...


def check_sampler(config: RLConfig) -> None:
    """Refuse a sampler that is not installed.

    Raises:
        ValueError: saying how to install it.
    """
    if config.sampler == "vllm":
        engine.check_installed()


def make_sampler(config: RLConfig, path: str, *, dtype: torch.dtype, device: torch.device, pool: ModelPool) -> Sampler:
    """The sampler the settings name.

    Args:
        config: sampler, lengths and vllm_* are read.
        path: folder or hub id of the policy.
        dtype: of forward passes.
        device: where models are used.
        pool: lends the model "policy" to a sampler without weights of its own.
    """
    if config.sampler == "transformers":
        return TransformersSampler(lambda: pool.use("policy"), device=device, dtype=dtype)
    return VLLMSampler(
        path,
        sleep_level=config.vllm_sleep_level,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=config.max_prompt_length + config.max_completion_length,
        max_num_seqs=config.vllm_max_num_seqs,
        memory_share=config.vllm_memory_share,
        enforce_eager=config.vllm_enforce_eager,
    )


class VLLMSampler:
    """vLLM in this process, with a copy of the weights that `push` replaces.

    Args:
        model_path: hub id or folder; its weights are not read.
        sleep_level: what `sleep` gives back on CUDA: 0 nothing, 1 the cache (weights go to the host), 2 weights too.
        engine_settings: the other fields of EngineSettings.
    """

    needs_push = True

    def __init__(self, model_path: str, *, sleep_level: int = 0, **engine_settings: str | float) -> None:
        self._sleep_level = sleep_level if torch.cuda.is_available() else 0
        self._settings = engine.EngineSettings(model=model_path, can_sleep=self._sleep_level > 0, **engine_settings)
        self._engine = engine.create_engine(self._settings)
        self._asleep: set[str] = set()
        self.has_weights = False

    @property
    def resident_bytes(self) -> int:
        """Device memory it keeps while it sleeps; about, at levels 1 and 2."""
        if not torch.cuda.is_available() or self._sleep_level > 0:
            return 0
        return int(torch.cuda.get_device_properties().total_memory * self._settings.memory_share)

    def generate(
        self,
        prompt_ids: list[list[int]],
        settings: SamplingSettings,
        *,
        num_generations: int = 1,
        seeds: list[int] | None = None,
    ) -> list[Completion]:
        """See Sampler."""
        _check_request(prompt_ids, settings, num_generations, seeds)
        longest, limit = max(map(len, prompt_ids), default=0), self._settings.max_model_len
        if longest + settings.max_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens with max_tokens={settings.max_tokens}: the engine was made for "
                f"max_model_len={limit} tokens together. Drop longer prompts, or raise max_prompt_length."
            )
        # vLLM would wait for ever for the memory, and sample from random weights.
        if self._asleep:
            raise RuntimeError(f"generate while {sorted(self._asleep)} sleep: vLLM has no memory. Call wake() first.")
        if not self.has_weights:
            raise RuntimeError("generate before push: vLLM has no weights of the policy. Call push(weights) first.")
        return engine.generate(
            self._engine,
            prompt_ids,
            settings,
            num_generations=num_generations,
            seeds=[None] * len(prompt_ids) if seeds is None else seeds,
        )

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler. Wakes the weights if they sleep, and not the cache: the policy is on the device too."""
        self._wake("weights")
        self.has_weights = False
        engine.push_weights(self._engine, weights)
        self.has_weights = True

    def sleep(self) -> None:
        """See Sampler."""
        if self._sleep_level > 0 and not self._asleep:
            engine.sleep(self._engine, self._sleep_level)
        if self._sleep_level == 2:
            self.has_weights = False
        self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """See Sampler."""
        self._wake("weights")
        self._wake("kv_cache")

    def _wake(self, part: str) -> None:
        if part in self._asleep and self._sleep_level > 0:
            engine.wake(self._engine, part)
        self._asleep.discard(part)


class TransformersSampler:
    """A decoding loop on the policy itself, for machines without vLLM: nothing is pushed, nothing sleeps.

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
    ) -> list[Completion]:
        """See Sampler."""
        _check_request(prompt_ids, settings, num_generations, seeds)
        at_once = max(self._max_rows // num_generations, 1)
        autocast = torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)
        completions = []
        with self._use_policy() as policy, _evaluation_mode(policy), torch.no_grad(), autocast:
            starts = range(0, len(prompt_ids), at_once)
            for start in tqdm(starts, desc="sampling", disable=not settings.show_progress):
                prompts = prompt_ids[start : start + at_once]
                noise = None
                if seeds is not None:
                    streams = [seed + i for seed in seeds[start : start + at_once] for i in range(num_generations)]
                    noise = torch.stack([_uniform(stream, settings.max_tokens) for stream in streams])
                    noise = noise.to(self._device)  # (rows, C)
                completions += decode(policy, prompts, settings, num_generations, noise)
        return completions

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: it draws from the policy itself."""

    def sleep(self) -> None:
        """Nothing to do: it has no memory of its own."""

    def wake(self) -> None:
        """Nothing to do."""


def _check_request(
    prompt_ids: list[list[int]], settings: SamplingSettings, num_generations: int, seeds: list[int] | None
) -> None:
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


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode it was in."""
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
