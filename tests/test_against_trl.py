"""Both sides of `python -m benchmarks.against_trl` do the same work; how fast they are is no test."""

import json

import pytest

from benchmarks.against_trl import own, work
from benchmarks.against_trl.problems import write_problems
from common.tasks.gsm8k import read_problems

theirs = pytest.importorskip("benchmarks.against_trl.theirs")

SMALL = {"preset": "cpu", "model": "tiny", "num_steps": 1, "prompts_per_step": 2, "num_generations": 4}
SMALL |= {"max_completion_length": 64, "num_eval_prompts": 1, "reward_time_limit": 0}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_both_sides_have_the_same_gradient(algorithm, tmp_path):
    arguments = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    work.write_work(algorithm, arguments, tmp_path)
    ours = own.time_update(algorithm, arguments, tmp_path, 1)
    trl = theirs.train(algorithm, tmp_path, {"batch": 4, "generation": "transformers", "replay": 1})
    assert ours["grad_norm"] > 1e-3
    assert trl["grad_norm"] == pytest.approx(ours["grad_norm"], rel=2e-3)
    sampled = json.loads((tmp_path / "work.json").read_text(encoding="utf-8"))["completion_ids"]
    assert trl["tokens"] == ours["tokens"] == sum(map(len, sampled))


def test_made_up_problems_are_as_long_as_those_of_gsm8k_and_have_answers(tmp_path):
    write_problems(tmp_path / "problems.jsonl", 300)
    rows = read_problems(str(tmp_path / "problems.jsonl"), "train", str)  # refuses what has no answer
    questions, answers = ([row[name] for row in rows] for name in ("prompt", "answer"))
    assert len(set(questions)) > 290
    assert 43 < sum(len(question.split()) for question in questions) / len(rows) < 47  # 45 in GSM8K
    assert all(int(answer) >= 0 for answer in answers)
