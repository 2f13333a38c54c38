"""Any data set with a column `prompt`: text, or chat messages in the conversational form of trl.

This task has no rewards of its own: the settings name them, and they get every other column of the data set.
"""

import transformers

from common.config import RLConfig
from common.data.rows import read_rows, split_held_out
from common.tasks import Task


def load(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Give the prompts of `config.dataset` with all its columns; missing values are None.

    Args:
        config: `dataset`, `dataset_split`, `num_eval_prompts` and `rewards` are read.
        tokenizer: not used; prompts are taken as they are.

    Raises:
        ValueError: no data set or no reward is named, or the data cannot be read or has too few rows.
    """
    if config.dataset is None:
        raise ValueError(
            "task='prompts' without a data set: this task has no prompts of its own. Pass --dataset "
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
    """Read all columns of every row and check its prompt; all rows get the same columns.

    Raises:
        ValueError: the source cannot be read (see `read_rows`), or a prompt is missing, empty or of another type.
    """
    rows = read_rows(source, split, None)
    for number, row in enumerate(rows, start=1):
        if not _is_prompt(row.get("prompt")):
            found = f"prompt={row['prompt']!r:.80}" if "prompt" in row else f"the columns {', '.join(row)}"
            raise ValueError(
                f"dataset={source}: row {number} has {found}; a prompt must be text or a list of messages, "
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
