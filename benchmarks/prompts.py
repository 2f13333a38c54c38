"""What computing a prompt once for all its completions saves: `python -m benchmarks.prompts`, `--help` for more.

Forward and backward passes of the same rows in turns, with padded rows and with packed ones: token_logprobs without
entropy, the gradient of a weighted sum, no optimizer step. Seconds are those of the processor; on a GPU, of the clock.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.shapes import SHAPES, save_shape
from benchmarks.timing import seconds_in_turns
from common.config import RLConfig
from common.embedded import resolve_model
from common.logprobs import sequence_logprobs
from common.models.loading import compute_dtype, load_policy
from common.packing import packing_of
from common.rollouts import Completion, PromptBatch, Rollouts
from common.sequences import Packing, Sequences
from common.update.batches import forward_context
from common.update.shared_prompts import pass_rows

# Prompts, completions of each, tokens of a prompt, of a completion (the longest; the shortest is half of it).
BATCHES = {
    "short-4": (8, 4, 100, 3),
    "short-8": (4, 8, 100, 3),
    "gsm8k": (8, 8, 120, 128),
    "embedded": (32, 8, 16, 16),
}


def main() -> None:
    """Measure each batch and print a row of a table for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default="mini", help=f"a folder, tiny, or one of {', '.join(SHAPES)} (random)")
    parser.add_argument("--lora", action="store_true", help="train an adapter, as use_lora does")
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens of a pass")
    parser.add_argument("--prompts", type=int, help="fewer or more prompts than the batch has")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", choices=BATCHES, action="append", help="default: all")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        model, dtype = _model(options, Path(folder))
    print("| batch | seconds padded | packed | ratio | lowest to highest | tokens padded | packed | packed passes |")
    print("|---|---|---|---|---|---|---|---|")
    for name in options.batch or BATCHES:
        print(_row(name, model, dtype, options), flush=True)


def rows_of(
    prompts: int, num_generations: int, prompt_length: int, completion_length: int, vocabulary: int
) -> Rollouts:
    """Random tokens; completions have lengths between half and all of `completion_length`."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    shortest = completion_length // 2 if completion_length > 3 else completion_length
    lengths = torch.randint(shortest, completion_length + 1, (prompts * num_generations,), generator=generator)
    batch = PromptBatch(
        step=1,
        rows=list(range(prompts)),
        prompt_ids=[tokens(prompt_length) for _ in range(prompts)],
        prompts=[""] * prompts,
        columns={},
    )
    completions = [Completion(tokens(n), [0.0] * n, truncated=False) for n in lengths.tolist()]
    return Rollouts.from_completions(batch, completions, [""] * len(completions), num_generations=num_generations)


def _row(name: str, model: nn.Module, dtype: torch.dtype, options: argparse.Namespace) -> str:
    device = next(model.parameters()).device
    prompts, *sizes = BATCHES[name]
    rows = rows_of(options.prompts or prompts, *sizes, model.config.get_text_config().vocab_size)
    with forward_context(device, dtype):
        packing = packing_of(model)
    if packing is None:
        return f"| {name} | this model gets padded rows |"
    passes = {"padded": _passes(rows, options, None), "packed": _passes(rows, options, packing)}
    backward = partial(_backward, model, dtype)
    ways = {way: partial(backward, parts, packing if way == "packed" else None) for way, parts in passes.items()}
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = seconds_in_turns(ways, rounds=options.rounds, clock=clock)
    ratios = [before / after for before, after in zip(seconds["padded"], seconds["packed"], strict=True)]
    padded = [Sequences.of(part) for part in passes["padded"]]
    packed = [Sequences.of(part, packing) for part in passes["packed"]]
    cells = [
        f"{name}, {len(rows)} rows",
        *(f"{median(seconds[way]):.2f}" for way in ways),
        f"{median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        *(f"{sum(each.ids.numel() for each in way)}" for way in (padded, packed)),
        f"{sum(each.packed_rows is not None for each in packed)} of {len(packed)}",
    ]
    return f"| {' | '.join(cells)} |"


def _passes(rows: Rollouts, options: argparse.Namespace, packing: Packing | None) -> list[Rollouts]:
    return [rows[chosen].trimmed() for chosen in pass_rows(rows, options.max_tokens, packing)]


def _backward(model: nn.Module, dtype: torch.dtype, passes: list[Rollouts], packing: Packing | None) -> None:
    """The gradient of all passes."""
    device = next(model.parameters()).device
    for part in passes:
        sequences = Sequences.of(part.to(device), packing)
        with forward_context(device, dtype):
            logprobs, _ = sequence_logprobs(model, sequences, 1.0, with_entropy=False)
        (logprobs * torch.linspace(-1, 1, logprobs.shape[1], device=device)).sum().backward()
    model.zero_grad(set_to_none=True)


def _model(options: argparse.Namespace, folder: Path) -> tuple[nn.Module, torch.dtype]:
    path = save_shape(options.model, folder) if options.model in SHAPES else resolve_model(options.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = RLConfig(model=str(path), use_lora=options.lora)
    dtype = compute_dtype(config, device)
    return load_policy(str(path), config, dtype=dtype).to(device), dtype


if __name__ == "__main__":
    main()
