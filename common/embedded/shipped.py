"""The weights of "tiny" that come with the repository, so that nobody waits a minute or two for its warm start.

They are in 16 bits, and are used only for the recipe that they were trained by: with any other settings, lessons or
tokens a policy is trained anew. ``python -m common.embedded`` trains them and writes the file again.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FILE = Path(__file__).with_name("tiny.safetensors")
# Batches whose mean loss is one number in the file.
BATCHES = 100


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """Weights that were trained elsewhere.

    Attributes:
        weights: float32 by name, without the head, which is the embedding.
        losses: mean loss of each BATCHES batches of their training.
        digest: of the file.
    """

    weights: dict[str, torch.Tensor]
    losses: list[float]
    digest: str


def shipped_weights(recipe: str) -> Shipped | None:
    """The weights of a recipe; None if the file was made by another one.

    Args:
        recipe: see policy.recipe.
    """
    with safe_open(FILE, "pt") as file:
        about = file.metadata()
        if about["recipe"] != recipe:
            return None
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - it is no dict
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()[:16]
    return Shipped(weights=weights, losses=json.loads(about["losses"]), digest=digest)


def means(losses: list[float]) -> list[float]:
    """The mean of each BATCHES losses."""
    parts = [losses[i : i + BATCHES] for i in range(0, len(losses), BATCHES)]
    return [round(sum(part) / len(part), 4) for part in parts]


def write_shipped(weights: dict[str, torch.Tensor], recipe: str, losses: list[float]) -> None:
    """Write the file.

    Args:
        weights: by name; the head is left out.
        recipe: what they were trained by.
        losses: of each batch.
    """
    halves = {name: tensor.half() for name, tensor in weights.items() if name != "lm_head.weight"}
    save_file(halves, FILE, metadata={"recipe": recipe, "losses": json.dumps(means(losses))})
