"""PolicySampler: completions of the current policy, from a sampler that always has the policy's weights.

Ids beyond the tokenizer's vocabulary, which a model with a larger vocabulary can sample, end a completion as the
length limit does: it counts as truncated. No id is masked, so training uses the distribution that was sampled from.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
import transformers
from torch import Tensor

from common.config import RLConfig
from common.data.texts import completion_texts
from common.models.loading import unused_token_ids
from common.models.pool import ModelPool
from common.rollouts import Completion, PromptBatch, Rollouts
from common.sampling import vllm_engine
from common.sampling.prefixes import PrefixSampler, states
from common.sampling.protocol import Finished, Leaving, Sampler, SamplingSettings, sampling_seed
from common.sampling.pushing import push_policy
from common.sampling.server_client import check_server
from common.sampling.server_sampler import server_sampler
from common.sampling.threads import in_thread
from common.sampling.torch_sampler import TransformersSampler
from common.sampling.vllm_sampler import VLLMSampler


def check_sampler(config: RLConfig) -> None:
    """Refuse a sampler that is not installed, or a server that is not there.

    Raises:
        ValueError: saying how to install or start it.
    """
    if config.sampler == "vllm":
        vllm_engine.check_installed()
    if config.sampler == "vllm_server":
        check_server(config.sampler_url, timeout=60 * config.process_timeout)


def make_sampler(
    config: RLConfig,
    path: str,
    *,
    dtype: torch.dtype,
    pool: ModelPool,
    most_rows: int | None = None,
    leaving: Leaving | None = None,
) -> Sampler:
    """The sampler the settings name. Made before the policy is loaded: vLLM finds here whether it runs the model.

    Args:
        config: sampler, lengths and vllm_* are read.
        path: folder or hub id of the policy.
        dtype: of forward passes.
        pool: lends the model "policy", once it has it, to a sampler without weights of its own.
        most_rows: completions of the largest request on this process; None: not known.
        leaving: how processes that share an engine leave it when the run has to end.

    Raises:
        ValueError: if vLLM does not run the model, or not rightly, or the server has another one.
    """
    if config.sampler == "transformers":
        return TransformersSampler(lambda: pool.use("policy"), device=pool.device, dtype=dtype)
    if config.sampler == "vllm_server":
        return server_sampler(config, path, dtype=dtype)
    return VLLMSampler(
        path,
        sleep_level=config.vllm_sleep_level,
        leaving=leaving,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=config.max_prompt_length + config.max_completion_length,
        max_num_seqs=config.vllm_max_num_seqs,
        most_rows=most_rows and most_rows * config.vllm_tensor_parallel,
        memory_share=config.vllm_memory_share,
        enforce_eager=config.vllm_enforce_eager,
        trust_remote_code=config.trust_remote_code,
        tensor_parallel=config.vllm_tensor_parallel,
        timeout=config.process_timeout,
    )


def largest_request(config: RLConfig, num_held_out: int, num_processes: int) -> int:
    """The most completions that one process asks for at once, in training or evaluation.

    Args:
        config: `completions_at_once` and `eval_num_samples` are read.
        num_held_out: held-out prompts of all processes; 0 if nothing is evaluated.
        num_processes: each evaluates whole prompts.
    """
    of_evaluation = math.ceil(num_held_out / num_processes) * config.eval_num_samples
    return max(math.ceil(config.completions_at_once / num_processes), of_evaluation)


class PolicySampler:
    """Samples completions; weights are pushed only if the policy has changed since the last push.

    Args:
        config: lengths, temperatures and seed.
        path: folder or hub id of the policy.
        sampler: from `make_sampler`, with the same settings and pool.
        tokenizer: turns completions into text.
        models: the pool with "policy".
        end_token_ids: a completion ends with any of them.
        stopwatch: counts time as "push", "sample" or "values".
    """

    def __init__(
        self,
        config: RLConfig,
        path: str,
        sampler: Sampler,
        *,
        tokenizer: transformers.PreTrainedTokenizerBase,
        models: ModelPool,
        end_token_ids: tuple[int, ...],
        stopwatch: Callable[[str], AbstractContextManager],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.models = models
        self.end_token_ids = end_token_ids
        self._unused_token_ids = unused_token_ids(path, tokenizer)
        self.stopwatch = stopwatch
        self.sampler = sampler
        self._is_stale = True
        self._under_way: Future[list[Completion]] | None = None  # what is drawn in a thread

    def policy_has_changed(self) -> None:
        """Push the policy's weights before the next completion."""
        self._is_stale = True

    def sample(self, prompts: PromptBatch, *, num_generations: int, greedy: bool = False, purpose: str) -> Rollouts:
        """Complete prompts for training, at the training temperature or greedily.

        Args:
            prompts: this process's prompts, possibly none.
            num_generations: completions per prompt, G; 1 if greedy.
            greedy: take the most likely token each time.
            purpose: decides the noise, with the seed, the step and the row.

        Returns:
            B = len(prompts) x G rows, rows of one prompt adjacent.
        """
        settings = self._settings(0.0 if greedy else self.config.temperature)
        return self._generate(prompts, settings, num_generations=num_generations, purpose=purpose)

    def begin(self, prompts: PromptBatch, *, num_generations: int, purpose: str) -> Future[list[Completion]]:
        """Begin to complete prompts as `sample` does, with the weights that the policy has now.

        A sampler that draws apart does so in a thread, while models train; any other one has drawn at the return.

        Args:
            prompts: this process's prompts, possibly none.
            num_generations: completions per prompt, G.
            purpose: as in `sample`.

        Returns:
            len(prompts) x G completions once they are drawn, or what the sampler has raised; for `rollouts`.
        """
        settings = self._settings(self.config.temperature)
        request = {"num_generations": num_generations, "seeds": self._seeds(prompts, settings, purpose)}
        self._refresh()
        draw = partial(self._draw, self.sampler.generate, prompts, settings, request)
        if self.sampler.samples_apart:
            self._under_way = in_thread(draw)
            return self._under_way
        drawn: Future[list[Completion]] = Future()
        with self.stopwatch("sample"):
            drawn.set_result(draw())
            self.sampler.sleep()
        return drawn

    def continue_from(
        self, rollouts: Rollouts, rows: Tensor, places: Tensor, *, step: int, num_generations: int, purpose: str
    ) -> Rollouts:
        """Sample new completions from intermediate states of completions, at the training temperature.

        Args:
            rollouts: B rows.
            rows: (S,) int64, which completion each state belongs to.
            places: (S,) int64, how many of its tokens belong to the state: 0 (the prompt alone) or more, but not all.
            step: the step.
            num_generations: K, per state.
            purpose: decides the noise, with the seed, the step, the row and the place.

        Returns:
            S x K rows, those of one state adjacent. The time counts as the phase "values", because the scores of such
            completions estimate the values of the states.
        """
        prompts, prefixes = states(
            rollouts, rows, places, step=step, max_completion_length=self.config.max_completion_length
        )
        sampler = PrefixSampler(self.sampler, prefixes, max_prompt_length=self.config.max_prompt_length)
        request = {"num_generations": num_generations, "purpose": purpose, "phase": "values"}
        return self._generate(prompts, self._settings(self.config.temperature), draw=sampler.generate, **request)

    def sample_for_evaluation(
        self,
        prompts: PromptBatch,
        *,
        finished: Finished | None = None,
        have: Mapping[int, list[Completion]] = MappingProxyType({}),
    ) -> Rollouts:
        """Complete held-out prompts as the eval_* settings say; eval_num_samples rows per prompt.

        Args:
            prompts: this process's prompts.
            finished: called with the position in `prompts` and the completions of each prompt that is sampled, as soon
                as they are there.
            have: completions that an interrupted evaluation has sampled, by position; these are not sampled again.
        """
        config = self.config
        missing = [i for i in range(len(prompts)) if i not in have]

        def draw(
            prompt_ids: list[list[int]], settings: SamplingSettings, *, num_generations: int, seeds: list[int] | None
        ) -> list[Completion]:
            drawn = dict(have)
            request = {"num_generations": num_generations, "seeds": seeds and [seeds[i] for i in missing]}
            if finished is not None:
                request["finished"] = lambda i, completions: finished(missing[i], self._as_cut_off(completions))
            if missing:
                new = self.sampler.generate([prompt_ids[i] for i in missing], settings, **request)
                parts = (new[at : at + num_generations] for at in range(0, len(new), num_generations))
                drawn |= zip(missing, parts, strict=True)
            return [completion for i in range(len(prompt_ids)) for completion in drawn[i]]

        settings = self._settings(config.eval_temperature, top_p=config.eval_top_p, top_k=config.eval_top_k)
        return self._generate(prompts, settings, num_generations=config.eval_num_samples, purpose="eval", draw=draw)

    def _settings(self, temperature: float, **options: float) -> SamplingSettings:
        stops = (*self.end_token_ids, *self._unused_token_ids)
        limits = {"max_tokens": self.config.max_completion_length, "stop_token_ids": stops}
        return SamplingSettings(temperature=temperature, **options, **limits)

    def _generate(
        self,
        prompts: PromptBatch,
        settings: SamplingSettings,
        *,
        num_generations: int,
        purpose: str,
        draw: Callable[..., list[Completion]] | None = None,
        phase: str = "sample",
    ) -> Rollouts:
        request = {"num_generations": num_generations, "seeds": self._seeds(prompts, settings, purpose)}
        self._refresh()
        with self.stopwatch(phase):
            completions = self._draw(draw or self.sampler.generate, prompts, settings, request)
            self.sampler.sleep()
            return self.rollouts(prompts, completions, num_generations=num_generations)

    def _seeds(self, prompts: PromptBatch, settings: SamplingSettings, purpose: str) -> list[int] | None:
        if not settings.temperature:  # greedy completions need no seeds
            return None
        return [sampling_seed(self.config.seed, prompts.step, row, purpose) for row in prompts.rows]

    @staticmethod
    def _draw(
        draw: Callable[..., list[Completion]], prompts: PromptBatch, settings: SamplingSettings, request: dict
    ) -> list[Completion]:
        return draw(prompts.prompt_ids, settings, **request) if len(prompts) else []

    def rollouts(self, prompts: PromptBatch, completions: list[Completion], *, num_generations: int) -> Rollouts:
        """The rows of prompts and their completions, len(prompts) x G of them, those of one prompt adjacent."""
        completions = self._as_cut_off(completions)
        return Rollouts.from_completions(
            prompts, completions, self.texts(completions), num_generations=num_generations
        )

    def texts(self, completions: list[Completion]) -> list[str]:
        """The text of each completion, as rewards see it."""
        return completion_texts(self.tokenizer, [each.token_ids for each in completions], self.end_token_ids)

    def _as_cut_off(self, completions: list[Completion]) -> list[Completion]:
        """The completions; those that end with an id beyond the vocabulary count as truncated."""
        return [replace(c, truncated=c.truncated or self._ends_with_unused_id(c)) for c in completions]

    def _ends_with_unused_id(self, completion: Completion) -> bool:
        return bool(completion.token_ids) and completion.token_ids[-1] in self._unused_token_ids

    def _refresh(self) -> None:
        """Push the policy's weights to the sampler if they have changed, and make room on the device for it.

        With offload, all models leave before the sampler's weights wake, and the policy's come by one at a time. The
        sampler's cache wakes last. What is drawn in a thread is drawn to its end by the weights it was begun with.
        """
        if self.sampler.needs_push and (self._is_stale or not self.sampler.has_weights):
            if self._under_way is not None:
                with self.stopwatch("sample"):
                    wait([self._under_way])
            with self.stopwatch("push"), self.models.stream("policy") as (model, on_device):
                push_policy(self.sampler, model, on_device)
        self._is_stale = False
        if self.sampler.needs_push and not self.sampler.samples_apart:  # it needs the device for itself
            self.models.evict()
        self.sampler.wake()
