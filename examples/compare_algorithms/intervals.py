"""The mean over seeds and its interval."""

import math
from statistics import mean, stdev
from typing import Any

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last is also used for more, a little too wide.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_with_interval(values: list[float | None]) -> dict[str, Any]:
    """The mean over seeds and the half width of its 95 % confidence interval by Student's t.

    Each seed gives one value, its mean over held-out prompts; the seeds are the independent draws.

    Args:
        values: one per seed; None if it was not measured.

    Returns:
        mean, ci95 (None for a single seed) and per_seed; mean and ci95 are None if a value is missing.
    """
    count = len(values)
    if None in values:
        return {"mean": None, "ci95": None, "per_seed": values}
    quantile = STUDENT_T[min(count - 1, len(STUDENT_T)) - 1]
    interval = quantile * stdev(values) / math.sqrt(count) if count > 1 else None
    return {"mean": mean(values), "ci95": interval, "per_seed": values}
