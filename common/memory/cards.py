"""GPUs by name: how much memory torch finds on them, and whether they compute in bfloat16.

For `--plan --device`, which plans for a card that is not there. Sizes are what torch.cuda reports for such a card as
far as its users have published it, rounded down; nothing here was measured. A size such as 24gb is 24 x 10^9 bytes,
which is a little less than any card that is sold under it has.
"""

import re
from dataclasses import dataclass

GIB = 2**30
GB = 10**9
# The first capability with units for bfloat16; vLLM refuses bfloat16 below it.
BFLOAT16_FROM = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A device that models are used on.

    Attributes:
        name: as the user wrote it, or as the driver calls it.
        total: bytes of memory that torch finds.
        capability: CUDA's compute capability; None: a card known by its size, or no GPU.
        kind: "cuda" or "cpu".
    """

    name: str
    total: int
    capability: tuple[int, int] | None = None
    kind: str = "cuda"

    @property
    def computes_bfloat16(self) -> bool:
        """False for a GPU that is known to be too old."""
        return self.capability is None or self.capability >= BFLOAT16_FROM


# name: GiB that torch finds, capability
_KNOWN = {
    "t4": (14.5, (7, 5)),
    "v100": (15.7, (7, 0)),
    "v100-32gb": (31.7, (7, 0)),
    "2080ti": (10.7, (7, 5)),
    "3060": (11.6, (8, 6)),
    "3090": (23.6, (8, 6)),
    "4070": (11.6, (8, 9)),
    "4080": (15.6, (8, 9)),
    "4090": (23.5, (8, 9)),
    "5080": (15.5, (12, 0)),
    "5090": (31.3, (12, 0)),
    "a10": (22.0, (8, 6)),
    "a10g": (22.0, (8, 6)),
    "a30": (23.5, (8, 0)),
    "a40": (44.3, (8, 6)),
    "a100": (79.1, (8, 0)),
    "a100-40gb": (39.3, (8, 0)),
    "a100-80gb": (79.1, (8, 0)),
    "a6000": (47.4, (8, 6)),
    "l4": (22.0, (8, 9)),
    "l40": (44.3, (8, 9)),
    "l40s": (44.3, (8, 9)),
    "rtx6000": (47.3, (8, 9)),
    "rtx-pro-6000": (94.9, (12, 0)),
    "h100": (79.1, (9, 0)),
    "h200": (139.7, (9, 0)),
    "b200": (178.0, (10, 0)),
}


def card(name: str) -> Card:
    """The card of a name.

    Args:
        name: such as h100, rtx4090 or "A100 40GB"; or a size, such as 24gb.

    Raises:
        ValueError: nobody knows it.
    """
    plain = re.sub(r"^(nvidia|geforce|tesla|rtx(?=-?[2345]0)|rtx(?=-?a\d))-?", "", _plain(name))
    plain = re.sub(r"^(geforce|rtx(?=-?[2345]0))-?", "", plain)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)-?(gb|gib|g)", plain):
        total = int(float(size[1]) * (GIB if size[2] == "gib" else GB))
        if 1 <= float(size[1]) <= 4096:
            return Card(name=name, total=total)
    elif plain in _KNOWN:
        gib, capability = _KNOWN[plain]
        return Card(name=name, total=int(gib * GIB), capability=capability)
    raise ValueError(
        f"--device {name}: no such card is known here. Pass its memory, such as --device 24gb, or one of "
        f"{', '.join(_KNOWN)}."
    )


def _plain(name: str) -> str:
    """Lower case, with one - in place of spaces and the like."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower())
