"""Completions of the current policy: a sampler that always has the policy's weights.

An id without a token, which a model can give whose vocabulary is larger than its tokenizer's, ends a completion as the
length limit does: it is truncated. Nothing is masked, so what is sampled from is what is trained.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from common.config import RLConfig
from common.metrics import Stopwatch
from common.models import unused_token_ids
from common.offload import ModelPool
from common.rollouts import Completion, PromptBatch, Rollouts
from common.sampling import SamplingSettings, make_sampler, sampling_seed
from common.weights import policy_weights


class Generation:
    """Draws completions; weights are pushed when, and only when, the policy has changed since.

    Args:
        config: sampler, lengths, temperatures and seed.
        path: folder or hub id of the policy.
        tokenizer: turns completions into text.
        models: the pool with "policy".
        end_token_ids: what a completion ends with.
        dtype: of forward passes.
        watch: charges time to "push" and "sample".

    Attributes:
        sampler: what samples.
    """

    def __init__(
        self,
        config: RLConfig,
        path: str,
        *,
        tokenizer: PreTrainedTokenizerBase,
        models: ModelPool,
        end_token_ids: tuple[int, ...],
        dtype: torch.dtype,
        watch: Stopwatch,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.models = models
        self.end_token_ids = end_token_ids
        self._unused_token_ids = unused_token_ids(path, tokenizer)
        self.watch = watch
        self.sampler = make_sampler(config, path, dtype=dtype, device=models.device, pool=models)
        self._is_stale = True

    def policy_has_changed(self) -> None:
        """Push weights before the next completion."""
        self._is_stale = True

    def sample(self, prompts: PromptBatch, *, num_generations: int, greedy: bool, stream: str) -> Rollouts:
        """Complete prompts for training, at the training temperature or greedily.

        Args:
            prompts: this process's prompts.
            num_generations: completions per prompt, G; 1 if greedy.
            greedy: take the most likely token each time.
            stream: with the seed, the step and the row it decides the noise.

        Returns:
            B = len(prompts) x G rows, rows of one prompt adjacent.
        """
        settings = self._settings(0.0 if greedy else self.config.temperature)
        return self._generate(prompts, settings, num_generations=num_generations, stream=stream)

    def sample_for_evaluation(self, prompts: PromptBatch, *, show_progress: bool = False) -> Rollouts:
        """Complete held-out prompts as the eval_* settings say; eval_num_samples rows per prompt."""
        config = self.config
        shape = {"top_p": config.eval_top_p, "top_k": config.eval_top_k, "show_progress": show_progress}
        settings = self._settings(config.eval_temperature, **shape)
        return self._generate(prompts, settings, num_generations=config.eval_num_samples, stream="eval")

    def _settings(self, temperature: float, **shape: float) -> SamplingSettings:
        stops = (*self.end_token_ids, *self._unused_token_ids)
        limits = {"max_tokens": self.config.max_completion_length, "stop_token_ids": stops}
        return SamplingSettings(temperature=temperature, **shape, **limits)

    def _generate(
        self, prompts: PromptBatch, settings: SamplingSettings, *, num_generations: int, stream: str
    ) -> Rollouts:
        seeds = None  # greedy completions draw nothing
        if settings.temperature:
            seeds = [sampling_seed(self.config.seed, prompts.step, row, stream) for row in prompts.rows]
        self._refresh()
        with self.watch("sample"):
            completions = self.sampler.generate(
                prompts.prompt_ids, settings, num_generations=num_generations, seeds=seeds
            )
            self.sampler.sleep()
            completions = [replace(c, truncated=c.truncated or self._ends_badly(c)) for c in completions]
            texts = self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
            return Rollouts.from_completions(prompts, completions, texts, num_generations=num_generations)

    def _ends_badly(self, completion: Completion) -> bool:
        return bool(completion.token_ids) and completion.token_ids[-1] in self._unused_token_ids

    def _refresh(self) -> None:
        """Give the sampler the policy's weights if they have changed since, and the device."""
        if self.sampler.needs_push and (self._is_stale or not self.sampler.has_weights):
            with self.watch("push"), self.models.use("policy") as model:
                self.sampler.push(policy_weights(model))
        self._is_stale = False
        if self.sampler.needs_push:  # a sampler with weights of its own wants the device for itself
            self.models.evict()
        self.sampler.wake()
