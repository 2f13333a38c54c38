"""Which models train on which card: the table of docs/memory.md and the presets gpu-*.yaml, by the memory plan.

    python -m tools.memory_table           # write both; minutes
    python -m tools.memory_table --check   # say what would change

Models are the shapes of Qwen2.5 in common/memory/fit.py: nothing is read from the hub.
"""

import argparse
import math
import sys
from functools import cache
from pathlib import Path

from common.memory.cards import GB, Card
from common.memory.cast import Casting
from common.memory.fit import without_storage
from common.memory.plan import Machine, Plan, make_plan
from common.memory.work import Work
from PPO.ppo_trainer import PPOConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE, PRESETS = ROOT / "docs" / "memory.md", ROOT / "common" / "presets"
BEGIN, END = "<!-- table: python -m tools.memory_table -->", "<!-- end of the table -->"

MODELS = ("0.5B", "1.5B", "3B", "7B", "14B")
CARDS = (12, 16, 24, 40, 80)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
METHODS = {
    "full": {"optimizer": "adamw_host"},
    "LoRA": {"use_lora": True},
    "QLoRA": {"use_lora": True, "load_in_4bit": True},
}
# A critic-free algorithm has no value model; all have a KL to the reference.
ALGORITHMS = {"critic-free": None, "PPO, own": "own", "PPO, shared": "shared"}
# Of the scripts as shipped.
BATCH = {"prompts_per_step": 64, "num_generations": 4, "kl_coef": 0.01, "gradient_checkpointing": True}
SHARED_PROMPT = 512


class WithoutValues(PPOConfig):
    """The settings of an algorithm that trains the policy alone."""

    other_models = ()


@cache
def casting(size: str) -> Casting:
    """Counts the parameters of a model once for all cards, which differ in their bytes alone."""
    return Casting(PPOConfig(use_lora=True), without_storage(size), Card(name="a GPU", total=0))


@cache
def work(context: int) -> Work:
    """The bytes of passes over rows of a context, for all models and cards."""
    return Work(PPOConfig(**BATCH, **lengths(context)))


def lengths(context: int) -> dict[str, int]:
    """Prompt and completion that fill a context."""
    prompt = min(SHARED_PROMPT, context // 2)
    return {"max_prompt_length": prompt, "max_completion_length": context - prompt}


def plan(size: str, method: str, backbone: str | None, gigabytes: int, context: int, offload: str) -> Plan:
    """The plan of a run."""
    settings = BATCH | METHODS[method] | lengths(context) | {"offload": offload, "model": f"Qwen2.5-{size}"}
    settings |= {"max_tokens_per_microbatch": "auto", "vllm_memory_share": "auto"}
    kind = WithoutValues if backbone is None else PPOConfig
    config = kind(**settings, value_backbone=backbone or "own")
    card = Card(name=f"{gigabytes} GB", total=gigabytes * GB)
    return make_plan(config, casting(size).cast(config), Machine(card=card), work=work(context))


def cell(size: str, method: str, backbone: str | None, gigabytes: int) -> str:
    """The longest context that fits with all models on the device, and in brackets with idle ones off it."""
    longest = dict.fromkeys(("never", "always"), 0)
    for offload in longest:
        for context in CONTEXTS:
            if not plan(size, method, backbone, gigabytes, context, offload).fits:
                break
            longest[offload] = context
    together, alone = longest["never"], max(longest.values())
    if not alone:
        return "no"
    bracket = f"({alone // 1024}K)" if alone > together else ""
    return " ".join(part for part in (f"{together // 1024}K" if together else "", bracket) if part)


def rows() -> list[tuple[str, str, str | None, str]]:
    """Model, method, value backbone and algorithm of each line."""
    return [
        (size, method, backbone, name)
        for size in MODELS
        for method in METHODS
        for name, backbone in ALGORITHMS.items()
        if not (method == "full" and (backbone == "shared" or size == "14B"))
    ]


def table() -> list[str]:
    """The lines of the table."""
    lines = ["| model | method | algorithm | host GB | " + " | ".join(f"{each} GB" for each in CARDS) + " |"]
    lines.append("|---" * (len(CARDS) + 4) + "|")
    for size, method, backbone, name in rows():
        cells = [cell(size, method, backbone, gigabytes) for gigabytes in CARDS]
        host = plan(size, method, backbone, max(CARDS), CONTEXTS[0], "always").host_peak.on_host
        lines.append(f"| {size} | {method} | {name} | {math.ceil(host / GB)} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def preset(gigabytes: int) -> str:
    """A preset's file: what the plan chooses for GRPO with LoRA on 1.5B, at the lengths of the scripts."""
    found = plan("1.5B", "LoRA", None, gigabytes, 1536, "auto")
    assert found.fits
    choices = found.choices
    pairs = {
        "max_tokens_per_microbatch": ("auto", choices.max_tokens_per_microbatch),
        "gradient_checkpointing": ("true", "true"),
        "offload": ("auto", "auto"),
        "vllm_memory_share": ("auto", math.floor(100 * choices.vllm_memory_share) / 100),
        "vllm_sleep_level": (1, 1),
    }
    return (
        f"# Memory settings for a 1.5B policy with LoRA on a card of {gigabytes} GB. Only the memory group: no result "
        "changes.\n"
        "# setting: [value of the scripts as shipped, value that replaces it]. An edited line of a script stays.\n"
        + "".join(f"{name}: [{shipped}, {value}]\n" for name, (shipped, value) in pairs.items())
    )


def files() -> dict[Path, str]:
    """What this command writes, by file."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    found = {PAGE: "\n".join([before + BEGIN, "", *table(), "", END + rest.split(END)[1]])}
    return found | {PRESETS / f"gpu-{gigabytes}gb.yaml": preset(gigabytes) for gigabytes in CARDS}


def main() -> None:
    """Write the page and the presets, or say what would change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file would change")
    options = parser.parse_args()
    changed = []
    for path, text in files().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            changed.append(path)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    print(*[f"{path.relative_to(ROOT)} {'differs' if options.check else 'written'}" for path in changed], sep="\n")
    if changed and options.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
