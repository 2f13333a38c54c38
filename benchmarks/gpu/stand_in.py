"""Prompts of random tokens, and a score for any completion: in place of a recipe's data and rewards without a hub."""

import json
import random
import zlib
from pathlib import Path
from typing import Any

# More than any step takes, so that no prompt comes twice in a short run.
ROWS = 4096


def write_prompts(path: Path, *, tokens: int, vocabulary: int) -> Path:
    """Write prompts of random token ids, with lengths from half to one and a half of the mean.

    Args:
        path: a new JSON-lines file.
        tokens: of a prompt, in the mean.
        vocabulary: ids are below this number.

    Returns:
        The path.
    """
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            length = draw.randint(max(tokens // 2, 1), tokens + tokens // 2)
            ids = [draw.randrange(vocabulary) for _ in range(length)]
            file.write(json.dumps({"prompt_ids": ids}) + "\n")
    return path


def score(completions: list[str], **_: Any) -> list[float]:
    """A number from 0 to 1 that depends on the text alone: groups have an advantage, and nothing can be learned."""
    return [zlib.crc32(completion.encode()) % 1000 / 1000 for completion in completions]
