"""Any data set with a column `prompt`: text, or chat messages in the conversational form of trl; or `prompt_ids`.

This task has no rewards of its own: the settings name them, and they get every other column of the data set.
"""

import transformers

from common.config import RLConfig
from common.data.rows import is_prompt, read_rows, split_held_out
from common.data.table import Rows
from common.tasks import Task
from common.terminal import names


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
    if config.rewards is None and config.needs_score:
        raise ValueError(
            "task='prompts' without rewards: completions need a score, and this task has no rewards of its own. Pass "
            "--rewards with file.py:function or a reward model."
        )
    train, held_out = split_held_out(read_prompts(config.dataset, config.dataset_split), config.num_eval_prompts)
    return Task(train=train, eval=held_out, rewards={}, reward_weights={}, accuracy=None)


def read_prompts(source: str, split: str) -> Rows:
    """Read all columns of every row and check its prompt; all rows get the same columns.

    Raises:
        ValueError: the source cannot be read (see `read_rows`), or a prompt is missing, empty or of another type.
    """
    rows = read_rows(source, split, None, examine=examine)
    return rows.with_names(rows.columns)


def examine(row: dict, where: str) -> str:
    """Check the prompt of a row, and give the key that rows with the same prompt share.

    Args:
        row: with `prompt`, or with `prompt_ids`, which are used as they are.
        where: the row, for messages.

    Raises:
        ValueError: it has no prompt, or one of another type.
    """
    prompt, prompt_ids = row.get("prompt"), row.get("prompt_ids")
    if prompt_ids is not None and not _are_ids(prompt_ids):
        raise ValueError(
            f"{where} has prompt_ids={prompt_ids!r:.80}; a list of token ids is needed, at least one, which are used "
            "as they are. Correct or remove the row, or leave the column out."
        )
    if not is_prompt(prompt) and (prompt_ids is None or prompt is not None):
        found = f"prompt={prompt!r:.80}" if "prompt" in row else f"the columns {names(row)}"
        raise ValueError(
            f"{where} has {found}; a prompt must be text or a list of messages, each with a "
            '"role" and a "content", text or a list of parts. Rename a column, or correct or remove the row.'
        )
    return str(prompt_ids if prompt is None else prompt)


def _are_ids(prompt_ids: object) -> bool:
    return isinstance(prompt_ids, list) and bool(prompt_ids) and all(type(token) is int for token in prompt_ids)
