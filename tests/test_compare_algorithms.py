"""The comparison of algorithms: what it finds, runs, refuses and says.

Most runs here are those of made-up algorithms, scripts that write a run's files in an instant; one is GRPO's own.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from common.cli import parse_settings
from common.evaluation.command import evaluate
from common.evaluation.settings import EvaluationSettings
from common.runs.log import read_metrics
from common.runs.plots import PALETTE
from examples.compare_algorithms import compare_algorithms
from examples.compare_algorithms.apart import in_words, on_frontier, seeds_on_frontier, tell_apart, two_sided
from examples.compare_algorithms.compare_algorithms import compare, find_algorithms
from examples.compare_algorithms.figure import _spread
from examples.compare_algorithms.given import written_settings
from examples.compare_algorithms.intervals import mean_with_interval
from examples.compare_algorithms.judged import compare_with_untrained, win_rates
from examples.compare_algorithms.judging import Judging
from examples.compare_algorithms.processes import Processes, run_environment
from examples.compare_algorithms.report import write_report
from examples.compare_algorithms.runs import comparable_runs, must_be_equal, read_run

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "task": "countdown",
    "num_steps": 2,
    "rewards": ["format", "equation"],
    "learning_rate": 0.1,
    "eval_every": 1,
}
# Writes what a run writes, with an accuracy of 0.5 after training; fails where --fail names its seed. With
# --plan, it only checks its settings.
SCRIPT = f"""
import argparse, json, os, pathlib, sys, yaml
parser = argparse.ArgumentParser()
for name in ("seed", "output_dir", "preset", "resume", "eval_kl", "fail", "task", "gamma", "teacher"):
    parser.add_argument("--" + name)
parser.add_argument("--plan", action="store_true")
options = parser.parse_args()
if options.teacher == "nowhere":
    sys.exit("error: teacher='nowhere': there is no such folder")
if options.plan:
    sys.exit()
print("arguments:", *sys.argv[1:], "threads:", os.environ["OMP_NUM_THREADS"])
if options.fail == options.seed:
    sys.exit("no such luck")
folder = pathlib.Path(options.output_dir)
folder.mkdir(exist_ok=True)
settings = {SETTINGS!r} | {{"seed": int(options.seed), "output_dir": str(folder)}}
settings |= {{name: value for name in ("task", "gamma", "teacher") if (value := vars(options)[name])}}
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
        (tmp_path / "root" / name / f"{name.lower()}.py").write_text("SETTINGS = dict(gamma=1.0)\nOWN = {}\n" + SCRIPT)
    for name in ("Alpha", "Beta"):
        (tmp_path / "root" / name / f"{name.lower()}_trainer.py").touch()
    return tmp_path / "root"


@pytest.fixture
def pupil(root):
    """The script of a further algorithm, Pupil, which learns from a teacher."""
    (root / "Pupil").mkdir()
    script = root / "Pupil" / "pupil.py"
    script.write_text("SETTINGS = dict(gamma=1.0, teacher=None)\nOWN = {}\n" + SCRIPT)
    (root / "Pupil" / "pupil_trainer.py").touch()
    return script


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
    end |= {"eval/accuracy": accuracy, "eval/accuracy_ci95": 0.06, "eval/kl": 0.03, "eval/length": 40.0}
    first["eval/length"] = 50.0
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


class EvaluatesHere(Processes):
    """Starts scripts as they are, and evaluates in this process, which has loaded what that needs."""

    def run(self, command, log):
        if "common.evaluation" not in command:
            return super().run(command, log)
        evaluate(parse_settings(EvaluationSettings, list(map(str, command[3:]))))
        return 0


@pytest.mark.slow
def test_grpos_own_script_is_compared_with_itself_and_judged_once(tiny_folder, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare_algorithms, "Processes", EvaluatesHere)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    caplog.set_level("INFO", "nanorlhf")
    Path("mine.py").write_text("def short(completions):\n    return [-float(len(text)) for text in completions]\n")
    settings = {
        **{"model": tiny_folder, "sampler": "transformers", "max_completion_length": 8, "num_eval_prompts": 4},
        **{"num_steps": 2, "prompts_per_step": 2, "num_generations": 2, "eval_every": 1, "save_every": 0},
        **{"task": "countdown", "use_lora": "false", "max_prompt_length": 64},
    }
    passed_on = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    arguments = ["--algorithms", "grpo", "--seeds", "0", "--preset", "cpu", "--judge", "mine.py:short"]
    arguments += ["--judge_samples", "2", "--", *passed_on]
    assert compare(arguments) == 0, capfd.readouterr()
    out = tmp_path / "runs" / "compare_algorithms"
    results = json.loads((out / "results.json").read_text())
    own = {name: entry["mean"] for name, entry in results["algorithms"]["GRPO"].items()}
    assert results["equal"]["num_steps"] == 2 and results["different"] == {}
    assert own["episodes"] == own["completions_sampled"] == 2 * 2 * 2
    assert own["tokens_sampled"] == own["tokens_trained"] > 0 and own["kl"] is not None
    assert 0 < own["seconds_per_episode"] < 10
    training, short = results["judged"]["judges"].values()
    # Each prompt's first answer is that of the run's own evaluation, which had the same noise.
    for who, row in (("untrained", 0), ("grpo-seed0", -1)):
        lines = (out / "judged" / who / "training" / "outputs.jsonl").read_text().splitlines()
        lengths = [[each["length"] for each in json.loads(line)["completions"]] for line in lines]
        assert np.mean(lengths, 0)[0] == read_metrics(out / "grpo-seed0")[row]["eval/length"]
        assert np.shape(lengths) == (results["judged"]["prompts"], results["judged"]["samples"]) == (4, 2)
    assert training["algorithms"]["GRPO"]["wins"]["mean"] is not None
    assert short["untrained"] < 0 and short["algorithms"]["GRPO"]["score"]["mean"] < 0
    assert caplog.text.count("completions are there") == 2  # of the untrained policy, and of the run
    # Nothing is measured again.
    written = {path: path.stat().st_mtime_ns for path in out.rglob("judged/*/*/*")}
    assert len(written) == 2 * 2 * 3
    capfd.readouterr()
    assert compare(arguments) == 0
    assert re.search(
        r"GRPO, seed 0: finished before, .*; judged in \d+ s: training .*, short -", capfd.readouterr().out
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("judged/*/*/*")} == written


# Settings for one algorithm, and a teacher


def test_a_setting_for_one_algorithm_goes_to_its_runs_alone_and_is_shown(root, tmp_path):
    out = tmp_path / "out"
    arguments = ["--seeds", "0", "--output_dir", str(out), "--for", "beta", "gamma=0.5", "--", "--task", "math"]
    assert compare(arguments, root) == 0
    assert json.loads((out / "arguments.json").read_text()) == {
        "all": ["--preset", "auto", "--task", "math"],
        "for": {"Beta": {"gamma": "0.5"}},
    }
    assert "--gamma" not in (out / "alpha-seed0.log").read_text()
    assert "--task math --gamma=0.5" in (out / "beta-seed0.log").read_text()
    table = (out / "table.md").read_text()
    assert "Given to one algorithm alone: Beta --gamma=0.5.\n" in table and "* gamma: 0.5 (Beta)" in table
    # Its runs are finished and would not notice another value; an algorithm that has not run may still get one.
    changed = ["--seeds", "0", "1", "--output_dir", str(out), "--for", "Beta", "gamma=0.6", "--", "--task", "math"]
    refused(
        lambda: compare(changed, root), "Beta with --gamma=0.6", "started with --gamma=0.5", "another --output_dir"
    )
    refused(lambda: compare([*changed[:5], *changed[8:]], root), "Beta with no setting of its own")


def test_who_learns_from_a_teacher_is_left_out_without_one_and_may_join_later(root, pupil, tmp_path, capfd):
    out = ["--seeds", "0", "--output_dir", str(tmp_path / "out")]
    assert compare(out, root) == 0
    shown = capfd.readouterr().out
    assert shown.startswith("Pupil is left out: it learns from a teacher, and none is given. Pass --teacher")
    assert "[2/2] Beta" in shown and "Pupil (no finished run)" in (tmp_path / "out" / "table.md").read_text()
    assert compare([*out, "--teacher", "tiny"], root) == 0
    assert "--teacher" not in (tmp_path / "out" / "beta-seed0.log").read_text()
    assert "--teacher=tiny" in (tmp_path / "out" / "pupil-seed0.log").read_text()
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Not counted are the completions, tokens and seconds of a teacher's own training (Pupil: tiny)." in table
    assert "is left out" not in capfd.readouterr().out
    refused(lambda: compare([*out, "--algorithms", "pupil"], root), "algorithms=Pupil", "--teacher")
    # As a setting of this algorithm alone, or in the script, it is a teacher too.
    assert compare([*out, "--algorithms", "Pupil", "--for", "Pupil", "teacher=tiny"], root) == 0
    assert not (tmp_path / "out" / "pupil-seed1").exists()


def test_a_teacher_that_is_not_there_is_refused_before_any_run(root, pupil, tmp_path):
    out = ["--output_dir", str(tmp_path / "out")]
    refused(lambda: compare([*out, "--teacher", "nowhere"], root), "Pupil with --teacher=nowhere: teacher='nowhere'")
    refused(lambda: compare([*out, "--teacher", "x", "--algorithms", "Alpha"], root), "teacher=x", "Alpha", "nobody")
    refused(lambda: compare([*out, "--teacher", "x", "--report_only"], root), "teacher=x", "starts no run")
    refused(lambda: compare([*out, "--teacher", "", "--report_only"], root), "teacher= with", "starts no run")
    refused(lambda: compare([*out, "--num_steps", "2"], root), "--num_steps 2: no option", "after --,", "--for GSPO")
    refused(lambda: compare([*out, "--for", "Alpha", "--clip_range", "1"], root), "--clip_range 1: no option")
    assert not (tmp_path / "out").exists()


def test_settings_are_found_in_the_scripts_of_this_repository():
    found = {name: written_settings(script) for name, script in find_algorithms(ROOT).items()}
    assert len(found) >= 11 and all(settings["seed"] == 0 for settings in found.values())
    assert [name for name, settings in found.items() if "teacher" in settings] == ["Distill"]
    assert found["Distill"]["teacher"] is None


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


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["Gamma", "gamma=1"], ["--for Gamma", "Alpha, Beta"]),
        (["Beta"], ["--for Beta: without a setting", "NAME=VALUE"]),
        (["Beta", "gamma"], ["--for Beta gamma:", "--for Beta gamma=VALUE"]),
        (["Beta", "gama=1"], ["unknown setting 'gama' after --for Beta", "Did you mean gamma?"]),
        (["Beta", "seed=1"], ["--for Beta seed=1: seed must be equal", "--seeds"]),
        (["Beta", "num_steps=9"], ["num_steps must be equal in all runs"]),
        (["Beta", "reward_weights=1"], ["reward_weights must be equal in all runs"]),
    ],
)
def test_a_setting_for_one_algorithm_that_cannot_be_one_is_refused_before_any_run(root, tmp_path, words, parts):
    refused(lambda: compare(["--output_dir", str(tmp_path / "out"), "--for", *words], root), *parts)
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


def test_a_setting_of_one_algorithm_may_begin_like_those_that_must_be_equal(tmp_path):
    """Such as the weight that distillation gives the score, reward_coef."""
    write_run(tmp_path / "alpha-seed0", {"reward_coef": 0.0}, rows=two_steps())
    write_run(tmp_path / "beta-seed0", rows=two_steps())
    assert "* reward_coef: 0.0 (Alpha)" in write_report(tmp_path, ["Alpha", "Beta"], known=["Alpha", "Beta"])
    assert all(map(must_be_equal, ("reward_weights", "reward_format", "dataset", "eval_kl", "prompt_weights")))


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
    (tmp_path / "alpha-seed0.bak" / "final").mkdir(parents=True)  # a copy that somebody keeps is no run
    refused(lambda: compare(["--report_only", "--output_dir", str(tmp_path)], root), "Alpha: none; Beta: none")
    (tmp_path / "alpha-seed-1" / "final").mkdir(parents=True)
    (tmp_path / "beta-seed2" / "final").mkdir(parents=True)
    refused(lambda: compare(["--report_only", "--output_dir", str(tmp_path)], root), "Alpha: [-1]; Beta: [2]")


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
            "kl_per_completion": 0.03 * 40.0,
            "length_before": 50.0,
            "length": 40.0,
        },
        "seconds_per_episode": 0.3,  # (3 + 7.5 - 4 - 0.5) / 20
        **{"episodes": 20, "completions_sampled": 20},
        **{"tokens_sampled": 220, "tokens_trained": 200, "peak_gb": 3.0},
    }


def test_completions_sampled_are_all_of_them_whatever_for(tmp_path):
    first, middle, last = two_steps()
    first |= {"value_init/completions": 8.0}
    middle |= {"refill/completions": 5.0, "greedy/completions": 2.0, "refill/tokens": 50.0}
    last |= {"refill/completions": 3.0, "vine/continuations": 12.0}
    write_run(tmp_path / "alpha-seed0", rows=[first, middle, last])
    table = write_report(tmp_path, ["Alpha"], known=["Alpha"])
    numbers = read_run(tmp_path / "alpha-seed0", "Alpha", 0).numbers()
    assert (numbers["episodes"], numbers["completions_sampled"]) == (20, 20 + 8 + 5 + 2 + 3 + 12)
    assert "Every run is trained from 20 completions" in table and "| completions sampled |" in table


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
    assert "| **Beta** | 0.250 ± 0.000 | 0.700 ± 0.000 |" in table
    assert "* learning_rate: 0.1 (Alpha); 0.3 (Beta)\n" in table
    assert "* clip_range: 0.2 (Alpha)\n" in table
    assert "num_steps 2" in table and "* num_steps" not in table and "* seed" not in table


def test_only_seeds_that_all_have_finished_are_compared_and_the_others_named(tmp_path):
    for name in ("alpha-seed0", "alpha-seed1", "beta-seed1"):
        write_run(tmp_path / name, rows=two_steps())
    (tmp_path / "beta-seed0").mkdir()  # interrupted
    runs, left_out = comparable_runs(tmp_path, ["Alpha", "Beta", "Gamma"])
    assert [(run.algorithm, run.seed) for run in runs] == [("Alpha", 1), ("Beta", 1)]
    assert left_out == ["Gamma (no finished run)", "seed 0 of all (not finished by Beta)"]
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
    pixels = (imread(path)[..., :3] * 255).round().astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    return {f"#{pixel:06X}" for pixel in np.unique(pixels)}.intersection(PALETTE)


@pytest.mark.slow
def test_the_figure_has_a_line_for_each_algorithm_in_a_colour_that_stays_its_own(tmp_path):
    known = ["Beta", "Alpha", "Gamma"]
    for name, accuracy in {"alpha-seed0": 0.4, "alpha-seed1": 0.6, "gamma-seed0": 0.7, "gamma-seed1": 0.8}.items():
        write_run(tmp_path / name, rows=two_steps(accuracy))
    write_report(tmp_path, known, known=known)
    assert colors_of(tmp_path / "comparison.png") == {PALETTE[0], PALETTE[2]}
    height, width, _ = imread(tmp_path / "comparison.png").shape
    assert width > 2.5 * height  # three panels
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


# The frontier, and what seeds tell apart


def test_on_the_frontier_nobody_else_has_more_at_less():
    points = {"good": (0.7, 0.05), "best": (0.8, 0.1), "worse": (0.7, 0.06), "less": (0.6, 0.05), "low": (0.5, 0.01)}
    assert on_frontier(points) == ["good", "best", "low"]
    assert on_frontier({"a": (0.7, 0.05), "twin": (0.7, 0.05)}) == ["a", "twin"]
    by_seed = {"a": [(0.7, 0.1), (0.5, 0.1)], "b": [(0.6, 0.1), (0.4, 0.1)], "c": [(0.1, 0.0), (0.6, 0.0)]}
    assert seeds_on_frontier(by_seed) == {"a": 1, "c": 2}  # with seed 1, c has more accuracy at less KL than a


def test_students_t_by_a_table():
    for degrees, t, p in [(1, 12.706, 0.05), (2, 4.303, 0.05), (3, 3.182, 0.05), (9, 2.262, 0.05), (20, 3.850, 0.001)]:
        assert two_sided(t, degrees) == pytest.approx(p, rel=2e-3)
    assert two_sided(0.0, 5) == 1.0


def test_two_algorithms_are_compared_by_the_paired_t_test():
    """Differences 0.1, 0.2 and 0.3: a mean of 0.2, a standard error of 0.1 / sqrt(3), so t = 3.464 and p = 0.074."""
    (pair,) = tell_apart({"A": [0.4, 0.3, 0.2], "B": [0.5, 0.5, 0.5]})["pairs"]
    assert (pair["above"], pair["below"]) == ("B", "A") and pair["per_seed"] == pytest.approx([0.1, 0.2, 0.3])
    assert (pair["mean"], pair["ci95"]) == pytest.approx((0.2, 4.303 * 0.1 / 3**0.5))
    assert pair["p"] == pytest.approx(0.0742, abs=1e-4) and not pair["told_apart"]
    # With a fourth seed, t is 4.9 and p is 0.016.
    assert in_words(tell_apart({"A": [0.4, 0.3, 0.2, 0.3], "B": [0.5] * 4})) == "B is above A."


def test_many_pairs_need_larger_differences_than_one():
    """The noise is at least the typical one, and Holm's correction multiplies the smallest p by 3 pairs."""
    values = {"A": [0.50, 0.52, 0.54], "B": [0.51, 0.53, 0.52], "C": [0.60, 0.61, 0.65]}
    compared = tell_apart(values)
    # Variances of the differences x 10,000: A and B 3, C and A 1, C and B 7. The median, 3, is on average 0.702 of the
    # true variance, and counts for C and A; C and B have their own. Each has 2 x 2 degrees of freedom.
    p = {(pair["above"], pair["below"]): pair["p"] for pair in compared["pairs"]}
    assert p["C", "A"] == pytest.approx(3 * two_sided(0.1 / (3e-4 / 0.702 / 3) ** 0.5, 4), rel=0.01)
    assert p["C", "B"] == pytest.approx(2 * two_sided(0.1 / (7e-4 / 3) ** 0.5, 4))
    assert in_words(compared) == "C is above A, B; the other pair is not told apart."


def test_a_pair_whose_own_seeds_disagree_is_not_told_apart():
    """Nine quiet algorithms make the typical noise small, but B has one good seed alone."""
    quiet = {f"Q{i}": [0.50, 0.501 + i / 1000, 0.5] for i in range(9)}
    compared = tell_apart(quiet | {"B": [0.51, 0.52, 0.9]})
    assert not any(pair["told_apart"] for pair in compared["pairs"] if "B" in (pair["above"], pair["below"]))


def test_an_algorithm_that_fails_with_a_seed_hides_no_difference_of_others():
    good = {"A": [0.60, 0.61, 0.62], "B": [0.605, 0.61, 0.615], "C": [0.75, 0.77, 0.76], "D": [0.76, 0.76, 0.765]}
    said = in_words(tell_apart(good | {"failing": [0.7, 0.1, 0.7]}))
    assert said == "D, C are above A, B; the other 6 pairs are not told apart."


def test_without_noise_or_seeds_nothing_is_told_apart():
    (pair,) = tell_apart({"A": [0.4, 0.5], "B": [0.5, 0.6]})["pairs"]  # two seeds that agree by chance
    assert pair["p"] == 1.0 and not pair["told_apart"]
    assert tell_apart({"A": [0.4], "B": [0.5]})["pairs"] == [] == tell_apart({"A": [0.4, 0.5]})["pairs"]
    assert tell_apart({})["pairs"] == []


def test_the_table_says_who_is_on_the_frontier_and_who_is_told_apart(tmp_path):
    for seed, noise in enumerate((0.0, 0.01, -0.01)):
        write_run(tmp_path / f"alpha-seed{seed}", rows=two_steps(0.5 + noise))
        write_run(tmp_path / f"beta-seed{seed}", rows=two_steps(0.7 - noise, **{"eval/kl": 0.02}))
        write_run(tmp_path / f"gamma-seed{seed}", rows=two_steps(0.72, **{"eval/kl": 0.05}))
    table = write_report(tmp_path, ["Alpha", "Beta", "Gamma"], known=["Alpha", "Beta", "Gamma"])
    assert "| Alpha |" in table and "| **Beta** |" in table and "| **Gamma** |" in table
    assert "bold above: Beta (with 3 of 3 seeds), Gamma (with 3 of 3 seeds)." in table
    assert "* held-out accuracy: Gamma, Beta are above Alpha; the other pair is not told apart." in table
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["frontier"] == {"Beta": 3, "Gamma": 3} and len(results["told_apart"]["accuracy"]["pairs"]) == 3


def test_one_seed_tells_nothing_apart_and_one_algorithm_is_not_ranked(tmp_path):
    for name in ("alpha-seed0", "beta-seed0"):
        write_run(tmp_path / name, rows=two_steps(0.9 if name == "alpha-seed0" else 0.1))
    table = write_report(tmp_path, ["Alpha", "Beta"], known=["Alpha", "Beta"])
    assert "**Told apart**: nothing, by one seed." in table and "Pass more --seeds." in table
    alone = write_report(tmp_path, ["Alpha"], known=["Alpha", "Beta"])
    assert "Told apart" not in alone and "Frontier" not in alone and "**Alpha**" not in alone


def test_a_run_whose_kl_is_no_number_is_on_no_frontier_and_the_others_are_drawn(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"alpha-seed{seed}", rows=two_steps(0.6 + seed / 10))
        write_run(tmp_path / f"beta-seed{seed}", rows=two_steps(0.7, **({"eval/kl": None} if seed else {})))
    table = write_report(tmp_path, ["Alpha", "Beta"], known=["Alpha", "Beta"])
    assert "bold above: Alpha (with 2 of 2 seeds)." in table
    assert "Without a KL in some run, so not on a frontier: Beta." in table
    height, width, _ = imread(tmp_path / "comparison.png").shape
    assert width > 2.5 * height  # the panel of KL is there


def test_names_at_the_ends_of_lines_do_not_overlap():
    places = _spread([0.5, 0.5, 0.51, 0.9, 0.99, 1.0], 0.1)
    assert places == pytest.approx([0.4 + 1 / 300, 0.5 + 1 / 300, 0.6 + 1 / 300, 0.8, 0.9, 1.0])
    assert _spread([0.0, 0.0], 0.1) == [0.0, 0.1]


# Judges


def write_judged(folder, scores, length=5, **settings):
    """The result of an evaluation; `scores` has those of each prompt."""
    folder.mkdir(parents=True)
    rows = [{"completions": [{"score": score, "length": length} for score in each]} for each in scores]
    (folder / "outputs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mean = float(np.mean(scores))
    (folder / "score.json").write_text(json.dumps({"score": mean, "settings": {"problems": "x"} | settings}))


@pytest.fixture
def judged(tmp_path):
    """Two seeds of Alpha and one of Beta, judged by the reward of training, and of seed 1 not by "kind"."""
    for name in ("alpha-seed0", "alpha-seed1"):
        write_run(tmp_path / name, rows=two_steps())
    for judge in ("training", "kind"):
        write_judged(tmp_path / "judged" / "untrained" / judge, [[0.0, 2.0], [1.0, 1.0], [4.0, 4.0]])
    write_judged(tmp_path / "judged" / "alpha-seed0" / "training", [[1.0, 3.0], [2.0, 2.0], [4.0, 8.0]], length=7)
    write_judged(tmp_path / "judged" / "alpha-seed1" / "training", [[2.0, 2.0], [1.0, 1.0], [5.0, 5.0]], length=9)
    write_judged(tmp_path / "judged" / "alpha-seed0" / "kind", [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    return tmp_path


def test_gains_over_the_untrained_policy_by_hand(judged):
    """Of seed 0 the prompts gain 1, 1 and 2, of seed 1 1, 0 and 1; together 1, 0.5 and 1.5: a deviation of 0.5."""
    runs, _ = comparable_runs(judged, ["Alpha"])
    found = compare_with_untrained(judged, runs)
    assert (found["prompts"], found["samples"], list(found["judges"])) == (3, 2, ["training", "kind"])
    training, kind = found["judges"].values()
    assert training["untrained"] == 2.0 and training["untrained_length"] == 5.0
    own = training["algorithms"]["Alpha"]
    assert own["score"]["per_seed"] == pytest.approx([10 / 3, 8 / 3]) and own["length"]["per_seed"] == [7.0, 9.0]
    assert own["gain"]["per_seed"] == pytest.approx([4 / 3, 2 / 3])
    assert (own["gain"]["mean"], own["gain"]["ci95"]) == pytest.approx((1.0, 1.96 * 0.5 / 3**0.5))
    assert own["wins"]["per_seed"][0] == pytest.approx((0.75 + 1.0 + 0.75) / 3)
    lost = kind["algorithms"]["Alpha"]["gain"]
    assert lost["per_seed"] == [pytest.approx(-4 / 3), None] and lost["mean"] is None


def test_a_win_counts_pairs_of_answers_and_ties_half():
    before, after = np.array([[0.0, 2.0], [1.0, 1.0]]), np.array([[1.0, 3.0], [1.0, 0.0]])
    assert win_rates(before, after).tolist() == [0.75, 0.25]


def test_the_table_has_what_judges_say_and_what_they_have_not_judged(judged):
    write_report(judged, ["Alpha"], known=["Alpha"])
    table = (judged / "table.md").read_text()
    assert "| | score by the reward of training | gain | wins | score by kind | gain | wins |" in table
    assert "| untrained | 2.000 ± 1.960 |  |  | 2.000 ± 1.960 |  |  |" in table
    assert "| Alpha | 3.000 | +1.000 ± 0.566 | 0.792 ± 0.082 | - | - | - |" in table
    assert "| Alpha, seed 0 | 3.333 | +1.333 ± 0.653 | 0.833 ± 0.163 | 0.667 | -1.333 ± 1.729 |" in table
    assert "the same 3 held-out prompts, 2 completions each" in table
    assert json.loads((judged / "results.json").read_text())["judged"]["judges"]["kind"]["untrained"] == 2.0


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_judge(judged):
    write_report(judged, ["Alpha"], known=["Alpha"])
    height, width, _ = imread(judged / "comparison.png").shape
    assert width < 2 * height and colors_of(judged / "comparison.png") == {PALETTE[0]}


def test_answers_to_other_prompts_are_not_compared(judged):
    score = judged / "judged" / "alpha-seed0" / "training" / "score.json"
    score.write_text(json.dumps({"score": 1.0, "settings": {"problems": "other"}}))
    refused(lambda: write_report(judged, ["Alpha"], known=["Alpha"]), "differ", "in problems", "Delete", "--judge")


def test_judges_are_checked_before_the_first_run(root, tmp_path):
    (tmp_path / "mine.py").write_text("def kind(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "other.py").write_text("def kind(completions):\n    return [0.0] * len(completions)\n")
    out = ["--output_dir", str(tmp_path / "out"), "--judge"]
    mine, other = f"{tmp_path}/mine.py:kind", f"{tmp_path}/other.py:kind"
    refused(lambda: compare([*out, str(tmp_path / "nothing")], root), "nothing", "cannot be loaded")
    refused(lambda: compare([*out, f"{mine}er"], root), "kinder")
    refused(lambda: compare([*out, mine, "--judge", other], root), "judge=", "the name 'kind' too", "Rename")
    refused(lambda: compare([*out, mine, "--judge_samples", "0"], root), "judge_samples=0", "1 or more")
    refused(lambda: compare([*out[:2], "--judge_samples", "2"], root), "judge_samples=2 without a judge")
    refused(lambda: compare([*out, mine, "--report_only"], root), "judges nothing", "Leave out --report_only")
    assert not list((tmp_path / "out").glob("*seed*"))
    assert list(Judging(tmp_path, [mine, mine]).judges) == ["kind"]


def test_a_judge_that_the_runs_were_trained_on_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def kind(completions):\n    return [1.0] * len(completions)\n")
    write_run(tmp_path / "alpha-seed0", {"rewards": ["mine.py:kind"], "reward_weights": None, "model": "x"})
    monkeypatch.chdir(tmp_path)
    judging = Judging(tmp_path, [f"{tmp_path}/mine.py:kind"])
    said, has_all = judging.judge(read_run(tmp_path / "alpha-seed0", "Alpha", 0), Processes())
    assert said.startswith("judging FAILED: judge kind: the runs were trained on it") and not has_all


def test_nothing_starts_once_a_comparison_ends(tmp_path):
    processes = Processes()
    assert processes.run([sys.executable, "-c", "print(1)"], tmp_path / "log") == 0
    processes.end()
    assert processes.run([sys.executable, "-c", "print(2)"], tmp_path / "log") == -15
    assert (tmp_path / "log").read_text() == "1\n"
