"""GPUs by name: how much memory torch finds on them, whether they compute in bfloat16, and how fast they are.

For `--plan --device`, which plans for a card that is not there, and for docs/recipes.md. Sizes are what torch.cuda
reports for such a card as far as its users have published it, rounded down; nothing here was measured. A size such as
24gb is 24 x 10^9 bytes, which is a little less than any card that is sold under it has.
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


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a card does at most; what of it a run reaches is assumed in constants.py.

    Attributes:
        bandwidth: bytes/s of its memory.
        flops: operations/s of matrix products in bfloat16, without sparsity.
        flops_float32: in float32, as torch computes it by default.
        link: bytes/s between main memory and the card, one way, of pinned memory.
        source: where the numbers are from.
        peers: bytes/s between cards of one machine, one way; 0: not known.
        network: bytes/s of each card's own way to other machines; 0: not known.
    """

    bandwidth: float
    flops: float
    flops_float32: float
    link: float
    source: str
    peers: float = 0.0
    network: float = 0.0


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
# A PCIe link of generation 4 with 16 lanes gives 25 of its 32 GB/s: github.com/ZaidQureshi/bam/issues/54, and between
# two 4090s github.com/tinygrad/open-gpu-kernel-modules/issues/6. Generation 5 is assumed to give the same share of 64.
_LINK_4, _LINK_5 = 25, 50
# name: GB/s of memory, TFLOPS in bfloat16 and in float32, GB/s of the link, source
_RATES = {
    "4090": (
        1008,
        165,
        82,
        _LINK_4,
        "the maker; bfloat16: github.com/mli/transformers-benchmarks/issues/4",
    ),
    "l4": (300, 121, 30, _LINK_4, "NVIDIA's data sheet"),
    "a100-40gb": (1555, 312, 19.5, _LINK_4, "NVIDIA's data sheet, SXM"),
    "a100-80gb": (2039, 312, 19.5, _LINK_4, "NVIDIA's data sheet, SXM"),
    "h100": (3350, 989, 67, _LINK_5, "NVIDIA's data sheet, SXM; half of the 1979 with sparsity"),
    "h200": (4800, 989, 67, _LINK_5, "NVIDIA's data sheet; half of the 1979 with sparsity"),
}
# GB/s one way between cards of a machine (NVLink, half of what the data sheets give for both ways), and of the network
# card that a DGX has for each GPU (HDR 200 or NDR 400 Gb/s): NVIDIA's data sheets of the DGX A100, H100 and H200.
_BETWEEN = {"a100-40gb": (300, 25), "a100-80gb": (300, 25), "h100": (450, 50), "h200": (450, 50)}
_WITHOUT_SIZE = {"a100": "a100-80gb"}


def card(name: str) -> Card:
    """The card of a name.

    Args:
        name: such as h100, rtx4090 or "A100 40GB"; or a size, such as 24gb.

    Raises:
        ValueError: nobody knows it.
    """
    plain = _short(name)
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


def rated_name(name: str) -> str:
    """The name that a card has in the table of rates.

    Args:
        name: as `card` takes it, but no size; or as its driver calls it, such as "NVIDIA A100-SXM4-80GB".

    Raises:
        ValueError: nothing is known of it.
    """
    plain = re.sub(r"-(sxm\d?|hbm\d?e?)(?=-|$)", "", _short(name))
    plain = plain if plain in _RATES else re.sub(r"-\d+gb$", "", plain)
    plain = _WITHOUT_SIZE.get(plain, plain)
    if plain not in _RATES:
        raise ValueError(
            f"card {name}: its memory bandwidth and FLOPS are not known here, and a time cannot be computed without "
            f"them. Name one of {', '.join([*_RATES, *_WITHOUT_SIZE])}."
        )
    return plain


def rates(name: str) -> Rates:
    """How fast a card is.

    Args:
        name: as `rated_name` takes it.

    Raises:
        ValueError: nothing is known of it.
    """
    bandwidth, flops, flops_float32, link, source = _RATES[rated_name(name)]
    peers, network = _BETWEEN.get(rated_name(name), (0, 0))
    return Rates(
        peers=peers * GB,
        network=network * GB,
        bandwidth=bandwidth * GB,
        flops=flops * 1e12,
        flops_float32=flops_float32 * 1e12,
        link=link * GB,
        source=source,
    )


def _short(name: str) -> str:
    """Lower case, with one - in place of spaces and the like, and without the maker's words."""
    plain = re.sub(r"[\s_-]+", "-", name.strip().lower())
    return re.sub(r"^((nvidia|geforce|tesla|rtx(?=-?[2345]0)|rtx(?=-?a\d))-?)+", "", plain)
