"""OnPolicyTrainer: the outer loop of every algorithm and the verbs its step is written in.

A subclass writes one iteration, `step(prompts)`, from the verbs below, and its losses. The verbs are final: what
differs between algorithms is in the algorithm's file, what does not is here. No algorithm is named here.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.config import RLConfig
from common.data import PromptSet
from common.evaluation import evaluation_shares, is_correct, with_confidence_interval
from common.learner import Learner
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
from common.passes import Passes, weighted_loss
from common.rewards import make_scorer
from common.rollouts import PromptBatch, Rollouts
from common.run import Run
from common.sampling import SamplingSettings, check_sampler, make_sampler, sampling_seed
from common.sanity import check_first_step
from common.tasks import Task, load_task
from common.weights import policy_weights

logger = logging.getLogger("nanorlhf")

# Loss of each completion token with its metrics; all (b, C).
LossFunction = Callable[[nn.Module, Rollouts], tuple[Tensor, dict[str, Tensor]]]


class OnPolicyTrainer(ABC):
    """Sample, score, update, again.

    Args:
        config: the algorithm's settings.
        task: prompts and rewards; None: the task the settings name.

    Attributes:
        models: the pool with "policy" and, where a KL is wanted, "ref".
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
        self._check_processes()
        self.tokenizer = load_tokenizer(config.model)
        self._load_data(task or load_task(config, self.tokenizer))
        self.run = Run(config, self.accelerator, algorithm=type(self).__name__.removesuffix("Trainer"))

        self.shares, self.watch = MetricShares(), Stopwatch(self.accelerator.device)
        self.dtype = compute_dtype(config, self.accelerator.device)
        self.passes = Passes(config, self.accelerator, self.dtype)
        self.models = ModelPool(self.accelerator.device, config.offload, self.watch)
        self.current_step = self.run.first_step - 1
        self._sampler_is_stale = True
        self._parts: dict[str, Tensor] = {}
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
                self.step(self._next_prompts())
                if self._evaluates_at(self.current_step):
                    self.evaluate()
                metrics = self._end_step()
            run.finish(self.current_step, self.tokenizer)
        return metrics

    # --------------------------------------------------------------------------------------------------- the verbs

    @final
    def sample(self, prompts: PromptBatch, *, num_generations: int = 1, greedy: bool = False) -> Rollouts:
        """Complete each prompt with the current policy, at the training temperature or greedily.

        Args:
            prompts: this process's prompts of the step.
            num_generations: completions per prompt, G; 1 if greedy.
            greedy: take the most likely token each time.

        Returns:
            B = len(prompts) x G rows, rows of one prompt adjacent.
        """
        config = self.config
        temperature, limit = 0.0 if greedy else config.temperature, config.max_completion_length
        settings = SamplingSettings(temperature=temperature, max_tokens=limit, stop_token_ids=self.end_token_ids)
        rollouts = self._generate(prompts, settings, num_generations=num_generations, stream="train")
        if not greedy:
            rollouts.step_lengths = self.passes.step_lengths(rollouts, config.prompts_per_step * num_generations)
            self.run.count_tokens(int(self.passes.sum_over_processes(rollouts.lengths.sum())))
        return rollouts

    @final
    def score(self, rollouts: Rollouts) -> Tensor:
        """(B,) float32: the weighted sum of the rewards of each completion."""
        with self.watch("score"):
            scores, self._parts = self.scorer(rollouts.prompts, rollouts.completions, rollouts.columns)
        return scores

    @final
    def describe(self, rollouts: Rollouts, advantages: Tensor) -> None:
        """Record what was sampled, before any row is left out.

        Args:
            rollouts: all rows of this process, scored.
            advantages: (B,) or (B, C) float.
        """
        rows, rate = len(rollouts), self.policy.rate(self.current_step)
        self.shares.add("score", rollouts.scores.sum(), rows)
        self.shares.add("length", rollouts.lengths.sum(), rows)
        self.shares.add("truncated", rollouts.truncated.sum(), rows)
        self.shares.add("zero_advantage", (advantages.reshape(rows, -1) == 0).all(1).sum(), rows)
        self.shares.add("lr", rate, 1)
        for name, part in self._parts.items():
            self.shares.add(f"reward/{name}", part.nansum(), (~part.isnan()).sum())
        every = self.config.samples_every
        if every and (self.current_step % every == 0 or self.current_step == 1):
            self.run.add_samples(self.current_step, "train", rollouts, self._parts)

    @final
    @torch.no_grad()
    def logprobs(self, name: str, rollouts: Rollouts) -> Tensor:
        """What a model thinks of each completion token.

        Args:
            name: "policy" or, with a kl_coef above 0, "ref".
            rollouts: B rows.

        Returns:
            (B, C) float32, 0 at padding.
        """
        logprobs = torch.zeros(rollouts.completion_ids.shape)
        with self.watch("logprobs"), self.models.use(name) as model:
            # The same passes as the first epoch of the update makes, so that its first ratio is 1 to the last bit.
            for rows, minibatch in self.passes.minibatches(rollouts, step=self.current_step, epoch=0):
                for chosen, microbatch in self.passes.microbatches(minibatch):
                    with self.passes.forward_context():
                        part, _ = token_logprobs(model, microbatch, self.config.temperature)
                    if chosen is not None:
                        logprobs[rows[chosen], : part.shape[1]] = part.cpu()
        return logprobs

    @final
    def update(self, learner: Learner, rollouts: Rollouts, loss: LossFunction, *, average_over: str) -> None:
        """Take num_update_epochs x num_minibatches optimizer steps.

        Args:
            learner: whose model is trained.
            rollouts: B rows; rows of the step that are missing here still count in the means.
            loss: per-token loss and metrics of a micro-batch; token weights make it a mean.
            average_over: "tokens", "rows" or "constant", what the mean is over.
        """
        first = True
        with self.watch("update"), self.models.use(learner.name, train=True) as model:
            for epoch in range(self.config.num_update_epochs):
                for _, minibatch in self.passes.minibatches(
                    rollouts, step=self.current_step, epoch=epoch, average_over=average_over
                ):
                    self._accumulate(learner, model, minibatch, loss, first=first)
                    norm = learner.optimizer_step(self.current_step, self.accelerator)
                    self.shares.add(f"{learner.name}/grad_norm", norm, 1)
                    first = False
        self._sampler_is_stale |= learner is self.policy

    @final
    def add_learner(self, name: str, module: nn.Module, learning_rate: float | None = None) -> Learner:
        """Give a model of one's own a place in the pool, an optimizer and a place in every checkpoint.

        Args:
            name: its name in the pool and the prefix of its metrics.
            module: the model, on the CPU; saved and loaded by its state_dict unless it is the policy.
            learning_rate: None: the setting `learning_rate`.

        Returns:
            What `update` takes.
        """
        learner = Learner(name, module, self.config, learning_rate)
        self.models.add(name, module, optimizer=learner.optimizer)
        self.run.restore(learner, module)
        return learner

    @final
    def evaluate(self) -> None:
        """Record the held-out score, accuracy and length of the current policy; changes nothing else."""
        config = self.config
        prompts = self.eval_prompts.share(
            process=self.accelerator.process_index, num_processes=self.accelerator.num_processes
        )
        settings = SamplingSettings(
            temperature=config.eval_temperature,
            top_p=config.eval_top_p,
            top_k=config.eval_top_k,
            max_tokens=config.max_completion_length,
            stop_token_ids=self.end_token_ids,
        )
        num_samples = config.eval_num_samples
        with self.watch("eval"):
            rollouts = self._generate(prompts, settings, num_generations=num_samples, stream="eval")
            rollouts.scores, parts = self.scorer(rollouts.prompts, rollouts.completions, rollouts.columns)
        correct = is_correct(parts, self.accuracy)
        evaluation_shares(rollouts, rollouts.scores, correct, num_samples=num_samples, shares=self.shares)
        self.run.add_samples(self.current_step, "eval", rollouts, parts)

    # ------------------------------------------------------------------------------------------------------ inside

    def _load_data(self, task: Task) -> None:
        config = self.config
        self.accuracy = task.accuracy
        chosen = {"names": config.rewards, "weights": config.reward_weights}
        self.scorer = make_scorer(task.rewards, task.reward_weights, **chosen)
        limits = {"max_prompt_length": config.max_prompt_length, "seed": config.seed}
        self.prompts = PromptSet(task.train, self.tokenizer, **limits)
        self.eval_prompts = PromptSet(task.eval, self.tokenizer, **limits) if task.eval else None

    def _load_models(self) -> None:
        config, path = self.config, resolve_model(self.config.model)
        module = load_policy(
            path, config, dtype=self.dtype, checkpoint=self.run.checkpoint and self.run.checkpoint / "policy"
        )
        self.policy = self.add_learner("policy", module)
        if config.kl_coef and config.use_lora:
            self.models.add_view("ref", of="policy", context=module.disable_adapter)
        elif config.kl_coef:
            self.models.add("ref", load_reference(path, config))
        self.end_token_ids = end_token_ids(module, self.tokenizer)
        self.sampler = make_sampler(config, path, dtype=self.dtype, device=self.models.device, pool=self.models)
        plan = self.models.plan(sampler_bytes=self.sampler.resident_bytes)
        if self.models.device.type == "cuda":
            logger.info("memory plan in GB: %s; offload %s", plan, self.models.offload)

    def _generate(
        self, prompts: PromptBatch, settings: SamplingSettings, *, num_generations: int, stream: str
    ) -> Rollouts:
        seeds = None  # greedy completions draw nothing
        if settings.temperature:
            seeds = [sampling_seed(self.config.seed, prompts.step, row, stream) for row in prompts.rows]
        self._refresh_sampler()
        with self.watch("sample"):
            completions = self.sampler.generate(
                prompts.prompt_ids, settings, num_generations=num_generations, seeds=seeds
            )
            self.sampler.sleep()
            texts = self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
            return Rollouts.from_completions(prompts, completions, texts, num_generations=num_generations)

    def _refresh_sampler(self) -> None:
        """Give the sampler the policy's weights if they have changed since, and the device."""
        if self.sampler.needs_push and (self._sampler_is_stale or not self.sampler.has_weights):
            with self.watch("push"), self.models.use("policy") as model:
                self.sampler.push(policy_weights(model))
        self._sampler_is_stale = False
        if self.sampler.needs_push:  # a sampler with weights of its own wants the device for itself
            self.models.evict()
        self.sampler.wake()

    def _accumulate(
        self, learner: Learner, model: nn.Module, minibatch: Rollouts, loss: LossFunction, *, first: bool
    ) -> None:
        """Add the gradient of one mini-batch, micro-batch by micro-batch, and record its metrics."""
        # Every process counts the same mini-batches, so one of them says how many there were.
        self.shares.add(f"{learner.name}/loss", 0.0, int(self.accelerator.is_main_process))
        for _, microbatch in self.passes.microbatches(minibatch):
            with self.passes.forward_context():
                per_token, token_metrics = loss(model, microbatch)
            total = weighted_loss(per_token, microbatch)
            total.backward()
            self.shares.add(f"{learner.name}/loss", total.detach(), 0)
            mask = microbatch.completion_mask
            for name, values in token_metrics.items():
                if first or not name.startswith("first/"):
                    self.shares.add(name.removeprefix("first/"), torch.where(mask, values, 0.0).sum(), mask.sum())

    def _next_prompts(self) -> PromptBatch:
        return self.prompts.batch(
            self.current_step,
            num_prompts=self.config.prompts_per_step,
            process=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )

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

    def _check_processes(self) -> None:
        num_processes = self.accelerator.num_processes
        if self.config.prompts_per_step % num_processes:
            raise ValueError(
                f"prompts_per_step={self.config.prompts_per_step} on {num_processes} processes: each samples the same "
                f"number of prompts. Pass a multiple of {num_processes}, or start fewer processes."
            )
