"""The picture of a comparison: held-out accuracy or score against episodes, against KL and against seconds.

Every algorithm has its name at the end of its line. What judges say of the final models is below.
"""

import io
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.runs.plots import FAINT, INK, PALETTE
from common.terminal import one_line
from examples.compare_algorithms.judged import TRAINING
from examples.compare_algorithms.runs import FinishedRun

PANELS = {
    "episodes": "episodes (completions trained from)",
    "eval/kl": "KL to the untrained policy (nats per token)",
    "seconds": "seconds of training",
}
STYLE = {
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": FAINT},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK},
    **{"xtick.major.size": 0, "ytick.major.size": 0, "font.size": 8, "axes.xmargin": 0.02},
}
# When the colours of the palette repeat, dashes tell the algorithms apart; on paper without colours, markers do.
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "*", "h")
# With more algorithms than this, the lines of single seeds would hide the means.
MOST_WITH_SEEDS = 4
# Shares of a panel: from one name at the ends of lines to the next, and the width that is left for them.
LINE_OF_TEXT, ROOM_FOR_NAMES = 0.042, 0.25


def picture(
    runs: Sequence[FinishedRun],
    names: list[str],
    frontier: Collection[str] = (),
    judged: dict[str, Any] | None = None,
) -> bytes:
    """Draw a PNG: a thick line for the mean over seeds, a marker and the name where training ended.

    Few algorithms have a thin line for each seed too. In the panel of KL, the algorithms of the frontier have a ring,
    and a line joins them. If the runs were judged, a second row has a panel for each judge: how much higher it scores
    final models than the untrained policy, against their KL; a small dot for each seed, a large one for their mean.

    Args:
        runs: comparable runs.
        names: algorithms in the order of their colours; includes those of the runs.
        frontier: algorithms that no other surpasses, as the table has them.
        judged: from `compare_with_untrained`.
    """
    metric = runs[0].progress()[0]
    own = {name: [run for run in runs if run.algorithm == name] for name in names}
    looks = {name: _look(index) for index, name in enumerate(names) if own[name]}
    evaluations = {name: [run.evaluations() for run in own[name]] for name in looks}
    having = {
        key: [name for name in looks if all(row.get(key) is not None for run in evaluations[name] for row in run)]
        for key in PANELS
    }
    measured = [key for key in PANELS if having[key]]
    judges = list(judged["judges"]) if judged and having["eval/kl"] else []
    columns, rows = max(len(measured), len(judges)), 2 if judges else 1
    with matplotlib.rc_context(STYLE):
        size = (4.8 * columns, 4.4 if rows == 1 else 8.4)
        figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
        first = None
        for column, key in enumerate(measured):
            axes = figure.add_subplot(rows, columns, column + 1, sharey=first)
            axes.set_xlabel(PANELS[key])
            axes.tick_params(labelleft=first is None)
            ends = {}
            for name in having[key]:
                keys = (key, f"eval/{metric}")
                ends[name] = _draw(axes, evaluations[name], keys, looks[name], faint=len(looks) > MOST_WITH_SEEDS)
            if key == "eval/kl" and len(looks) > 1:
                _draw_frontier(axes, {name: ends[name] for name in frontier if name in ends})
            _name_ends(axes, ends, looks)
            first = first or axes
        first.set_title(f"held-out {metric}", loc="left", fontsize=10)
        for column, judge in enumerate(judges):
            axes = figure.add_subplot(rows, columns, columns + column + 1)
            axes.set_xlabel(PANELS["eval/kl"])
            who = "the reward of training" if judge == TRAINING else judge
            axes.set_title(f"gain of final models, judged by {one_line(who, 24)}", loc="left", fontsize=10)
            shown = {name: looks[name] for name in having["eval/kl"]}
            _name_ends(axes, _draw_judged(axes, judged["judges"][judge], own, shown), shown)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _look(index: int) -> dict[str, str]:
    """Colour, line and marker of the algorithm with this number; where colours repeat, the others do not."""
    dash = DASHES[index // len(PALETTE) % len(DASHES)]
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": dash, "marker": MARKERS[index % len(MARKERS)]}


def _draw(
    axes: Axes, seeds: list[list[dict]], keys: tuple[str, str], look: dict[str, str], *, faint: bool
) -> tuple[float, float]:
    """One algorithm in one panel; the mean is over the steps that all seeds evaluated. Gives its last point."""
    shared = set.intersection(*({row["step"] for row in rows} for rows in seeds))
    points = np.array([[[row[key] for key in keys] for row in rows if row["step"] in shared] for rows in seeds])
    if len(points) > 1 and not faint:
        for x, y in points.transpose(0, 2, 1):
            axes.plot(x, y, linewidth=0.7, alpha=0.45, **(look | {"marker": None}))
    x, y = points.mean(0).T
    end = {"markevery": [-1], "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 0.5}
    axes.plot(x, y, linewidth=1.3 if faint else 2.2, **end, **look)
    return x[-1], y[-1]


def _draw_frontier(axes: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Rings around the algorithms that no other surpasses, and a line through them."""
    if ends:
        x, y = np.array(sorted(ends.values())).T
        axes.plot(x, y, color=INK, linewidth=0.8, marker="o", markersize=12, markerfacecolor="none")
        axes.set_title("ringed: the frontier", loc="left", fontsize=8)


def _name_ends(axes: Axes, ends: dict[str, tuple[float, float]], looks: dict[str, dict]) -> None:
    """Write markers and names on the right, in the order of the ends' heights, each as near to its end as may be.

    Args:
        axes: whose lines are drawn.
        ends: last point of each.
        looks: of each.
    """
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    width = (right - left) / (1 - ROOM_FOR_NAMES)
    axes.set_xlim(left, left + width)
    axes.set_ylim(low, high)
    names = sorted(ends, key=lambda name: ends[name][1])
    heights = _spread([(ends[name][1] - low) / (high - low) for name in names], LINE_OF_TEXT)
    for name, height in zip(names, heights, strict=True):
        color, at = looks[name]["color"], (right + 0.05 * width, low + height * (high - low))
        axes.plot(*zip(ends[name], at, strict=True), color=color, linewidth=0.5, alpha=0.6)
        axes.plot(*at, color=color, marker=looks[name]["marker"], markersize=6, markeredgewidth=0)
        axes.text(at[0] + 0.02 * width, at[1], name, va="center", fontsize=8, parse_math=False)


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Places from 0 to 1 at least `gap` apart, as near to the wanted ones as that allows, which are sorted.

    Where places meet, they become a block around the mean of what they want.
    """
    blocks: list[tuple[float, int]] = []  # of each: the place of its first one, and how many it holds
    for first in wanted:
        count = 1
        while True:
            first = max(0.0, min(first, 1 - (count - 1) * gap))
            if not blocks or blocks[-1][0] + blocks[-1][1] * gap <= first:
                break
            before, others = blocks.pop()
            first = (before * others + (first - others * gap) * count) / (others + count)
            count += others
        blocks.append((first, count))
    return [first + index * gap for first, count in blocks for index in range(count)]


def _draw_judged(
    axes: Axes, judge: dict[str, Any], own: dict[str, list[FinishedRun]], looks: dict[str, dict]
) -> dict[str, tuple[float, float]]:
    """Gains in the panel of one judge; bars are the interval over prompts. Gives the means, against their KL."""
    axes.axhline(0, color=INK, linewidth=0.8)
    means = {}
    for name, look in looks.items():
        dots = {"color": look["color"], "marker": look["marker"], "linestyle": "none"}
        kls, gain = np.array([run.numbers()["kl"] for run in own[name]]), judge["algorithms"][name]["gain"]
        seeds = np.array(gain["per_seed"], dtype=float)  # None becomes NaN: no dot
        axes.plot(kls, seeds, markersize=3.5, alpha=0.6, markeredgewidth=0, **dots)
        if gain["mean"] is not None:
            bars = {
                "yerr": gain["ci95"],
                "elinewidth": 1.2,
                "markersize": 8,
                "markeredgecolor": "white",
                "markeredgewidth": 0.5,
            }
            axes.errorbar(kls.mean(), gain["mean"], **bars, **dots)
            means[name] = (kls.mean(), gain["mean"])
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    return means
