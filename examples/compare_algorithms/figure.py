"""The picture of a comparison: held-out accuracy or score against episodes, against KL and against seconds."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.runs.plots import FAINT, INK, PALETTE
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
DASHES = ("-", "--", ":")


def picture(runs: Sequence[FinishedRun], names: list[str]) -> bytes:
    """Draw a PNG: thin lines for seeds, a thick one for their mean, a dot where training ended.

    Args:
        runs: comparable runs.
        names: algorithms in the order of their colours; includes those of the runs.
    """
    metric = runs[0].progress()[0]
    curves: dict[str, list[list[dict]]] = {name: [] for name in names}
    for run in runs:
        curves[run.algorithm].append(run.evaluations())
    measured = [key for key in PANELS if all(row.get(key) is not None for run in runs for row in run.evaluations())]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(measured), 3.9), dpi=110, facecolor="white", layout="constrained")
        all_axes = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
        for axes, key in zip(all_axes, measured, strict=True):
            axes.set_xlabel(PANELS[key])
            for index, name in enumerate(names):
                if curves[name]:
                    look = {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index // len(PALETTE) % 3]}
                    _draw(axes, curves[name], (key, f"eval/{metric}"), look | {"label": name})
        all_axes[0].set_title(f"held-out {metric}", loc="left", fontsize=10)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=9)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw(axes: Axes, seeds: list[list[dict]], keys: tuple[str, str], look: dict[str, str]) -> None:
    """One algorithm in one panel; the mean is over the steps that all seeds evaluated."""
    shared = set.intersection(*({row["step"] for row in rows} for rows in seeds))
    points = np.array([[[row[key] for key in keys] for row in rows if row["step"] in shared] for rows in seeds])
    for x, y in points.transpose(0, 2, 1):
        axes.plot(x, y, linewidth=0.7, alpha=0.45, **(look | {"label": None}))
    x, y = points.mean(0).T
    axes.plot(x, y, linewidth=2.2, marker="o", markevery=[-1], markersize=5, **look)
