"""Which rewards a run has: the task's by name, functions from files, and reward models."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from common.rewards.reward_model import RewardModel
from common.rewards.rules import DEFAULT_LIMITS, Limits
from common.rewards.scorer import RewardFunction, Scorer


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How rewards are computed.

    Attributes:
        conversational: functions from files get chat messages, not text.
        max_tokens_per_microbatch: padded tokens per forward pass of a reward model.
        limits: time and memory that a rule may use per row; None: no limits.
    """

    conversational: bool = False
    max_tokens_per_microbatch: int = 16384
    limits: Limits | None = DEFAULT_LIMITS


DEFAULTS = ScoringSettings()


def make_scorer(
    available: dict[str, RewardFunction],
    default_weights: dict[str, float],
    *,
    names: list[str] | None,
    weights: list[float] | None,
    settings: ScoringSettings = DEFAULTS,
) -> Scorer:
    """Choose rewards: the task's by name, functions from files, and reward models.

    Args:
        available: the task's reward functions.
        default_weights: the task's weights.
        names: the setting `rewards`: names of the task's functions, file.py:function, folders or hub ids of reward
            models; None: all rewards of the task.
        weights: the setting `reward_weights`; None: the task's weights, and 1 for other rewards.
        settings: how rewards are computed.

    Returns:
        The scorer; its reward models are not loaded yet.

    Raises:
        ValueError: for an unknown name, a missing file or function, or a model that does not give a single score.
    """
    if names is None:
        return Scorer(available, default_weights, limits=settings.limits)
    functions, from_files = {}, set()
    for name in names:
        if name in available:
            functions[name] = available[name]
        elif ":" in name:
            from_files.add(name.rpartition(":")[2])
            functions[name.rpartition(":")[2]] = load_reward(name)
        elif Path(name).is_dir() or ("/" in name and not name.endswith(".py")):
            model = RewardModel(name, max_tokens_per_microbatch=settings.max_tokens_per_microbatch)
            functions[model.name] = model
        else:
            raise ValueError(
                f"rewards={name!r}: the task has {', '.join(available)}. Pass --rewards with one of these, with "
                "file.py:function for your own function, or with the folder or hub id of a reward model."
            )
    if len(functions) != len(names):
        raise ValueError(f"rewards={names}: two rewards have the same name. Pass --rewards with distinct names.")
    chosen = weights or [default_weights.get(name, 1.0) for name in functions]
    conversational = from_files if settings.conversational else ()
    weights = dict(zip(functions, chosen, strict=True))
    return Scorer(functions, weights, conversational=conversational, limits=settings.limits)


def load_reward(where: str) -> RewardFunction:
    """Load a user's reward function.

    Args:
        where: file.py:function.

    Returns:
        The function.

    Raises:
        ValueError: if there is no such file, or no such function in it, or if it is a class.
    """
    file, _, name = where.rpartition(":")
    path = Path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(
            f"rewards={where!r}: there is no file {file}, or it does not end in .py. Pass --rewards "
            "path/to/file.py:function."
        )
    # A dataclass in the file looks up its own module, so register it; the path as name cannot hide another module.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise ValueError(
            f"rewards={where!r}: {file} cannot be imported: {type(error).__name__}: {error}. Fix the file."
        ) from error
    found = vars(module).get(name)
    if isinstance(found, type):
        raise ValueError(
            f"rewards={where!r}: {name} is a class, and a reward is one of its objects. Write `judge = {name}(...)` "
            f"into the file and pass {file}:judge."
        )
    if not callable(found):
        raise ValueError(
            f"rewards={where!r}: {file} defines no function {name!r}. Pass the name of a function in it: "
            f"{', '.join(key for key, value in vars(module).items() if callable(value) and not key.startswith('_'))}."
        )
    return found
