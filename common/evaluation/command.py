"""Evaluates models: ``python -m common.evaluation --model M --task math500 --num_samples 8 --temperature 0.6``.

Completions come from the sampler that training uses, with the same seeds; scores and means come from the functions
that training uses. Repeating a command shows the existing results and samples only what is missing: an interrupted
evaluation goes on from the completions that it has.
"""

from __future__ import annotations  # types whose import takes seconds are not loaded

import logging
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor

from common.cli import as_arguments, parse_settings
from common.config import RLConfig
from common.data.prompts import PromptSet
from common.data.vocabulary import check_vocabulary, describe_spelled, describe_unknown
from common.embedded import is_embedded, load_tokenizer, resolve_model, skeleton
from common.evaluation.identity import reward_digest, sampling_identity, weights_digest
from common.evaluation.pass_rates import PassRates
from common.evaluation.results import TABLE_FILE, Score, digest, stored_score, table, write_result
from common.evaluation.sets import find_set, load_problems, num_left_out
from common.evaluation.settings import NO_LIMIT, EvaluationSettings, as_run_settings
from common.evaluation.unfinished import Unfinished
from common.memory.start import plan_of
from common.merge import load
from common.mistakes import CannotWrite, WrongNumbers, first_line, is_ours
from common.models.attention import attention_for
from common.models.configs import model_class, read_config
from common.models.loading import compute_dtype, end_token_ids, num_tokens, warn_of_slow_dtype
from common.models.pool import ModelPool
from common.models.system_role import describe_system
from common.models.ties import settle_ties
from common.models.weights import weights_in_memory
from common.rewards.reports import TrainerState
from common.rewards.reward_model import RewardModel
from common.rewards.scorer import RewardFunction, Scorer
from common.rollouts import Completion, Rollouts
from common.runs.checkpoints import write_file
from common.runs.folder import versions
from common.runs.lost_rows import judge_evaluation
from common.runs.measures import confidence_interval, evaluation_means, judge, judge_leniently, mean_interval
from common.runs.metrics import StepMetrics, Stopwatch
from common.runs.progress import LongWork
from common.runs.prompt_record import time_of_run
from common.runs.sources import Source, find_model
from common.runs.writable import check_folder
from common.sampling.checks import check_sampling
from common.sampling.policy_sampler import PolicySampler, check_sampler, make_sampler
from common.signals import Stopped
from common.tasks import lenient_scorer, task_scorer

logger = logging.getLogger("nanorlhf")

DEFAULT_PARENT = Path("evaluations")

# Enough for the reasoning of most models; the model cards of others say how much they need.
MOST_TOKENS = 4096

# Settings that do not change a result. A date acts through the prompts, which are compared themselves.
_NO_EFFECT = ("output_dir", "trust_remote_code", "vllm_memory_share", "vllm_max_num_seqs", "date", "keep_completions")
_NO_EFFECT += ("write_pass_rates",)


class Evaluation:
    """One model on one set of problems. The constructor checks everything; `run` samples.

    Args:
        settings: with one model.
        parent: folder that the result's folder is in; None: settings.output_dir is the result's folder.

    Attributes:
        name: model, task and a hash of everything that the result depends on.
        folder: of the result.

    Raises:
        ValueError: for anything wrong with settings, data, model, adapter or folder, before a model is loaded.
    """

    def __init__(self, settings: EvaluationSettings, parent: Path | None = None) -> None:
        (self.model,) = settings.model
        source = find_model(self.model, settings.adapter, trust_remote_code=settings.trust_remote_code)
        config = as_run_settings(settings, source.base)
        check_sampler(config)
        self.tokenizer = _load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
        is_chat = self.tokenizer.chat_template is not None
        which = {"num_held_out": settings.num_held_out, "of_training": settings.write_pass_rates is not None}
        which |= {"is_chat": is_chat}
        found = find_set(settings.task, settings.dataset, settings.dataset_split, **which)
        self.source = replace(source, base=resolve_model(source.base))
        context = _context_length(self.source.base)
        if settings.max_completion_length is None:
            config = replace(config, max_completion_length=min(MOST_TOKENS, (context or NO_LIMIT) // 2))
        self.task = load_problems(found, config, self.tokenizer)
        self.num_left_out = num_left_out(found, self.task)
        self.now = datetime.fromisoformat(settings.date) if settings.date else _time_of(source) or datetime.now()
        self.prompts = PromptSet.of(_first(self.task.eval, settings.num_problems), self.tokenizer, config, self.now)
        check_vocabulary(self.prompts.encoded, num_tokens(self.source.base))
        functions = self._check_rewards(config, settings.accuracy)
        self.pass_rates = None
        if settings.write_pass_rates is not None:
            self.pass_rates = PassRates(settings.write_pass_rates, self.task.accuracy, functions)
        # vLLM has done its part when a reward model needs the GPU.
        level = 2 if any(isinstance(function, RewardModel) for function in functions.values()) else 0
        longest = int(self.prompts.encoded.lengths.max())
        self.config = replace(config, max_prompt_length=longest, vllm_sleep_level=level)
        self._check_room(context)
        self._keeps_completions = settings.keep_completions
        self.settings = _with_effect(settings) | {
            "model": self.model,
            "max_completion_length": config.max_completion_length,
            "weights": weights_digest(self.source),
            "problems": digest(list(self.prompts.texts), self.prompts.columns, *self._seen_by_rewards()),
            "reward_sources": [reward_digest(name) for name in settings.rewards or ()],
        }
        called = self._called()
        self.name = f"{called}-{digest(self.settings)}"
        folder = settings.output_dir if parent is None else None
        self.folder = Path(folder or (parent or DEFAULT_PARENT) / self.name)
        if not self.folder.exists():
            check_folder(self.folder)
        if self.folder.is_symlink():
            self.folder = self.folder.resolve()  # a result replaces a folder, not a link to one
        is_new = self.stored() is None
        if is_new:
            check_folder(self.folder, is_replaced=True)
        if self.pass_rates is not None:
            self.pass_rates.check(self.folder, self.prompts)
        sampled = sampling_identity(self.settings, self.prompts.ids)
        self.unfinished = Unfinished(self.folder.with_name(f"{called}-{digest(sampled)}.unfinished.jsonl"), sampled)
        if is_new:
            has_all = self.unfinished.check() == len(self.prompts)
            if not has_all and not is_embedded(source.base):  # after the rest: it may import vLLM
                self._check_memory([each.model for each in functions.values() if isinstance(each, RewardModel)])
                check_sampling(self.config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _check_memory(self, reward_models: list[str]) -> None:
        """Refuse a model without room in main memory; on a GPU, vLLM says so itself."""
        if not torch.cuda.is_available():
            sampled = {"num_eval_prompts": len(self.prompts), "eval_every": 1, "kl_coef": 0.0}
            options = {"rewards": reward_models, "with_passes": False, "is_trained": False}
            plan_of(replace(self.config, **sampled), skeleton(self.source.base), **options)

    def _seen_by_rewards(self) -> list:
        """The prompts that rewards see beside token ids, which need not say the same."""
        return [self.prompts.raw] if self.prompts.encoded.has("ids") else []

    def stored(self) -> Score | None:
        """The content of score.json; None if this evaluation is new.

        Raises:
            ValueError: the folder holds something else.
        """
        return stored_score(self.folder, self.settings)

    def run(self) -> None:
        """Sample what is missing, score, and write the folder."""
        with self.unfinished as kept:
            try:
                self._run()
            except (KeyboardInterrupt, Stopped, CannotWrite):
                if kept.completions:
                    count = f"{len(kept.completions)} of {len(self.prompts)} problems"
                    logger.info("\n%s: the completions of %s are kept in %s", self.model, count, kept.path)
                raise
            if not self._keeps_completions:
                kept.remove()

    def _run(self) -> None:
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        stopwatch = Stopwatch(accelerator.device)
        # First, because a scorer forks, which is cheap while no model is loaded.
        scorer, leniently = task_scorer(self.task, self.config), lenient_scorer(self.task, self.config)
        has_all = len(self.unfinished.completions) == len(self.prompts)
        with stopwatch("load"):
            generation = None if has_all else self._load(accelerator.device, stopwatch)
            scorer.load(ModelPool(accelerator.device, "never", stopwatch), self.now)
        num_samples = self.config.eval_num_samples
        rollouts = self._kept() if generation is None else self._sample(generation)
        with stopwatch("score"):
            rollouts.scores = self._judge(rollouts, scorer)
            lenient = judge_leniently(rollouts, leniently)
            judge_evaluation(leniently.lost if leniently else {})
        metrics = StepMetrics()
        judged_by = {"accuracy": self.task.accuracy, "format": self.task.format, "lenient": lenient}
        evaluation_means(rollouts, **judged_by, num_samples=num_samples, metrics=metrics)
        score = self._score(rollouts, metrics.reduce(accelerator), stopwatch.read_and_reset())
        score["over_limit"] = {name: int(rows.sum()) for name, rows in scorer.over_limit.items()}
        score["logged"] = {name: sum(values) / len(values) for name, values in scorer.reports.metrics.items()}
        score["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        write_result(self.folder, score, rollouts, accuracy=self.task.accuracy, lenient=lenient)

    def _check_rewards(self, config: RLConfig, accuracy: str | None) -> dict[str, RewardFunction]:
        """The rewards, which can be called; the task learns which of them is the accuracy."""
        scorer = task_scorer(self.task, config)
        scorer.check_columns(self.prompts.column_names)
        if accuracy is not None and accuracy not in scorer.functions:
            raise ValueError(
                f"accuracy={accuracy!r}: no reward has this name; there are {', '.join(scorer.functions)}. Pass "
                "--accuracy with the one whose value 1 means a right answer, or leave it out."
            )
        self.task = replace(self.task, accuracy=accuracy or self.task.accuracy)
        return scorer.functions

    def _called(self) -> str:
        """Model and task, as a part of file names."""
        names = filter(None, (self.model, self.settings["adapter"]))
        parts = [part for name in names for part in Path(name).parts[-2:] if part.strip("/.")]
        return "-".join([*parts, _task_name(self.settings["task"])])

    def _check_room(self, context: int | None) -> None:
        longest, limit = self.config.max_prompt_length, self.config.max_completion_length
        if context is not None and longest + limit > context:
            raise ValueError(
                f"max_completion_length={limit} and a prompt of {longest} tokens: {self.model} has room for {context} "
                "tokens in total. Pass a smaller --max_completion_length, or drop long prompts with "
                "--max_prompt_length."
            )

    def _load(self, device: torch.device, stopwatch: Stopwatch) -> PolicySampler:
        """The model, ready to sample from."""
        dtype = compute_dtype(self.config, device)
        warn_of_slow_dtype(dtype, device)
        # vLLM has its own weights and uses the device alone.
        models = ModelPool(torch.device("cpu") if self.config.sampler == "vllm" else device, "never", stopwatch)
        most_rows = len(self.prompts) * self.config.eval_num_samples
        sampler = make_sampler(self.config, self.source.base, dtype=dtype, pool=models, most_rows=most_rows)
        model = _load_merged(self.source, device, dtype).to(dtype)
        models.add("policy", model)
        tokens = {"tokenizer": self.tokenizer, "end_token_ids": end_token_ids(model, self.tokenizer)}
        return PolicySampler(self.config, self.source.base, sampler, models=models, stopwatch=stopwatch, **tokens)

    def _sample(self, generation: PolicySampler) -> Rollouts:
        """Completions of all problems; each is kept in a file from when it is there."""
        num_samples, kept = self.config.eval_num_samples, self.unfinished
        total, have = len(self.prompts) * num_samples, len(kept.completions) * num_samples
        there = f", {have} of which are there" if have else ""
        said = describe_system(self.tokenizer, self.prompts.one_of_each_shape)
        said += describe_unknown(self.prompts.encoded) + describe_spelled(self.prompts.encoded)
        said.append(f"sampling {len(self.prompts)} x {num_samples} completions{there}")
        logger.info("%s", "\n".join(f"{self.model}: {line}" for line in said))
        kept.start_clock()
        with LongWork("sampling", total, "completions", done=have) as work:

            def finished(problem: int, completions: list[Completion]) -> None:
                self._check_sampled(completions)
                kept.add(problem, completions, generation.texts(completions))
                work.advance(num_samples)

            return generation.sample_for_evaluation(
                self.prompts.share(), finished=finished, have=dict(kept.completions)
            )

    def _kept(self) -> Rollouts:
        """Completions that are all there: neither the model nor a sampler is needed for them."""
        num_samples, kept = self.config.eval_num_samples, self.unfinished
        logger.info("%s: all %d completions are there", self.model, len(self.prompts) * num_samples)
        completions, texts = (
            [each for problem in range(len(self.prompts)) for each in by_problem[problem]]
            for by_problem in (kept.completions, kept.texts)
        )
        return Rollouts.from_completions(self.prompts.share(), completions, texts, num_generations=num_samples)

    def _check_sampled(self, completions: list[Completion]) -> None:
        """Refuse completions whose log-probs are not finite, before they are kept: they are not the model's."""
        if not all(map(math.isfinite, chain.from_iterable(each.logprobs for each in completions))):
            sampler, dtype = self.config.sampler, self.config.dtype
            raise WrongNumbers(
                f"{self.model}: log-probs of its completions are not finite (NaN or infinite), so they say nothing of "
                "it, and none are kept. Likely causes:\n"
                "* the files of the checkpoint are damaged, or its training had failed\n"
                f"* {sampler} fails with this architecture: try --sampler "
                f"{'transformers' if sampler == 'vllm' else 'vllm'}\n"
                f"* numbers too large for dtype={dtype}: --dtype float32"
            )

    def _judge(self, rollouts: Rollouts, scorer: Scorer) -> Tensor:
        """(B,) float32: the scores; the refusal of a reward says that sampling was not in vain."""
        try:
            scores = judge(rollouts, scorer, TrainerState(global_step=1))
            judge_evaluation(scorer.lost)
            return scores
        except ValueError as error:
            if not is_ours(error.__traceback__):
                raise
            raise ValueError(
                f"{error} All completions are kept in {self.unfinished.path}, and the same command then gives them "
                "their scores, without sampling them again."
            ) from error.__cause__

    def _score(self, rollouts: Rollouts, means: dict[str, float], timings: dict[str, float]) -> Score:
        means = {name.removeprefix("eval/"): value for name, value in means.items()}
        num_samples, parts = self.config.eval_num_samples, rollouts.parts
        seconds = {name: timings.get(f"time/{name}", 0.0) for name in ("load", "push", "sample", "score")}
        seconds["sample"] += self.unfinished.seconds
        num_tokens = int(rollouts.lengths.sum())
        return {
            "model": self.model,
            "adapter": self.settings["adapter"],
            "task": self.settings["task"],
            "num_problems": len(self.prompts),
            "num_too_long": self.prompts.num_dropped,
            "num_left_out": self.num_left_out,
            "num_samples": num_samples,
            **self._accuracy(means),
            **means,
            "score_ci95": mean_interval(rollouts.scores, num_samples),
            "rewards": {name: _mean(part) for name, part in parts.items()},
            "rewards_ci95": {name: mean_interval(part, num_samples) for name, part in parts.items()},
            "tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds["sample"],
            "seconds": seconds,
            "settings": self.settings,
            "versions": versions(),
        }

    def _accuracy(self, means: dict[str, float]) -> Score:
        """The accuracy and its interval, taken out of the means; nothing if no reward is one."""
        if "accuracy" not in means:
            return {}
        accuracy = means.pop("accuracy")
        middle, half = confidence_interval(accuracy, means.pop("accuracy_square"), len(self.prompts))
        return {"accuracy": accuracy, "accuracy_ci95": [max(middle - half, 0.0), min(middle + half, 1.0)]}


def evaluate(settings: EvaluationSettings) -> list[Score]:
    """Evaluate models one after another; existing results are not sampled again.

    With several models, vLLM samples each in its own process, which frees all of its memory.

    Returns:
        The content of score.json of each model, in their order.

    Raises:
        ValueError: see Evaluation; for any of the models before the first is loaded.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: an evaluation is one process, and several would each do all of "
            "it. Start it without torchrun; to use several GPUs, evaluate one model on each."
        )
    several = len(settings.model) > 1
    parent = Path(settings.output_dir or DEFAULT_PARENT) if several else None
    if several and settings.date is None:  # one table has one date
        given = {"adapter": settings.adapter, "trust_remote_code": settings.trust_remote_code}
        times = (_time_of(find_model(model, **given)) for model in settings.model)
        time = next((time for time in times if time is not None), datetime.now())
        settings = replace(settings, date=time.isoformat(timespec="seconds"))
    evaluations = [Evaluation(replace(settings, model=[model]), parent) for model in settings.model]
    for evaluation in evaluations:
        if evaluation.stored():
            logger.info("%s: already evaluated, nothing is sampled again: %s", evaluation.model, evaluation.folder)
        elif several and settings.sampler == "vllm":
            _run_in_a_process(replace(settings, model=[evaluation.model], output_dir=str(evaluation.folder)))
        else:
            evaluation.run()
            logger.info("%s: written to %s", evaluation.model, evaluation.folder)
        if evaluation.pass_rates is not None:
            evaluation.pass_rates.write(evaluation.folder, evaluation.prompts)
    scores = [evaluation.stored() for evaluation in evaluations]
    if several:
        names = digest([evaluation.name for evaluation in evaluations])
        file = TABLE_FILE if settings.output_dir else f"table-{_task_name(settings.task)}-{names}.md"
        write_file(parent / file, table(scores).encode())
        logger.info("table: %s", parent / file)
    return scores


def main() -> None:
    """Run the evaluation of the command line and print the table."""
    print(table(evaluate(parse_settings(EvaluationSettings))), end="")


# Models


def _time_of(source: Source) -> datetime | None:
    """When the run began that the model, or its adapter, comes from; None if it comes from none."""
    times = (time_of_run(folder) for folder in (source.adapter, source.base) if folder is not None)
    return next((time for time in times if time is not None), None)


def _load_tokenizer(source: Source, *, trust_remote_code: bool) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in the adapter's folder, else that of the model."""
    name = source.own_tokenizer
    try:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        reason = None if len(tokenizer("0")["input_ids"]) else "it has no tokens"  # transformers makes an empty one
    except (OSError, ValueError) as error:
        reason = first_line(error)
    if reason is not None:
        raise ValueError(
            f"model={name}: its tokenizer cannot be loaded: {reason}. Prompts have to become tokens. Put the "
            "tokenizer's files into the model's folder."
        )
    return tokenizer


def _load_merged(source: Source, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model on the CPU, its adapter merged as `python -m common.merge` merges it; attention as in training."""
    config = read_config(source.base)
    attention, _ = attention_for(config, "auto", device, dtype=dtype, cls=model_class(config))
    model = load(source, attn_implementation=attention)
    settle_ties(model)
    if source.adapter is None:
        return model
    weights = dict(weights_in_memory(model))
    model = model.unload()
    model.load_state_dict(weights, strict=False)  # a tied head has no entry
    return model


def _context_length(model: str) -> int | None:
    """Context length of a model in tokens; None if its configuration does not say."""
    config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    return config.get_text_config().to_dict().get("max_position_embeddings")


# The rest


def _first(rows: list[dict], count: int | None) -> list[dict]:
    if count is not None and count > len(rows):
        raise ValueError(
            f"num_problems={count}: there are {len(rows)} problems, and each is evaluated once. Pass --num_problems "
            f"{len(rows)} or fewer, or leave it out for all."
        )
    return rows[:count]


def _with_effect(settings: EvaluationSettings) -> dict[str, Any]:
    """The settings that a result depends on."""
    named = {name: value for name, value in asdict(settings).items() if name not in _NO_EFFECT}
    if settings.num_held_out is None:  # results of whole sets keep the names that they have
        del named["num_held_out"]
    return named | ({} if settings.write_pass_rates is None else {"of_training": True})


def _task_name(task: str) -> str:
    return Path(task).name.partition(".")[0]


def _mean(part: Tensor) -> float | None:
    """Over the rows in which a reward has a say; None if there are none."""
    return None if part.isnan().all() else part.nanmean().item()


def _run_in_a_process(settings: EvaluationSettings) -> None:
    """Run the same command for one model in a new process.

    Raises:
        SystemExit: if it fails; it has printed the reason.
    """
    words = as_arguments(asdict(settings))
    done = subprocess.run([sys.executable, "-m", "common.evaluation", *words], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)
