"""Where every random number of a run comes from: hashes of (run seed, step, row, purpose), never global state."""

import hashlib

import torch
from torch import Tensor


def hashed_seed(*parts: int | str) -> int:
    """56 bits of a hash of `parts`, the same on every machine and in every Python process.

    Args:
        parts: all that the random numbers should depend on, such as (seed, step, "shuffle").

    Returns:
        An integer in [0, 2^56).
    """
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def seeded_permutation(length: int, *parts: int | str) -> Tensor:
    """A random order of 0 .. length - 1 that depends on `parts` alone, as (length,) int64."""
    generator = torch.Generator().manual_seed(hashed_seed(*parts))
    return torch.randperm(length, generator=generator)


def seeded_uniforms(length: int, *parts: int | str) -> Tensor:
    """Random numbers in [0, 1) that depend on `parts` alone, as (length,) float64."""
    generator = torch.Generator().manual_seed(hashed_seed(*parts))
    return torch.rand(length, generator=generator, dtype=torch.float64)
