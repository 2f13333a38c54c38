"""What a run says once at its start about settings that are allowed, but hardly meant."""

from dataclasses import fields

from common.config import RLConfig
from common.environment import said_of_threads


def remarks(config: RLConfig) -> list[str]:
    """The remarks on a run's settings.

    Args:
        config: the run's settings; `origins` tells which of them the user set.

    Returns:
        Lines: the settings that the user set and that do nothing next to the others, then an optimizer that saves
        little, then oddities of the learning rate, then how many threads there are, if not as many as CPUs. None for
        settings as shipped.
    """
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in config.idle_settings().items():
        if _is_set_by_user(config, name):
            names_by_reason.setdefault(reason, []).append(f"{name}={vars(config)[name]}")
    lines = [
        f"{', '.join(names)}: {'they do' if len(names) > 1 else 'it does'} nothing, since {reason}"
        for reason, names in names_by_reason.items()
    ]
    return [*lines, *_remarks_on_optimizer(config), *_remarks_on_rate(config), *said_of_threads()]


def _is_set_by_user(config: RLConfig, name: str) -> bool:
    """Whether a setting was typed, or has another value than it comes with.

    The scripts ship with some values that are not the defaults of the class: those are of settings that act.
    """
    default = next(field.default for field in fields(config) if field.name == name)
    origin = config.origins.get(name)
    return origin == "" or (vars(config)[name] != default and not str(origin).startswith("preset "))


def _remarks_on_optimizer(config: RLConfig) -> list[str]:
    if config.optimizer == "adamw" or not config.use_lora:
        return []
    return [
        f"optimizer={config.optimizer}: it saves little with use_lora, since only the adapters are trained; adamw is "
        "faster"
    ]


def _remarks_on_rate(config: RLConfig) -> list[str]:
    lines, steps = [], f"num_steps={config.num_steps}"
    highest, last = (
        max(map(config.scheduled_rate, range(1, config.num_steps + 1))),
        config.scheduled_rate(config.num_steps),
    )
    if config.warmup_steps >= max(config.num_steps, 2):
        lines.append(
            f"the learning rate rises until the last step, where it is {last:.3g}: warmup_steps={config.warmup_steps} "
            f"is not shorter than {steps}"
        )
    elif highest < config.learning_rate / 2:
        lines.append(
            f"the learning rate is {highest:.3g} at most, not learning_rate={config.learning_rate:.3g}: with {steps}, "
            f"warmup_steps={config.warmup_steps} and lr_scheduler={config.lr_scheduler} no step is at its peak"
        )
    if config.lr_scheduler != "constant" and config.min_lr_ratio == 1:
        lines.append("the learning rate does not fall, since min_lr_ratio=1: as with lr_scheduler=constant")
    if config.learning_rate and last == 0:
        lines.append(
            f"the last step has a learning rate of 0 and changes nothing, since min_lr_ratio={config.min_lr_ratio}"
        )
    return lines
