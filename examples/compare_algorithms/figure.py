"""The picture of a comparison: held-out accuracy or score against episodes, against KL and against seconds.

What judges say of the final models is below.
"""

import io
from collections.abc import Sequence
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
# When the colours of the palette repeat, these tell the algorithms apart.
DASHES, MARKERS = ("-", "--", ":"), ("o", "s", "^")


def picture(runs: Sequence[FinishedRun], names: list[str], judged: dict[str, Any] | None = None) -> bytes:
    """Draw a PNG: thin lines for seeds, a thick one for their mean, a dot where training ended.

    If the runs were judged, a second row has a panel for each judge: how much higher it scores the final models than
    the untrained policy, against their KL; a small dot for each seed, a large one for their mean.

    Args:
        runs: comparable runs.
        names: algorithms in the order of their colours; includes those of the runs.
        judged: from `compare_with_untrained`.
    """
    metric = runs[0].progress()[0]
    own = {name: [run for run in runs if run.algorithm == name] for name in names}
    looks = {name: _look(index) for index, name in enumerate(names) if own[name]}
    measured = [key for key in PANELS if all(row.get(key) is not None for run in runs for row in run.evaluations())]
    judges = list(judged["judges"]) if judged and "eval/kl" in measured else []
    columns, rows = max(len(measured), len(judges)), 2 if judges else 1
    with matplotlib.rc_context(STYLE):
        size = (4.6 * columns, 3.9 if rows == 1 else 7.2)
        figure = Figure(figsize=size, dpi=110, facecolor="white", layout="constrained")
        first = None
        for column, key in enumerate(measured):
            axes = figure.add_subplot(rows, columns, column + 1, sharey=first)
            axes.set_xlabel(PANELS[key])
            axes.tick_params(labelleft=first is None)
            for name, look in looks.items():
                evaluations = [run.evaluations() for run in own[name]]
                _draw(axes, evaluations, (key, f"eval/{metric}"), look | {"label": name}, faint=len(looks) > 4)
            first = first or axes
        first.set_title(f"held-out {metric}", loc="left", fontsize=10)
        for column, judge in enumerate(judges):
            axes = figure.add_subplot(rows, columns, columns + column + 1)
            axes.set_xlabel(PANELS["eval/kl"])
            who = "the reward of training" if judge == TRAINING else judge
            axes.set_title(f"gain of final models, judged by {one_line(who, 24)}", loc="left", fontsize=10)
            _draw_judged(axes, judged["judges"][judge], own, looks)
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _look(index: int) -> dict[str, str]:
    """Colour, line and marker of the algorithm with this number; where colours repeat, the others do not."""
    again = index // len(PALETTE) % len(DASHES)
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[again], "marker": MARKERS[again]}


def _draw(axes: Axes, seeds: list[list[dict]], keys: tuple[str, str], look: dict[str, str], *, faint: bool) -> None:
    """One algorithm in one panel; the mean is over the steps that all seeds evaluated."""
    shared = set.intersection(*({row["step"] for row in rows} for rows in seeds))
    points = np.array([[[row[key] for key in keys] for row in rows if row["step"] in shared] for rows in seeds])
    if len(points) > 1:
        for x, y in points.transpose(0, 2, 1):
            axes.plot(x, y, linewidth=0.7, alpha=0.25 if faint else 0.45, **(look | {"label": None, "marker": None}))
    x, y = points.mean(0).T
    axes.plot(x, y, linewidth=1.8 if faint else 2.2, markevery=[-1], markersize=5, **look)


def _draw_judged(axes: Axes, judge: dict[str, Any], own: dict[str, list[FinishedRun]], looks: dict[str, dict]) -> None:
    """Gains of all algorithms in the panel of one judge; bars are the interval over prompts."""
    axes.axhline(0, color=INK, linewidth=0.8)
    for name, look in looks.items():
        dots = {"color": look["color"], "marker": look["marker"], "linestyle": "none"}
        kls, gain = np.array([run.numbers()["kl"] for run in own[name]]), judge["algorithms"][name]["gain"]
        seeds = np.array(gain["per_seed"], dtype=float)  # None becomes NaN: no dot
        axes.plot(kls, seeds, markersize=3.5, alpha=0.6, markeredgewidth=0, **dots)
        if gain["mean"] is not None:
            bars = {"yerr": gain["ci95"], "elinewidth": 1.2, "markersize": 8, "markeredgecolor": "white"}
            axes.errorbar(kls.mean(), gain["mean"], **bars, **dots)
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
