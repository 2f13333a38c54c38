"""The recipes' commands, memory, seconds and GPU-hours, for docs/recipes.md.

    python -m tools.recipes                                   # write the page
    python -m tools.recipes --check                           # say whether it would change
    python -m tools.recipes --recipe math-1.5b-8k --card h200 # print one, for another card

The plan is that of `--plan --device`, the rates are those of common/memory/cards.py. What was measured is read from
benchmarks/results/recipes.json, which `python -m benchmarks.gpu --recipe NAME` writes.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.recipes import RECIPES, ROOT, Planned, measured, planned
from common.memory import constants
from common.memory.cards import GB, card, rates
from common.memory.seconds import Part, Tokens, sampling, step_seconds
from GRPO.grpo_trainer import GRPOConfig

PAGE = ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- table: python -m tools.recipes -->", "<!-- end of the table -->"
# GB of the plan, and the card whose rates stand for that size.
CARDS = ((24, "4090"), (40, "a100-40gb"), (80, "a100-80gb"), (80, "h100"))
PHASES = ("sample", "score", "logprobs", "update", "push", "offload")


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


def described(config: GRPOConfig) -> str:
    """The settings that decide what is learned and how long it takes."""
    trained = f"LoRA of rank {config.lora_r}" if config.use_lora else "all weights"
    base = ", the base in 4 bits" if config.load_in_4bit else ""
    evaluated = f"{config.num_eval_prompts} x {config.eval_num_samples} completions every {config.eval_every} steps"
    return (
        f"{config.num_steps} steps of {config.prompts_per_step} prompts x {config.num_generations} completions of at "
        f"most {config.max_completion_length:,} tokens after prompts of at most {config.max_prompt_length}; {trained}"
        f"{base}, learning rate {config.learning_rate:g}, KL {config.kl_coef:g}, mean over {config.average_over}; "
        f"evaluation: {evaluated}."
    )


def row(name: str, gigabytes: int, rated: str) -> str:
    """A line of a recipe's table."""
    found = estimate(name, gigabytes, rated)
    plan, config = found.planned.plan, found.planned.config
    choices = plan.choices
    seconds = [f"{found.parts[phase].seconds:.1f}" if phase in found.parts else "" for phase in PHASES]
    known = [each for each in measured() if each["recipe"] == name and each["rates"] == rated]
    state = measured_row(known[-1], config) if known else "computed, not measured"
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


def measured_row(found: dict[str, Any], config: GRPOConfig) -> str:
    """What a measurement says, for the last column."""
    share = found["prompts"] / config.prompts_per_step
    step = found["seconds"]["step"] / share
    part = "" if share == 1 else f", from {found['prompts']} of {config.prompts_per_step} prompts"
    return (
        f"measured: {step:.0f} s a step, {config.num_steps * step / 3600:.1f} h, {found['weights']} weights, "
        f"{found['length']:.0f} tokens each{part}; {found['gpu']}"
    )


def section(name: str) -> list[str]:
    """A recipe: command, settings, table, arithmetic."""
    recipe = RECIPES[name]
    first = estimate(name, *CARDS[0])
    heads = ["card", "added", "device GB", "host GB", "offload", "tokens of a micro-batch", "places in vLLM"]
    heads += [*PHASES, "s a step", "all at full length", "GPU-hours", "state"]
    lines = [f"### {name}: {recipe.title}", "", f"    {recipe.command()}", ""]
    lines += [described(planned(name, CARDS[-1][0]).config), ""]
    lines += [f"Assumed: prompts of {recipe.prompt} tokens, completions of {recipe.completion} ({recipe.why}).", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [row(name, *each) for each in CARDS]
    for gigabytes in dict.fromkeys(each for each, _ in CARDS):
        if refused := planned(name, gigabytes).refused:
            lines += ["", f"On {gigabytes} GB the command without what is added is refused: `{refused}`"]
    lines += ["", f"The arithmetic of a step on {CARDS[0][0]} GB with the rates of a {CARDS[0][1]}:", ""]
    lines += ["| phase | arithmetic | s |", "|---|---|---|"]
    lines += [f"| {phase} | {part.how} | {part.seconds:.1f} |" for phase, part in first.parts.items()]
    lines += [f"| sum | | {first.step:.1f} |", ""]
    return lines


def assumptions() -> list[str]:
    """The rates of the cards, and what of them a run is assumed to reach."""
    lines = ["| card | memory, GB/s | bfloat16, TFLOPS | float32, TFLOPS | link, GB/s one way | source |"]
    lines.append("|---" * 6 + "|")
    for _, name in CARDS:
        found = rates(name)
        cells = [f"{found.bandwidth / GB:.0f}", f"{found.flops / 1e12:.0f}", f"{found.flops_float32 / 1e12:g}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {found.link / GB:.0f} | {found.source} |")
    return [
        *lines,
        "",
        f"Reached of these: {constants.DECODING_BANDWIDTH:.0%} of the bandwidth while decoding, "
        f"{constants.SAMPLING_FLOPS:.0%} of the FLOPS in vLLM, {constants.PASS_FLOPS:.0%} in our passes; "
        f"{1e3 * constants.DECODING_ROUND:.0f} ms of Python and sampling for each round of decoding; "
        f"{constants.HOST_BANDWIDTH / 1e9:.0f} GB/s of main memory for `adamw_host`.",
        "",
    ]


def page() -> str:
    """The whole page, as this command writes it."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    lines = [*assumptions(), *[line for name in RECIPES for line in section(name)]]
    return "\n".join([before + BEGIN, "", *lines, END + rest.split(END)[1]])


def show(name: str, rated: str) -> None:
    """Print a recipe's line and arithmetic for a card."""
    gigabytes = int(card(rated).total / GB)
    found = estimate(name, gigabytes, rated)
    print(found.planned.command)
    if found.planned.refused:
        print(f"changed, since: {found.planned.refused}")
    for phase, part in found.parts.items():
        print(f"{phase}: {part.seconds:.1f} s: {part.how}")
    print(f"computed, not measured: {found.step:.1f} s a step, {found.hours:.1f} GPU-hours in all")


def main() -> None:
    """Write the page, say whether it would change, or print one recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page would change")
    parser.add_argument("--recipe", choices=RECIPES, help="print this one")
    parser.add_argument("--card", default="a100-80gb", help="for which card --recipe is computed")
    options = parser.parse_args()
    if options.recipe:
        try:
            return show(options.recipe, options.card)
        except ValueError as error:
            sys.exit(f"error: {error}")
    text = page()
    differs = PAGE.read_text(encoding="utf-8") != text
    if options.check:
        print(f"{PAGE.relative_to(ROOT)} {'differs' if differs else 'is as computed'}")
        sys.exit(differs)
    PAGE.write_text(text, encoding="utf-8")
    return print(f"{PAGE.relative_to(ROOT)} {'written' if differs else 'was as computed'}")


if __name__ == "__main__":
    main()
