"""What 7B, 32B and 72B need on 8, 64 and 512 GPUs, and how long a step takes: computed, for docs/several-gpus.md.

    python -m tools.several_gpus                       # write the page
    python -m tools.several_gpus --check               # say whether it would change
    python -m tools.several_gpus --model 32B --gpus 64 # print the arithmetic of one line

The plan is that of `--plan --device h100 --processes N --nodes N/8`, the rates are those of common/memory/cards.py,
and what is assumed of them is in common/memory/constants.py. Models are the shapes of Qwen2.5, read from no hub.
"""

import argparse
import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from common.memory import constants
from common.memory.cards import GB, card, rates
from common.memory.cast import Casting
from common.memory.fit import without_storage
from common.memory.plan import Machine, Plan, make_plan
from common.memory.remedies import shared_engines
from common.memory.seconds import Part, Tokens, step_seconds
from common.memory.work import Work
from GRPO.grpo_trainer import GRPOConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "several-gpus.md"
PART = re.compile(
    r"(<!-- several GPUs: python -m tools.several_gpus -->\n).*?(<!-- end of several GPUs -->)", re.DOTALL
)
CARD, PER_MACHINE = "h100", 8
MODELS, GPUS = ("7B", "32B", "72B"), (8, 64, 512)
# 4,096 completions of 2,000 tokens, all at full length, after prompts of 200.
SETTINGS = {"prompts_per_step": 512, "num_generations": 8, "max_prompt_length": 256, "max_completion_length": 2000}
SETTINGS |= {"shard": "full", "gradient_checkpointing": True, "kl_coef": 0.0, "vllm_max_num_seqs": 512}
SETTINGS |= {"max_tokens_per_microbatch": "auto", "vllm_memory_share": "auto"}
TOKENS = Tokens(prompts=512, generations=8, prompt=200, completion=2000, longest=2000)
CONTEXTS = tuple(1 << n for n in range(12, 18))
# From the one that changes nothing to the one that trains something else.
METHODS = {
    "all weights": {},
    "all weights, `optimizer=adamw_host`": {"optimizer": "adamw_host"},
    "LoRA, r=64": {"use_lora": True},
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """A model on so many GPUs.

    Attributes:
        method: key of METHODS.
        config: the settings.
        plan: of them.
        parts: seconds of a step, by phase.
    """

    method: str
    config: GRPOConfig
    plan: Plan
    parts: dict[str, Part]

    @property
    def step(self) -> float:
        """Seconds of a step, phases one after the other."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and moments on a GPU."""
        policy = self.plan.cast.policy
        return policy.weights + policy.gradients + policy.moments


@cache
def casting(size: str) -> Casting:
    """Counts the parameters of a model once."""
    return Casting(GRPOConfig(**SETTINGS), without_storage(size), card(CARD))


@cache
def work(size: str, gpus: int) -> Work:
    """Bytes of passes; size keeps those of different models apart."""
    return Work(GRPOConfig(**SETTINGS), gpus)


def planned(size: str, gpus: int, method: str, parts: int) -> tuple[GRPOConfig, Plan]:
    """The settings and the plan of a run.

    Args:
        size: of the model.
        gpus: in all, 8 in a machine.
        method: key of METHODS.
        parts: processes that share an engine.
    """
    config = GRPOConfig(model=f"Qwen2.5-{size}", vllm_tensor_parallel=parts, **SETTINGS | METHODS[method])
    machine = Machine(card=card(CARD), processes=gpus, nodes=max(gpus // PER_MACHINE, 1))
    return config, make_plan(config, casting(size).cast(config, gpus), machine, work=work(size, gpus))


def lines_of(size: str, gpus: int, method: str) -> list[Line]:
    """Of the engines that fit, one for each number of processes that share one."""
    machine = Machine(card=card(CARD), processes=gpus, nodes=max(gpus // PER_MACHINE, 1))
    numbers = (1, *shared_engines(GRPOConfig(**SETTINGS), casting(size), machine))
    found = [planned(size, gpus, method, parts) for parts in numbers]
    return [
        Line(method=method, config=config, plan=plan, parts=step_seconds(config, plan, rates(CARD), TOKENS))
        for config, plan in found
        if plan.fits
    ]


@cache
def line(size: str, gpus: int) -> Line | None:
    """The first method that fits, with the engines that make its step shortest; None: none fits."""
    for method in METHODS:
        if found := lines_of(size, gpus, method):
            return min(found, key=lambda each: each.step)
    return None


def longest(size: str, gpus: int, found: Line) -> int:
    """The longest row that fits with the settings of a line, doubled from 4,096 tokens to 131,072."""
    machine, most = Machine(card=card(CARD), processes=gpus, nodes=found.plan.nodes), 0
    for context in CONTEXTS:
        config = replace(found.config, max_completion_length=context - found.config.max_prompt_length)
        cast = casting(size).cast(config, gpus)
        if not make_plan(config, cast, machine, work=Work(config, gpus)).fits:
            break
        most = context
    return most


def fewest(size: str) -> int:
    """The fewest GPUs, doubled from one, on which all weights of a model are trained by adamw."""
    gpus = 1
    while not lines_of(size, gpus, "all weights"):
        gpus *= 2
    return gpus


def row(size: str, gpus: int) -> str:
    """A line of the table."""
    found = line(size, gpus)
    if found is None:
        return f"| {size} | {gpus} | does not fit |{' |' * 11}"
    plan = found.plan
    seconds = [f"{found.parts[name].seconds:.1f}" if name in found.parts else "" for name in ("sample", "update")]
    cells = [
        *(size, f"{gpus}", found.method, f"{found.config.vllm_tensor_parallel}"),
        *(f"{found.state / GB:.1f}", f"{plan.peak.on_device / GB:.0f} ({plan.peak.name})"),
        f"{PER_MACHINE * plan.host_peak.on_host / GB:,.0f}",
        f"{plan.choices.max_tokens_per_microbatch:,}",
        f"{plan.sequences}",
        f"{longest(size, gpus, found) // 1024}K",
        *seconds,
        f"{found.parts['push'].seconds:.1f}",
        f"**{found.step:.0f}**",
    ]
    return f"| {' | '.join(cells)} |"


def section() -> list[str]:
    """The table, and what it assumes."""
    found = rates(CARD)
    heads = ("model", "GPUs", "trained", "`vllm_tensor_parallel`", "state, GB", "most, GB", "host of a machine, GB")
    heads += (
        "tokens of a micro-batch",
        "completions at once",
        "longest row",
        "sample s",
        "update s",
        "push s",
        "s a step",
    )
    machines = {size: fewest(size) for size in MODELS}
    least = "; ".join(f"{size}: {gpus}" for size, gpus in machines.items())
    return [
        "**Computed, not measured.** A step of 512 prompts x 8 completions of 2,000 tokens each; H100 of 80 GB, eight "
        "in a machine; `shard=full`, gradient checkpointing, no KL. *state* is weights, gradients and moments of the "
        "policy on each GPU, *most* the plan's largest phase there. The first kind of training that fits is shown, "
        "with the engines that make its step shortest. *longest row*: prompt and completion, up to 128K, with which "
        "these settings still fit.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(row(size, gpus) for size in MODELS for gpus in GPUS),
        "",
        f"Fewest GPUs, doubled from one, for all weights with `optimizer=adamw`: {least}.",
        "",
        f"Rates: {found.flops / 1e12:.0f} TFLOPS in bfloat16, of which passes reach {constants.PASS_FLOPS:.0%} and "
        f"vLLM {constants.SAMPLING_FLOPS:.0%}; {found.bandwidth / GB:,.0f} GB/s of memory at "
        f"{constants.DECODING_BANDWIDTH:.0%} while decoding, and {1e3 * constants.DECODING_ROUND:.0f} ms for each "
        f"round besides; {found.peers / GB:.0f} GB/s between the GPUs of a machine at {constants.PEERS:.0%}, "
        f"{found.network / GB:.0f} GB/s of network for each GPU at {constants.NETWORK:.0%}, all eight of a machine "
        "together (github.com/NVIDIA/nccl/issues/1218 measured 200 GB/s over 256 H100). "
        f"{1e6 * constants.OPERATION:.0f} µs for each collective operation, and "
        f"{1e6 * constants.OPERATION_OF_NODE:.0f} for each further machine.",
    ]


def page(path: Path) -> str:
    """The whole page, as this command writes it.

    Raises:
        ValueError: it has no place for the table.
    """
    text = path.read_text(encoding="utf-8")
    if not PART.search(text):
        raise ValueError(
            f"{path}: there is no `<!-- several GPUs: python -m tools.several_gpus -->` with its end. Add both lines."
        )
    body = "\n".join(section())
    return PART.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", text)


def show(size: str, gpus: int) -> None:
    """Print the arithmetic of a line."""
    found = line(size, gpus)
    if found is None:
        config, plan = planned(size, gpus, list(METHODS)[-1], 1)
        print(f"{config.model} on {gpus} GPUs: {plan.problem}")
        return
    print(f"{found.config.model} on {gpus} GPUs: {found.method}, engines of {found.config.vllm_tensor_parallel}")
    for name, part in found.parts.items():
        print(f"{name}: {part.seconds:.2f} s: {part.how}")


def main() -> None:
    """Write the page, say whether it would change, or print the arithmetic of a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page would change")
    parser.add_argument("--page", type=Path, default=PAGE, help="that is written")
    parser.add_argument("--model", choices=MODELS, help="print the arithmetic of this one")
    parser.add_argument("--gpus", type=int, default=8, help="for so many GPUs")
    options = parser.parse_args()
    if options.model:
        return show(options.model, options.gpus)
    try:
        text = page(options.page)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    differs = options.page.read_text(encoding="utf-8") != text
    if options.check:
        print(f"{options.page} {'differs' if differs else 'is as computed'}")
        sys.exit(differs)
    options.page.write_text(text, encoding="utf-8")
    return print(f"{options.page} {'written' if differs else 'was as computed'}")


if __name__ == "__main__":
    main()
