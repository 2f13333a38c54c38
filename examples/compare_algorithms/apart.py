"""Which algorithms are better than which others, as far as the seeds can tell."""

import math
from itertools import combinations
from statistics import mean, median, variance
from typing import Any

import numpy as np

from examples.compare_algorithms.intervals import mean_with_interval

# Chance of one pair or more that is told apart and does not differ, over all pairs.
LEVEL = 0.05
# Variances of accuracies and KLs below this are those of rounding.
ROUNDING = 1e-18


def on_frontier(points: dict[str, tuple[float, float]]) -> list[str]:
    """Those that no other one surpasses: has at least as much with at most the cost, and one of both strictly.

    Args:
        points: what was reached and what it cost, by name.
    """
    return [
        name
        for name, (gain, cost) in points.items()
        if not any(
            more >= gain and less <= cost and (more, less) != (gain, cost)
            for other, (more, less) in points.items()
            if other != name
        )
    ]


def tell_apart(values: dict[str, list[float]]) -> dict[str, Any]:
    """Compare every two algorithms by their differences seed by seed, since a seed has the same prompts in both.

    A pair is told apart if it passes two tests. The 95 % interval of its own differences (Student's t over seeds)
    leaves out 0. And its mean difference is significant at 5 % after Holm's correction for all pairs (Scandinavian
    Journal of Statistics 6, 1979), in a t test with (algorithms - 1) x (seeds - 1) degrees of freedom. Its variance is
    the pair's own or that of a typical pair, whichever is larger. The typical one is a median over pairs, so that an
    algorithm that fails with a seed hides only its own differences. Where algorithms vary equally, a false pair is
    rarer than 5 %; among few that vary far more than most it is not (README.md). The few seeds of a pair alone would
    leave nothing significant among many pairs. With two algorithms both tests are the paired t test.

    Args:
        values: for each algorithm one value per seed, seeds in the same order.

    Returns:
        As JSON: level, and pairs, each with above and below (names), mean, ci95 and per_seed of the differences, p
        (Holm's, of all pairs) and told_apart. Without noise in any difference, p is 1: there is nothing to judge by.
    """
    names, table = list(values), np.atleast_2d(list(values.values())).astype(float)  # (algorithms, seeds)
    degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
    if degrees < 1:
        return {"level": LEVEL, "pairs": []}
    pairs = []
    for above, below in combinations(range(len(names)), 2):
        if table[above].mean() < table[below].mean():
            above, below = below, above
        difference = mean_with_interval([float(each) for each in table[above] - table[below]])
        pairs.append({"above": names[above], "below": names[below], **difference})
    own = [variance(pair["per_seed"]) for pair in pairs]
    typical = median(own) / (_median_of_variances(table.shape[1] - 1) if len(pairs) > 1 else 1)
    for pair, variance_of_pair in zip(pairs, own, strict=True):
        noise = max(variance_of_pair, typical)
        t = pair["mean"] / math.sqrt(noise / table.shape[1]) if noise > ROUNDING else 0.0
        pair["p"] = two_sided(t, degrees)
    largest = 0.0
    for rank, pair in enumerate(sorted(pairs, key=lambda pair: pair["p"])):
        pair["p"] = largest = max(largest, min(1.0, (len(pairs) - rank) * pair["p"]))
        pair["told_apart"] = largest < LEVEL and pair["mean"] > pair["ci95"]
    return {"level": LEVEL, "pairs": pairs}


def _median_of_variances(degrees: int) -> float:
    """The median of an estimated variance over the true one (Wilson and Hilferty's approximation of chi-squared)."""
    return (1 - 2 / (9 * degrees)) ** 3


def two_sided(t: float, degrees: int) -> float:
    """Probability that Student's t is further from 0 than this, by its finite series (Abramowitz and Stegun, 26.7).

    Args:
        t: the statistic, 0 or more.
        degrees: of freedom, at least 1.
    """
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    term, total = (1.0, 0.0) if degrees % 2 == 0 else (cosine, 0.0)
    for k in range(degrees % 2, degrees - 1, 2):
        total += term
        term *= cosine**2 * (k + 1) / (k + 2)
    inside = math.sin(angle) * total
    return max(0.0, 1 - (inside if degrees % 2 == 0 else 2 / math.pi * (angle + inside)))


def in_words(compared: dict[str, Any]) -> str:
    """Who is above whom, and how many pairs are not told apart.

    Args:
        compared: from `tell_apart`, with at least one pair.
    """
    pairs = compared["pairs"]
    found: dict[str, list[str]] = {}
    for pair in sorted(pairs, key=lambda pair: -pair["mean"]):
        if pair["told_apart"]:
            found.setdefault(pair["above"], []).append(pair["below"])
    rest = len(pairs) - sum(map(len, found.values()))
    having: dict[str, list[str]] = {}
    for above, below in found.items():
        having.setdefault(", ".join(sorted(below)), []).append(above)
    said = "; ".join(
        f"{', '.join(above)} {'are' if len(above) > 1 else 'is'} above {below}" for below, above in having.items()
    )
    if not rest:
        return f"{said}."
    if not found:
        return "the only pair is not told apart." if rest == 1 else f"none of the {rest} pairs is told apart."
    return f"{said}; the other {f'{rest} pairs are' if rest > 1 else 'pair is'} not told apart."


def typical_interval(compared: dict[str, Any]) -> float:
    """The median over pairs of the half width of their interval."""
    return median(pair["ci95"] for pair in compared["pairs"])


def seeds_on_frontier(points: dict[str, list[tuple[float, float]]]) -> dict[str, int]:
    """For each algorithm on the frontier of means, with how many seeds it is on the frontier of that seed.

    Args:
        points: for each algorithm one pair per seed: what was reached and what it cost.
    """
    means = {name: (mean(x for x, _ in own), mean(y for _, y in own)) for name, own in points.items()}
    num_seeds = len(next(iter(points.values()), ()))
    by_seed = [on_frontier({name: own[seed] for name, own in points.items()}) for seed in range(num_seeds)]
    return {name: sum(name in each for each in by_seed) for name in on_frontier(means)}
