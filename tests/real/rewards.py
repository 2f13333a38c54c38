"""Rewards for tests that are about something else."""

import json
from pathlib import Path


def short(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """Minus the length in characters, in hundreds: any policy's completions differ in it."""
    return [-len(text) / 100 for text in completions]


def seen(prompts: list[str], completions: list[str], *, folder: list[str], **columns: list) -> list[float]:
    """0 for everything; each prompt is written into the row's folder as it came."""
    for prompt, place in zip(prompts, folder, strict=True):
        with open(Path(place) / "seen.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(prompt) + "\n")
    return [0.0] * len(prompts)
