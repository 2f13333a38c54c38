"""A user's mistakes in Python become messages: in a script of his own, and in how a trainer is made.

What this project refuses, with a ValueError or TypeError of its own, ends a script with a message that names the line
of the script, and with status 2. Any other error keeps its traceback; so does everything in notebooks, in tests, at
Python's prompt, and with `python -X dev`.
"""

import inspect
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from common.config import RLConfig

ROOT = Path(__file__).parent.parent

# The arguments of trl's trainers, and what is given here instead. {name} is GRPO, for example.
_OF_TRL = {
    "model": '{name}Config(model="...")',
    "args": "{name}Config(...), the first argument",
    "reward_funcs": 'Task(rewards={{"right": right}})',
    "train_dataset": "Task(train=rows)",
    "eval_dataset": "Task(eval=rows)",
    "processing_class": "nothing, since the tokenizer is the model's own",
    "reward_processing_classes": "nothing, since a reward model's tokenizer is its own",
    "peft_config": "{name}Config(use_lora=True, lora_r=...)",
    "quantization_config": "{name}Config(load_in_4bit=True, use_lora=True)",
    "optimizers": "{name}Config(learning_rate=..., lr_scheduler=...)",
    "callbacks": "nothing: override `step` in a class of your own, or read metrics.jsonl",
}


def check_arguments(trainer: type, args: tuple, given: dict[str, Any]) -> None:
    """Refuse what a trainer is not made from, such as the arguments of trl's trainers.

    Args:
        trainer: the class.
        args: its arguments by position.
        given: its arguments by name.

    Raises:
        TypeError: says how a trainer is made.
    """
    name = trainer.__name__.removesuffix("Trainer")
    known = inspect.signature(trainer.__init__).parameters
    unknown = [each for each in given if each not in known]
    if unknown:
        instead = [f"{each} is {_OF_TRL[each].format(name=name)}" for each in unknown if each in _OF_TRL]
        problem = f"({', '.join(f'{each}=...' for each in unknown)}): "
        problem += f"here {'; '.join(instead)}" if instead else f"it has no argument {', '.join(unknown)}"
    elif len(args) > 1:
        problem = f" with {len(args)} arguments by position: only the settings come by position"
    elif not isinstance(config := args[0] if args else given.get("config"), RLConfig):
        found = f"of type {type(config).__name__}" if args or "config" in given else "missing"
        problem = f" with settings {found}: need a {name}Config"
    else:
        return
    raise TypeError(
        f"{trainer.__name__}{problem}. A trainer is made from settings and a task:\n"
        f"    {trainer.__name__}({name}Config(model=...), "
        'task=Task(train=rows, eval=rows, rewards={"right": right}, accuracy="right"))'
    )


def explain_mistakes() -> None:
    """Make a refused value in a script a message with its line, not a traceback; once, however often it is called."""
    others = sys.excepthook
    if getattr(others, "__module__", None) == __name__:
        return

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        frames = traceback.extract_tb(trace)
        is_script = len(frames) > 1 and frames[0].name == "<module>"
        if kind not in (ValueError, TypeError) or not is_script or not is_ours(frames[-1]) or _wants_traceback():
            return others(kind, error, trace)
        line = [frame for frame in frames if frame.filename == frames[0].filename][-1].lineno
        print(f"error: {name_of_script(frames[0].filename)}, line {line}: {error}", file=sys.stderr)
        sys.exit(2)

    sys.excepthook = explain


def _wants_traceback() -> bool:
    return bool(sys.flags.dev_mode or sys.flags.interactive) or hasattr(sys, "ps1")


def is_ours(raised_at: traceback.FrameSummary) -> bool:
    """Whether this project raised an error on purpose.

    Python's own functions raise ValueErrors too: those have no frame, and end in a line that calls them.
    """
    file = Path(raised_at.filename)
    is_in_project = file.is_relative_to(ROOT) and not file.is_relative_to(sys.prefix)
    return is_in_project and (raised_at.line or "").startswith("raise ")


def name_of_script(script: str | None) -> str:
    """The script's name in messages: its path from the repository's root."""
    path = Path(script or "the script").resolve()
    return str(path.relative_to(ROOT)) if script and path.is_relative_to(ROOT) else (script or "the script")
