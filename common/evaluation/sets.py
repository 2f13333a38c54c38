"""The problems that a model is evaluated on: a named set, or a file with the columns of a task.

Prompts and rewards are those of the task's module, as in training. Every row of the set counts, unless the set is the
held-out part of a larger one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import transformers

from common.config import RLConfig
from common.data.files import READABLE, is_data_file
from common.data.rows import read_rows
from common.tasks import Task, check_task, load_task
from common.tasks.countdown import GENERATED, problems
from common.tasks.math import ANSWER_COLUMNS, QUESTION_COLUMNS


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Problems and their task.

    Attributes:
        task: module of common/tasks.
        dataset: hub id or local file; None: problems that the task generates.
        split: of a hub data set.
        num_held_out: number of rows that the task holds out, which are the set; 0: all rows are the set.
        of_training: the set is what the task trains on instead.
    """

    task: str
    dataset: str | None = None
    split: str = "train"
    num_held_out: int = 0
    of_training: bool = False


NAMED_SETS = {
    "math500": EvaluationSet(task="math", dataset="HuggingFaceH4/MATH-500", split="test"),
    "aime24": EvaluationSet(task="math", dataset="HuggingFaceH4/aime_2024"),
    "gsm8k": EvaluationSet(task="gsm8k", dataset="openai/gsm8k:main", split="test"),
    "countdown": EvaluationSet(task="countdown"),
}
OWN_PROMPTS = "prompts"  # any rows with a prompt; the settings name their rewards
# For models with a chat template; published results hold out the same 500 rows.
COUNTDOWN_HELD_OUT = EvaluationSet(
    task="countdown", dataset="Jiayi-Pan/Countdown-Tasks-3to4", split="train", num_held_out=500
)


def find_set(
    name: str,
    dataset: str | None,
    split: str | None = None,
    *,
    is_chat: bool,
    num_held_out: int | None = None,
    of_training: bool = False,
) -> EvaluationSet:
    """The set that the settings `task`, `dataset` and `dataset_split` mean.

    Args:
        name: a named set, a local file of data (`common.data.files.READABLE`), or "prompts".
        dataset: a local file, or another hub id, in place of the named set's data; the data of "prompts".
        split: of `dataset` on the hub; None: the named set's.
        is_chat: the model has a chat template; without one, Countdown problems are generated.
        num_held_out: the set is what training holds out with this num_eval_prompts, and `name` is that of a task of
            training; None: all rows.
        of_training: with num_held_out, the set is what that training trains on.

    Raises:
        ValueError: there is no such set or file, the file cannot be read, or no task has its columns.
    """
    if num_held_out is not None:
        if name in NAMED_SETS and name != NAMED_SETS[name].task:
            option = "write_pass_rates" if of_training else "num_held_out"
            raise ValueError(
                f"task={name} with {option}: it is a set for evaluation, of which nothing is trained on or held out. "
                f"Pass --task {NAMED_SETS[name].task}, the task of training, or leave out --{option}."
            )
        check_task(name)
        held_out = {"num_held_out": num_held_out, "of_training": of_training}
        return EvaluationSet(task=name, dataset=dataset, split=split or "train", **held_out)
    if name == OWN_PROMPTS:
        return EvaluationSet(task=OWN_PROMPTS, dataset=dataset, split=split or "train")
    if name not in NAMED_SETS:
        return EvaluationSet(task=_task_of_file(name, dataset), dataset=name)
    if split is not None and dataset is None:
        raise ValueError(
            f"dataset_split={split} without dataset: {name} has a split of its own. Pass --dataset too, or leave out "
            "--dataset_split."
        )
    named = NAMED_SETS[name]
    if name == "countdown" and dataset in GENERATED:
        if is_chat and dataset is None:
            return COUNTDOWN_HELD_OUT
        return replace(named, dataset=dataset, num_held_out=len(problems(GENERATED[dataset])[1]))
    split = split or ("train" if is_data_file(dataset or "") else named.split)  # a file has no splits
    return named if dataset is None else replace(named, dataset=dataset, split=split)


def load_problems(found: EvaluationSet, config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Load a set with the rewards of its task.

    Args:
        found: the set.
        config: some rewards read `max_completion_length`; the settings of task and data are replaced.
        tokenizer: the model's; tasks check whether it has a chat template.

    Returns:
        The task; `eval` holds the problems in their order, `train` is empty.

    Raises:
        ValueError: the data cannot be read or lack a column.
    """
    names = {"task": found.task, "dataset": found.dataset, "dataset_split": found.split}
    try:
        task = load_task(replace(config, num_eval_prompts=found.num_held_out, **names), tokenizer)
    except ValueError as error:  # what a run calls num_eval_prompts is num_held_out here
        raise ValueError(str(error).replace("num_eval_prompts", "num_held_out")) from error
    # If nothing is held out, the set is what the task would train on.
    is_held_out = found.num_held_out and not found.of_training
    return replace(task, eval=task.eval if is_held_out else task.train, train=[])


def num_left_out(found: EvaluationSet, task: Task) -> int:
    """How many rows of a set the task leaves out: math does with answers to guess, and with those nobody can match."""
    if found.task != "math" or found.num_held_out or found.of_training:
        return 0
    return len(read_rows(found.dataset, found.split, None)) - len(task.eval)


def _task_of_file(path: str, dataset: str | None) -> str:
    """The task whose columns a file has."""
    if not is_data_file(path):
        raise ValueError(
            f"task={path!r}: neither a set of problems nor a file of them. Pass --task with one of "
            f"{', '.join(NAMED_SETS)}, with a file ({READABLE}), or with {OWN_PROMPTS} for prompts of your own."
        )
    if dataset is not None:
        raise ValueError(
            f"task={path} with dataset={dataset}: both say where the problems are. Leave out --dataset, or name the "
            f"set whose data it replaces: --task with one of {', '.join(NAMED_SETS)}."
        )
    if not Path(path).is_file():
        raise ValueError(f"task={path}: there is no such file. Pass --task with an existing one.")
    row = read_rows(path, "train", None)[0]
    if {"nums", "target"} <= row.keys():
        return "countdown"
    if "question" in row and "####" in str(row.get("answer")):
        return "gsm8k"
    if not row.keys().isdisjoint(QUESTION_COLUMNS) and not row.keys().isdisjoint(ANSWER_COLUMNS):
        return "math"
    if "prompt" in row:
        return OWN_PROMPTS
    raise ValueError(
        f"task={path}: its rows have the columns {', '.join(row)}, which fit no task. Needed are nums and "
        "target (Countdown), a question and an answer that ends in #### 42 (GSM8K), or a problem "
        f"({', '.join(QUESTION_COLUMNS)}) and its answer ({', '.join(ANSWER_COLUMNS)}), or a prompt for rewards of "
        "your own. Rename the columns."
    )
