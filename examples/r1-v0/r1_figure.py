"""Figures 2 and 3 of R1 for a run: held-out accuracy and response length over training, several seeds in one picture.

`python r1_figure.py RUN [RUN...] --output FILE` draws it again from each run's metrics.jsonl.
"""

import argparse
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.cli import run_script
from common.runs.checkpoints import write_file
from common.runs.log import METRICS_FILE
from common.runs.plots import BLUE, GREEN, Curves, dress, running_mean

FIGURE_FILE = "r1.png"


def write_figure(runs: list[Path], output: Path) -> None:
    """Draw accuracy and length of one or several runs of the same settings.

    Args:
        runs: folders with a metrics.jsonl.
        output: the PNG file to write.

    Raises:
        ValueError: if a folder has no metrics, or no evaluation with an accuracy.
    """
    curves = [_read(Path(run)) for run in runs]
    figure = Figure(figsize=(9.2, 3.4), dpi=110, facecolor="white", layout="constrained")
    accuracy_axes, length_axes = figure.subplots(1, 2)
    accuracies = [run.series("eval/accuracy") for run in curves]
    if len(curves) == 1:
        (steps, values), (_, margins) = accuracies[0], curves[0].series("eval/accuracy_ci95")
        accuracy_axes.fill_between(steps, values - margins, values + margins, color=BLUE, alpha=0.2, linewidth=0)
    _overlay(accuracy_axes, accuracies, {"color": BLUE, "marker": "o", "markersize": 4})
    lengths = [run.series("length") for run in curves]
    for steps, values in lengths:
        length_axes.plot(steps, values, ".", color=GREEN, alpha=0.2, markersize=4, markeredgewidth=0)
    _overlay(length_axes, [(steps, running_mean(values)) for steps, values in lengths], {"color": GREEN})
    dress(accuracy_axes, "held-out accuracy")
    dress(length_axes, "mean response length in training (tokens)")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_file(output, buffer.getvalue())


def _read(run: Path) -> Curves:
    if not (run / METRICS_FILE).is_file():
        raise ValueError(f"{run}: has no {METRICS_FILE}, which the figure is drawn from. Pass the folder of a run.")
    curves = Curves(run / METRICS_FILE)
    for name, remedy in {"eval/accuracy": "--eval_every 10", "length": "--num_steps 10"}.items():
        if not len(curves.series(name)[0]):
            raise ValueError(f"{run}: no line of {METRICS_FILE} has {name}, which is drawn. Train with {remedy}, say.")
    return curves


def _overlay(axes: Axes, series: list[tuple[np.ndarray, np.ndarray]], look: dict) -> None:
    """One line; for several runs thin lines, and a thick one for their mean over the steps that all have."""
    if len(series) > 1:
        for steps, values in series:
            axes.plot(steps, values, linewidth=0.7, alpha=0.45, color=look["color"])
        shared = sorted(set.intersection(*(set(steps) for steps, _ in series)))
        means = np.mean([values[np.isin(steps, shared)] for steps, values in series], axis=0)
        series = [(np.array(shared), means)]
    axes.plot(*series[0], linewidth=2, **look)


def main() -> None:
    """Draw the runs of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs that differ in their seed")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    options = parser.parse_args()
    write_figure(options.runs, options.output)
    print(options.output.resolve())


if __name__ == "__main__":
    run_script(main)
