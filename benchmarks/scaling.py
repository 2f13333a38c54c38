"""What a real token costs, whatever the lengths: `python -m benchmarks.scaling`, `--help` for more.

CPU seconds of one update per real token of prompts and completions: with rows of 256 to 8192 tokens, with LoRA, with a
very narrow model, with skewed lengths, and with groups whose scores are all the same. Attention takes more the longer
the rows, so the same is measured with an attention that only passes values on: that must be flat. Then padding.

Start it with OMP_NUM_THREADS=1: the processor time of threads that wait for each other says nothing.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.shapes import save_shape
from benchmarks.timing import machine
from benchmarks.updates import update
from common.cli import run_script
from common.embedded.policy import save_untrained
from common.rollouts import Completion, Rollouts
from common.seeds import hashed_seed
from common.tasks import Task
from common.update.rows import microbatch_rows
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer

PROMPT = "3 + 4 ="
# From here on, tokens must cost the same within the bound; 256 is shown.
SHORTEST, BOUND = 512, 0.15
GROUP = 4


@dataclass(kw_only=True)
class Cost:
    """Of one update.

    Attributes:
        name: of the rows.
        tokens: real ones.
        total: CPU microseconds per real token.
        rest: the same with an attention that only passes values on.
    """

    name: str
    tokens: int
    total: float
    rest: float


def main() -> None:
    """Measure, print the tables, write the numbers."""
    options = _options()
    models = {"tiny width": "narrow", "mini": "mini", "mini, LoRA": "mini"}
    report = {"command": " ".join(["python", "-m", "benchmarks.scaling", *sys.argv[1:]]), "machine": machine()}
    for name in options.models or models:
        with TemporaryDirectory() as folder:
            model = _save(models[name], Path(folder) / "model")
            costs = measure(model, Path(folder), options, use_lora="LoRA" in name)
        report[name] = [vars(cost) for cost in costs]
        print(f"{name}\n{table(costs)}\n", flush=True)
    report["padding"] = padding_table(options.budget)
    print(report["padding"])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(model: Path, folder: Path, options: argparse.Namespace, *, use_lora: bool) -> list[Cost]:
    """Costs of a token, with rows of each length, of skewed lengths, and with dead groups.

    Args:
        model: its folder.
        folder: for the run.
        options: of the command line.
        use_lora: train an adapter alone.
    """
    trainer = _trainer(model, folder / "run", options, use_lora=use_lora)
    work = {str(length): _rows(trainer, [length] * (options.tokens // length)) for length in options.lengths}
    skewed = skewed_lengths(options.tokens // 512, longest=max(options.lengths), mean=512)
    skewed = skewed[: len(skewed) // GROUP * GROUP]
    work["skewed"] = _rows(trainer, skewed)
    work["skewed, half of the groups dead"] = _with_dead_groups(trainer, work["skewed"])
    seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
    update(trainer, _rows(trainer, [SHORTEST]))  # what a first update makes is no part of it
    for number in range(options.rounds):
        for name, rollouts in work.items():
            # With attention once: at 8192 tokens it takes nearly all of the time, and the rest is what must be exact.
            for leaves_out, way in {True: _without_attention, **({} if number else {False: nullcontext})}.items():
                with way():
                    start = time.process_time()
                    update(trainer, rollouts)
                    seconds[name, leaves_out].append(time.process_time() - start)
    costs = []
    for name, rollouts in work.items():
        tokens = int(rollouts.total_lengths.sum())
        total, rest = (min(seconds[name, leaves_out]) / tokens * 1e6 for leaves_out in (False, True))
        costs.append(Cost(name=name, tokens=tokens, total=total, rest=rest))
    return costs


def table(costs: list[Cost]) -> str:
    """Costs as lines, and whether they are flat."""
    lines = [f"{'rows of':32} {'tokens':>7} {'us/token':>9} {'without attention':>18} {'to mean':>8}"]
    flat = [cost.rest for cost in costs if cost.name.isdigit() and int(cost.name) >= SHORTEST]
    mean = sum(flat) / len(flat)
    for cost in costs:
        lines.append(f"{cost.name:32} {cost.tokens:7} {cost.total:9.1f} {cost.rest:18.1f} {cost.rest / mean:8.2f}")
    largest = max(abs(rest / mean - 1) for rest in flat)
    said = f"flat within {largest:.1%} from {SHORTEST} on"
    return "\n".join([*lines, said if largest <= BOUND else f"NOT {said.replace('within', 'within 15 %: it is')}"])


def padding_table(budget: int) -> str:
    """Padded tokens of micro-batches per real token, for skewed rows of up to 1500 tokens after prompts of 100."""
    lines = [f"{'skewed rows':>12} {'padded / real':>14} {'passes':>7}   budget {budget}"]
    for num_rows in (32, 128, 512):
        lengths = torch.tensor([100 + length for length in skewed_lengths(num_rows, longest=1500, mean=380)])
        passes = microbatch_rows(lengths, budget)
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in passes)
        lines.append(f"{num_rows:12} {padded / int(lengths.sum()):14.3f} {len(passes):7}")
    return "\n".join(lines)


def skewed_lengths(num_rows: int, *, longest: int, mean: int) -> list[int]:
    """Log-normal lengths, most of them short, a few as long as allowed."""
    noise = torch.randn(num_rows, generator=torch.Generator().manual_seed(hashed_seed(0, "skewed")))
    lengths = mean * (0.9 * noise - 0.4).exp()  # e^(0.9^2 / 2) = e^0.4
    return lengths.long().clamp(32, longest).tolist()


def _save(name: str, folder: Path) -> Path:
    if name == "narrow":
        return save_untrained(folder, hidden_size=32, intermediate_size=64, max_position_embeddings=16384)
    return save_shape(name, folder)


def _trainer(model: Path, folder: Path, options: argparse.Namespace, *, use_lora: bool) -> GRPOTrainer:
    config = GRPOConfig(
        model=str(model),
        output_dir=str(folder),
        sampler="transformers",
        dtype="float32",
        learning_rate=0.0,  # every round starts from the same weights
        use_lora=use_lora,
        num_generations=GROUP,
        max_prompt_length=32,
        max_completion_length=max(options.lengths),
        max_tokens_per_microbatch=options.budget,
        num_minibatches=1,
        prompts_per_step=1,
        eval_every=0,
        save_every=0,
        kl_coef=0.0,
        max_logprob_diff=0.0,  # no sampler has drawn these tokens
        report_to=[],
        progress=False,
    )
    task = Task(train=[{"prompt": PROMPT}], rewards={"none": _no_reward})
    trainer = GRPOTrainer(config, task=task)
    trainer.current_step = 1
    return trainer


def _no_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    return [0.0] * len(completions)


def _rows(trainer: GRPOTrainer, lengths: list[int]) -> Rollouts:
    """Rows of random tokens with a prompt, together of these lengths, and random advantages."""
    generator = torch.Generator().manual_seed(hashed_seed(0, *lengths))
    prompts = trainer.prompts.batch(1, num_prompts=len(lengths))
    behind = len(trainer.tokenizer(PROMPT).input_ids)
    tokens = [torch.randint(4, 60, (n - behind,), generator=generator).tolist() for n in lengths]
    completions = [Completion(ids, [-4.0] * len(ids), False) for ids in tokens]
    rollouts = Rollouts.from_completions(prompts, completions, [""] * len(tokens), num_generations=1)
    trainer.batches.number(rollouts)
    rollouts.advantages = rollouts.spread(torch.randn(len(rollouts), generator=generator))
    return rollouts


def _with_dead_groups(trainer: GRPOTrainer, rollouts: Rollouts) -> Rollouts:
    """The rows without every other group, as sparse=true trains on them: the scores of these are all the same."""
    scores = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(0))
    is_dead = torch.arange(len(rollouts)) // GROUP % 2 == 1
    return trainer.only_with_signal(rollouts, torch.where(is_dead, 0.0, scores))


@contextmanager
def _without_attention() -> Iterator[None]:
    """Have every attention give the values of its own place: all that is left of a layer takes the same per token."""

    def values_alone(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple:
        per_group = query.shape[1] // value.shape[1]
        # Queries and keys stay in the graph, so that their backward passes are counted.
        kept = value.repeat_interleave(per_group, 1) + 0.0 * (query + key.repeat_interleave(per_group, 1))
        return kept.transpose(1, 2).contiguous(), None

    known = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = values_alone
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = known


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=("tiny width", "mini", "mini, LoRA"), help="default: all")
    parser.add_argument("--lengths", nargs="*", type=int, default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=16384, help="real tokens of an update (default: 16384)")
    parser.add_argument("--budget", type=int, default=16384, help="padded tokens of a micro-batch (default: 16384)")
    parser.add_argument("--rounds", type=int, default=5, help="timed updates without attention (default: 5)")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
