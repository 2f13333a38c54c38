"""Which rewards a run has: the task's by name, functions from files and modules, and reward models."""

from dataclasses import dataclass
from pathlib import Path

from common.rewards.forms import AUTO
from common.rewards.load import load_reward, reward_name
from common.rewards.reward_model import RewardModel
from common.rewards.scorer import RewardFunction, Scorer
from common.rewards.worker import DEFAULT_LIMITS, Limits


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How rewards are computed.

    Attributes:
        reward_format: what functions from files and modules get: "text", "conversational" (chat messages), or "auto",
            which the function decides; see forms.py.
        max_tokens_per_microbatch: padded tokens per forward pass of a reward model.
        dtype: precision of a reward model on a CPU, as the setting; on CUDA it is as saved.
        limits: time and memory that a rule may use per row; None: no limits.
    """

    reward_format: str = AUTO
    max_tokens_per_microbatch: int = 16384
    dtype: str = "auto"
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
    """Choose rewards: the task's by name, functions from files and modules, and reward models.

    Args:
        available: the task's reward functions.
        default_weights: the task's weights.
        names: the setting `rewards`: names of the task's functions, file.py:function, module:function, folders or
            hub ids of reward models; None: all rewards of the task.
        weights: the setting `reward_weights`; None: the task's weights, and 1 for other rewards.
        settings: how rewards are computed.

    Returns:
        The scorer; its reward models are not loaded yet.

    Raises:
        ValueError: for an unknown name, one that the task has given to another reward, a missing file, module or
            function, or a model that does not give a single score.
    """
    if names is None:
        return Scorer(available, default_weights, limits=settings.limits)
    functions, forms = {}, {}
    for name in names:
        if name in available:
            functions[name] = available[name]
        elif ":" in name:
            function = load_reward(name)
            functions[reward_name(name)], forms[reward_name(name)] = function, settings.reward_format
        elif is_reward_model(name):
            model = RewardModel(
                name, max_tokens_per_microbatch=settings.max_tokens_per_microbatch, dtype=settings.dtype
            )
            functions[model.name] = model
        else:
            raise ValueError(
                f"rewards={name!r}: {_has(available)}. Pass --rewards with {'one of these, with ' * bool(available)}"
                "file.py:function or module:function for a function, or with the folder or hub id of a reward model."
                f"{_dotted(name)}"
            )
    if len(functions) != len(names):
        raise ValueError(f"rewards={names}: two rewards have the same name. Pass --rewards with distinct names.")
    for given, (name, function) in zip(names, functions.items(), strict=True):
        if name in available and function is not available[name]:
            raise ValueError(
                f"rewards={given!r}: the task has a reward {name!r} of its own, whose name says what is its accuracy, "
                "its format and its weight, so another one would be taken for it. Rename yours, such as "
                f"my_{name}, or pass {name!r} for the one of the task."
            )
    chosen = weights or [default_weights.get(name, 1.0) for name in functions]
    return Scorer(functions, dict(zip(functions, chosen, strict=True)), forms=forms, limits=settings.limits)


def is_reward_model(name: str) -> bool:
    """Whether a name in the setting `rewards` is a folder or hub id, if no reward of the task has it."""
    return ":" not in name and (Path(name).is_dir() or ("/" in name and not name.endswith(".py")))


def _has(available: dict[str, RewardFunction]) -> str:
    return f"the task has {', '.join(available)}" if available else "the task has no rewards of its own"


def _dotted(name: str) -> str:
    """For a function that is written as Python imports it."""
    module, _, function = name.rpartition(".")
    return f" Did you mean {module}:{function}?" if module and function.isidentifier() and function != "py" else ""
