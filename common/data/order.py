"""Which prompt comes when: pure functions of the run's seed, of the epoch or step, and of the prompts' weights.

Without weights every prompt comes once in an epoch. With them an epoch has as many places, and a prompt has its share
of them. Equal weights give the order without weights.
"""

import math

import numpy as np

from common.seeds import hashed_seed, seeded_permutation, seeded_uniforms

# Shares are whole numbers of this unit, so that their sums are exact and one place per epoch is exactly one place.
_PLACE = 2**30


class PromptOrder:
    """The order of N prompts.

    Args:
        length: N.
        seed: the run's seed.
        weights: (N,) float64, finite, 0 or more, not all 0: how often each prompt comes, in relation to the others;
            None: all equally often.
    """

    def __init__(self, length: int, seed: int, weights: np.ndarray | None = None) -> None:
        self._length, self._seed = length, seed
        self._shares = None if weights is None else _shares(weights)

    def of_epoch(self, epoch: int, name: str) -> list[int]:
        """The N places of an epoch, as indices of prompts.

        Of N w_i / sum(w) places on average, a prompt gets the whole number below or above it in every epoch. The
        copies of a prompt are spread evenly over the epoch: copy j of c stands at (j + r) / c of it, where r in [0, 1)
        is where the prompt stands without weights.

        Args:
            epoch: from 0.
            name: a different one gives another order.
        """
        plain = seeded_permutation(self._length, self._seed, epoch, name)
        if self._shares is None:
            return plain.tolist()
        plain = plain.numpy()
        offset = hashed_seed(self._seed, epoch, name, "offset") % _PLACE
        ends = (np.cumsum(self._shares[plain]) + offset) // _PLACE  # systematic sampling
        counts = np.diff(ends, prepend=0)  # (N,) places of each prompt, in the order without weights
        prompts = np.repeat(np.arange(self._length), counts)
        copies = np.arange(self._length) - (ends - counts)[prompts]  # j of each place
        where = (copies + prompts / self._length) / counts[prompts]
        return plain[prompts[np.argsort(where, kind="stable")]].tolist()

    def drawn(self, step: int, name: str) -> list[int]:
        """All prompts that ever come, each once, as if drawn one after another with probabilities in their weights.

        The smallest of exponential waiting times with rates w_i is that of prompt i with probability w_i / sum(w), and
        so on for the others (Efraimidis and Spirakis, Information Processing Letters 97, 2006).

        Args:
            step: from 1.
            name: as in of_epoch.
        """
        plain = seeded_permutation(self._length, self._seed, step, name)
        if self._shares is None:
            return plain.tolist()
        plain = plain.numpy()
        uniforms = seeded_uniforms(self._length, self._seed, step, name, "waiting times").numpy()
        # In ascending order, because the order without weights is random already: equal weights keep it.
        waits = -np.log1p(-np.sort(uniforms))
        shares = self._shares[plain]
        comes = np.flatnonzero(shares)
        return plain[comes[np.argsort(waits[comes] / shares[comes], kind="stable")]].tolist()


def _shares(weights: np.ndarray) -> np.ndarray:
    """(N,) int64: places per epoch in units of _PLACE, N places in all."""
    weights = weights / weights.max()  # no sum of them is too large
    places = weights * (len(weights) / math.fsum(weights))
    shares = np.rint(places * _PLACE).astype(np.int64)
    # Rounding leaves less than a unit per prompt that comes; of equal weights it leaves nothing.
    comes = np.flatnonzero(shares)
    each, rest = divmod(len(weights) * _PLACE - int(shares.sum()), len(comes))
    shares[comes] += each
    shares[comes[:rest]] += 1
    return shares
