"""The sampler on vLLM: one engine for the whole run, asleep while models are used; `push` replaces its weights."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from common.rollouts import Completion
from common.sampling import vllm_engine
from common.sampling.protocol import Finished, Leaving, SamplingSettings, check_request
from common.sampling.vllm_group import Request

logger = logging.getLogger("nanorlhf")


class VLLMSampler:
    """vLLM in this process, with a copy of the weights that `push` replaces.

    With tensor_parallel, processes of adjacent ranks share it: all of them push, sleep and wake at the same time. A
    process may ask for completions as often as it likes in between; the others take part until all go to sleep.

    Args:
        model_path: hub id or folder; its weights are not read.
        sleep_level: what `sleep` frees on CUDA: 0 nothing, 1 the cache (weights move to the host), 2 weights too.
        leaving: how processes that share the engine leave it when the run has to end; None: they do not.
        engine_settings: the other fields of EngineSettings.
    """

    needs_push = True
    samples_apart = False

    def __init__(
        self, model_path: str, *, sleep_level: int = 0, leaving: Leaving | None = None, **engine_settings: str | float
    ) -> None:
        self._leaving = leaving
        self._sleep_level = sleep_level if torch.cuda.is_available() else 0
        self._settings = vllm_engine.EngineSettings(
            model=model_path, can_sleep=self._sleep_level > 0, **engine_settings
        )
        self._engine = vllm_engine.create_engine(self._settings)
        self.weights_dtype = vllm_engine.matrix_dtype(self._engine)
        self._asleep: set[str] = set()
        self._is_small = self._settings.num_seqs_on_cpu < self._settings.max_num_seqs
        self.has_weights = False

    @property
    def resident_bytes(self) -> int:
        """Device memory it keeps while it sleeps; approximate at levels 1 and 2."""
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
        finished: Finished | None = None,
    ) -> list[Completion]:
        """See Sampler."""
        check_request(prompt_ids, settings, num_generations, seeds)
        longest, limit = max(map(len, prompt_ids), default=0), self._settings.max_model_len
        if longest + settings.max_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens with max_tokens={settings.max_tokens}: the engine was created for "
                f"max_model_len={limit} tokens in total. Drop longer prompts, or raise max_prompt_length."
            )
        # vLLM would wait forever for the memory, or sample from random weights.
        if self._asleep:
            raise RuntimeError(f"generate while {sorted(self._asleep)} sleep: vLLM has no memory. Call wake() first.")
        if not self.has_weights:
            raise RuntimeError("generate before push: vLLM has no weights of the policy. Call push(weights) first.")
        seeds = [None] * len(prompt_ids) if seeds is None else seeds
        request = Request(prompt_ids=prompt_ids, settings=settings, num_generations=num_generations, seeds=seeds)
        with self._engine.group.together(self._leaving):
            return self._take_part(self._engine.group.gather(request), finished)

    def _take_part(self, requests: list[Request | None], finished: Finished | None = None) -> list[Completion]:
        """The completions of this process; those of others are computed with them.

        Args:
            requests: of all processes of the engine; None: it asks for nothing more before it sleeps.
            finished: as in `generate`.
        """
        place = self._engine.group.place
        own, asked = requests[place], [each for each in requests if each is not None]
        first = sum(len(each.prompt_ids) for each in requests[:place] if each is not None)

        def report(prompt: int, completions: list[Completion]) -> None:
            if own is not None and first <= prompt < first + len(own.prompt_ids):
                finished(prompt - first, completions)

        self._check_size(sum(each.num_rows for each in asked))
        completions = vllm_engine.generate(self._engine, asked, report if finished else None)
        return [] if own is None else completions[sum(each is not None for each in requests[:place])]

    def _check_size(self, num_rows: int) -> None:
        """Say once that a request is larger than what there is memory for, if more could have been asked for."""
        at_once = self._settings.num_seqs_on_cpu
        is_first = self._engine.group.place == 0  # the others have the same request
        if self._is_small and is_first and num_rows > at_once and not torch.cuda.is_available():
            self._is_small = False
            logger.warning(
                "a request of %d completions: vLLM has memory for %d, which was said to be the most, and samples so "
                "many at a time. This is slower, and the result is the same. Have completions_at_once in the "
                "algorithm's settings return %d.",
                *(num_rows, at_once, num_rows),
            )

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Sampler. Wakes the weights if they sleep, but not the cache: models may not have left yet."""
        self._wake("weights")
        self.has_weights = False
        vllm_engine.push_weights(self._engine, weights)
        self.has_weights = True

    def sleep(self) -> None:
        """See Sampler. Other processes of the engine may still ask for something."""
        with self._engine.group.together(self._leaving):
            while not self._asleep and any(requests := self._engine.group.gather(None)):
                self._take_part(requests)
        if self._sleep_level > 0 and not self._asleep:
            vllm_engine.sleep(self._engine, self._sleep_level)
        if self._sleep_level == 2:
            self.has_weights = False
        self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """See Sampler."""
        self._wake("weights")
        self._wake("kv_cache")

    def _wake(self, part: str) -> None:
        if part in self._asleep and self._sleep_level > 0:
            vllm_engine.wake(self._engine, part)
        self._asleep.discard(part)
