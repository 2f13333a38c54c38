"""OnPolicyTrainer: the outer loop of every algorithm and the verbs its step is written in.

A subclass writes one iteration, `step(prompts)`, from the verbs below, and its losses. The verbs are final: what
differs between algorithms is in the algorithm's file, what does not is here. No algorithm is named here.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.advantages import per_token_rewards, whiten
from common.config import RLConfig
from common.data import PromptSet
from common.evaluation import evaluation_shares, judge, rollout_shares, with_confidence_interval
from common.generation import Generation
from common.learner import Learner
from common.losses import kl_estimate
from common.metrics import MetricShares, Stopwatch, choose_trackers
from common.models import (
    check_model,
    compute_dtype,
    end_token_ids,
    load_policy,
    load_reference,
    load_tokenizer,
    resolve_model,
    token_logprobs,
)
from common.offload import ModelPool
from common.passes import Passes, check_processes
from common.rollouts import PromptBatch, Rollouts
from common.run import Run
from common.sampling import check_sampler
from common.sanity import check_first_step
from common.tasks import Task, load_task, task_scorer
from common.updates import optimizer_steps
from common.values import token_values

logger = logging.getLogger("nanorlhf")

# Loss of each completion token with its metrics; all (b, C).
Metrics = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Rollouts], tuple[Tensor, Metrics]]
TokenFunction = Callable[[nn.Module, Rollouts], Tensor]
SaveModel = Callable[[Path], None]


class OnPolicyTrainer(ABC):
    """Sample, score, update, again.

    Args:
        config: the algorithm's settings.
        task: prompts and rewards; None: the task the settings name.

    Attributes:
        models: the pool with "policy", "ref" where a KL is wanted, and what the algorithm adds.
        policy: the learner of the policy.
        shares: the step's metrics so far; reduced over processes at its end.
        watch: seconds by phase.

    Raises:
        ValueError: for anything wrong with settings, data, model or folder, before a model is loaded where possible.
    """

    def __init__(self, config: RLConfig, *, task: Task | None = None) -> None:
        self.config = config
        check_sampler(config)
        check_model(config.model)
        # Without cpu=True, processes that torchrun starts on a machine without a GPU would not know of each other.
        on_cpu, trackers = not torch.cuda.is_available(), choose_trackers(config.report_to) or None
        self.accelerator = Accelerator(cpu=on_cpu, log_with=trackers, project_dir="runs")
        check_processes(config, self.accelerator)
        self.tokenizer = load_tokenizer(config.model)
        self._load_data(task or load_task(config, self.tokenizer))
        self.run = Run(config, self.accelerator, algorithm=type(self).__name__.removesuffix("Trainer"))

        self.shares, self.watch = MetricShares(), Stopwatch(self.accelerator.device)
        self.dtype = compute_dtype(config, self.accelerator.device)
        self.passes = Passes(config, self.accelerator, self.dtype)
        self.models = ModelPool(self.accelerator.device, config.offload, self.watch)
        self.current_step = self.run.first_step - 1
        self._load_models()

    # ------------------------------------------------------------------------------------------------ the algorithm

    @abstractmethod
    def step(self, prompts: PromptBatch) -> None:
        """One iteration, written out by each algorithm: sample, score, advantages, update."""

    # ---------------------------------------------------------------------------------------------------- the loop

    @final
    def train(self) -> dict[str, float]:
        """Run all steps that are left.

        Returns:
            The metrics of the last step.
        """
        metrics = {}
        self.watch.read_and_reset()  # loading is no part of the first step
        with self.run as run:
            if self.current_step == 0 and self._evaluates_at(0):
                self.evaluate()
                metrics = self._end_step()
            while self.current_step < self.config.num_steps and not run.stopped_early:
                self.current_step += 1
                self.step(self.training_prompts(self.current_step))
                if self._evaluates_at(self.current_step):
                    self.evaluate()
                metrics = self._end_step()
            run.finish(self.current_step, self.tokenizer)
        return metrics

    # --------------------------------------------------------------------------------------------------- the verbs

    @final
    def training_prompts(self, step: int, num_prompts: int | None = None) -> PromptBatch:
        """This process's prompts of a step, from 1; num_prompts over all processes, None: prompts_per_step."""
        share = {"process": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}
        return self.prompts.batch(step, num_prompts=num_prompts or self.config.prompts_per_step, **share)

    @final
    def sample(
        self, prompts: PromptBatch, *, num_generations: int = 1, greedy: bool = False, stream: str = "train"
    ) -> Rollouts:
        """Complete each prompt with the current policy, at the training temperature or greedily.

        Args:
            prompts: this process's prompts of the step.
            num_generations: completions per prompt, G; 1 if greedy.
            greedy: take the most likely token each time.
            stream: completions of the same prompts in another stream are other ones.

        Returns:
            B = len(prompts) x G rows, rows of one prompt adjacent.
        """
        rollouts = self.generation.sample(prompts, num_generations=num_generations, greedy=greedy, stream=stream)
        num_rows = len(rollouts) * self.accelerator.num_processes
        rollouts.step_lengths = self.passes.step_lengths(rollouts, num_rows)
        self.run.count_tokens(int(self.passes.sum_over_processes(rollouts.lengths.sum())))
        return rollouts

    @final
    def score(self, rollouts: Rollouts) -> Tensor:
        """(B,) float32: the weighted sum of the rewards, less missing_eos_penalty where there is no end token."""
        return self._rewards(rollouts) - self.config.missing_eos_penalty * rollouts.truncated

    @final
    def token_rewards(self, rollouts: Rollouts, scores: Tensor, *, whitened: bool = False) -> Tensor:
        """A reward for each token: -kl_coef x its KL to the reference (k1), and the score with the last one.

        Where there is a KL, rollouts.old_logprobs and ref_logprobs are set on the way.

        Args:
            rollouts: B rows.
            scores: (B,) float32.
            whitened: scale the rewards of the step to variance 1; their mean stays.

        Returns:
            (B, C) float32, 0 at padding.
        """
        mask, kl = rollouts.completion_mask, torch.zeros(rollouts.completion_mask.shape)
        if self.config.kl_coef:
            kl = self._add_kl(rollouts, "kl")
        rewards = per_token_rewards(scores, mask, kl, self.config.kl_coef)
        if whitened:
            rewards = whiten(rewards, mask, sum_over_processes=self.passes.sum_over_processes, shift_mean=False)
        return rewards

    @final
    def maybe_whiten(self, advantages: Tensor, rollouts: Rollouts) -> Tensor:
        """(B, C) float32: the advantages, over all processes of mean 0 and variance 1 if whiten_advantages is set."""
        if not self.config.whiten_advantages:
            return advantages
        return whiten(advantages, rollouts.completion_mask, sum_over_processes=self.passes.sum_over_processes)

    @final
    def describe(self, rollouts: Rollouts, advantages: Tensor) -> None:
        """Record what was sampled, before any row is left out.

        Args:
            rollouts: all rows of this process, scored.
            advantages: (B,) or (B, C) float.
        """
        rollout_shares(rollouts, advantages, shares=self.shares)
        self.shares.add("lr", self.policy.rate(self.current_step), 1)
        every = self.config.samples_every
        if every and (self.current_step % every == 0 or self.current_step == 1):
            self.run.add_samples(self.current_step, "train", rollouts, rollouts.parts)

    @final
    def logprobs(self, name: str, rollouts: Rollouts) -> Tensor:
        """What a model thinks of each completion token.

        Args:
            name: "policy" or, with a kl_coef above 0, "ref".
            rollouts: B rows.

        Returns:
            (B, C) float32, 0 at padding.
        """
        return self._for_each_token(name, rollouts, lambda *args: token_logprobs(*args, self.config.temperature)[0])

    @final
    def old_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """What the policy that sampled thinks of each token.

        Args:
            rollouts: B rows; with old_logprobs already, these are given back.

        Returns:
            (B, C) float32, 0 at padding; None if each rollout makes one optimizer step: the policy that sampled is
            then the one being updated, and its pass would only repeat the update's own.
        """
        if rollouts.old_logprobs is not None or self.config.trains_on_policy:
            return rollouts.old_logprobs
        return self.logprobs("policy", rollouts)

    @final
    def values(self, rollouts: Rollouts) -> Tensor:
        """(B, C) float32: what the model "value" expects of the state each token was chosen in, 0 at padding."""
        return self._for_each_token("value", rollouts, token_values)

    @final
    def update(self, learner: Learner, rollouts: Rollouts, loss: LossFunction, *, average_over: str) -> None:
        """Take num_update_epochs x num_minibatches optimizer steps.

        Args:
            learner: whose model is trained, by its own settings.
            rollouts: B rows; rows of the step that are missing here still count in the means.
            loss: per-token loss and metrics of a micro-batch; token weights make it a mean.
            average_over: "tokens", "rows" or "constant", what the mean is over.
        """
        settings = {"passes": self.passes, "step": self.current_step, "average_over": average_over}
        with self.watch("update"), self.models.use(learner.name, train=True) as model:
            for share in optimizer_steps(learner, rollouts, partial(loss, model), **settings):
                self.shares.add(*share)
        self.shares.add_sum(f"{learner.name}/tokens", learner.config.num_update_epochs * rollouts.lengths.sum())
        if learner is self.policy:
            self.generation.policy_has_changed()

    @final
    def add_learner(
        self, name: str, module: nn.Module, config: RLConfig, *, save: SaveModel | None = None, **place: Any
    ) -> Learner:
        """Give a model of one's own a place in the pool, an optimizer and a place in every checkpoint.

        Args:
            name: its name in the pool and the prefix of its metrics.
            module: the model, on the CPU; of its parameters those that require a gradient are trained and saved.
            config: settings of its optimizer, epochs and mini-batches.
            save: writes it into a folder of final/ that transformers loads.
            place: what else ModelPool.add takes, for a model that shares weights with another one.

        Returns:
            What `update` takes.
        """
        with place.get("context", nullcontext)():  # which decides what requires a gradient
            learner = Learner(name, module, config)
        self.models.add(name, module, optimizer=learner.optimizer, **place)
        self.run.restore(learner, module, save)
        return learner

    @final
    def evaluate(self) -> None:
        """Record the held-out score, accuracy and length of the current policy; changes nothing else."""
        process, num_samples = self.accelerator.process_index, self.config.eval_num_samples
        prompts = self.eval_prompts.share(process=process, num_processes=self.accelerator.num_processes)
        with self.watch("eval"):
            rollouts = self.generation.sample_for_evaluation(prompts)
            rollouts.scores = self._rewards(rollouts)
            evaluation_shares(rollouts, **self.judged_by, num_samples=num_samples, shares=self.shares)
            if self.config.eval_kl:
                rollouts.step_lengths = self.passes.step_lengths(rollouts, len(self.eval_prompts) * num_samples)
                self._add_kl(rollouts, "eval/kl")
        self.run.add_samples(self.current_step, "eval", rollouts, rollouts.parts)

    # ------------------------------------------------------------------------------------------------------ inside

    def _load_data(self, task: Task) -> None:
        self.judged_by = {"accuracy": task.accuracy, "format": task.format}
        self.scorer = task_scorer(task, self.config)
        self.prompts = PromptSet.of(task.train, self.tokenizer, self.config)
        self.eval_prompts = PromptSet.of(task.eval, self.tokenizer, self.config) if task.eval else None
        self.scorer.check_columns(list(self.prompts.columns))

    def _load_models(self) -> None:
        config, path = self.config, resolve_model(self.config.model)
        checkpoint = self.run.checkpoint and self.run.checkpoint / "policy"
        module = load_policy(path, config, dtype=self.dtype, checkpoint=checkpoint)
        self.policy = self.add_learner("policy", module, config)
        if (config.kl_coef or config.eval_kl) and config.use_lora:
            self.models.add_view("ref", of="policy", context=module.disable_adapter)
        elif config.kl_coef or config.eval_kl:
            self.models.add("ref", load_reference(path, config))
        self.scorer.load(self.models)
        tokens = {"tokenizer": self.tokenizer, "end_token_ids": end_token_ids(module, self.tokenizer)}
        self.generation = Generation(config, path, models=self.models, dtype=self.dtype, watch=self.watch, **tokens)
        plan = self.models.plan(sampler_bytes=self.generation.sampler.resident_bytes)
        if self.models.device.type == "cuda":
            logger.info("memory plan in GB: %s; offload %s", plan, self.models.offload)

    def _for_each_token(self, name: str, rollouts: Rollouts, forward: TokenFunction) -> Tensor:
        with self.watch("values" if name == "value" else "logprobs"), self.models.use(name) as model:
            return self.passes.for_each_token(rollouts, partial(forward, model), step=self.current_step)

    def _rewards(self, rollouts: Rollouts) -> Tensor:
        """(B,) float32, the weighted sum of the rewards; each of them is kept in rollouts.parts."""
        with self.watch("score"):
            scores = judge(rollouts, self.scorer)
        for name, rows in self.scorer.over_limit.items():
            self.shares.add_sum(f"over_limit/{name}", rows.sum())
        return scores

    def _add_kl(self, rollouts: Rollouts, metric: str) -> Tensor:
        """(B, C) float32: k1 of the KL to the reference; recorded, and both log-probs are kept in the rollouts."""
        rollouts.old_logprobs = self.logprobs("policy", rollouts)
        rollouts.ref_logprobs = self.logprobs("ref", rollouts)
        kl = kl_estimate(rollouts.old_logprobs, rollouts.ref_logprobs, "k1")
        self.shares.add(metric, kl.sum(), rollouts.completion_mask.sum())
        return kl

    def _evaluates_at(self, step: int) -> bool:
        every = self.config.eval_every
        return bool(every and self.eval_prompts) and (step % every == 0 or step == self.config.num_steps)

    def _end_step(self) -> dict[str, float]:
        """Reduce and write the step's metrics, and save what is due."""
        step = self.current_step
        metrics = self.shares.reduce(self.accelerator)
        metrics = with_confidence_interval(metrics, len(self.eval_prompts or ()))
        check_first_step(metrics, step=step, dtype=self.dtype)
        timings = self.watch.read_and_reset()
        # Charged to the next step, since this step's line is what is being written.
        with self.watch("save"):
            self.run.end_step(step, metrics, timings)
            self.run.save_if_due(step, self.tokenizer)
        return metrics
