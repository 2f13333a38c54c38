"""Tasks: each module gives prompts with their answer columns, and the rewards for them.

A task is a module with `load(config, tokenizer) -> Task`; its name is the value of `--task`. There is no list to edit:
every module here is a task, unless its name begins with an underscore.
"""

from common.tasks._task import Task, check_rows, check_task, lenient_scorer, load_task, reward_models, task_scorer

__all__ = ["Task", "check_rows", "check_task", "lenient_scorer", "load_task", "reward_models", "task_scorer"]
