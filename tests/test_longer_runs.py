"""Longer runs: at a constant rate they just go on, a schedule that ends is extended by choice; and Ctrl-C."""

import sys
from collections.abc import Callable

import pytest
import torch

from common.config import RLConfig
from common.runs.checkpoints import load_state
from common.start import start
from tests.toy import algorithms, metrics_of, scored_trainer, toy_config, toy_trainer, train_until, weights_of


def said_by(caplog: pytest.LogCaptureFixture, make: Callable[[], object]) -> str:
    caplog.clear()
    with caplog.at_level("INFO", logger="nanorlhf"):
        make()
    return caplog.text


@pytest.mark.parametrize(
    "algorithm", [pytest.param(name, marks=pytest.mark.slow if name != "GRPO" else []) for name in algorithms()]
)
def test_at_a_constant_rate_a_finished_run_is_made_longer_as_if_it_had_been_longer(tiny_folder, tmp_path, algorithm):
    settings = {"algorithm": algorithm, "save_every": 1, "warmup_steps": 3, "eval_every": 1}
    toy_trainer(tiny_folder, tmp_path / "run", num_steps=2, **settings).train()
    longer = toy_trainer(tiny_folder, tmp_path / "run", num_steps=4, **settings)
    assert load_state(tmp_path / "run" / "final")["step"] == 2
    longer.train()
    whole = toy_trainer(tiny_folder, tmp_path / "whole", num_steps=4, **settings)
    whole.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert torch.equal(weights_of(longer), weights_of(whole))
    assert load_state(tmp_path / "run" / "final")["step"] == 4
    assert "num_steps 4, not 2" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_a_finished_run_says_what_to_type_to_train_longer(tiny_folder, tmp_path, monkeypatch, scheduler):
    settings = {"save_every": 1, "lr_scheduler": scheduler}
    toy_trainer(tiny_folder, tmp_path / "run", num_steps=2, **settings).train()
    monkeypatch.delattr("common.trainer.load_policy")  # refused before a model is loaded
    with pytest.raises(ValueError, match=r"finished \(after step 2 of 2\).*To continue from checkpoint-2") as refused:
        toy_trainer(tiny_folder, tmp_path / "run", num_steps=2, **settings)
    typed = f"--output_dir {tmp_path / 'run'} --num_steps 4" + (" --resume extend" if scheduler != "constant" else "")
    assert f"pass {typed}" in str(refused.value) and str(tmp_path / "run" / "final") in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("algorithm", "scheduler"), [("GRPO", "linear"), ("PPO", "cosine")])
def test_a_schedule_that_ends_is_made_longer_only_if_that_is_said(
    tiny_folder, tmp_path, caplog, algorithm, scheduler, finished
):
    run = tmp_path / "run"
    settings = {"algorithm": algorithm, "save_every": 1, "lr_scheduler": scheduler}
    first = toy_trainer(tiny_folder, run, num_steps=4, **settings)
    first.train() if finished else train_until(first, 2)
    step = 4 if finished else 2
    with pytest.raises(ValueError, match=rf"num_steps \(stored 4, now 8\).*lr_scheduler={scheduler}") as refused:
        toy_trainer(tiny_folder, run, num_steps=8, **settings)
    assert f"--num_steps 8 --resume extend: it continues from checkpoint-{step}" in str(refused.value)
    longer = {"num_steps": 8, "resume": "extend"} | settings
    trainer = []
    said = said_by(caplog, lambda: trainer.append(toy_trainer(tiny_folder, run, **longer)))
    before, config = RLConfig(num_steps=4, learning_rate=1e-3, lr_scheduler=scheduler), trainer[0].config
    assert f"the learning rate was {before.scheduled_rate(step):.3g} at step {step}" in said
    assert f"goes on with {config.scheduled_rate(step + 1):.3g}" in said and "reaches 0.0001 at step 8" in said
    assert trainer[0].run.first_step == step + 1
    train_until(trainer[0], step + 1)
    # From now on it is a run of that length, which is continued without a word.
    again = toy_trainer(tiny_folder, run, **(longer | {"resume": "auto"}))
    assert "extended" not in said_by(caplog, again.train)
    rates = [line["lr"] for line in metrics_of(run) if line["step"]]
    expected = [before.scheduled_rate(each) for each in range(1, step + 1)]
    assert rates == expected + [config.scheduled_rate(each) for each in range(step + 1, 9)]
    assert load_state(run / "final")["step"] == 8


def test_extend_changes_nothing_where_there_is_nothing_to_extend(tiny_folder, tmp_path):
    settings = {"save_every": 1, "lr_scheduler": "linear", "num_steps": 2, "resume": "extend"}
    toy_trainer(tiny_folder, tmp_path / "run", **settings).train()
    with pytest.raises(ValueError, match="has finished"):
        toy_trainer(tiny_folder, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=r"num_steps \(stored 2, now 1\)"):
        toy_trainer(tiny_folder, tmp_path / "run", **(settings | {"num_steps": 1}))


def test_a_falling_rate_before_the_first_checkpoint_is_that_of_the_new_length(tiny_folder, tmp_path):
    settings = {"save_every": 3, "lr_scheduler": "linear"}
    train_until(toy_trainer(tiny_folder, tmp_path / "run", num_steps=3, **settings), 1)
    trainer = toy_trainer(tiny_folder, tmp_path / "run", num_steps=4, **settings)
    trainer.train()
    assert [line["lr"] for line in metrics_of(tmp_path / "run")] == [
        trainer.config.scheduled_rate(step) for step in range(1, 5)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("patience", [3, 0])
def test_a_run_that_stopped_early_goes_on_with_more_patience(tiny_folder, tmp_path, patience):
    accuracies, run = [0.5, 0.25, 0.25, 0.75, 0.25, 0.25, 0.25], tmp_path / "run"
    settings = {"num_steps": 6, "lr_scheduler": "linear"}
    scored_trainer(tiny_folder, run, accuracies, early_stopping_patience=2, **settings).train()
    assert load_state(run / "final")["step"] == 2
    for more in ({}, {"num_steps": 9, "lr_scheduler": "linear", "resume": "extend"}):
        with pytest.raises(
            ValueError,
            match=r"finished \(early, after step 2.*after 2 evaluations without.*_patience with more than 2",
        ):
            scored_trainer(tiny_folder, run, accuracies, early_stopping_patience=2, **(settings | more))
    longer = scored_trainer(tiny_folder, run, accuracies, early_stopping_patience=patience, **settings)
    train_until(longer, 3)  # killed, and started again with the same command
    scored_trainer(tiny_folder, run, accuracies, early_stopping_patience=patience, **settings).train()
    whole = scored_trainer(tiny_folder, tmp_path / "whole", accuracies, early_stopping_patience=patience, **settings)
    whole.train()
    assert metrics_of(run) == metrics_of(tmp_path / "whole") and len(metrics_of(run)) == 7
    assert load_state(run / "final")["step"] == 6
    with pytest.raises(ValueError, match="other settings: early_stopping_patience"):
        scored_trainer(tiny_folder, run, accuracies, early_stopping_patience=1, **settings)


def test_a_finished_run_without_checkpoints_says_what_can_be_done(tiny_folder, tmp_path):
    toy_trainer(tiny_folder, tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"kept no checkpoint.*--model .*final with another --output_dir"):
        toy_trainer(tiny_folder, tmp_path / "run", num_steps=9)
    (tmp_path / "run" / "final" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"final/ is damaged \(model.safetensors is missing\).*kept no checkpoint"):
        toy_trainer(tiny_folder, tmp_path / "run")


def test_a_finished_run_whose_checkpoints_are_damaged_says_what_is_wrong_with_them(tiny_folder, tmp_path):
    settings = {"save_every": 1, "num_steps": 2}
    toy_trainer(tiny_folder, tmp_path / "run", **settings).train()
    for step in (1, 2):
        (tmp_path / "run" / f"checkpoint-{step}" / "policy_optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"has finished .*Its checkpoints are all damaged.*--model .*final"):
        toy_trainer(tiny_folder, tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=r"none of its checkpoints is whole\. checkpoint-2: policy_optimizer.pt is"):
        toy_trainer(tiny_folder, tmp_path / "run", **(settings | {"num_steps": 3}))


# Ctrl-C


@pytest.mark.parametrize(
    ("save_every", "killed_after", "said"),
    [
        (2, 1, "there is no checkpoint yet (save_every=2), so the same command starts again from the first step"),
        (2, 2, "the same command continues from checkpoint-2"),
        (0, 2, "save_every=0 keeps no checkpoint, so the same command starts again from the first step"),
    ],
)
def test_after_ctrl_c_no_checkpoint_is_promised_that_is_not_there(
    tiny_folder, tmp_path, monkeypatch, capsys, save_every, killed_after, said
):
    run = tmp_path / "run"
    train_until(toy_trainer(tiny_folder, run, num_steps=3, save_every=save_every), killed_after)
    config = toy_config(tiny_folder, run, num_steps=3, save_every=save_every)

    class GRPOTrainer:
        def __init__(self, config: RLConfig) -> None:
            raise KeyboardInterrupt

    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["grpo.py", "--preset", "none"])
    with pytest.raises(SystemExit) as ended:
        start(GRPOTrainer, config)
    assert ended.value.code == 130
    first, second = capsys.readouterr().err.removeprefix("\ninterrupted: ").splitlines()
    assert first == said and second.startswith(sys.executable)  # the command


@pytest.mark.parametrize("algorithm", ["PPO", "VinePPO"])
def test_a_run_from_before_the_kl_had_a_place_goes_on(algorithm, tiny_folder, tmp_path):
    def trainer():
        return toy_trainer(tiny_folder, tmp_path / "run", algorithm=algorithm, save_every=1, kl_coef=0.1, num_steps=2)

    train_until(trainer(), 1)
    path = tmp_path / "run" / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(("kl_place", "kl_estimator"))))
    assert trainer().run.first_step == 2
