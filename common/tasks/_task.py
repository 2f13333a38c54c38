"""The type of a task, and how the task that the settings name is loaded."""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers

from common.config import RLConfig
from common.rewards.choose import ScoringSettings, make_scorer
from common.rewards.rules import Limits
from common.rewards.scorer import RewardFunction, Scorer


@dataclass(kw_only=True)
class Task:
    """What to learn.

    Attributes:
        train: rows to train on: {"prompt": text or a list of chat messages, **columns}.
        eval: rows held out, same form.
        rewards: the task's reward functions by name.
        reward_weights: weight of each in the score.
        accuracy: the reward whose value 1 means a right answer; None if there is none.
        format: the reward whose value 1 means an answer in the requested form; None if there is none.
        lenient_accuracy: a rule whose value 1 means that the answer is right, in the requested form or not; it is
            measured in evaluations and never a reward; None if there is none.
        default_rewards: used if the setting `rewards` is not given; may name reward models; None: all of `rewards`.
    """

    train: Sequence[dict]
    eval: Sequence[dict]
    rewards: dict[str, RewardFunction]
    reward_weights: dict[str, float]
    accuracy: str | None
    format: str | None = None
    lenient_accuracy: RewardFunction | None = None
    default_rewards: list[str] | None = None


def load_task(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Load the task that `config.task` names.

    Args:
        config: task, dataset, dataset_split and num_eval_prompts are read.
        tokenizer: the policy's; tasks check whether it has a chat template.

    Returns:
        The task.

    Raises:
        ValueError: if there is no such task, or its data cannot be read.
    """
    check_task(config.task)
    return importlib.import_module(f"common.tasks.{config.task}").load(config, tokenizer)


def task_scorer(task: Task, config: RLConfig) -> Scorer:
    """The scorer for the rewards that the settings name, or for the task's defaults.

    Raises:
        ValueError: for an unknown reward.
    """
    return make_scorer(
        task.rewards,
        task.reward_weights,
        names=config.rewards or task.default_rewards,
        weights=config.reward_weights,
        settings=ScoringSettings(
            conversational=config.reward_format == "conversational",
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
            limits=_limits(config),
        ),
    )


def lenient_scorer(task: Task, config: RLConfig) -> Scorer | None:
    """The scorer of `task.lenient_accuracy`, which evaluations use beside that of the rewards; None without one."""
    if task.lenient_accuracy is None:
        return None
    name = "lenient_accuracy"
    return Scorer({name: task.lenient_accuracy}, {name: 1.0}, limits=_limits(config))


def _limits(config: RLConfig) -> Limits | None:
    if not config.reward_time_limit:
        return None
    return Limits(seconds=config.reward_time_limit, gigabytes=config.reward_memory_limit)


def check_task(name: str) -> None:
    """Refuse an unknown task before any model is loaded.

    Raises:
        ValueError: names the existing tasks.
    """
    modules = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    known = sorted(name for name in modules if not name.startswith("_"))
    if name not in known:
        raise ValueError(f"task={name!r}: there is no such task. Pass --task with one of {', '.join(known)}.")
