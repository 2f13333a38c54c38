"""OnPolicyTrainer: the training loop of every algorithm, and the verbs that its step is written with.

A subclass writes one iteration, `step(prompts)`, with the verbs below, and its losses. The verbs are final: what
differs between algorithms is in the algorithm's file, everything else is here. No algorithm is named here.
"""

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar, final

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from common import others
from common.advantages import inverse_deviation, per_token_rewards, rows_with_signal, whiten
from common.config import RLConfig
from common.data.prompt_weights import WeightsFile
from common.data.prompts import PromptSet, PromptStyle
from common.data.vocabulary import check_vocabulary, describe_spelled, describe_unknown
from common.embedded import check_model, is_embedded, load_tokenizer, resolve_model, skeleton
from common.environment import check_launch
from common.frozen import find_frozen, for_plan
from common.host import FreedMemory, processes_here
from common.logprobs import token_logprobs, without_adapter
from common.losses import chosen_correction, importance_weights, kl_estimate
from common.memory.show import short, whole
from common.memory.start import plan_of
from common.models.loading import (
    compute_dtype,
    end_token_ids,
    load_policy,
    load_reference,
    num_tokens,
    warn_of_slow_dtype,
)
from common.models.lora import describe_adapter
from common.models.parts import is_spread, spread
from common.models.pool import ModelPool
from common.models.system_role import describe_system
from common.refill import Places
from common.remarks import remarks
from common.rewards.reports import TrainerState
from common.rollouts import PromptBatch, Rollouts
from common.runs import ended
from common.runs.alike import check_folder_is_shared
from common.runs.launch import launched
from common.runs.lost_rows import LostRows
from common.runs.measures import (
    evaluation_means,
    judge,
    judge_leniently,
    rollout_means,
    training_means,
    with_confidence_interval,
)
from common.runs.metrics import SignalCheck, StepMetrics, Stopwatch, warn_of_unused_settings
from common.runs.progress import LongWork
from common.runs.prompt_record import describe_prompts, start_time
from common.runs.replay import Replay
from common.runs.run import Run, algorithm_name, run_folder
from common.runs.soundness import Soundness
from common.runs.writable import check_folder
from common.sampling.ahead import Ahead
from common.sampling.checks import check_engines, check_policy, check_sampling
from common.sampling.policy_sampler import PolicySampler, check_sampler, largest_request, make_sampler
from common.sharding import check_sharding, describe_sharding
from common.tasks import Task, check_rows, check_task, lenient_scorer, load_task, reward_models, task_scorer
from common.update.batches import Batches, check_processes
from common.update.learner import Learner, Metric
from common.update.optimizers import check_optimizer
from common.update.out_of_memory import StepAgain
from common.update.rows import keep_one_per_group, kept_numbers

logger = logging.getLogger("nanorlhf")

# Loss of each completion token, (b, C), and metrics by name.
LossFunction = Callable[[nn.Module, Rollouts], tuple[Tensor, dict[str, Metric]]]
TokenFunction = Callable[[nn.Module, Rollouts], Tensor]
SaveModel = Callable[[Path], None]
Step = TypeVar("Step")


class OnPolicyTrainer(ABC):
    """Sample, score, update, repeat.

    Args:
        config: the algorithm's settings.
        task: prompts and rewards; None: the task the settings name.

    Attributes:
        model_path: hub id or folder of the policy.
        plan: what is where in each phase, and what was chosen because of it.
        models: the pool with "policy", "ref" if a KL is needed, and the algorithm's own models.
        policy: the learner of the policy.
        start_time: when the run began, for chat templates that write the date.
        metrics: the step's metrics so far; reduced over processes at its end.
        stopwatch: seconds by phase.

    Raises:
        TypeError: for other arguments, such as those of trl's trainers.
        ValueError: for a mistake in settings, data, rewards, model or folder, if possible before a model is loaded.
        WrongNumbers: if log-probs, values or gradients of the run cannot be right.
    """

    def __new__(cls, *args: object, **arguments: object) -> Self:
        """Say what a trainer takes to those who pass what TRL's take; Python itself would not."""
        known = inspect.signature(cls.__init__).parameters
        has_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        unknown = [f"{name}=..." for name in arguments if name not in known and not has_any]
        # Where settings would be, a name or a model; behind them, rewards.
        unknown += [type(each).__name__ for each in args if not isinstance(each, RLConfig)]
        if unknown:
            settings = f"{cls.__name__.removesuffix('Trainer')}Config"
            raise TypeError(
                f"{cls.__name__}({', '.join(unknown)}): nothing reads that. A trainer takes its settings, and a "
                f"task if prompts or rewards are made in Python: {cls.__name__}({settings}(model=...), "
                "task=Task(train=..., rewards=...)). docs/from-trl.md says where the arguments of TRL's trainers are."
            )
        return super().__new__(cls)

    def __init__(self, config: RLConfig, *, task: Task | None = None) -> None:
        self.config = config
        check_launch()
        check_sampler(config)
        check_optimizer(config)
        if task is None:
            check_task(config.task)
        check_model(config.model, trust_remote_code=config.trust_remote_code, attention=config.attn_implementation)
        algorithm = algorithm_name(type(self))
        folder = run_folder(config, algorithm)
        self.accelerator = launched(config, type(self), folder)
        check_processes(config, self.accelerator.num_processes)
        check_sharding(config, self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            check_folder(folder)
        policy = skeleton(config.model)
        self._check_policy(policy)
        self._frozen = find_frozen(config)
        self.plan = plan_of(
            config,
            policy,
            rewards=reward_models(config, task),
            frozen=for_plan(self._frozen),
            processes=self.accelerator.num_processes,
            nodes=max(1, self.accelerator.num_processes // processes_here()),
            with_passes=False,
        )
        settled = self.plan.settled(config)
        self.tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        self.check_models(policy)
        num_rows = policy.config.get_text_config().vocab_size
        of_frozen = [line for each in self._frozen for line in each.check_tokens(self.tokenizer, num_rows, config)]
        self.start_time = start_time(folder, config.resume, self.accelerator)
        self._load_data(task or load_task(config, self.tokenizer), settled)
        self.run = Run(config, self.accelerator, algorithm=algorithm, plan=whole(self.plan, config))
        check_folder_is_shared(self.run.folder, self.accelerator)
        self.run.check_model(policy)
        self.run.check_others({each.label: each.identity() for each in self._frozen})
        record = {"tokenizer": self.tokenizer, "style": PromptStyle.of(config), "now": self.start_time}
        self.run.check_prompts(describe_prompts(self.prompts, self.eval_prompts, **record))
        if self.accelerator.is_main_process:  # loading takes a while from here on
            said = [*config.notes, *(self._remarks() if self.run.checkpoint is None else ())]
            said += describe_sharding(config, self.accelerator.num_processes)
            said += describe_system(self.tokenizer, self.prompts.one_of_each_shape)
            said += describe_unknown(self.prompts.encoded) + describe_spelled(self.prompts.encoded)
            said += [self.prompts.weights.said] if self.prompts.weights else []
            said += of_frozen + short(self.plan, config)
            logger.info("%s", "\n".join([*said, f"loading {config.model} and {config.sampler} ..."]))

        self.metrics, self.stopwatch = StepMetrics(), Stopwatch(self.accelerator.device)
        self.dtype = compute_dtype(config, self.accelerator.device)
        if self.accelerator.is_main_process:
            warn_of_slow_dtype(self.dtype, self.accelerator.device)
        self.batches = Batches(settled, self.accelerator, self.dtype)
        if known := self.run.known_budget(settled.max_tokens_per_microbatch):
            self.batches.keep_to(known)
        self._once = Replay()
        self._freed_memory = FreedMemory()
        self._soundness = Soundness(config, self.dtype, sum_over_processes=self.sum_over_processes)
        self.models = ModelPool(self.accelerator.device, self.plan.choices.offload, self.stopwatch)
        self.current_step = self.run.first_step - 1
        self._used_settings: set[str] = set()
        self._passed_apart: Rollouts | None = None  # rows whose log-probs were made by passes for those that are kept
        self._signal = SignalCheck(config, self.run.folder)
        is_main = self.accelerator.is_main_process
        rules = {"rewards": self.scorer.rules, "lenient": self.lenient_scorer.rules if self.lenient_scorer else []}
        self._lost_rows = LostRows(rules, sum_over_processes=self.sum_over_processes, says=is_main)
        self.model_path = resolve_model(config.model, beside=folder.parent)
        known = num_tokens(self.model_path)
        for prompts in filter(None, (self.prompts, self.eval_prompts)):
            check_vocabulary(prompts.encoded, known)
        self._load_models(settled)
        self.run.is_ready()

    # ------------------------------------------------------------------------------------------------ the algorithm

    @abstractmethod
    def step(self, prompts: PromptBatch) -> None:
        """One iteration, written by each algorithm: sample, score, advantages, update."""

    def check_models(self, policy: nn.Module) -> None:  # noqa: B027  it is not abstract
        """Refuse an algorithm's own models before data are read and anything is loaded; most have none.

        Args:
            policy: the policy's modules, without storage. The tokenizer is there too.

        Raises:
            ValueError: says what is wrong with one of them.
        """

    # ---------------------------------------------------------------------------------------------------- the loop

    @final
    def train(self) -> dict[str, float]:
        """Run all remaining steps, and return the metrics of the last one."""
        metrics = {}
        self.stopwatch.start_first_step()  # loading is no part of it
        watch = {"leave": partial(ended.end, self.run.folder), "is_aborted": self.accelerator.device.type == "cuda"}
        with self.run as run, run.stopping as stopping, others.watched(stopping.is_away, **watch):
            try:
                metrics = self._finish_step_of_checkpoint()
                while self.current_step < self.config.num_steps and not run.stopped_early:
                    stopping.leave_if_asked()
                    self.current_step += 1
                    metrics = self._whole_step()
            except BaseException as error:
                if not stopping.caused(error):
                    raise
                run.leave(self.tokenizer)
            stopping.begin_end()
            run.finish(self.current_step, self.tokenizer)
        return metrics

    # --------------------------------------------------------------------------------------------------- the verbs

    @final
    def training_prompts(self, step: int, num_prompts: int | None = None, *, refill: int = 0) -> PromptBatch:
        """The prompts this process samples at `step` (counted from 1).

        Args:
            step: the step.
            num_prompts: the total over all processes; None: prompts_per_step.
            refill: 0 for the step's own prompts; 1, 2, ... for additional ones.
        """
        processes = {"process": self.accelerator.process_index, "num_processes": self.accelerator.num_processes}
        num_prompts = num_prompts or self.config.prompts_per_step
        return self.prompts.batch(step, num_prompts=num_prompts, refill=refill, **processes)

    @final
    def sample(
        self, prompts: PromptBatch, *, num_generations: int = 1, greedy: bool = False, purpose: str = "train"
    ) -> Rollouts:
        """Complete each prompt with the current policy: B = len(prompts) x G rows, those of one prompt adjacent.

        With sampling_lag=1, those of the step's own prompts come from the policy of one step earlier, and others from
        the current one. Completions of the step's own prompts count as `episodes`; all others under a name of their
        own: greedy/completions, refill/completions or <purpose>/completions.

        Args:
            prompts: this process's prompts of the step.
            num_generations: completions per prompt, G; 1 if greedy.
            greedy: take the most likely token each time, instead of sampling at the training temperature.
            purpose: a different one gives different completions of the same prompts.
        """
        settings = {"num_generations": num_generations, "greedy": greedy, "purpose": purpose}
        kind = "greedy" if greedy else "refill" if prompts.refill else purpose
        rollouts = self._once(lambda: self._sampled(prompts, kind, settings))
        if kind != "train":
            self.metrics.add_sum(f"{kind}/completions", torch.tensor(len(rollouts)))
            self.metrics.add_sum(f"{kind}/tokens", rollouts.lengths.sum())
        return rollouts

    def _sampled(self, prompts: PromptBatch, kind: str, settings: dict[str, Any]) -> Rollouts:
        """Completions of the prompts, numbered, checked and counted."""
        if self._ahead and kind == "train":
            rollouts = self._ahead.sample(prompts, num_generations=settings["num_generations"])
        else:
            rollouts = self.policy_sampler.sample(prompts, **settings)
        self.run.stopping.meet()
        if self.config.mask_truncated:
            rollouts.loss_mask = rollouts.completion_mask & ~rollouts.truncated[:, None]  # (B, C)
        self.batches.number(rollouts)
        self._check_sampled(rollouts)
        counts = torch.stack([torch.tensor(len(rollouts)), rollouts.lengths.sum()])
        completions, tokens = self.sum_over_processes(counts).tolist()
        self.run.count(episodes=completions if kind == "train" else 0, tokens=tokens)
        return rollouts

    @final
    def refilled(self, sampled: Rollouts, *, rounds: int) -> Rollouts:
        """Replace groups of equal scores by groups of other prompts (DAPO, huggingface.co/papers/2503.14476).

        Each round samples one additional prompt for each place that is still empty: other prompts than the step's own,
        as long as there are any. A place that stays empty keeps its own group. What is compared is the score, without
        any KL. With the same settings the result is the same on any number of processes.

        Args:
            sampled: scored rows of the step's own prompts, as `sample` and `score` left them.
            rounds: the most rounds; 0 returns `sampled` as it is.

        Returns:
            As many rows as `sampled`, with the same row numbers; `sampled` itself if no group was replaced.
        """
        if not rounds:
            return sampled
        step, num_prompts, process = self.current_step, self.config.prompts_per_step, self.accelerator.process_index
        spare = enumerate(self.prompts.spare(step, num_prompts=num_prompts), start=num_prompts)  # row, prompt
        places, num_rounds = Places(sampled, self.config.num_generations), 0
        while num_rounds < rounds:
            missing = self.batches.of_each_process([int(places.empty.sum())])[:, 0].tolist()
            chosen = list(islice(spare, sum(missing)))
            if not chosen:  # nothing is missing, or no prompt is left
                break
            num_rounds += 1
            own = chosen[sum(missing[:process]) : sum(missing[: process + 1])]
            rows, indices = [row for row, _ in own], [index for _, index in own]
            prompts = self.prompts.select(step, rows, indices, refill=num_rounds)
            more = self.sample(prompts, num_generations=self.config.num_generations)
            more.scores = self.score(more)
            places.fill(more)
        self.metrics.add("refill/rounds", num_rounds, 1)
        self.metrics.add_sum("refill/filled", places.num_filled)
        self.metrics.add_sum("refill/left_empty", places.empty.sum())
        if not self.batches.of_each_process([places.num_filled]).any():
            return sampled
        rollouts = places.rollouts()
        self.batches.number(rollouts)
        return rollouts

    @final
    def continue_from(
        self, rollouts: Rollouts, rows: Tensor, places: Tensor, *, num_generations: int, purpose: str
    ) -> Rollouts:
        """Sample new completions from intermediate states of completions, within the same length limit.

        All processes must call it, even without states. The time counts as the phase "values".

        Args:
            rollouts: B rows of the current policy.
            rows: (S,) int64, which completion each state belongs to.
            places: (S,) int64, how many of its tokens belong to the state: 0 (the prompt alone) or more, but not all.
            num_generations: K, per state.
            purpose: as in `sample`.

        Returns:
            S x K completions that include the state's tokens and text, rows of one state adjacent. Their noise is a
            function of (seed, step, row, place).
        """
        request = {"step": self.current_step, "num_generations": num_generations, "purpose": purpose}

        def continued() -> Rollouts:
            continuations = self.policy_sampler.continue_from(rollouts, rows, places, **request)
            self.run.stopping.meet()
            self._check_sampled(continuations)
            num_tokens = continuations.lengths.sum() - num_generations * places.sum()
            self.run.count(tokens=int(self.sum_over_processes(num_tokens)))
            return continuations

        return self._once(continued)

    @final
    def score(self, rollouts: Rollouts) -> Tensor:
        """(B,) float32: the weighted sum of the rewards, minus missing_eos_penalty where there is no end token."""
        scores = self._rewards(rollouts, max(self.current_step - 1, 0), prefix="logged")
        return scores - self.config.missing_eos_penalty * rollouts.truncated

    @final
    def token_rewards(
        self, rollouts: Rollouts, scores: Tensor, *, whitened: bool = False, with_kl: bool = True, keep: bool = False
    ) -> Tensor:
        """(B, C) float32, 0 at padding: -kl_coef x each token's KL to the reference (k1), plus the score at the last.

        With kl_coef above 0 and with_kl, it sets rollouts.old_logprobs and ref_logprobs. The KL is that of the policy
        that the step trains: with sampling_lag=1 the ratio makes of it, too, a mean over what that policy samples.

        Args:
            rollouts: B rows.
            scores: (B,) float32.
            whitened: multiply by `reward_scale`.
            with_kl: False leaves the KL out, for an algorithm that has it in the loss.
            keep: one completion per prompt will be kept, so its log-probs are made in the passes of the update.
        """
        mask, kl = rollouts.completion_mask, torch.zeros(rollouts.completion_mask.shape)
        if with_kl and self.config.kl_coef:
            kl = self._kl(rollouts, apart=keep and self.config.makes_old_logprobs)
        rewards = per_token_rewards(scores, mask, kl, self.config.kl_coef)
        return rewards * self.reward_scale(rewards, rollouts) if whitened else rewards

    @final
    def reward_scale(self, rewards: Tensor, rollouts: Rollouts) -> float:
        """The factor that scales token rewards (B, C) to variance 1, over the tokens of all processes trained on."""
        return inverse_deviation(rewards, rollouts.loss_mask, sum_over_processes=self.sum_over_processes)

    @final
    def maybe_whiten(self, advantages: Tensor, rollouts: Rollouts) -> Tensor:
        """(B, C) float32: the advantages; with whiten_advantages, of mean 0 and variance 1.

        Mean and variance are over the tokens of all processes that are trained on; others get 0.
        """
        self._used_settings.add("whiten_advantages")
        if not self.config.whiten_advantages:
            return advantages
        return whiten(advantages, rollouts.loss_mask, sum_over_processes=self.sum_over_processes)

    @final
    def describe(self, rollouts: Rollouts, advantages: Tensor, *, sampled: Rollouts | None = None) -> None:
        """Record metrics and samples of scored rollouts, before any row is dropped.

        Args:
            rollouts: B rows that the step trains on.
            advantages: (B,) or (B, C) float.
            sampled: rows of the step's own prompts, where refills have replaced some of them. Means of scores and
                lengths are theirs: those of groups that were chosen for their scores would say nothing of the policy.
        """
        own = rollouts if sampled is None else sampled
        options = {"num_generations": self.config.num_generations, "has_score": self._has_score}
        rollout_means(own, **options, metrics=self.metrics)
        training_means(rollouts, advantages, metrics=self.metrics)
        self.metrics.add("lr", self.policy.rate(self.current_step), 1)
        every = self.config.samples_every
        if every and (self.current_step % every == 0 or self.current_step == 1):
            self._once(lambda: self.run.add_samples(self.current_step, "train", own, own.parts))

    @final
    def keep_one_per_group(self, rollouts: Rollouts) -> Rollouts:
        """Keep one random completion per prompt, after all served as the baseline; the others leave the means."""
        size, random = self.config.num_generations, {"seed": self.config.seed, "step": self.current_step}
        kept = keep_one_per_group(rollouts, size, **random)
        if rollouts is self._passed_apart:  # no row was dropped since, so the same forward passes come in the update
            kept.old_logprobs, self._passed_apart = rollouts.old_logprobs[self._is_kept(rollouts)], None
        return kept

    @final
    def only_with_signal(self, rollouts: Rollouts, scores: Tensor) -> Rollouts:
        """Keep the groups whose scores differ for all later passes; the others, of advantage 0, count in the means.

        Args:
            rollouts: B rows, those of one prompt adjacent.
            scores: (B,) float that advantages are made of.
        """
        rows = rows_with_signal(scores, self.config.num_generations)
        num_dropped = self.sum_over_processes(torch.tensor(len(rollouts) - len(rows)))
        # Where no process drops a row, passes are as before, and log-probs that are there stay valid.
        return rollouts.only(rows) if num_dropped else rollouts

    @final
    def logprobs(self, name: str, rollouts: Rollouts) -> Tensor:
        """(B, C) float32, 0 at padding: log-probs of the tokens under a model of the pool, at the run's temperature.

        Args:
            name: "policy"; "ref", which is there with a kl_coef above 0; or an untrained one of other_models.
            rollouts: B rows.
        """
        temperature = self.config.temperature
        return self.for_each_token(
            name, rollouts, lambda *args: token_logprobs(*args, temperature, with_entropy=False)[0]
        )

    @final
    def old_logprobs(self, rollouts: Rollouts) -> Tensor | None:
        """(B, C) float32, 0 at padding: log-probs under the policy that sampled; not recomputed if already set.

        None if each rollout makes one optimizer step: the policy that sampled is then the one being updated, and this
        forward pass would only repeat the update's own. With sampling_lag=1 they are the sampler's: the policy that
        sampled is gone. The ratio then corrects for the lag and for the sampler's rounding, both at once.
        """
        if self.config.sampling_lag:
            return rollouts.sampling_logprobs
        if rollouts.old_logprobs is not None or self.config.trains_on_policy:
            return rollouts.old_logprobs
        return self.logprobs("policy", rollouts)

    @final
    def for_each_token(
        self, name: str, rollouts: Rollouts, forward: TokenFunction, *, phase: str = "logprobs"
    ) -> Tensor:
        """(B, C) float32, 0 at padding: a model's output for each completion token, without gradient.

        Args:
            name: of the model in the pool.
            rollouts: B rows.
            forward: gives (b, C) float32 for the model and a micro-batch.
            phase: of the stopwatch.
        """
        if name == "ref":
            self._used_settings.add("kl_coef")
        with self.stopwatch(phase), self.models.use(name) as model, self.batches.passes_of(model):
            outputs = self.batches.for_each_token(rollouts, partial(forward, model), step=self.current_step)
            self._soundness.check_outputs(name, outputs, model, step=self.current_step)
        return outputs

    @final
    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """The sum of the tensor over all processes, on its own device."""
        return self.batches.sum_over_processes(tensor)

    @final
    def update(self, learner: Learner, rollouts: Rollouts, loss: LossFunction, *, average_over: str) -> None:
        """Take num_update_epochs x num_minibatches optimizer steps.

        A run that was asked to stop may leave the step before its first update, but not after.

        Args:
            learner: what is trained, with its own settings.
            rollouts: B rows; dropped rows of the step still count in the means.
            loss: per-token loss and metrics of a micro-batch; token weights make it a mean.
            average_over: "tokens", "rows" or "constant": what the mean is over.
        """
        self.run.stopping.begin_update()
        num_epochs = learner.config.num_update_epochs
        settings = {"batches": self.batches, "step": self.current_step, "average_over": average_over}
        in_use = self.models.use(learner.name, train=True)
        with self.stopwatch("update"), in_use as model, self.batches.passes_of(model):
            of_step = {"step": self.current_step, "lagged": self._is_lagged}
            check = partial(self._soundness.check_first_minibatch, model=model, **of_step)
            settings["check"] = check if learner is self.policy else None
            for epoch in range(num_epochs):
                for name, value, count in learner.update(rollouts, partial(loss, model), epoch=epoch, **settings):
                    if count is None:
                        self.metrics.add_max(name, float(value))
                    else:
                        self.metrics.add(name, value, count)
        self.metrics.add_sum(f"{learner.name}/tokens", num_epochs * rollouts.loss_mask.sum())
        if learner is self.policy:
            self.policy_sampler.policy_has_changed()

    @final
    def corrected(
        self,
        loss: Tensor,
        metrics: dict[str, Metric],
        logprobs: Tensor,
        minibatch: Rollouts,
        *,
        of_completions: bool = False,
    ) -> tuple[Tensor, dict[str, Metric]]:
        """A policy loss weighed as importance_correction says, and its metrics with those of the weights.

        It needs the settings of a ClippedConfig. With sampling_lag=1 the loss stays as it is: its ratio is to the
        sampler's log-probs, so the weights would all be 1.

        Args:
            loss: (b, C) float32, all terms that are means over what the policy samples.
            metrics: of the loss, by name.
            logprobs: (b, C) float32 of the policy being updated.
            minibatch: b rows.
            of_completions: one weight for each completion, for a loss with the ratio of completions.
        """
        if self.config.sampling_lag:
            return loss, metrics
        correction = chosen_correction(self.config.importance_correction, self.dtype, logprobs.device)
        options = {"cap": self.config.importance_cap, "of_completions": of_completions}
        weights, of_weights = importance_weights(logprobs, minibatch, correction=correction, **options)
        counted = minibatch.loss_mask.any(1, keepdim=True) if of_completions else minibatch.loss_mask
        of_weights["max/sampler/weight_max"] = torch.where(counted, of_weights["sampler/weight"], 0.0)
        return (loss if correction == "none" else loss * weights), metrics | of_weights

    @final
    def add_learner(
        self, name: str, module: nn.Module, config: RLConfig, *, save: SaveModel | None = None, **in_pool: Any
    ) -> Learner:
        """Register a trainable model: pool, optimizer, checkpoints. It replaces a model of the same name.

        Args:
            name: its name in the pool and the prefix of its metrics.
            module: the model, on the CPU; its parameters that require a gradient are trained and saved.
            config: settings of its optimizer, epochs and mini-batches.
            save: writes it into a folder of final/ that transformers loads.
            in_pool: other arguments of ModelPool.add, for a model that shares weights with another one.

        Returns:
            What `update` takes.
        """
        self._share_out(module)
        with in_pool.get("context", nullcontext)():  # it decides what requires a gradient
            learner = Learner(name, module, config)
        self.models.add(name, module, optimizer=learner.optimizer, **in_pool)
        self.run.restore(learner, module, save, use=partial(self.models.use, name))
        return learner

    @final
    def with_progress(self, steps: Sequence[Step], name: str, unit: str) -> Iterator[Step]:
        """Go through steps that may take minutes together, and show how many are done: see LongWork.

        Args:
            steps: what to go through.
            name: what the whole is, such as "fit of the value model".
            unit: what the steps are, in the plural.
        """
        with self._long_work(name, len(steps), unit) as work:
            for step in steps:
                yield step
                work.advance()

    @final
    def evaluate(self) -> None:
        """Record the held-out score, accuracy and length of the current policy; changes nothing else."""
        process, num_samples = self.accelerator.process_index, self.config.eval_num_samples
        prompts = self.eval_prompts.share(process=process, num_processes=self.accelerator.num_processes)
        doing = f"finishing the evaluation of step {self.current_step}"
        with self.stopwatch("eval"), self.run.stopping.window(doing):
            with self._long_work("evaluation", len(prompts) * num_samples, "completions") as work:
                rollouts = self.policy_sampler.sample_for_evaluation(
                    prompts, finished=lambda _, completions: work.advance(len(completions))
                )
            self.run.stopping.meet()
            self._check_sampled(rollouts)
            rollouts.scores = self._rewards(rollouts, self.current_step, prefix="eval/logged")
            judged = self.judged_by | {"lenient": judge_leniently(rollouts, self.lenient_scorer)}
            self._lost_rows.add("lenient", self.lenient_scorer.lost if self.lenient_scorer else {})
            options = {"num_samples": num_samples, "has_score": self._has_score}
            evaluation_means(rollouts, **judged, **options, metrics=self.metrics)
            if self.config.eval_kl:
                self.metrics.add("eval/kl", self._kl(rollouts).sum(), rollouts.lengths.sum())
        self.run.add_samples(self.current_step, "eval", rollouts, rollouts.parts)

    # ----------------------------------------------------------------------------------------------------- private

    def _check_policy(self, policy: nn.Module) -> None:
        """Refuse a policy that cannot be trained, before data are read, which may take minutes."""
        check_policy(self.config, policy)
        check_engines(self.config, policy, self.accelerator.num_processes)
        if not is_embedded(self.config.model):  # the sampler's check may import vLLM, which takes seconds
            check_sampling(self.config, self.accelerator.device)

    def _load_data(self, task: Task, settled: RLConfig) -> None:
        check_rows(task)
        self.judged_by = {"accuracy": task.accuracy, "format": task.format}
        self.scorer = task_scorer(task, settled)
        self.lenient_scorer = lenient_scorer(task, self.config)
        weights = None if self.config.prompt_weights is None else WeightsFile(self.config.prompt_weights)
        self.prompts = PromptSet.of(task.train, self.tokenizer, self.config, self.start_time, weights)
        self.eval_prompts = None
        if task.eval:
            self.eval_prompts = PromptSet.of(task.eval, self.tokenizer, self.config, self.start_time)
        self.scorer.check_columns(self.prompts.column_names)
        if self.eval_prompts:
            self.scorer.check_columns(self.eval_prompts.column_names, "the held-out part")
        self._check_evaluation()
        self._check_scores()

    @property
    def _evaluates(self) -> bool:
        return bool(self.config.eval_every and self.eval_prompts)

    def _check_evaluation(self) -> None:
        if self.config.early_stopping_patience and not self._evaluates:
            raise ValueError(
                f"early_stopping_patience={self.config.early_stopping_patience}, task={self.config.task}: it has no "
                "held-out prompts, so nothing is evaluated that could stop the run. Pass "
                "--early_stopping_patience 0, or data with held-out rows."
            )

    @property
    def _has_score(self) -> bool:
        """False for prompts without rewards, which a teacher is enough for."""
        return bool(self.scorer.functions)

    def _check_scores(self) -> None:
        """Refuse settings that act on scores where there are none."""
        if self._has_score:
            return
        if self.config.early_stopping_patience:
            raise ValueError(
                f"early_stopping_patience={self.config.early_stopping_patience} without rewards: there is no held-out "
                "score that could get worse. Pass --early_stopping_patience 0, or --rewards."
            )
        if self.config.missing_eos_penalty:
            raise ValueError(
                f"missing_eos_penalty={self.config.missing_eos_penalty} without rewards: it is taken from scores, and "
                "there are none. Pass --missing_eos_penalty 0, or --rewards."
            )

    def _remarks(self) -> list[str]:
        """What the run says of its settings at its start."""
        config = self.config if self._evaluates else replace(self.config, eval_every=0)
        config.origins = self.config.origins
        lines = remarks(config)
        if self.config.eval_every and not self._evaluates:
            lines.insert(
                0, f"eval_every={self.config.eval_every}: there are no held-out prompts, so nothing is evaluated"
            )
        return lines

    def _load_models(self, settled: RLConfig) -> None:
        config, path = self.config, self.model_path
        num_held_out = len(self.eval_prompts) if self._evaluates else 0
        most_rows = largest_request(config, num_held_out, self.accelerator.num_processes)
        options = {"most_rows": most_rows, "leaving": self.run.stopping}
        sampler = make_sampler(settled, path, dtype=self.dtype, pool=self.models, **options)
        checkpoint = self.run.checkpoint and self.run.checkpoint / "policy"
        module = load_policy(path, config, dtype=self.dtype, checkpoint=checkpoint)
        if config.use_lora and self.accelerator.is_main_process:
            logger.info("%s", describe_adapter(module, config))
        self.policy = self.add_learner("policy", module, config)
        needs_reference = config.kl_coef or (config.eval_kl and self._evaluates)
        if needs_reference and config.use_lora:
            self.models.add_view("ref", of="policy", context=module.disable_adapter)
        elif needs_reference:
            self.models.add("ref", self._share_out(load_reference(path, config, dtype=self.dtype)))
        untrained = module if self.run.checkpoint is None else None
        for each in self._frozen:
            model = each.load(config, dtype=self.dtype, policy=untrained)
            self.models.add(each.other.name, self._share_out(model))
        self.scorer.load(self.models, self.start_time)
        tokens = {"tokenizer": self.tokenizer, "end_token_ids": end_token_ids(module, self.tokenizer)}
        self.policy_sampler = PolicySampler(
            config, path, sampler, models=self.models, stopwatch=self.stopwatch, **tokens
        )
        self._ahead = None
        if config.sampling_lag:
            self._ahead = Ahead(
                self.policy_sampler,
                self.training_prompts,
                num_steps=config.num_steps,
                gather=lambda own: gather_object([own]) if self.accelerator.num_processes > 1 else [own],
                waiting=self.run.waiting,
            )

    def _share_out(self, module: nn.Module) -> nn.Module:
        """The model, with shard=full spread over all processes."""
        if is_spread(self.config):
            spread(without_adapter(module), self.accelerator.device, self.dtype)
        return module

    def _rewards(self, rollouts: Rollouts, finished_steps: int, *, prefix: str) -> Tensor:
        """(B,) float32: the weighted sum of the rewards; each reward is kept in rollouts.parts.

        Args:
            rollouts: B rows.
            finished_steps: what functions see as trainer_state.global_step.
            prefix: of the metrics that functions log.
        """
        config = self.config
        epoch = finished_steps * config.prompts_per_step / len(self.prompts)
        state = TrainerState(global_step=finished_steps, max_steps=config.num_steps, epoch=epoch)
        scorer = self.scorer

        def judged() -> tuple:
            with self.stopwatch("score"):
                scores = judge(rollouts, scorer, state)
            self._lost_rows.add("rewards", scorer.lost)
            return scores, rollouts.parts, rollouts.extra, scorer.reports.metrics, scorer.over_limit

        scores, rollouts.parts, rollouts.extra, logged, over_limit = self._once(judged)
        for name, values in logged.items():
            self.metrics.add(f"{prefix}/{name}", math.fsum(values), len(values))
        for name, rows in over_limit.items():
            self.metrics.add_sum(f"over_limit/{name}", rows.sum())
        return scores

    def _check_sampled(self, rollouts: Rollouts) -> None:
        """Refuse log-probs of the sampler that are not finite; those of the policy tell whose fault it is."""
        if not self._soundness.all_finite(rollouts):
            self.logprobs("policy", rollouts)  # which refuses its own
            raise self._soundness.sampler_is_wrong(step=self.current_step)

    def _long_work(self, name: str, total: int, unit: str) -> LongWork:
        return LongWork(name, total, unit, enabled=self.config.progress and self.accelerator.is_main_process)

    def _kl(self, rollouts: Rollouts, *, apart: bool = False) -> Tensor:
        """(B, C) float32: k1 of the policy's KL to the reference; keeps log-probs of both in the rollouts.

        With sampling_lag=1 it keeps the sampler's in place of the policy's, which are those of another policy.

        Args:
            rollouts: B rows.
            apart: pass rows that `keep_one_per_group` keeps through the policy by themselves, as the update does: only
                the same passes give a first ratio of exactly 1, and so these need not be made again.
        """
        if apart:
            is_kept = self._is_kept(rollouts)
            old_logprobs = torch.zeros(rollouts.completion_mask.shape)
            old_logprobs[is_kept] = self.logprobs("policy", self.keep_one_per_group(rollouts))
            old_logprobs[~is_kept] = self.logprobs("policy", rollouts.only(~is_kept).renumbered())
            self._passed_apart = rollouts
        else:
            old_logprobs = self.logprobs("policy", rollouts)
        rollouts.old_logprobs = rollouts.sampling_logprobs if self.config.sampling_lag else old_logprobs
        rollouts.ref_logprobs = self.logprobs("ref", rollouts)
        return kl_estimate(old_logprobs, rollouts.ref_logprobs, "k1")

    def _is_kept(self, rollouts: Rollouts) -> Tensor:
        """(B,) bool: rows that `keep_one_per_group` keeps."""
        size, random = self.config.num_generations, {"seed": self.config.seed, "step": self.current_step}
        return torch.isin(rollouts.rows, kept_numbers(len(rollouts.step_lengths) // size, size, **random))

    def _finish_step_of_checkpoint(self) -> dict[str, float]:
        """Evaluate the untrained policy; or that of a checkpoint which was saved before its evaluation was done."""
        unfinished = self.run.unfinished
        if not unfinished and not (self.current_step == 0 and self._evaluates_at(0)):
            return {}
        if unfinished and self.accelerator.is_main_process:
            self.metrics.restore(unfinished["measured"])
        self.evaluate()
        return self._end_step()

    def _whole_step(self) -> dict[str, float]:
        step, stopping = self.current_step, self.run.stopping
        self._used_settings.clear()
        stopping.begin_step(step)
        self._do_step(self.training_prompts(step))
        if self._ahead:  # a part of the update, which is over or left within the same grace
            with self.stopwatch("sample"):
                self.run.waiting = self._ahead.finish()
        stopping.end_update()
        self._freed_memory.give_back()
        if step == self.run.first_step and self.accelerator.is_main_process:
            warn_of_unused_settings(self.config, self._used_settings, algorithm=type(self).__name__)
        if self._evaluates_at(step):
            self._note_budget()
            self.run.begin_evaluation(step, self.metrics.gather(self.accelerator))
            self.evaluate()
        return self._end_step()

    def _do_step(self, prompts: PromptBatch) -> None:
        """The algorithm's step, from its first pass again if memory was short before any weight had changed."""
        before = self.metrics.parts()
        self.batches.lowered_midway = False
        with self._once.step():
            while True:
                self.batches.step_can_begin_anew = True
                try:
                    self.step(prompts)
                    break
                except StepAgain:
                    self.metrics.restore(before)
                    self._once.begin_anew()
                finally:
                    self.batches.step_can_begin_anew = False

    def _note_budget(self) -> None:
        """Checkpoints from now on say what token budget was found to fit, if that is less than at the start."""
        if self.batches.has_less:
            at_start = self.batches.config.max_tokens_per_microbatch
            self.run.note_budget(self.batches.max_tokens_per_microbatch, at_start)

    @property
    def _is_lagged(self) -> bool:
        """Whether the step's completions are of the policy of one step earlier."""
        return self._ahead is not None and self._ahead.is_lagged

    def _evaluates_at(self, step: int) -> bool:
        return self._evaluates and (step % self.config.eval_every == 0 or step == self.config.num_steps)

    def _end_step(self) -> dict[str, float]:
        """Reduce and write the step's metrics, and save what is due."""
        step = self.current_step
        self._lost_rows.end_step(step)
        metrics = with_confidence_interval(self.metrics.reduce(self.accelerator), len(self.eval_prompts or ()))
        if self.accelerator.is_main_process:
            same_passes = not self.batches.lowered_midway
            self._soundness.warn(metrics, step=step, same_passes=same_passes, lagged=self._is_lagged)
            self._signal.see(metrics, step=step)
        timings = self.stopwatch.read_and_reset()
        timings["memory/max_tokens_per_microbatch"] = self.batches.max_tokens_per_microbatch
        # Counted in the next step, because this step's line is being written.
        with self.stopwatch("save"):
            self._note_budget()
            self.run.end_step(step, metrics, timings)
            self._soundness.check_losses(metrics, step=step)
            self.run.save_if_due(step, self.tokenizer)
        return metrics
