"""Any data set with a column `prompt`: text, or chat messages in the conversational form of trl.

What a good completion is, the run says: this task has no rewards of its own, and every other column of the data set
travels to the rewards that the settings name. Here is also how tasks without a split of their own hold rows out.
"""

from collections.abc import Callable, Hashable

import numpy as np
from transformers import PreTrainedTokenizerBase

from common.config import RLConfig
from common.sources import read_rows
from common.tasks import Task

SPLIT_SEED = 42  # of published results on Countdown and others, whatever the seed of the run


def load(config: RLConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Give the prompts of `config.dataset` with all its columns; a column that a row lacks is None there.

    Args:
        config: `dataset`, `dataset_split`, `num_eval_prompts` and `rewards` are read.
        tokenizer: not used; prompts are taken as they are.

    Raises:
        ValueError: no data set or no reward is named, or the data cannot be read or has too few rows.
    """
    if config.dataset is None:
        raise ValueError(
            "task='prompts' without a data set: it trains on the prompts it is given and brings none. Pass --dataset "
            "with a hub id or a local file that has a column `prompt`."
        )
    if config.rewards is None:
        raise ValueError(
            "task='prompts' without rewards: completions need a score, and this task has no rewards of its own. Pass "
            "--rewards with file.py:function or a reward model."
        )
    train, held_out = split_held_out(read_prompts(config.dataset, config.dataset_split), config.num_eval_prompts)
    return Task(train=train, eval=held_out, rewards={}, reward_weights={}, accuracy=None)


def read_prompts(source: str, split: str) -> list[dict]:
    """Read all columns of every row, after a check of its prompt; all rows get the same columns.

    Raises:
        ValueError: the source cannot be read (see `read_rows`), or a prompt is missing, empty or of another type.
    """
    rows = read_rows(source, split, None)
    for number, row in enumerate(rows, start=1):
        if not _is_prompt(row.get("prompt")):
            found = f"prompt={row['prompt']!r:.80}" if "prompt" in row else f"the columns {', '.join(row)}"
            raise ValueError(
                f"dataset={source}: row {number} has {found}; a prompt is needed that is text or a list of messages, "
                'each with a "role" and a "content" that are text. Rename a column, or correct or remove the row.'
            )
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def _is_prompt(prompt: object) -> bool:
    if not isinstance(prompt, list):
        return isinstance(prompt, str) and prompt != ""
    return bool(prompt) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in prompt
    )


def prompt_key(row: dict) -> str:
    """What makes two rows the same prompt."""
    return str(row["prompt"])


def split_held_out(
    rows: list[dict], num_held_out: int, *, key: Callable[[dict], Hashable] = prompt_key
) -> tuple[list[dict], list[dict]]:
    """Shuffle rows and hold some out; what is held out does not stay among the training rows in another row.

    The shuffle is that of `datasets.Dataset.train_test_split(seed=42)`, so that on data whose published results used
    it, results can be compared.

    Args:
        rows: `prompt` each, or what `key` needs, and any other columns.
        num_held_out: number of rows to hold out; with 0 the rows stay in their order.
        key: equal for rows that are the same problem.

    Returns:
        Training rows and held-out rows.

    Raises:
        ValueError: no row would be left to train on.
    """
    if num_held_out == 0:
        return rows, []
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows)).tolist()
    held_out = [rows[index] for index in order[:num_held_out]]
    seen = {key(row) for row in held_out}
    train = [rows[index] for index in order[num_held_out:] if key(rows[index]) not in seen]
    if not train:
        raise ValueError(
            f"num_eval_prompts={num_held_out}: the data has {len(rows)} rows, and none would be left to train on that "
            f"is not also held out. Pass a smaller --num_eval_prompts or more data."
        )
    return train, held_out


def take_held_out(rows: list[dict], num_held_out: int) -> list[dict]:
    """The first rows of a split that is there for evaluation.

    Args:
        rows: the whole split.
        num_held_out: how many to take.

    Raises:
        ValueError: the split has fewer.
    """
    if num_held_out > len(rows):
        raise ValueError(
            f"num_eval_prompts={num_held_out}: the split for evaluation has {len(rows)} rows, and each is evaluated "
            f"once. Pass --num_eval_prompts {len(rows)} or fewer."
        )
    return rows[:num_held_out]
