"""Seconds and hours of the recipes on a card, computed, and the lines of docs/recipes.md with what was measured."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.recipes import Planned, measured, planned
from common.memory.cards import GB, rates
from common.memory.seconds import Part, Tokens, sampling, step_seconds
from GRPO.grpo_trainer import GRPOConfig

PHASES = ("sample", "score", "logprobs", "update", "push", "offload")
HEADS = ("card", "added", "device GB", "host GB", "offload", "tokens of a micro-batch", "places in vLLM", *PHASES)
HEADS = (*HEADS, "s a step", "all at full length", "GPU-hours", "state")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A recipe on a card.

    Attributes:
        planned: its settings and its plan.
        parts: of a step, by phase.
        step: seconds.
        longest: seconds of a step whose completions are all as long as allowed.
        hours: of all steps and evaluations.
    """

    planned: Planned
    parts: dict[str, Part]
    step: float
    longest: float
    hours: float


@cache
def estimate(name: str, gigabytes: int, rated: str) -> Estimate:
    """Compute a recipe's time on a card.

    Args:
        name: key of RECIPES.
        gigabytes: that the plan is made for.
        rated: the card whose rates count.
    """
    found = planned(name, gigabytes)
    config, plan, tokens = found.config, found.plan, found.recipe.tokens(found.config)
    parts = step_seconds(config, plan, rates(rated), tokens)
    step = _sum(parts)
    held_out = sampling(config, plan, rates(rated), found.recipe.held_out(config)).seconds
    evaluations = 1 + config.num_steps // config.eval_every if config.eval_every else 0
    return Estimate(
        planned=found,
        parts=parts,
        step=step,
        longest=_sum(step_seconds(config, plan, rates(rated), full_length(tokens))),
        hours=(config.num_steps * step + evaluations * held_out) / 3600,
    )


def full_length(tokens: Tokens) -> Tokens:
    """The same with completions that are all as long as allowed."""
    return replace(tokens, completion=tokens.longest)


def _sum(parts: dict[str, Part]) -> float:
    return sum(part.seconds for part in parts.values())


def row(name: str, gigabytes: int, rated: str, known: list[dict[str, Any]] | None = None) -> str:
    """A line of a recipe's table.

    Args:
        name: of the recipe.
        gigabytes: that the plan is made for.
        rated: the card whose rates count.
        known: measurements, the newest last; None: those of the repository.
    """
    found = estimate(name, gigabytes, rated)
    plan, config = found.planned.plan, found.planned.config
    choices = plan.choices
    seconds = [f"{found.parts[phase].seconds:.1f}" if phase in found.parts else "" for phase in PHASES]
    known = measured() if known is None else known
    fitting = [each for each in known if each["recipe"] == name and each["rates"] == rated]
    state = as_measured(fitting[-1], config) if fitting else "computed, not measured"
    cells = [
        f"{gigabytes} GB, {rated}",
        f"`{' '.join(found.planned.more)}`" if found.planned.more else "as it is",
        f"{plan.peak.on_device / GB:.1f}",
        f"{plan.host_peak.on_host / GB:.0f}",
        choices.offload,
        f"{choices.max_tokens_per_microbatch:,}",
        f"{plan.sequences}",
        *seconds,
        f"**{found.step:.0f}**",
        f"{found.longest:.0f}",
        f"**{found.hours:.1f}**",
        state,
    ]
    return f"| {' | '.join(cells)} |"


def as_measured(found: dict[str, Any], config: GRPOConfig) -> str:
    """What a measurement says, for the last column."""
    share = found["prompts"] / config.prompts_per_step
    step = found["seconds"]["step"] / share
    part = "" if share == 1 else f", from {found['prompts']} of {config.prompts_per_step} prompts"
    return (
        f"measured: {step:.0f} s a step, {config.num_steps * step / 3600:.1f} h, {found['weights']} weights, "
        f"{found['length']:.0f} tokens each{part}; {found['gpu']}"
    )
