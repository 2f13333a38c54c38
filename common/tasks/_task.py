"""The type of a task, and how the task that the settings name is loaded."""

import difflib
import importlib
import math
import pkgutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import transformers

from common.config import RLConfig
from common.data.rows import is_prompt, rows_of_dataset
from common.rewards.choose import ScoringSettings, is_reward_model, make_scorer
from common.rewards.scorer import RewardFunction, Scorer
from common.rewards.worker import Limits


@dataclass(kw_only=True)
class Task:
    """What to learn.

    Attributes:
        train: rows to train on: {"prompt": text or a list of chat messages, **columns}.
        eval: rows held out, same form.
        rewards: the task's reward functions by name.
        reward_weights: weight of each in the score; None: 1 each.
        accuracy: the reward whose value 1 means a right answer; None if there is none.
        format: the reward whose value 1 means an answer in the requested form; None if there is none.
        lenient_accuracy: a rule whose value 1 means that the answer is right, in the requested form or not; it is
            measured in evaluations and never a reward; None if there is none.
        default_rewards: used if the setting `rewards` is not given; may name reward models; None: all of `rewards`.

    Raises:
        ValueError: if rows, rewards or weights are of another type. What a trainer needs beyond that, it checks when
            it is made, since its settings may name other rewards.
    """

    train: Sequence[dict]
    eval: Sequence[dict] = field(default_factory=list)
    rewards: dict[str, RewardFunction] = field(default_factory=dict)
    reward_weights: dict[str, float] | None = None
    accuracy: str | None = None
    format: str | None = None
    lenient_accuracy: RewardFunction | None = None
    default_rewards: list[str] | None = None

    def __new__(cls, **given: object) -> Self:
        """Suggest the nearest field for an unknown one; Python itself would not."""
        known = [each.name for each in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            near = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.5) for name in unknown}
            advice = "".join(f" Did you mean {match[0]} by {name}?" for name, match in near.items() if match)
            raise TypeError(f"Task({'=..., '.join(unknown)}=...): a task has {', '.join(known)}.{advice}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check the types."""
        for name in ("train", "eval"):
            rows = getattr(self, name)
            if name == "eval" and rows is None:
                rows = []
            elif type(rows).__module__.startswith("datasets.") and hasattr(rows, "with_format") and is_indexed(rows):
                rows = rows_of_dataset(rows)
            setattr(self, name, rows)
            if not is_indexed(rows):
                raise ValueError(
                    f"Task({name}={type(rows).__name__}): need a list of rows, or one split of a data set, each row a "
                    'dict with a prompt: [{"prompt": "2 + 2 = ", "answer": "4"}].'
                )
        if not isinstance(self.rewards, dict):
            raise ValueError(
                f"Task(rewards={type(self.rewards).__name__}): need a dict that gives every reward its name, under "
                'which it is logged. Pass rewards={"right": right}; reward models are named in the setting `rewards`.'
            )
        if not isinstance(self.reward_weights, dict | None):
            raise ValueError(
                f"Task(reward_weights={type(self.reward_weights).__name__}): need a dict with the names of the "
                f"rewards. Pass reward_weights={dict.fromkeys(self.rewards, 1.0)}, or leave it out: 1 each."
            )


def is_indexed(rows: object) -> bool:
    """Whether rows are found by their numbers: not in text, a dict, a data set that is a stream, or a data frame."""
    if isinstance(rows, str | dict) or not isinstance(rows, Sized):  # a DatasetDict is a dict
        return False
    try:
        return len(rows) == 0 or rows[0] is not None
    except (TypeError, LookupError):
        return False


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


def reward_models(config: RLConfig, task: Task | None = None) -> list[str]:
    """Hub ids and folders of the reward models that a run loads; no task's data are read for it.

    Args:
        config: task and rewards are read.
        task: made in Python; None: the one that the settings name, whose module says which model is its default.

    Raises:
        ValueError: if the task is none.
    """
    names = config.rewards
    if task is not None and not isinstance(task, Task):
        raise ValueError(
            f"task={type(task).__name__}: need a Task. Pass "
            'task=Task(train=rows, rewards={"right": right}), or leave it out for the task that the settings name.'
        )
    if names is None and task is not None:
        names = task.default_rewards
    elif names is None:
        default = vars(importlib.import_module(f"common.tasks.{config.task}")).get("REWARD_MODEL")
        names = [default] if default else []
    return [name for name in names or () if is_reward_model(name)]


def check_rows(task: Task) -> None:
    """Refuse a task that cannot be trained on for its rows.

    Raises:
        ValueError: if there are none, or one is no dict with a prompt and the columns of the first.
    """
    if not len(task.train):
        raise ValueError("Task(train=[]): no rows, so there is nothing to train on. Pass rows with a prompt.")
    for name, rows in (("train", task.train), ("eval", task.eval)):
        # Others, such as data sets, have the same columns in all rows, and take long to read one by one.
        for number, row in enumerate(rows if isinstance(rows, list) else [rows[0]] if len(rows) else []):
            if not isinstance(row, dict) or not ("prompt_ids" in row or is_prompt(row.get("prompt"))):
                raise ValueError(
                    f'Task({name}=...): row {number} is {row!r:.80}. Need a dict with the key "prompt", text or a '
                    'list of messages with "role" and "content", and any columns that the rewards ask for.'
                )
            if absent := rows[0].keys() - row.keys():
                raise ValueError(
                    f"Task({name}=...): row {number} has no {', '.join(sorted(absent))}, which row 0 has. All rows "
                    "need the same columns, since a reward gets one value for each completion. Add None, or remove "
                    "the row."
                )


def task_scorer(task: Task, config: RLConfig) -> Scorer:
    """The scorer for the rewards that the settings name, or for the task's defaults.

    Raises:
        ValueError: for an unknown reward, or if rewards, weights and accuracy of the task do not belong together.
    """
    names = config.rewards or task.default_rewards
    if not names and not task.rewards and config.needs_score:
        raise ValueError(
            "the task has no rewards, so completions would have no score. Give it some, "
            'Task(rewards={"right": right}), or name them in the settings: rewards=["my_rewards.py:right"].'
        )
    weights = task.reward_weights
    if weights is None:
        weights = dict.fromkeys(task.rewards, 1.0)
    scorer = make_scorer(
        task.rewards,
        weights,
        names=names,
        weights=config.reward_weights,
        settings=ScoringSettings(
            reward_format=config.reward_format,
            max_tokens_per_microbatch=config.max_tokens_per_microbatch,
            dtype=config.dtype,
            limits=_limits(config),
        ),
    )
    known = dict.fromkeys([*task.rewards, *scorer.functions])
    _check_weights(weights, task, known)
    for role in ("accuracy", "format"):
        name = getattr(task, role)
        if name is not None and name not in known:
            raise ValueError(
                f"Task({role}={name!r}): no reward has this name; there are {', '.join(known)}. Pass one of them, or "
                f"{role}=None."
            )
    return scorer


def _check_weights(weights: dict[str, float], task: Task, known: dict[str, None]) -> None:
    unknown = [name for name in weights if name not in known]
    absent = [name for name in task.rewards if name not in weights]
    wrong = [name for name, weight in weights.items() if not _is_weight(weight)]
    if unknown or absent or wrong:
        problems = [f"no reward {name!r}" for name in unknown] + [f"no weight for {name!r}" for name in absent]
        problems += [f"{weights[name]!r:.40} is no finite number" for name in wrong]
        raise ValueError(
            f"Task(reward_weights={weights!r:.200}): {', '.join(problems)}. The rewards are {', '.join(known)}. Pass "
            "one number for each, or leave reward_weights out: 1 each."
        )


def _is_weight(weight: object) -> bool:
    try:
        return not isinstance(weight, str) and math.isfinite(weight)
    except (OverflowError, TypeError):  # an int that no float can hold, or no number
        return False


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
