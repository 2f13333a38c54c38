"""The best checkpoint: the link to it, what becomes of it on resume, what `merge` and the end of a run say of it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from common.evaluation.command import Evaluation, evaluate
from common.evaluation.settings import EvaluationSettings
from common.merge import find_source
from common.merge import main as merge_main
from common.runs.best import BEST_LINK
from common.runs.checkpoints import damage_of, load_state
from common.start import report
from tests.toy import LORA, scored_trainer, train_until

WEIGHTS = "policy/model.safetensors"


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def best_step(run: Path) -> str | None:
    """What the link says."""
    link = run / BEST_LINK
    assert link.exists() or not link.is_symlink()
    return str(link.readlink()) if link.is_symlink() else None


def test_best_is_a_link_to_the_best_policy_that_moves_with_the_folder(tiny_folder, tmp_path):
    scored_trainer(tiny_folder, tmp_path / "run", [0.25, 0.5, 1.0, 0.5, 0.75], save_total_limit=1).train()
    assert best_step(tmp_path / "run") == "checkpoint-2/policy"
    shutil.move(tmp_path / "run", tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moved" / "best")
    stored = load_file(tmp_path / "moved" / "checkpoint-2" / WEIGHTS)
    last = load_file(tmp_path / "moved" / "final" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), stored[name]) and not torch.equal(last[name], stored[name])


def test_a_best_that_is_the_untrained_policy_is_said_and_has_no_link(tiny_folder, tmp_path, capsys):
    report(scored_trainer(tiny_folder, tmp_path / "run", [0.75, 0.5, 0.75, 0.25, 0.25]))
    said = capsys.readouterr().out
    assert "best: the untrained policy (step 0, eval/accuracy 0.750)" in said and best_step(tmp_path / "run") is None
    assert "final (the policy after the last step, 4)" in said
    assert load_state(tmp_path / "run" / "final") | {"policy": "last", "step": 4} == load_state(tmp_path / "run/final")


def test_the_end_of_a_run_says_which_step_was_the_best_and_how_to_train_longer(tiny_folder, tmp_path, capsys):
    report(scored_trainer(tiny_folder, tmp_path / "run", [0.25, 0.5, 0.75, 0.5, 0.5]))
    said = capsys.readouterr().out
    assert f"best: {tmp_path / 'run' / 'best'} (step 2, eval/accuracy 0.750)" in said
    assert f"to train longer: the same command with --output_dir {tmp_path / 'run'} --num_steps 8" in said
    report(scored_trainer(tiny_folder, tmp_path / "bare", [0.25, 0.5, 0.75, 0.5, 0.5], save_every=0))
    said = capsys.readouterr().out
    assert "best: the policy of step 2 (eval/accuracy 0.750), of which there is no checkpoint" in said
    assert "to train longer" not in said and not (tmp_path / "bare" / "best").is_symlink()


@pytest.mark.parametrize("damage", ["gone", "weights", "contents"])
def test_if_the_best_is_lost_the_best_of_what_is_left_takes_its_place(tiny_folder, tmp_path, caplog, damage):
    accuracies, run = [0.25, 0.5, 1.0, 0.75, 0.5], tmp_path / "run"
    train_until(scored_trainer(tiny_folder, run, accuracies, save_total_limit=9), 3)
    assert best_step(run) == "checkpoint-2/policy"
    if damage == "gone":
        shutil.rmtree(run / "checkpoint-2")
    elif damage == "weights":
        (run / "checkpoint-2" / WEIGHTS).unlink()
    else:
        flip_last_byte(run / "checkpoint-2" / WEIGHTS)
    trainer = scored_trainer(tiny_folder, run, accuracies, save_total_limit=9)
    assert "checkpoint-2 with eval/accuracy 1.000 was the best so far, but" in caplog.text
    assert "the best is checkpoint-3 with eval/accuracy 0.750" in caplog.text
    assert trainer.run.best["checkpoint"] == "checkpoint-3" and best_step(run) == "checkpoint-3/policy"
    trainer.train()
    assert load_state(run / "checkpoint-4")["best"]["checkpoint"] == "checkpoint-3"


def test_if_every_later_best_is_lost_the_untrained_policy_is_the_best(tiny_folder, tmp_path, caplog):
    accuracies, run = [0.25, 0.5, 0.0, 0.0, 0.0], tmp_path / "run"
    train_until(scored_trainer(tiny_folder, run, accuracies, save_total_limit=1), 3)
    shutil.rmtree(run / "checkpoint-1")
    trainer = scored_trainer(tiny_folder, run, accuracies, save_total_limit=1)
    assert "the best is the untrained policy (step 0) with eval/accuracy 0.250" in caplog.text
    assert trainer.run.best["checkpoint"] == "checkpoint-0" and best_step(run) is None


def test_a_run_that_goes_back_has_the_best_of_where_it_goes_on(tiny_folder, tmp_path):
    accuracies, run = [0.25, 0.5, 0.25, 1.0, 0.25], tmp_path / "run"
    train_until(scored_trainer(tiny_folder, run, accuracies, save_total_limit=9), 3)
    assert best_step(run) == "checkpoint-3/policy"
    (run / "checkpoint-3" / "policy_optimizer.pt").unlink()
    trainer = scored_trainer(tiny_folder, run, accuracies, save_total_limit=9)
    assert trainer.run.best["checkpoint"] == "checkpoint-1" and best_step(run) == "checkpoint-1/policy"
    trainer.train()
    assert best_step(run) == "checkpoint-3/policy" and damage_of(run / "checkpoint-3") is None


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_an_evaluation_takes_the_best_as_it_takes_any_folder(tiny_folder, tmp_path, lora):
    run, settings = tmp_path / "run", LORA if lora else {}
    scored_trainer(tiny_folder, run, [0.25, 0.5, 0.75, 0.5, 0.5], **settings).train()
    options = {"task": "countdown", "sampler": "transformers", "num_problems": 2, "num_samples": 1}
    options |= {"max_completion_length": 8, "output_dir": str(tmp_path / "evaluation")}
    (score,) = evaluate(EvaluationSettings(model=[str(run / "best")], **options))
    assert score["num_problems"] == 2 and score["model"] == str(run / "best")
    (run / "best").unlink()
    with pytest.raises(ValueError, match=r"best: this run has no such folder.*Pass --model"):
        Evaluation(EvaluationSettings(model=[str(run / "best")], **options))


def test_a_folder_that_a_user_calls_best_is_left_alone(tiny_folder, tmp_path, capsys):
    trainer = scored_trainer(tiny_folder, tmp_path / "run", [0.25, 0.5, 0.75, 0.5, 0.5])
    (tmp_path / "run" / "best").mkdir()
    report(trainer)
    assert (tmp_path / "run" / "best").is_dir() and not list((tmp_path / "run" / "best").iterdir())
    assert f"best: {tmp_path / 'run' / 'checkpoint-2'} (step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_with_lora_best_is_an_adapter_that_transformers_peft_and_merge_take(tiny_folder, tmp_path, capsys):
    run = tmp_path / "run"
    report(scored_trainer(tiny_folder, run, [0.25, 0.5, 0.75, 0.5, 0.5], **LORA))
    said = capsys.readouterr().out
    assert f"python -m common.merge --model {run / 'best'} --output FOLDER" in said
    merge_main(["--model", str(run / "best"), "--output", str(tmp_path / "merged")])
    said = capsys.readouterr().out
    assert f"checkpoint-2 with eval/accuracy 0.750 of {run}, the best" in said
    last = f"(the last policy of {run}, after step 4)"
    assert last in find_source(None, str(run / "final" / "adapter")).what
    assert f"(checkpoint-4 of {run}, the last checkpoint)" in find_source(None, str(run / "checkpoint-4/policy")).what
    loaded = AutoModelForCausalLM.from_pretrained(run / "best")  # transformers finds the base in the adapter
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, merged(ids).logits, atol=1e-5)


def test_merge_says_which_step_it_takes_and_whether_it_is_the_last_or_the_best(tiny_folder, tmp_path):
    run = tmp_path / "run"
    scored_trainer(tiny_folder, run, [0.25, 0.5, 0.75, 0.5, 0.5], save_total_limit=9).train()
    best = f"checkpoint-2 with eval/accuracy 0.750 of {run}, the best"
    assert find_source(str(run), None).what == find_source(str(run / "best"), None).what == best
    assert find_source(str(run / "checkpoint-2"), None).what == best
    assert find_source(str(run / "checkpoint-4"), None).what == f"checkpoint-4 of {run}, the last checkpoint"
    assert find_source(str(run / "checkpoint-3"), None).what == f"checkpoint-3 of {run}"
    flip_last_byte(run / "checkpoint-3" / WEIGHTS)
    with pytest.raises(ValueError, match=rf"checkpoint-3: it is damaged: {WEIGHTS} has other contents"):
        find_source(str(run / "checkpoint-3"), None)
    shutil.rmtree(run / "checkpoint-2")
    what = find_source(str(run), None).what
    assert what.startswith(f"the last policy of {run}, after step 4 (its best was checkpoint-2") and "gone" in what
    with pytest.raises(ValueError, match=r"best: this run has no such folder.*Pass --model"):
        find_source(str(run / "best"), None)
