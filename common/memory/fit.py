"""Fit the formulas of a pass to passes without numbers: `python -m common.memory.fit` writes formulas.yaml (minutes).

Run it after a change of what a pass allocates; a test compares some cells with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
import transformers
import yaml

from common.memory import formulas
from common.memory.fake import extended_passes, rows_of
from common.memory.passes import PassSettings

# hidden, layers, heads, heads of keys, inner, vocabulary, tied: Qwen2.5 0.5B, 1.5B, 3B, 7B, 14B, 32B and 72B.
SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
    "32B": (5120, 64, 40, 8, 27648, 152064, False),
    "72B": (8192, 80, 64, 8, 29568, 152064, False),
}
# Tokens of a micro-batch, the share of completions, and the rank of the adapter.
BATCHES = (
    *((1024, 0.25, 64), (1024, 0.9, 16), (4096, 0.9, 64), (16384, 0.25, 16), (16384, 0.5, 64), (32768, 0.9, 64)),
)
ROW = 1024


def configuration(name: str) -> transformers.PreTrainedConfig:
    """The configuration of a Qwen2.5 model by its size, such as "1.5B"."""
    hidden, layers, heads, keys, inner, vocabulary, tied = SHAPES[name]
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


def fitted_settings() -> Iterator[PassSettings]:
    """Settings that get a formula: those of a run on CUDA."""
    kinds = [("lora", torch.bfloat16), ("qlora", torch.bfloat16), ("full", torch.bfloat16), ("full", torch.float32)]
    for kind, (method, weights) in itertools.product(("policy", "value"), kinds):
        yield PassSettings(kind=kind, method=method, weights=weights)


def cells(settings: PassSettings) -> Iterator[tuple[dict[str, float], dict[str, dict[str, int]]]]:
    """Sizes of a micro-batch, and the peaks of its phases, by pass; for each shape and number of tokens."""
    for name, (tokens, share, rank) in itertools.product(SHAPES, BATCHES):
        config = configuration(name)
        completion = int(share * ROW)
        rollouts = rows_of(tokens // ROW, ROW, completion)
        training, forward = extended_passes(config, replace(settings, lora_r=rank), rollouts)
        found = formulas.sizes(config, tokens=tokens, completion_tokens=completion * tokens // ROW, lora_r=rank)
        yield found, {"training": training.peaks, "forward": forward.peaks}


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


def main() -> None:
    """Write formulas.yaml and print how far each formula is from what it was fitted to."""
    written = {}
    for settings in fitted_settings():
        found = list(cells(settings))
        written[formulas.key(settings)] = fitted = {
            kind: {phase: fit([(sizes, peaks[kind][phase]) for sizes, peaks in found]) for phase in found[0][1][kind]}
            for kind in ("training", "forward")
        }
        for kind, phases in fitted.items():
            errors = [_peak(phases, sizes) / max(peaks[kind].values()) - 1 for sizes, peaks in found]
            print(f"{formulas.key(settings)}, {kind}: {min(errors):+.1%} to {max(errors):+.1%}", flush=True)
    formulas.FILE.write_text(yaml.safe_dump(written, sort_keys=False))


def _peak(phases: dict[str, dict[str, float]], sizes: dict[str, float]) -> float:
    return max(sum(value * sizes[name] for name, value in phase.items()) for phase in phases.values())


if __name__ == "__main__":
    main()
