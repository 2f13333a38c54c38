"""The picture of a run is drawn from whatever is in metrics.jsonl, and never stops a run."""

import json
import math
import os
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

from common.runs.plots import Curves, _evaluation, _panels, _time_by_phase, draw_curves, running_mean


def metrics_of(step, num_steps):
    progress = 1 - math.exp(-3 * step / num_steps)
    noise = math.sin(step * 12.9898)
    row = {"step": step}
    if step % 10 == 0:
        row |= {"eval/accuracy": 0.28 + 0.3 * progress, "eval/accuracy_ci95": 0.06}
    if step:
        row |= {"score": 0.35 + 0.3 * progress + 0.05 * noise, "length": 60 + 40 * progress + 3 * noise, "kl": 0.01}
        row |= {"reward/format": 0.84, "reward/equation": 0.3 + 0.3 * progress, "entropy": 1 - 0.2 * progress}
        row |= {"time/sample": 1.2, "time/update": 2.0 + 0.1 * noise, "time/push": 0.05, "time/step": 3.6}
    return row


def write_metrics(folder, rows, end="\n"):
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)


def test_curves_are_drawn_complete_with_nothing_left_beside_them(tmp_path, recwarn):
    write_metrics(tmp_path, [metrics_of(step, 50) for step in range(51)])
    draw_curves(tmp_path)
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert picture.endswith(b"IEND\xaeB`\x82")
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl"]
    assert not recwarn.list


@pytest.mark.slow
def test_a_thousand_steps_do_not_hold_a_run_up(tmp_path):
    write_metrics(tmp_path, [metrics_of(step, 1000) for step in range(1001)])
    draw_curves(tmp_path)  # imports matplotlib
    start = time.process_time()
    draw_curves(tmp_path)
    assert time.process_time() - start < 5  # about ten times what it takes


@pytest.mark.parametrize("num_rows", [1, 2, 3, 12])
def test_the_first_steps_of_a_run_are_drawn_without_a_warning(num_rows, tmp_path, recwarn):
    write_metrics(tmp_path, [metrics_of(step, 50) for step in range(num_rows)])
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()
    assert not recwarn.list


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    write_metrics(tmp_path, [metrics_of(step, 50) for step in range(5)], end='\n{"step": 5, "score": 0.')
    assert len(Curves(tmp_path / "metrics.jsonl").rows) == 5
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_only_panels_with_something_to_show_are_drawn(tmp_path):
    def titles(rows):
        write_metrics(tmp_path, rows)
        return list(_panels(Curves(tmp_path / "metrics.jsonl")))

    assert titles([{"step": 1, "score": 0.5, "kl": None}]) == ["score"]
    assert titles([{"step": 0, "eval/score": 0.5}]) == ["held-out score"]
    full = titles([metrics_of(10, 50)])
    assert full == [
        "score",
        "held-out accuracy",
        "completion length (tokens)",
        "KL to the reference",
        "reward parts",
        "time per step (s)",
    ]
    without_kl = {name: value for name, value in metrics_of(10, 50).items() if name != "kl"}
    assert "entropy" in titles([without_kl])


def test_a_run_without_a_step_yet_has_no_picture_and_no_warning(tmp_path, recwarn):
    write_metrics(tmp_path, [])
    draw_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists()
    assert not recwarn.list


def test_what_cannot_be_drawn_is_a_warning_and_leaves_the_old_picture(tmp_path):
    write_metrics(tmp_path, [metrics_of(step, 50) for step in range(5)])
    draw_curves(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()
    write_metrics(tmp_path, [{"step": 1, "score": "high"}])
    with pytest.warns(UserWarning, match=r"could not be drawn \(ValueError.*The run goes on"):
        draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == before


HOSTILE_METRICS = {
    "an axis finer than a float": [{"step": 1, "kl": 10**17}, {"step": 2, "kl": 10**17 + 16}],
    "sums that overflow": [{"step": 1, "score": 1e308, "kl": -1e308}, {"step": 2, "score": 0.5, "kl": 1e308}],
    "subnormal": [{"step": 1, "score": 1e-320}, {"step": 2, "score": 2e-320}],
    "no float": [{"step": 1, "score": 10**400}, {"step": 2, "score": 0.5}],
    "far steps": [{"step": 10**30, "score": 1}, {"step": -5, "score": 1}, {"step": 2**53, "score": 0}],
    "bad mathtext": [{"step": 1, "score": 1, "reward/$": 1, "reward/$\\frac$": 2, "reward/\x1b[2J\n\u202e": 3}],
    "a long name": [{"step": 1, "score": 1, "reward/" + 10_000 * "n": 1, "reward/b": 2}],
    "no time": [{"step": 1, "score": 1, "time/step": 0}, {"step": 2, "score": 1, "time/step": 0}],
}


@pytest.mark.parametrize("rows", HOSTILE_METRICS.values(), ids=HOSTILE_METRICS)
def test_whatever_names_and_numbers_there_are_the_picture_is_drawn(rows, tmp_path, recwarn):
    write_metrics(tmp_path, rows)
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn.list if "curves.png" in str(warning.message)]


def test_of_very_many_lines_some_are_drawn_with_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr("common.runs.plots.MAX_POINTS", 10)
    write_metrics(tmp_path, [{"step": step, "score": 0.5} for step in range(95)])
    steps = [row["step"] for row in Curves(tmp_path / "metrics.jsonl").rows]
    assert len(steps) <= 11 and steps[0] == 0 and steps[-1] == 94


def test_the_band_of_an_evaluation_reaches_as_far_below_as_above(tmp_path):
    write_metrics(tmp_path, [{"step": step, "eval/accuracy": 0.5, "eval/accuracy_ci95": 0.2} for step in (0, 10)])
    axes = Figure().subplots()
    _evaluation(axes, Curves(tmp_path / "metrics.jsonl"), "eval/accuracy")
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.3) and heights.max() == pytest.approx(0.7)


def test_a_fit_before_the_first_step_does_not_hide_the_time_of_the_steps(tmp_path):
    rows = [metrics_of(step, 10) for step in range(1, 11)]
    rows[0] |= {"time/value_init": 100.0, "time/step": 103.6}
    write_metrics(tmp_path, rows)
    axes = Figure().subplots()
    _time_by_phase(axes, Curves(tmp_path / "metrics.jsonl"))
    assert axes.get_ylim()[1] < 6
    assert axes.get_legend_handles_labels()[1] == ["sample", "update", "push", "other"]


def test_the_running_mean_keeps_a_constant_and_a_line_and_removes_noise():
    np.testing.assert_allclose(running_mean(np.full(50, 3.0)), 3.0)
    line = np.arange(200.0)
    np.testing.assert_allclose(running_mean(line)[30:-30], line[30:-30])
    noise = np.random.default_rng(0).normal(size=1000)
    assert running_mean(noise).std() < 0.15
    assert running_mean(np.array([1.0])).tolist() == [1.0]
