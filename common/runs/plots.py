"""The plot of a run: curves.png from its metrics.jsonl.

It reads only this file, so it can be drawn again at any time. An error here is one warning, because a plot must never
stop a run. Names and numbers may be anything: names are drawn as they are, never as mathematics, and numbers that a
picture has no room for are left out.
"""

import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.runs.checkpoints import write_file
from common.runs.log import read_metrics
from common.terminal import one_line

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
INK, FAINT = "#333333", "#DDDDDD"
# From the bottom of the stack to its top; every phase has the same colour in all plots.
PHASE_COLORS = {
    "sample": BLUE,
    "score": PURPLE,
    "logprobs": SKY,
    "values": GREEN,
    "update": ORANGE,
    "push": RED,
    "offload": "#8C6D31",
    "eval": "#F0E442",
    "save": "#999999",
    "other": FAINT,
}
MAX_PANELS = 6
MAX_DOTS = 300
MAX_POINTS = 20_000  # lines of metrics.jsonl in the picture, evenly spread
MAX_LABEL = 24  # characters of a name in a legend
MAX_VALUE = 1e100  # sums and squares of larger ones overflow
MAX_STEP = 2**53  # floats cannot tell larger ones apart
_LEGEND = {"fontsize": 8, "frameon": False, "labelcolor": INK, "handlelength": 1.2, "columnspacing": 1.0}

Panel = Callable[["Axes", "Curves"], None]


class Curves:
    """The lines of a metrics.jsonl as one series per name."""

    def __init__(self, path: Path) -> None:
        """Reads the file; a line that is still being written is left out."""
        self.rows = read_metrics(path.parent)
        if len(self.rows) > MAX_POINTS:
            self.rows = self.rows[:: -(-len(self.rows) // MAX_POINTS)] + self.rows[-1:]

    def names(self, prefix: str) -> list[str]:
        """Names that begin with `prefix` and have a value somewhere, without the prefix, in order of appearance."""
        names = {name: None for row in self.rows for name, value in row.items() if _fits(row["step"], value)}
        return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def series(self, name: str) -> tuple["np.ndarray", "np.ndarray"]:
        """Steps and values of a metric, without the steps that have none for which there is room."""
        import numpy as np

        points = [(row["step"], row[name]) for row in self.rows if _fits(row["step"], row.get(name))]
        return tuple(np.array(points, dtype=float).reshape(-1, 2).T)


def _fits(step: int, value: object) -> bool:
    """Whether there is a value and a picture has room for it; of what is no number, drawing says so."""
    is_far = isinstance(value, int | float) and not abs(value) <= MAX_VALUE
    return value is not None and not is_far and abs(step) <= MAX_STEP


def draw_curves(run_folder: Path) -> None:
    """Writes curves.png of a run, complete or not at all; does nothing if there is nothing to show yet.

    Args:
        run_folder: holds metrics.jsonl; the folder's name is the title.
    """
    run_folder = Path(run_folder)
    metrics = run_folder / "metrics.jsonl"
    if not metrics.exists():
        return
    try:
        curves = Curves(metrics)
        if picture := _picture(curves, run_folder.resolve().name):
            write_file(run_folder / CURVES_FILE, picture)
    except Exception as error:
        warnings.warn(
            f"{run_folder / CURVES_FILE} could not be drawn ({one_line(repr(error), 300)}). The run goes on, and "
            "the numbers are in metrics.jsonl.",
            stacklevel=2,
        )


def _picture(curves: Curves, title: str) -> bytes | None:
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # at first use it logs a line about fonts
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(curves)
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    width, height = 4.6 * columns, 3.1 * rows + 0.5
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    look = {"x": 0.55 / width, "y": 1 - 0.12 / height, "ha": "left", "va": "top"}
    figure.suptitle(one_line(title), parse_math=False, fontsize=12, color=INK, weight="bold", **look)
    for index, (name, draw) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        draw(axes, curves)
        dress(axes, name)
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.2 / width, bottom=0.45 / height, top=1 - 0.75 / height, wspace=0.2, hspace=0.42
    )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _panels(curves: Curves) -> dict[str, Panel]:
    """Titles and drawings of the panels that have something to show."""
    present = set(curves.names(""))
    panels: dict[str, Panel] = {}
    if "score" in present:
        panels["score"] = lambda axes, curves: _line(axes, *curves.series("score"), BLUE)
    if "eval/accuracy" in present:
        panels["held-out accuracy"] = lambda axes, curves: _evaluation(axes, curves, "eval/accuracy")
    elif "eval/score" in present:
        panels["held-out score"] = lambda axes, curves: _evaluation(axes, curves, "eval/score")
    if "length" in present:
        panels["completion length (tokens)"] = lambda axes, curves: _line(axes, *curves.series("length"), GREEN)
    if "kl" in present:
        panels["KL to the reference"] = lambda axes, curves: _line(axes, *curves.series("kl"), RED)
    if len(curves.names("reward/")) > 1:
        panels["reward parts"] = _reward_parts
    if "entropy" in present:
        panels["entropy"] = lambda axes, curves: _line(axes, *curves.series("entropy"), PURPLE)
    if "time/step" in present:
        panels = dict(list(panels.items())[: MAX_PANELS - 1])
        panels["time per step (s)"] = _time_by_phase
    return panels


def _line(axes: "Axes", steps: "np.ndarray", values: "np.ndarray", color: str, label: str | None = None) -> None:
    """Faint dots for single steps, few enough to see the line, and the running mean over all steps."""
    every = max(len(steps) // MAX_DOTS, 1)
    axes.plot(steps[::every], values[::every], ".", color=color, alpha=0.35, markersize=5, markeredgewidth=0)
    axes.plot(steps, running_mean(values), color=color, linewidth=1.8, label=label)


def _evaluation(axes: "Axes", curves: Curves, name: str) -> None:
    steps, values = curves.series(name)
    margins = dict(zip(*curves.series(f"{name}_ci95"), strict=True))
    shown = [(step, value, margins[step]) for step, value in zip(steps, values, strict=True) if step in margins]
    if shown:
        low, high = zip(*[(value - margin, value + margin) for _, value, margin in shown], strict=True)
        axes.fill_between([step for step, _, _ in shown], low, high, color=ORANGE, alpha=0.2, linewidth=0)
    axes.plot(steps, values, "o-", color=ORANGE, linewidth=1.8, markersize=4)


def _reward_parts(axes: "Axes", curves: Curves) -> None:
    for color, part in zip(PALETTE, curves.names("reward/"), strict=False):
        _line(axes, *curves.series(f"reward/{part}"), color, one_line(part, MAX_LABEL))
    legend = axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=len(PALETTE), **_LEGEND)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a "$"


def _time_by_phase(axes: "Axes", curves: Curves) -> None:
    """The phases stacked; time outside of all phases is on top. A fit before the first step would hide the steps."""
    import numpy as np

    steps, totals = curves.series("time/step")
    stacked = {}
    for phase in ("value_init", *PHASE_COLORS):
        seconds = dict(zip(*curves.series(f"time/{phase}"), strict=True))
        stacked[phase] = np.array([seconds.get(step, 0.0) for step in steps])
    totals = totals - stacked.pop("value_init")
    stacked["other"] = np.maximum(totals - sum(stacked.values()), 0)
    shown = {phase: seconds for phase, seconds in stacked.items() if seconds.sum() > 0.005 * totals.sum()}
    if not shown:  # no step took any time
        return _line(axes, steps, totals, INK)
    smooth = [running_mean(seconds) for seconds in shown.values()]
    axes.stackplot(steps, *smooth, labels=shown, colors=[PHASE_COLORS[phase] for phase in shown], linewidth=0)
    axes.set_ylim(0, 1.35 * max(sum(smooth)))
    axes.legend(loc="upper left", ncols=5, **_LEGEND)


def running_mean(values: "np.ndarray") -> "np.ndarray":
    """Centred mean over about a tenth of the run, applied twice for smoothness; at the ends over fewer values."""
    import numpy as np

    reach = len(values) // 20
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[high] - sums[low]) / (high - low)
    return values


def dress(axes: "Axes", title: str) -> None:
    """Give a panel its title and the look of all plots of runs."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.set_xlabel("step", fontsize=8, color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
