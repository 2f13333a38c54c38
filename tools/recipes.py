"""The recipes' commands, memory, seconds and GPU-hours, for docs/recipes.md.

    python -m tools.recipes                                   # write the page
    python -m tools.recipes --check                           # say whether it would change
    python -m tools.recipes --recipe math-1.5b-8k --card h200 # print one, for another card

The plan is that of `--plan --device`, the rates are those of common/memory/cards.py. What was measured is read from
benchmarks/results/recipes.json, which `python -m benchmarks.gpu --recipe NAME` writes.
"""

import argparse
import re
import sys

from benchmarks.estimates import HEADS, estimate, row
from benchmarks.recipes import RECIPES, ROOT, measured, planned
from common.memory import constants
from common.memory.cards import GB, card, rates
from GRPO.grpo_trainer import GRPOConfig

PAGE = ROOT / "docs" / "recipes.md"
# A part of the page that this command writes, between two comments.
PART = re.compile(r"(<!-- (\w+): python -m tools.recipes -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
# GB of the plan, and the card whose rates stand for that size.
CARDS = ((24, "4090"), (40, "a100-40gb"), (80, "a100-80gb"), (80, "h100"))


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


def section(name: str) -> list[str]:
    """A recipe: command, settings, table, arithmetic."""
    recipe = RECIPES[name]
    first = estimate(name, *CARDS[0])
    lines = [f"### {name}", "", f"{recipe.title}:", "", f"    {recipe.command()}", ""]
    lines += [described(planned(name, CARDS[-1][0]).config), ""]
    lines += [f"Assumed: prompts of {recipe.prompt} tokens, completions of {recipe.completion} ({recipe.why}).", ""]
    lines += [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    others = [(each["gigabytes"], each["rates"]) for each in measured() if each["recipe"] == name and each["rates"]]
    lines += [row(name, *each) for each in dict.fromkeys([*CARDS, *others])]
    for gigabytes in dict.fromkeys(each for each, _ in CARDS):
        if refused := planned(name, gigabytes).refused:
            lines += ["", f"The plan for {gigabytes} GB says to the command as it is:", "", f"    {refused}"]
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
    ]


def anchor(name: str) -> str:
    """Of a heading, as GitHub makes it."""
    return name.replace(".", "")


def short() -> list[str]:
    """GPU-hours of each recipe on each card."""
    lines = [f"| GPU-hours, computed | {' | '.join(f'{size} GB, {name}' for size, name in CARDS)} |"]
    lines.append("|---" * (len(CARDS) + 1) + "|")
    for name, recipe in RECIPES.items():
        hours = [f"{estimate(name, *each).hours:.1f}" for each in CARDS]
        lines.append(f"| [{name}](#{anchor(name)}): {recipe.title} | {' | '.join(hours)} |")
    return lines


def page() -> str:
    """The whole page, as this command writes it."""
    parts = {"hours": short(), "rates": assumptions(), "recipes": []}
    for name in RECIPES:
        parts["recipes"] += section(name)

    def written(found: re.Match[str]) -> str:
        text = "\n".join(parts[found[2]]).strip()
        return f"{found[1]}\n{text}\n\n{found[3]}"

    return PART.sub(written, PAGE.read_text(encoding="utf-8"))


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
