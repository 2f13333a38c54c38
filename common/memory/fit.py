"""Fit the formulas of a pass to passes without numbers: `python -m common.memory.fit` writes formulas.json (minutes).

Run it after a change of what a pass allocates; a test compares some cells with it. `--compare` runs models with all of
their layers instead, and prints how far formulas and two depths are from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import transformers

from common.memory import formulas
from common.memory.fake import both_passes, build, extended_passes, rows_of
from common.memory.passes import PassSettings, pass_bytes

# hidden, layers, heads, heads of keys, inner, vocabulary, tied: Qwen2.5 0.5B, 1.5B, 3B, 7B, 14B and 32B.
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
}
# A shape that no formula was fitted to: Qwen2.5 72B.
BEYOND = {"72B": (8192, 80, 64, 8, 29568, 152064, False)}
# Micro-batches: rows, tokens of each, of its completion, and the rank of the adapter.
BATCHES = (
    *((1, 1024, 256, 64), (1, 1024, 920, 16), (4, 1024, 920, 64), (1, 4096, 2048, 16)),
    *((16, 1024, 256, 16), (1, 16384, 8192, 64), (8, 4096, 3680, 64)),
)
# Whole models: of Qwen2.5 by formula, others from two depths.
OTHERS = {
    "Llama 3.2 1B": transformers.LlamaConfig(
        **{"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "Gemma 2 2B": transformers.Gemma2Config(),
}
_LORA = PassSettings()
_FULL = PassSettings(method="full")
_FULL32 = PassSettings(method="full", weights=torch.float32)
WHOLE = (
    *(("0.5B", _LORA, (1, 1024, 512, 64)), ("1.5B", _LORA, (16, 1024, 768, 64)), ("3B", _LORA, (1, 8192, 7168, 32))),
    *(("7B", _LORA, (2, 2048, 1024, 64)), ("1.5B", _FULL, (4, 1024, 768, 64)), ("3B", _FULL, (16, 1024, 768, 64))),
    *(("0.5B", _FULL32, (16, 1024, 768, 64)), ("1.5B", _FULL32, (2, 1024, 512, 64))),
    *(("Llama 3.2 1B", _LORA, (4, 1024, 768, 64)), ("Gemma 2 2B", _LORA, (4, 1024, 768, 64))),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A micro-batch of a model.

    Attributes:
        sizes: of its formula.
        peaks: of its phases, by pass.
        standing: bytes of weights, gradients and moments.
    """

    sizes: dict[str, float]
    peaks: dict[str, dict[str, int]]
    standing: int


def configuration(name: str) -> transformers.PreTrainedConfig:
    """The configuration of a Qwen2.5 model by its size, such as "1.5B"."""
    hidden, layers, heads, keys, inner, vocabulary, tied = (SHAPES | BEYOND)[name]
    return transformers.Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


@cache
def without_storage(name: str) -> transformers.PreTrainedModel:
    """A Qwen2.5 model by its size, in bfloat16, whose weights have a shape only."""
    config = configuration(name)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def fitted_settings() -> Iterator[PassSettings]:
    """Settings that get a formula: those of a run on CUDA."""
    kinds = [("lora", torch.bfloat16), ("qlora", torch.bfloat16), ("full", torch.bfloat16), ("full", torch.float32)]
    for kind, (method, weights) in itertools.product(("policy", "value"), kinds):
        yield PassSettings(kind=kind, method=method, weights=weights)
    for kind in ("policy", "value"):
        yield PassSettings(kind=kind, method="full", spread=True)


def standing(config: transformers.PreTrainedConfig, settings: PassSettings) -> int:
    """Bytes of weights, gradients and AdamW's moments; those of weights in bfloat16 are in main memory."""
    weights = list(build(config, settings).parameters())
    trained = [each for each in weights if each.requires_grad]
    moments = sum(2 * each.nbytes for each in trained if each.dtype == torch.float32)
    return sum(each.nbytes for each in (*weights, *trained)) + moments


def cells(settings: PassSettings) -> Iterator[Cell]:
    """A micro-batch of each shape and number of tokens."""
    for name, (rows, row_tokens, completion, rank) in itertools.product(SHAPES, BATCHES):
        config, ranked = configuration(name), replace(settings, lora_r=rank)
        training, forward = extended_passes(config, ranked, rows_of(rows, row_tokens, completion))
        yield Cell(
            sizes=formulas.sizes(config, ranked, tokens=rows * row_tokens, completion_tokens=rows * completion),
            peaks={"training": training.peaks, "forward": forward.peaks},
            standing=standing(config, ranked),
        )


def fit(found: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Coefficients, none below 0, whose sums are near the peaks of a phase, relative to each peak."""
    sizes = torch.tensor([list(each.values()) for each, _ in found], dtype=torch.float64)
    peaks = torch.tensor([peak for _, peak in found], dtype=torch.float64)
    names = [name for name in found[0][0] if any(each[name] for each, _ in found)]
    while True:
        columns = sizes[:, [list(found[0][0]).index(name) for name in names]] / peaks[:, None]
        scale = columns.norm(dim=0)
        solved = torch.linalg.lstsq(columns / scale, torch.ones_like(peaks)[:, None], driver="gelsd").solution[:, 0]
        # What the others make up for goes first.
        if solved.min() >= 0:
            return {
                name: float(f"{value:.5g}") for name, value in zip(names, solved / scale, strict=True) if value > 0
            }
        names.pop(int(solved.argmin()))


def errors(found: Iterable[Cell], fitted: dict[str, dict[str, dict[str, float]]], kind: str) -> list[float]:
    """Of a pass by formula, at each cell, as shares of what it and all that stands beside it need."""
    return [
        (_peak(fitted[kind], cell.sizes) - max(cell.peaks[kind].values()))
        / (cell.standing + max(cell.peaks[kind].values()))
        for cell in found
    ]


def _peak(phases: dict[str, dict[str, float]], sizes: dict[str, float]) -> float:
    return max(sum(value * sizes[name] for name, value in phase.items()) for phase in phases.values())


def fit_all() -> None:
    """Write formulas.json and print how far each formula is from what it was fitted to."""
    written = {}
    for settings in fitted_settings():
        found = list(cells(settings))
        written[formulas.key(settings)] = fitted = {
            kind: {phase: fit([(cell.sizes, cell.peaks[kind][phase]) for cell in found]) for phase in phases}
            for kind, phases in found[0].peaks.items()
        }
        for kind in fitted:
            off = errors(found, fitted, kind)
            print(f"{formulas.key(settings)}, {kind}: {min(off):+.2%} to {max(off):+.2%} of the total", flush=True)
    formulas.FILE.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


def compare() -> None:
    """Print predictions beside passes of all layers: formulas of Qwen2.5, and two depths of a Llama and a Gemma."""
    for name, settings, batch in WHOLE:
        config = configuration(name) if name in SHAPES else OTHERS[name]
        rows, row_tokens, completion, rank = batch
        settings = replace(settings, lora_r=rank)
        lengths = {"rows": rows, "row_tokens": row_tokens, "completion_tokens": completion}
        predicted = pass_bytes(config, settings, **lengths)
        training, _ = both_passes(config, settings, rows_of(rows, row_tokens, completion))
        beside = standing(config, settings)
        off = (predicted.training - training.peak) / (beside + training.peak)
        label = f"{name}, {settings.method} in {str(settings.weights).removeprefix('torch.')}, {rows} x {row_tokens:,}"
        amounts = f"{predicted.training / 1e9:.3f} GB for {training.peak / 1e9:.3f} beside {beside / 1e9:.2f}"
        print(f"{label}: {amounts}, {off:+.2%} of the total ({predicted.source})", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="fit nothing; run whole models and compare")
    compare() if parser.parse_args().compare else fit_all()
