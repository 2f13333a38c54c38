"""The comparison of algorithms: what it finds, runs, refuses and says.

Most runs here are those of made-up algorithms, scripts that write a run's files in an instant; one is GRPO's own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.image import imread

from common.runs.plots import PALETTE
from examples.compare_algorithms.compare_algorithms import compare, find_algorithms
from examples.compare_algorithms.intervals import mean_with_interval
from examples.compare_algorithms.processes import run_environment
from examples.compare_algorithms.report import write_report
from examples.compare_algorithms.runs import comparable_runs

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "task": "countdown",
    "num_steps": 2,
    "rewards": ["format", "equation"],
    "learning_rate": 0.1,
    "eval_every": 1,
}
# Writes what a run writes, with an accuracy of 0.5 after training; fails where --fail names its seed.
SCRIPT = f"""
import argparse, json, os, pathlib, sys, yaml
parser = argparse.ArgumentParser()
for name in ("seed", "output_dir", "preset", "resume", "eval_kl", "fail", "task"):
    parser.add_argument("--" + name)
options = parser.parse_args()
print("arguments:", *sys.argv[1:], "threads:", os.environ["OMP_NUM_THREADS"])
if options.fail == options.seed:
    sys.exit("no such luck")
folder = pathlib.Path(options.output_dir)
folder.mkdir(exist_ok=True)
settings = {SETTINGS!r} | {{"seed": int(options.seed), "output_dir": str(folder)}}
settings |= {{"task": options.task}} if options.task else {{}}
(folder / "config.yaml").write_text(yaml.safe_dump(settings | OWN))
rows = [dict(step=step, episodes=8 * step, tokens=80 * step) for step in range(2)]
for row in rows:
    row |= {{"eval/score": 0.1, "eval/accuracy": 0.5 * row["step"], "eval/accuracy_ci95": 0.1}}
    row |= {{"eval/kl": 0.1 * row["step"], "time/step": 1.0, "time/eval": 0.5, "memory/peak_gb": 1.0}}
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "final").mkdir()
"""


@pytest.fixture
def root(tmp_path):
    """A repository with the algorithms Alpha and Beta, and folders that are none."""
    for name in ("Alpha", "Beta", "Gamma", "delta"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / f"{name.lower()}.py").write_text("OWN = {}\n" + SCRIPT)
    for name in ("Alpha", "Beta"):
        (tmp_path / "root" / name / f"{name.lower()}_trainer.py").touch()
    return tmp_path / "root"


def write_run(folder, settings=None, rows=()):
    """A finished run's folder."""
    (folder / "final").mkdir(parents=True)
    seed = int(folder.name.rpartition("-seed")[2])
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"seed": seed} | (settings or {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def two_steps(accuracy=0.5, **last):
    """Metrics of an evaluation, a step of 10 completions, and one with another evaluation."""
    first = {"step": 0, "episodes": 0, "tokens": 0, "eval/score": 0.2, "eval/accuracy": 0.25, "eval/kl": 0.0}
    middle = {"step": 1, "episodes": 10, "tokens": 100, "score": 0.3, "policy/tokens": 90.0}
    end = {"step": 2, "episodes": 20, "tokens": 220, "score": 0.4, "policy/tokens": 110.0, "eval/score": 0.6}
    end |= {"eval/accuracy": accuracy, "eval/accuracy_ci95": 0.06, "eval/kl": 0.03}
    first |= {"time/step": 5.0, "time/eval": 5.0, "memory/peak_gb": 1.0}
    middle |= {"time/step": 3.0, "memory/peak_gb": 3.0}
    end |= {"time/step": 7.5, "time/eval": 4.0, "time/save": 0.5, "memory/peak_gb": 2.0}
    return [first, middle, end | last]


# What it finds and runs


def test_an_algorithm_is_a_folder_with_its_script_and_its_trainer(root):
    assert find_algorithms(root) == {name: root / name / f"{name.lower()}.py" for name in ("Alpha", "Beta")}
    assert find_algorithms(ROOT)["GRPO"] == ROOT / "GRPO" / "grpo.py"


@pytest.mark.slow
def test_every_algorithm_runs_before_the_next_seed_and_is_given_what_follows_the_dashes(root, tmp_path, capfd):
    out = tmp_path / "out"
    assert compare(["--seeds", "0", "3", "--output_dir", str(out), "--", "--task", "math"], root) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[")]
    runs = ["Alpha, seed 0", "Beta, seed 0", "Alpha, seed 3", "Beta, seed 3"]
    assert [line.split(":")[0] for line in lines] == [f"[{n}/4] {run}" for n, run in enumerate(runs, start=1)]
    assert all(line.endswith("s, accuracy 0.000 -> 0.500") for line in lines)
    assert "--eval_kl true --task math" in (out / "beta-seed3.log").read_text()
    assert {path.name for path in out.iterdir() if path.is_file() and path.suffix != ".log"} == {
        *("arguments.json", "comparison.png", "results.json", "table.md"),
    }


@pytest.mark.slow
def test_finished_runs_are_skipped_and_the_others_started(root, tmp_path, capfd):
    arguments = ["--output_dir", str(tmp_path), "--seeds"]
    compare([*arguments, "0"], root)
    before = (tmp_path / "alpha-seed0.log").read_bytes()
    assert compare([*arguments, "0", "1"], root) == 0
    assert "[1/4] Alpha, seed 0: finished before, accuracy 0.000 -> 0.500" in capfd.readouterr().out
    assert (tmp_path / "alpha-seed0.log").read_bytes() == before
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == [0, 1]


def test_an_interrupted_run_is_started_again_to_continue_and_its_log_goes_on(root, tmp_path):
    (tmp_path / "alpha-seed0").mkdir()
    (tmp_path / "alpha-seed0.log").write_text("step 1\n")
    assert compare(["--seeds", "0", "--algorithms", "Alpha", "--output_dir", str(tmp_path)], root) == 0
    before, after = (tmp_path / "alpha-seed0.log").read_text().splitlines()
    assert before == "step 1" and "--resume auto" in after


@pytest.mark.slow
def test_a_failing_run_is_named_with_its_log_and_the_others_go_on(root, tmp_path, capfd):
    assert compare(["--seeds", "0", "1", "--output_dir", str(tmp_path), "--", "--fail", "1"], root) == 1
    printed = capfd.readouterr().out
    log = re.escape(f"{tmp_path}/alpha-seed1.log")
    assert re.search(rf"\[3/4\] Alpha, seed 1: FAILED with status 1 after \d+ s, see {log}: no such luck", printed)
    assert "[4/4] Beta, seed 1: FAILED" in printed
    assert json.loads((tmp_path / "results.json").read_text())["seeds"] == [0]  # what all finished is reported


def test_a_comparison_in_which_everything_fails_says_so(root, tmp_path, capfd):
    assert compare(["--seeds", "1", "--output_dir", str(tmp_path), "--", "--fail", "1"], root) == 1
    assert capfd.readouterr().out.count("FAILED") == 2


def test_a_run_has_all_cpus_of_this_process_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_environment()["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert run_environment()["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run_environment()["OMP_NUM_THREADS"] == "7"


@pytest.mark.slow
def test_grpos_own_script_is_compared_with_itself(tiny_folder, tmp_path):
    settings = {
        **{"model": tiny_folder, "sampler": "transformers", "max_completion_length": 8, "num_eval_prompts": 4},
        **{"num_steps": 2, "prompts_per_step": 2, "num_generations": 2, "eval_every": 1, "save_every": 0},
        **{"task": "countdown", "use_lora": "false", "max_prompt_length": 64},
    }
    passed_on = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    script = ROOT / "examples" / "compare_algorithms" / "compare_algorithms.py"
    command = [sys.executable, script, "--algorithms", "grpo", "--seeds", "0", "--preset", "cpu", "--", *passed_on]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    out = tmp_path / "runs" / "compare_algorithms"
    assert done.returncode == 0, done.stdout + done.stderr + (out / "grpo-seed0.log").read_text()
    results = json.loads((out / "results.json").read_text())
    own = {name: entry["mean"] for name, entry in results["algorithms"]["GRPO"].items()}
    assert results["equal"]["num_steps"] == 2 and results["different"] == {}
    assert own["tokens_sampled"] == own["tokens_trained"] > 0 and own["kl"] is not None
    assert 0 < own["seconds_per_episode"] < 10


# What it refuses


def refused(call, *parts):
    with pytest.raises(ValueError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_algorithm_is_refused_with_those_that_are_there(root, tmp_path):
    arguments = ["--algorithms", "alpha", "Gamma", "--output_dir", str(tmp_path / "out")]
    refused(lambda: compare(arguments, root), "'Gamma'", "gamma_trainer.py", "Alpha, Beta")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["--seed", "--output_dir=elsewhere", "--preset", "--resume"])
def test_what_each_run_is_given_by_the_comparison_cannot_be_passed_on(root, tmp_path, word):
    refused(lambda: compare(["--output_dir", str(tmp_path / "out"), "--", word, "5"], root), word, "before the --")


@pytest.mark.slow
def test_runs_with_other_settings_do_not_mix_in_one_folder(root, tmp_path):
    arguments = ["--seeds", "0", "--output_dir", str(tmp_path)]
    compare(arguments, root)
    refused(lambda: compare([*arguments, "--", "--task", "math"], root), "--task math", "another --output_dir")
    assert compare(arguments, root) == 0


@pytest.mark.parametrize(
    ("setting", "value"), [("task", "math"), ("num_steps", 3), ("eval_every", 2), ("rewards", ["format"]), ("seed", 7)]
)
def test_algorithms_that_learned_something_else_are_not_compared(tmp_path, setting, value):
    write_run(tmp_path / "alpha-seed0", rows=two_steps())
    write_run(tmp_path / "beta-seed0", {setting: value}, rows=two_steps())
    refused(lambda: write_report(tmp_path, ["Alpha", "Beta"], known=["Alpha", "Beta"]), "Beta", setting, repr(value))
    assert not (tmp_path / "table.md").exists()


def test_seeds_of_one_algorithm_have_to_be_equal_in_every_setting(tmp_path):
    write_run(tmp_path / "alpha-seed0", rows=two_steps())
    write_run(tmp_path / "alpha-seed1", {"learning_rate": 0.2}, rows=two_steps())
    refused(lambda: write_report(tmp_path, ["Alpha"], known=["Alpha"]), "Alpha, seed 1", "learning_rate", "0.2")


def test_unequal_algorithms_are_refused_as_soon_as_the_second_has_run(root, tmp_path):
    script = root / "Alpha" / "alpha.py"
    script.write_text(script.read_text().replace("OWN = {}", "OWN = {'num_steps': 5}"))
    refused(lambda: compare(["--output_dir", str(tmp_path / "out")], root), "Beta, seed 0: num_steps is 2 but 5")
    assert not (tmp_path / "out" / "alpha-seed1").exists()


def test_runs_without_evaluations_are_refused(tmp_path):
    write_run(tmp_path / "alpha-seed0", rows=two_steps()[:2])
    refused(lambda: write_report(tmp_path, ["Alpha"], known=["Alpha"]), "1 held-out evaluations", "--eval_every")


def test_a_report_on_nothing_is_refused(root, tmp_path):
    refused(lambda: compare(["--report_only", "--output_dir", str(tmp_path)], root), "Alpha: none; Beta: none")


# What it says


def test_the_numbers_of_a_run_by_hand(tmp_path):
    write_run(tmp_path / "alpha-seed0", rows=two_steps())
    write_report(tmp_path, ["Alpha"], known=["Alpha"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: entry["mean"] for name, entry in results["algorithms"]["Alpha"].items()} == {
        **{
            "accuracy_before": 0.25,
            "accuracy": 0.5,
            "accuracy_ci95": 0.06,
            "score_before": 0.2,
            "score": 0.6,
            "kl": 0.03,
        },
        "seconds_per_episode": 0.3,  # (3 + 7.5 - 4 - 0.5) / 20
        **{"tokens_sampled": 220, "tokens_trained": 200, "peak_gb": 3.0},
    }


def test_the_interval_over_seeds_by_hand():
    """Deviations -1, 0 and 1 tenths: a standard deviation of 0.1, and 4.303 of its standard errors."""
    over_three = mean_with_interval([0.1, 0.2, 0.3])
    assert (over_three["mean"], over_three["ci95"]) == pytest.approx((0.2, 4.303 * 0.1 / 3**0.5))
    assert over_three["per_seed"] == [0.1, 0.2, 0.3]
    assert mean_with_interval([0.4])["ci95"] is None  # one seed says nothing about others
    assert mean_with_interval([0.4, None])["mean"] is None
    many = mean_with_interval([0.0, 1.0] * 6)
    assert many["ci95"] == pytest.approx(2.262 * (3 / 11) ** 0.5 / 12**0.5)


def test_the_table_has_each_algorithm_its_seeds_and_what_differs(tmp_path):
    for seed, accuracy in enumerate((0.4, 0.5, 0.6)):
        write_run(tmp_path / f"alpha-seed{seed}", {"clip_range": 0.2}, rows=two_steps(accuracy))
        write_run(tmp_path / f"beta-seed{seed}", {"learning_rate": 0.3}, rows=two_steps(0.7))
    table = write_report(tmp_path, ["Alpha", "Beta"], known=["Alpha", "Beta"])
    assert (tmp_path / "table.md").read_text() == table
    assert "| Alpha | 0.250 ± 0.000 | 0.500 ± 0.248 |" in table
    assert "| Alpha, seed 2 | 0.250 | 0.600 ± 0.060 |" in table
    assert "| Beta | 0.250 ± 0.000 | 0.700 ± 0.000 |" in table
    assert "* learning_rate: 0.1 (Alpha); 0.3 (Beta)\n" in table
    assert "* clip_range: 0.2 (Alpha)\n" in table
    assert "num_steps 2" in table and "* num_steps" not in table and "* seed" not in table


def test_only_seeds_that_all_have_finished_are_compared_and_the_others_named(tmp_path):
    for name in ("alpha-seed0", "alpha-seed1", "beta-seed1"):
        write_run(tmp_path / name, rows=two_steps())
    (tmp_path / "beta-seed0").mkdir()  # interrupted
    runs, left_out = comparable_runs(tmp_path, ["Alpha", "Beta", "Gamma"])
    assert [(run.algorithm, run.seed) for run in runs] == [("Alpha", 1), ("Beta", 1)]
    assert left_out == ["Gamma (no finished run)", "Alpha, seed 0"]
    assert "; ".join(left_out) in write_report(tmp_path, ["Alpha", "Beta", "Gamma"], known=["Alpha", "Beta", "Gamma"])


def test_a_task_without_accuracy_and_a_run_without_kl_leave_their_columns_out(tmp_path):
    rows = [
        {key: value for key, value in row.items() if "accuracy" not in key and "kl" not in key} for row in two_steps()
    ]
    write_run(tmp_path / "alpha-seed0", rows=rows)
    table = write_report(tmp_path, ["Alpha"], known=["Alpha"])
    assert "accuracy" not in table.splitlines()[2] and "KL" not in table.splitlines()[2]
    assert "| Alpha | 0.200 | 0.600 |" in table


def colors_of(path: Path) -> set[str]:
    """The colours of the palette that a picture has, exactly."""
    present = {to_hex(pixel).upper() for pixel in np.unique(imread(path).reshape(-1, 4), axis=0)}
    return present.intersection(PALETTE)


@pytest.mark.slow
def test_the_figure_has_a_line_for_each_algorithm_in_a_colour_that_stays_its_own(tmp_path):
    known = ["Beta", "Alpha", "Gamma"]
    for name, accuracy in {"alpha-seed0": 0.4, "alpha-seed1": 0.6, "gamma-seed0": 0.7, "gamma-seed1": 0.8}.items():
        write_run(tmp_path / name, rows=two_steps(accuracy))
    write_report(tmp_path, known, known=known)
    assert colors_of(tmp_path / "comparison.png") == {PALETTE[0], PALETTE[2]}
    height, width, _ = imread(tmp_path / "comparison.png").shape
    assert width > 3 * height  # three panels
    write_report(tmp_path, ["Gamma"], known=known)
    assert colors_of(tmp_path / "comparison.png") == {PALETTE[2]}


@pytest.mark.slow
def test_runs_at_the_same_time_have_cpus_of_their_own(root, tmp_path, monkeypatch):
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert compare(["--output_dir", str(tmp_path / "out"), "--seeds", "0", "1", "--at_once", "2"], root=root) == 0
    for name in ("alpha", "beta"):
        for seed in (0, 1):
            log = (tmp_path / "out" / f"{name}-seed{seed}.log").read_text()
            assert f"threads: {len(cpus) // 2}" in log or f"threads: {len(cpus) - len(cpus) // 2}" in log
    assert sorted(os.sched_getaffinity(0)) == cpus


def test_more_runs_at_once_than_cpus_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match=r"at_once=999: each run needs a CPU"):
        compare(["--output_dir", str(tmp_path / "out"), "--at_once", "999"], root=root)
