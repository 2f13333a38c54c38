"""The outer loop: what every run does, whatever the algorithm."""

import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import parse_config
from common.models.loading import resolve_dtype
from common.rollouts import Rollouts
from common.tasks import Task
from GRPO.grpo_trainer import GRPOConfig, GRPOTrainer
from tests.forked import Forked
from tests.toy import (
    algorithms,
    described_by,
    metrics_of,
    shift_weights,
    toy_config,
    toy_task,
    toy_trainer,
    train_until,
    weights_of,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory, with_curves):
    """A short run with everything on, and its trainer."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    settings = {"num_steps": 4, "eval_every": 2, "save_every": 2, "kl_coef": 0.05, "num_minibatches": 2}
    trainer = toy_trainer(tiny_folder, folder, **settings)
    with with_curves():
        trainer.train()
    return folder, trainer


def test_a_run_leaves_the_files_it_promises(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert names - {"best"} == {  # a link, if the untrained policy was not the best
        *("config.yaml", "prompts.json", "metrics.jsonl", "samples.jsonl", "curves.png"),
        *("checkpoint-2", "checkpoint-4", "final"),
    }
    assert [line["step"] for line in metrics_of(folder)] == [0, 1, 2, 3, 4]


def test_every_step_reports_the_same_names(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    step = lines[1]
    expected = """step episodes tokens score reward/digits reward/sum kl entropy length truncated zero_advantage
        score_min score_max equal_scores
        policy/loss policy/grad_norm policy/clip_fraction policy/ratio policy/first_ratio lr sampler/logprob_diff
        time/sample time/score time/logprobs time/update time/offload time/step memory/peak_gb memory/host_gb"""
    assert set(expected.split()) <= set(step)
    assert {name for name in lines[2] if name.startswith("eval/")} == {
        "eval/score", "eval/accuracy", "eval/accuracy_ci95", "eval/length", "eval/truncated"
    }  # fmt: skip
    assert not any(name.startswith("eval/") for name in lines[3] if lines[3]["step"] == 3)
    assert step["episodes"] == 16 and lines[4]["episodes"] == 64
    assert lines[4]["tokens"] == pytest.approx(sum(16 * line["length"] for line in lines[1:]))


def test_the_ratio_before_the_first_optimizer_step_is_exactly_one(finished):
    for line in metrics_of(finished[0])[1:]:
        assert line["policy/first_ratio"] == 1.0
        assert line["sampler/logprob_diff"] < 1e-4


def test_the_parts_of_a_step_add_up_to_its_time(finished):
    for line in [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()][2:]:
        parts = sum(value for name, value in line.items() if name.startswith("time/") and name != "time/step")
        assert parts <= line["time/step"]
        assert parts > 0.5 * line["time/step"]  # a toy step takes milliseconds; docs/performance.md has real ones


def test_what_comes_before_training_is_no_time_of_the_first_step(tiny_folder, tmp_path, monkeypatch):
    trainer, clock = toy_trainer(tiny_folder, tmp_path / "run", num_steps=1), time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 10_000)
    assert trainer.train() and json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["time/step"] < 5_000


def test_a_token_counts_as_often_as_it_was_trained_on(toy_folder, tmp_path):
    toy_trainer(toy_folder, tmp_path / "run", num_steps=1, num_update_epochs=3, num_minibatches=2).train()
    (line,) = metrics_of(tmp_path / "run")
    assert line["policy/tokens"] == 3 * line["tokens"] == pytest.approx(3 * 16 * line["length"])


def test_samples_show_prompt_completion_score_and_parts(finished):
    rows = [json.loads(line) for line in (finished[0] / "samples.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "eval"}
    assert {row["step"] for row in rows if row["split"] == "eval"} == {0, 2, 4}
    row = rows[0]
    assert row["score"] == pytest.approx(row["parts"]["digits"] + 0.5 * row["parts"]["sum"])
    assert "make" in row["prompt"]


def test_the_final_model_is_the_trained_policy_in_plain_transformers(finished):
    folder, trainer = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    with trainer.models.use("policy") as policy:
        for (name, ours), (_, theirs) in zip(model.named_parameters(), policy.named_parameters(), strict=True):
            assert torch.equal(ours, theirs.cpu()), name
    assert AutoTokenizer.from_pretrained(folder / "final").decode([5]) == trainer.tokenizer.decode([5])
    assert not torch.equal(
        model.lm_head.weight, AutoModelForCausalLM.from_pretrained(trainer.config.model).lm_head.weight
    )


def test_config_yaml_repeats_the_run(finished, tmp_path):
    folder, _ = finished
    arguments = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path), "--preset", "none"]
    config = parse_config(GRPOConfig(), args=arguments)
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert {name: vars(config)[name] for name in stored} == stored | {"output_dir": str(tmp_path), "preset": "none"}
    assert "torch" in (folder / "config.yaml").read_text()


def test_the_same_settings_give_the_same_metrics_and_another_seed_others(tiny_folder, tmp_path):
    runs = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        toy_trainer(tiny_folder, tmp_path / name, seed=seed, eval_every=1).train()
        runs[name] = metrics_of(tmp_path / name)
    assert runs["a"] == runs["b"]
    assert runs["a"][1]["score"] != runs["c"][1]["score"]


def test_the_global_generators_decide_nothing_and_stay_as_they_were(tiny_folder, tmp_path):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        toy_trainer(tiny_folder, tmp_path / str(seed), use_lora=True, lora_r=4).train()
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
        results.append(metrics_of(tmp_path / str(seed)))
    assert results[0] == results[1]


def test_evaluation_changes_nothing_but_the_metrics(tiny_folder, tmp_path):
    lines = {}
    for every in (0, 1):
        toy_trainer(tiny_folder, tmp_path / str(every), num_steps=3, eval_every=every).train()
        lines[every] = [
            {k: v for k, v in line.items() if not k.startswith("eval/")}
            for line in metrics_of(tmp_path / str(every))
            if line["step"]
        ]
    assert lines[0] == lines[1]


def test_evaluation_happens_before_every_few_steps_and_at_the_end(tiny_folder, tmp_path):
    toy_trainer(tiny_folder, tmp_path / "run", num_steps=3, eval_every=2).train()
    evaluated = [line["step"] for line in metrics_of(tmp_path / "run") if "eval/score" in line]
    assert evaluated == [0, 2, 3]


def test_several_samples_per_held_out_prompt_give_pass_at_k(tiny_folder, tmp_path):
    task = toy_task()
    task.rewards["sum"] = lambda prompts, completions, **columns: [float(i % 3 == 0) for i in range(len(completions))]
    config = toy_config(tiny_folder, tmp_path / "run", eval_num_samples=3, eval_every=2)
    GRPOTrainer(config, task=task).train()
    line = metrics_of(tmp_path / "run")[0]
    assert line["eval/accuracy"] == pytest.approx(1 / 3) and line["eval/pass@3"] == 1.0
    assert line["eval/pass@2"] == pytest.approx(2 / 3)  # two of the three pairs hold the right one
    # Four prompts with a third right, two added with all and two with none: mean 5/12, variance 11/36 - 25/144.
    assert line["eval/accuracy_ci95"] == pytest.approx(1.96 * (19 / 144 / 8) ** 0.5)


def test_early_stopping_counts_evaluations_without_a_new_best(tiny_folder, tmp_path):
    task = toy_task()
    task.rewards["sum"] = lambda prompts, completions, **columns: [0.0] * len(completions)
    config = toy_config(
        tiny_folder, tmp_path / "run", num_steps=9, eval_every=1, early_stopping_patience=2, save_every=5
    )
    GRPOTrainer(config, task=task).train()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_early_stopping_goes_on_counting_in_a_resumed_run(tiny_folder, tmp_path):
    task = toy_task()
    task.rewards["sum"] = lambda prompts, completions, **columns: [0.0] * len(completions)
    stopping = {"eval_every": 1, "early_stopping_patience": 4, "save_every": 1}
    config = toy_config(tiny_folder, tmp_path / "run", num_steps=9, **stopping)
    train_until(GRPOTrainer(config, task=task), 2)
    GRPOTrainer(config, task=task).train()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("save_every", "latest"), [(1, "checkpoint-6"), (4, "checkpoint-4")])
def test_the_best_checkpoint_is_saved_whenever_it_comes_and_survives_rotation(
    tiny_folder, tmp_path, save_every, latest
):
    task = toy_task()
    accuracies = iter([0.1, 0.2, 1.0, 0.3, 0.2, 0.1, 0.1])

    def scripted(prompts, completions, **columns):
        if len(completions) != 4:  # a training batch
            return [0.0] * len(completions)
        return [float(i < round(4 * accuracy)) for accuracy in [next(accuracies)] for i in range(4)]

    task.rewards["sum"] = scripted
    config = toy_config(
        tiny_folder, tmp_path / "run", num_steps=6, eval_every=1, save_every=save_every, save_total_limit=1
    )
    GRPOTrainer(config, task=task).train()
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", latest]


# Each step begins with a pause, in which it can be killed on a busy machine too.
RUN_TOY = """
import json, sys, time
from pathlib import Path
from tests.toy import toy_trainer
settings = {"num_steps": 6, "eval_every": 2, "save_every": 2, "kl_coef": 0.05, "num_minibatches": 2}
trainer = toy_trainer(Path(sys.argv[1]), Path(sys.argv[2]), **settings, **json.loads(sys.argv[3]))
step = trainer.step
trainer.step = lambda prompts: (time.sleep(0.1), step(prompts))
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"use_lora": True, "lora_r": 4}], ids=["full", "lora"])
def test_a_killed_run_continues_as_if_nothing_had_happened(tiny_folder, tmp_path, settings):
    def start(folder: Path) -> Forked:
        return Forked(["-c", RUN_TOY, tiny_folder, folder, json.dumps(settings)])

    with start(tmp_path / "whole") as whole:
        for kill_at in (1, 3, 5):
            # Killed as soon as the line of that step is written: step 1 before any checkpoint, the others after one,
            # and at an odd step with lines that the continued run must write anew.
            path = tmp_path / "killed" / "metrics.jsonl"
            with start(tmp_path / "killed") as process:
                while not (path.exists() and f'"step": {kill_at},' in path.read_text()):
                    assert process.poll(0.005) is None, process.stderr
                process.send_signal(signal.SIGKILL)
                assert process.wait().returncode == -signal.SIGKILL
        with start(tmp_path / "killed") as last:
            for process in (whole, last):
                done = process.wait()
                assert done.returncode == 0, done.stderr
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    for name in ("samples.jsonl",):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Careless(GRPOTrainer):
    """An algorithm that looks at neither the KL nor the whitening that its settings ask for."""

    def step(self, prompts):
        rollouts = self.sample(prompts, num_generations=self.config.num_generations)
        rollouts.scores = self.score(rollouts)
        rollouts.advantages = rollouts.spread(rollouts.scores)
        self.describe(rollouts, rollouts.advantages)
        self.update(self.policy, rollouts, lambda *args: super(Careless, self).loss(*args), average_over="tokens")

    def loss(self, policy, minibatch):
        return super().loss(policy, minibatch)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, []),
        ({"kl_coef": 0.1, "kl_place": "reward", "eval_kl": True, "eval_every": 1}, ["kl_coef=0.1"]),
        ({"whiten_advantages": True}, ["whiten_advantages=True"]),
    ],
    ids=str,
)
def test_a_step_that_makes_nothing_of_a_setting_says_so_once(tiny_folder, tmp_path, caplog, settings, told):
    config = toy_config(tiny_folder, tmp_path / "run", num_steps=3, **settings)
    Careless(config, task=toy_task()).train()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message.partition(":")[0] for message in warnings] == told
    assert all("Careless.step" in message and "or pass --" in message for message in warnings)


def test_a_step_that_uses_them_says_nothing(tiny_folder, tmp_path, caplog):
    settings = {"kl_coef": 0.1, "whiten_advantages": True, "num_steps": 2}
    toy_trainer(tiny_folder, tmp_path / "run", **settings).train()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("average_over", ["tokens", "rows"])
def test_tokens_outside_the_loss_mask_have_no_gradient_and_no_part_in_the_mean(tiny_folder, tmp_path, average_over):
    """As if they had been given, like a tool's answer: what they hold changes nothing."""
    steps = []
    for poison in (0.0, 1e6):
        trainer = toy_trainer(tiny_folder, tmp_path / str(poison), num_steps=1)
        rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
        rollouts.loss_mask = rollouts.completion_mask.clone()
        rollouts.loss_mask[:, 1::2] = False
        rollouts.step_lengths = None  # counted anew
        rollouts.advantages = torch.where(rollouts.loss_mask, 1.0, poison)
        trainer.update(trainer.policy, rollouts, trainer.loss, average_over=average_over)
        steps.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters]))
        metrics = trainer.metrics.reduce(trainer.accelerator)
        assert metrics["policy/tokens"] == rollouts.loss_mask.sum() == rollouts.step_lengths.sum()
        assert metrics["policy/loss"] == pytest.approx(-1.0, abs=1e-5)  # the mean over what counts
    assert torch.equal(*steps)


def masked_step(folder, tmp_path, **settings):
    """The rollouts of a step in which some completions are cut off and masked, and their advantages."""
    settings = {"mask_truncated": True, "num_steps": 1, "max_completion_length": 5} | settings
    trainer = toy_trainer(folder, tmp_path / "run", **settings)
    seen = described_by(trainer)
    line = trainer.train()
    ((rollouts, advantages),) = seen
    assert 0 < rollouts.truncated.sum() < len(rollouts)
    return rollouts, advantages, line


def test_whitening_is_over_the_tokens_that_are_trained_on(toy_folder, tmp_path):
    settings = {"algorithm": "Reinforce", "missing_eos_penalty": 50.0}
    rollouts, advantages, line = masked_step(toy_folder, tmp_path, **settings)
    real = advantages[rollouts.loss_mask].double()
    assert float(real.mean()) == pytest.approx(0, abs=1e-5)
    assert float(real.square().mean()) == pytest.approx(1, abs=1e-3)
    assert line["truncated"] == pytest.approx(float(rollouts.truncated.float().mean()))  # over all of them
    assert line["score"] < -5


def test_rewards_are_scaled_by_those_that_are_trained_on_and_a_masked_completion_stays_in_the_baseline(
    toy_folder, tmp_path
):
    rollouts, advantages, _ = masked_step(toy_folder, tmp_path, algorithm="RLOO", whiten_rewards=True)
    rewards = torch.zeros(rollouts.completion_mask.shape, dtype=torch.float64)
    rewards[torch.arange(16), rollouts.lengths - 1] = rollouts.scores.double()
    factor = 1 / rewards[rollouts.loss_mask].std(correction=0)
    assert abs(float(factor * rewards[rollouts.completion_mask].std(correction=0)) - 1) > 0.01  # it matters
    groups = rollouts.scores.reshape(4, 4).double()
    expected = factor * (groups - (groups.sum(1, keepdim=True) - groups) / 3)
    torch.testing.assert_close(advantages[:, 0].double(), expected.reshape(-1), atol=1e-5, rtol=1e-4)


def test_every_epoch_and_every_step_has_other_mini_batches_of_the_same_rows(tiny_folder, tmp_path):
    settings = {"num_minibatches": 4, "num_update_epochs": 3, "num_steps": 2}
    trainer = toy_trainer(tiny_folder, tmp_path / "run", **settings)
    seen, loss = [], trainer.loss
    trainer.loss = lambda policy, minibatch: seen.append(minibatch.rows.tolist()) or loss(policy, minibatch)
    trainer.train()
    assert len(seen) == 2 * 3 * 4
    passes = [seen[first : first + 4] for first in range(0, 24, 4)]
    assert all(sorted(row for rows in minibatches for row in rows) == list(range(16)) for minibatches in passes)
    partitions = [frozenset(frozenset(minibatch) for minibatch in rows) for rows in passes]
    assert len(set(partitions)) == 6


class Refilling(GRPOTrainer):
    """An algorithm that samples a second batch of prompts when groups teach nothing, and a batch for itself."""

    def step(self, prompts):
        parts = []
        for refill in (0, 1):
            part = self.sample(self.training_prompts(self.current_step, refill=refill), num_generations=4)
            part.scores = self.score(part)
            part.advantages = part.spread(part.scores)
            parts.append(part)
        rollouts = Rollouts.joined(parts)
        self.sample(prompts, num_generations=2, purpose="look")
        self.describe(rollouts, rollouts.advantages)
        self.update(self.policy, rollouts, self.loss, average_over="tokens")


def test_episodes_are_the_completions_of_the_steps_own_prompts_and_others_have_names_of_their_own(
    tiny_folder, tmp_path
):
    folder = tmp_path / "run"
    Refilling(toy_config(tiny_folder, folder, num_steps=3, save_every=2), task=toy_task()).train()
    lines = metrics_of(folder)
    assert [line["episodes"] for line in lines] == [16, 32, 48]
    assert all(line["refill/completions"] == 16 and line["look/completions"] == 8 for line in lines)
    of_steps = [32 * line["length"] + line["look/tokens"] for line in lines]
    assert lines[-1]["tokens"] == pytest.approx(sum(of_steps))
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoint-3", ignore_errors=True)
    Refilling(toy_config(tiny_folder, folder, num_steps=3, save_every=2), task=toy_task()).train()
    assert metrics_of(folder) == lines


def test_the_kl_of_an_evaluation_is_that_of_the_policy(tiny_folder, tmp_path):
    settings = {"eval_kl": True, "eval_every": 1, "temperature": 0.7, "eval_temperature": 0.7, "num_steps": 2}
    trainer = toy_trainer(tiny_folder, tmp_path / "run", learning_rate=1e-2, **settings)
    trainer.train()
    first, *_, last = metrics_of(tmp_path / "run")
    assert first["eval/kl"] == 0.0 != last["eval/kl"] and "kl" not in last
    rollouts = trainer.policy_sampler.sample_for_evaluation(trainer.eval_prompts.share())
    difference = trainer.logprobs("policy", rollouts) - trainer.logprobs("ref", rollouts)
    assert last["eval/kl"] == pytest.approx(float(difference[rollouts.completion_mask].double().mean()), rel=1e-4)


def test_other_settings_in_the_same_folder_are_refused_before_a_model_is_loaded(tiny_folder, tmp_path):
    toy_trainer(tiny_folder, tmp_path / "run", save_every=1).train()
    with pytest.raises(ValueError, match="learning_rate"):
        toy_trainer(tiny_folder, tmp_path / "run", learning_rate=2e-3, num_steps=3)
    with pytest.raises(ValueError, match="resume=never"):
        toy_trainer(tiny_folder, tmp_path / "run", resume="never", num_steps=3)


def test_a_start_that_failed_leaves_no_folder_in_the_way(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="max_prompt_length=1"):
        toy_trainer(tiny_folder, tmp_path / "run", max_prompt_length=1)
    toy_trainer(tiny_folder, tmp_path / "run")


@pytest.mark.slow
def test_twenty_steps_leak_no_memory(tiny_folder, tmp_path):
    trainer = toy_trainer(tiny_folder, tmp_path / "run", num_steps=30, samples_every=0)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    host = [line["memory/host_gb"] for line in lines]
    assert host[-1] - host[9] < 0.03  # 20 steps, less than 30 MB


def test_a_reward_function_that_raises_ends_the_run_with_its_row(tiny_folder, tmp_path):
    task = toy_task()

    def broken(prompts, completions, total, **columns):
        return [1 / (t - 4) for t in total]

    task.rewards["sum"] = broken
    with pytest.raises(ValueError, match=r"reward 'sum' raised ZeroDivisionError.*row \d+ of"):
        GRPOTrainer(toy_config(tiny_folder, tmp_path / "run", num_steps=9), task=task).train()
    assert (tmp_path / "run" / "config.yaml").exists()


def test_the_final_model_goes_to_the_hub_if_asked(tiny_folder, tmp_path, monkeypatch):
    uploads = []

    class Hub:  # the network's end; what is sent to it is what is tested
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path):
            uploads.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    toy_trainer(tiny_folder, tmp_path / "run", push_to_hub="countdown").train()
    ((repository, names),) = uploads
    assert repository == "me/countdown" and {"model.safetensors", "config.json", "tokenizer.json"} <= set(names)


def test_a_hub_that_cannot_be_reached_is_told_before_training(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"push_to_hub=me/x: the final model could not be uploaded.*hf upload"):
        toy_trainer(tiny_folder, tmp_path / "run", push_to_hub="me/x")
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_does_not_lose_the_end_of_a_run(tiny_folder, tmp_path, monkeypatch, caplog):
    class Hub:  # the network's end
        def create_repo(self, name, exist_ok):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path):
            raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert toy_trainer(tiny_folder, tmp_path / "run", push_to_hub="me/x").train()["score"] is not None
    said = f"hf upload me/x {tmp_path / 'run' / 'final'}"
    assert any("no route to host" in line and line.endswith(said) for line in caplog.messages)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


# Where the weights come from


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 16])
@pytest.mark.parametrize("algorithm", ["GRPO", "PPO"])
def test_a_resumed_run_has_the_same_bits_wherever_in_its_file_a_weight_begins(toy_folder, tmp_path, algorithm, offset):
    """Kernels of the CPU may round differently at another place in memory, and a checkpoint is another file."""
    model = shutil.copytree(toy_folder, tmp_path / "model")
    shift_weights(model / "model.safetensors", offset)
    settings = {"num_minibatches": 2, "num_update_epochs": 2, "kl_coef": 0.1, "max_tokens_per_microbatch": 1}
    settings |= {"algorithm": algorithm, "num_steps": 4, "save_every": 1}
    if algorithm == "PPO":
        settings["value_init"] = "zero_head"
    whole = toy_trainer(model, tmp_path / "whole", **settings)
    whole.train()
    train_until(toy_trainer(model, tmp_path / "resumed", **settings), 2)
    resumed = toy_trainer(model, tmp_path / "resumed", **settings)
    assert resumed.run.first_step == 3
    resumed.train()
    assert metrics_of(tmp_path / "resumed") == metrics_of(tmp_path / "whole")
    assert torch.equal(weights_of(resumed), weights_of(whole))


# Evaluation without held-out prompts


def test_without_held_out_prompts_nothing_stops_early_and_no_reference_is_loaded(toy_folder, tmp_path, caplog):
    task = replace(toy_task(), eval=[])
    with pytest.raises(ValueError, match=r"early_stopping_patience=1.*held-out"):
        GRPOTrainer(toy_config(toy_folder, tmp_path / "run", eval_every=1, early_stopping_patience=1), task=task)
    with caplog.at_level("INFO", logger="nanorlhf"):
        trainer = GRPOTrainer(toy_config(toy_folder, tmp_path / "run", eval_every=1, eval_kl=True), task=task)
    assert "ref" not in trainer.models
    assert "eval_every=1: there are no held-out prompts" in caplog.text and "eval_kl=True" in caplog.text


def test_a_reference_for_the_evaluation_alone_is_loaded_where_it_evaluates(toy_folder, tmp_path):
    for every in (0, 1):
        trainer = toy_trainer(toy_folder, tmp_path / str(every), eval_kl=True, eval_every=every)
        assert ("ref" in trainer.models) is bool(every)


def test_what_does_nothing_is_said_once_at_the_start_of_a_run(toy_folder, tmp_path, caplog):
    settings = {"kl_place": "reward", "save_every": 1, "num_steps": 2}
    with caplog.at_level("INFO", logger="nanorlhf"):
        trainer = toy_trainer(toy_folder, tmp_path / "run", **settings)
        train_until(trainer, 1)
        toy_trainer(toy_folder, tmp_path / "run", **settings)
    assert caplog.text.count("kl_place=reward: it does nothing, since kl_coef is 0") == 1


@pytest.mark.parametrize("name", algorithms())
def test_a_reward_that_never_differs_is_warned_of_in_every_algorithm(toy_folder, tmp_path, caplog, name):
    config = toy_config(toy_folder, tmp_path / "run", algorithm=name, num_steps=4, prompts_per_step=4)
    rewards = {"rewards": {"same": constant_score}, "reward_weights": {"same": 1.0}, "accuracy": None}
    constant = Task(train=toy_task().train, eval=[], **rewards)
    with caplog.at_level("WARNING", logger="nanorlhf"):
        algorithms()[name].trainer(config, task=constant).train()
    expected = ["steps 1 to 3: all completions had the score 0.5"] if config.needs_score else []
    assert [message.split(",")[0] for message in caplog.messages] == expected


FLAGS = "processor\t: 0\nflags\t\t: fpu sse avx2 avx512f {}\nbugs\t\t: none\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("cpu", "dtype", "warned"),
    [
        (FLAGS.format("avx512_vnni"), "bfloat16", True),
        (FLAGS.format("avx512_vnni"), "float32", False),
        (FLAGS.format("avx512_bf16"), "bfloat16", False),
        (FLAGS.format("amx_tile amx_bf16"), "bfloat16", False),
        ("processor\t: 0\nFeatures\t: fp asimd sve\n", "bfloat16", True),
        ("processor\t: 0\nFeatures\t: fp asimd sve bf16\n", "bfloat16", False),
        ("processor\t: 0\ncpu\t\t: POWER10\n", "bfloat16", False),  # it does not say
    ],
)
def test_bfloat16_on_a_cpu_without_it_is_warned_of_once(toy_folder, tmp_path, monkeypatch, caplog, cpu, dtype, warned):
    (tmp_path / "cpuinfo").write_text(cpu)
    monkeypatch.setattr("common.environment.CPU_INFO", tmp_path / "cpuinfo")
    with caplog.at_level("WARNING", logger="nanorlhf"):
        toy_trainer(toy_folder, tmp_path / "run", dtype=dtype, num_steps=1).train()
    assert [message.split(" on a CPU")[0] for message in caplog.messages] == ["dtype=bfloat16"] * warned


@pytest.mark.parametrize(("flag", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx512_vnni", torch.float32)])
def test_fast_is_bfloat16_where_the_cpu_computes_in_it(tmp_path, monkeypatch, flag, dtype):
    (tmp_path / "cpuinfo").write_text(FLAGS.format(flag))
    monkeypatch.setattr("common.environment.CPU_INFO", tmp_path / "cpuinfo")
    assert resolve_dtype("fast", torch.device("cpu")) == dtype
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert {resolve_dtype(name, torch.device("cuda")) for name in ("auto", "fast")} == {torch.bfloat16}


def constant_score(prompts, completions, **columns):
    return [0.5] * len(completions)


def test_a_run_with_something_to_learn_is_not_warned(toy_folder, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="nanorlhf"):
        toy_trainer(toy_folder, tmp_path / "run", num_steps=4).train()
    assert not caplog.messages
