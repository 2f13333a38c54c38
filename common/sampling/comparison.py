"""Sampler against trainer on one model: the same completions, and the log-probs that each of the two gives them.

It is a step of training without an algorithm: the policy is loaded, pushed and sampled from as in a run, and its
log-probs come from where a run's come from. Then the weights move and are pushed again, because a first push and a
later one are different work for an engine.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedConfig

from common.config import RLConfig
from common.logprobs import token_logprobs, without_adapter
from common.models.attention import why_not
from common.models.loading import compute_dtype, end_token_ids, load_policy
from common.models.pool import ModelPool
from common.rollouts import PromptBatch, Rollouts
from common.sampling.policy_sampler import PolicySampler, make_sampler
from common.update.batches import Batches

_NUM_GENERATIONS, _NUM_TOKENS = 2, 48
# How far a weight moves, relative to the size of the weights of its tensor.
_MOVE = 0.02
# The same for tensors of zeros, such as those of a new adapter.
_MOVE_OF_ZEROS = 0.01

# The second push must be closer to the policy by this factor than its old weights are.
_OF_MOVE = 3

# What to do about a difference.
_OTHER_MODEL = "the sampler computes another model than the trainer; try --sampler transformers"
_OTHER_ATTENTION = "the attention leaves out a part of the model; try --attn_implementation eager"
_NO_MOVE = "the trained weights hardly act on the log-probs, so the next line shows little"
_OLD_WEIGHTS = "the sampler keeps a part of the old weights; try --sampler transformers"
# No weight is NaN: a model with such a weight is refused when it is loaded.
_NOT_FINITE = "log-probs of the trainer are NaN or infinite, though no weight is; try --dtype float32"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two sets of log-probs of the same tokens.

    Attributes:
        what: which two, in words.
        mean: mean absolute difference; NaN if any log-prob is.
        largest: the largest one.
        is_move: weights changed in between, so that a difference is what is wanted.
        rounding: of a move: what the first push differed by, without any move.
        limit: the largest mean that is right, where that is less than rounding in this precision explains.
        advice: what to do about a difference that is wrong.
    """

    what: str
    mean: float
    largest: float
    is_move: bool = False
    rounding: float = 0.0
    limit: float = math.inf
    advice: str = ""

    # A move must change log-probs by so many times what rounding does, or a push after it would show nothing.
    VISIBLE = 10

    @classmethod
    def of(cls, one: Tensor, other: Tensor, rollouts: Rollouts, **described: str | bool | float) -> Difference:
        """Compare log-probs, (B, C) both, at the real tokens of rollouts."""
        apart = (one - other)[rollouts.completion_mask].abs()  # (tokens,)
        return cls(mean=apart.mean().item(), largest=apart.max().item(), **described)

    def is_right(self, bound: float) -> bool:
        """Whether the mean is at most `bound` and the limit, or after a move far above rounding; NaN is never right.

        A move that is not far above it is no fault of the model: a later difference shows less then.
        """
        return self.mean >= self.VISIBLE * self.rounding if self.is_move else self.mean <= min(bound, self.limit)


class Comparison:
    """A loaded policy with its sampler.

    Args:
        config: of the run that is tried out.
        path: hub id or folder of the model.
        tokenizer: its tokenizer.

    Attributes:
        dtype: of forward passes.
        num_completions: so many are sampled each time.

    Raises:
        ValueError: the model cannot be loaded, or the sampler refuses it.
    """

    def __init__(self, config: RLConfig, path: str, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.dtype = compute_dtype(config, self.accelerator.device)
        self.prompts = sample_prompts(tokenizer, config.max_prompt_length)
        self.num_completions = len(self.prompts) * _NUM_GENERATIONS
        # The sum of both limits stays: some models compute differently for another one.
        room = config.max_prompt_length + config.max_completion_length
        most = min(_NUM_TOKENS, config.max_completion_length)
        self.config = replace(
            config, max_prompt_length=room - most, max_completion_length=most, vllm_sleep_level=0, num_minibatches=1
        )
        self.batches = Batches(self.config, self.accelerator, self.dtype)
        self.models = ModelPool(self.accelerator.device, "never")
        sampler = make_sampler(self.config, path, dtype=self.dtype, pool=self.models, most_rows=self.num_completions)
        module = load_policy(path, config, dtype=self.dtype)
        self.models.add("policy", module)
        self.sampler = PolicySampler(
            self.config,
            path,
            sampler,
            tokenizer=tokenizer,
            models=self.models,
            end_token_ids=end_token_ids(without_adapter(module), tokenizer),
            stopwatch=lambda phase: nullcontext(),
        )

    def run(self) -> Iterator[Difference]:
        """Each difference as soon as it is known."""
        rollouts = self._sample()
        before = self._logprobs(rollouts)
        advice = "" if before[rollouts.completion_mask].isfinite().all() else _NOT_FINITE
        what = {"what": "sampler and trainer, first push", "advice": advice or _OTHER_MODEL}
        first = Difference.of(rollouts.sampling_logprobs, before, rollouts, **what)
        yield first
        if advice:  # nothing after it can be right
            return
        yield from self._eager(rollouts, before)
        self._move()
        what = {"what": "trainer before and after its weights moved", "is_move": True, "advice": _NO_MOVE}
        moved = Difference.of(before, self._logprobs(rollouts), rollouts, **what, rounding=first.mean)
        yield moved
        rollouts = self._sample()
        what = {"what": "sampler and trainer, second push", "advice": _OLD_WEIGHTS}
        # A sampler with the old weights would differ by as much as the weights moved.
        limit = moved.mean / _OF_MOVE if moved.is_right(math.inf) else math.inf
        yield Difference.of(rollouts.sampling_logprobs, self._logprobs(rollouts), rollouts, **what, limit=limit)

    def _sample(self) -> Rollouts:
        rollouts = self.sampler.sample(self.prompts, num_generations=_NUM_GENERATIONS, purpose="check")
        self.batches.number(rollouts)
        return rollouts

    def _logprobs(self, rollouts: Rollouts) -> Tensor:
        """(B, C) float32: the trainer's."""
        with self.models.use("policy") as policy:
            of_batch = partial(_of_batch, policy, self.config.temperature)
            return self.batches.for_each_token(rollouts, of_batch, step=self.prompts.step)

    def _eager(self, rollouts: Rollouts, logprobs: Tensor) -> Iterator[Difference]:
        """The same with attention written out, which leaves nothing out: a second witness beside the sampler."""
        with self.models.use("policy") as policy:
            base = without_adapter(policy)
        used = base.config._attn_implementation
        cannot = why_not("eager", base.config, type(base)) or not type(base)._can_set_attn_implementation()
        if used == "eager" or cannot:
            return
        # Modules read it from a configuration that need not be the same object as the model's.
        configs = [each.config for each in base.modules() if isinstance(vars(each).get("config"), PreTrainedConfig)]
        before = [each._attn_implementation for each in configs]
        for each in configs:
            each._attn_implementation = "eager"
        try:
            eager = self._logprobs(rollouts)
        finally:
            for each, implementation in zip(configs, before, strict=True):
                each._attn_implementation = implementation
        what = {"what": f"attention {used} and eager", "advice": _OTHER_ATTENTION}
        yield Difference.of(logprobs, eager, rollouts, **what)

    @torch.no_grad()
    def _move(self) -> None:
        """Move every trained weight a little, as an optimizer step would."""
        generator = torch.Generator().manual_seed(self.config.seed)
        with self.models.use("policy") as policy:
            for weight in policy.parameters():
                if weight.requires_grad:
                    size = weight.square().mean().sqrt().item()
                    noise = torch.randn(weight.shape, generator=generator)
                    weight.add_((_MOVE * size if size else _MOVE_OF_ZEROS) * noise.to(weight))
        self.sampler.policy_has_changed()


def _of_batch(policy: nn.Module, temperature: float, rollouts: Rollouts) -> Tensor:
    return token_logprobs(policy, rollouts, temperature, with_entropy=False)[0]


# Prompts

_QUESTIONS = (
    "What is the capital of France?",
    "A train leaves at 9:40 and arrives at 12:05. How long does it take? Think step by step.",
    "Write a function in Python that reverses a list.",
)
# Longer than the windows and chunks of small models.
_PASSAGE = (
    "The rain had stopped an hour before, and people came out of their houses to look at the river, which stood "
    "higher than in any year since 1954. Nobody spoke, and the clock of the church struck seven. "
)
_PASSAGE_TOKENS = 400


def sample_prompts(tokenizer: transformers.PreTrainedTokenizerBase, max_prompt_length: int) -> PromptBatch:
    """Three questions, and a passage of 400 tokens; all are cut off at max_prompt_length.

    Args:
        tokenizer: the model's; its chat template, if it has one, is put around the questions.
        max_prompt_length: in tokens.
    """
    texts = [_rendered(tokenizer, question) for question in _QUESTIONS]
    has_template = tokenizer.chat_template is not None
    ids = [tokenizer(text, add_special_tokens=not has_template)["input_ids"] for text in texts]
    passage = tokenizer(_PASSAGE * _PASSAGE_TOKENS)["input_ids"][:_PASSAGE_TOKENS]
    ids = [each[:max_prompt_length] for each in (*ids, passage)]
    return PromptBatch(step=1, rows=list(range(len(ids))), prompt_ids=ids, prompts=[*texts, _PASSAGE], columns={})


def _rendered(tokenizer: transformers.PreTrainedTokenizerBase, question: str) -> str:
    if tokenizer.chat_template is None:
        return question
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
