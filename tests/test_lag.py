"""sampling_lag=1: each step trains on what the policy of one step earlier has drawn, and all else stays as it was."""

import json
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config import RLConfig
from common.mistakes import WrongNumbers
from common.rollouts import Completion, PromptBatch
from common.runs.run import WAITING_FILE
from common.sampling.ahead import joined, packed, unpacked
from common.sampling.torch_sampler import TransformersSampler
from common.signals import ENDING, Stopped
from common.trainer import OnPolicyTrainer
from common.update.out_of_memory import StepAgain
from tests.enumeration import put_weights
from tests.forked import launch
from tests.toy import (
    algorithms,
    metrics_of,
    samples_of,
    toy_trainer,
    train_until,
    updates_of,
)

LAG = {"sampling_lag": 1, "num_steps": 4}
SAMPLE_ONCE = [name for name, each in algorithms().items() if not each.config().why_no_lag]


class Apart:
    """A sampler elsewhere: it draws from a copy of the policy, and takes its time.

    Args:
        trainer: of a toy run, whose sampler it becomes.
        seconds: for each request.
    """

    needs_push, has_weights, resident_bytes, samples_apart = True, False, 0, True

    def __init__(self, trainer: OnPolicyTrainer, seconds: float = 0.0) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(trainer.model_path, dtype=torch.float32)
        self._sampler = TransformersSampler(lambda: nullcontext(self._model), device=torch.device("cpu"))
        self.seconds, self.num_running, self.log = seconds, 0, []
        trainer.policy_sampler.sampler = self

    def push(self, weights) -> None:
        assert not self.num_running
        self.log.append("push")
        self._model.load_state_dict(dict(weights), strict=False)
        self.has_weights = True

    def generate(self, prompt_ids, settings, **request) -> list[Completion]:
        self.num_running += 1
        self.log.append("main" if threading.current_thread() is threading.main_thread() else "thread")
        time.sleep(self.seconds)
        completions = self._sampler.generate(prompt_ids, settings, **request)
        self.num_running -= 1
        return completions

    def sleep(self) -> None: ...

    wake = sleep


def lagged(folder: Path, run: Path, **settings: object) -> OnPolicyTrainer:
    return toy_trainer(folder, run, **LAG | settings)


# What is refused, and what it is said to do


@pytest.mark.parametrize(("name", "what"), [("ReMax", "greedy completion"), ("VinePPO", "continuations")])
def test_an_algorithm_that_compares_with_what_its_step_samples_is_refused_with_the_reason(name, what):
    with pytest.raises(ValueError, match=f"sampling_lag=1: .* {name} .*{what}.* --sampling_lag 0"):
        algorithms()[name].config(sampling_lag=1)
    assert algorithms()[name].config(sampling_lag=0)


def test_all_algorithms_but_two_sample_once():
    assert {*algorithms()} - {*SAMPLE_ONCE} == {"ReMax", "VinePPO"}


def test_any_other_lag_is_refused():
    with pytest.raises(ValueError, match="sampling_lag=2: need one of 0, 1"):
        RLConfig(sampling_lag=2)


def test_the_clip_acts_with_a_lag_and_the_correction_for_the_sampler_does_not():
    config = algorithms()["PPO"].config
    assert {"clip_range", "value_clip_range"} <= config().idle_settings().keys()
    idle = config(sampling_lag=1).idle_settings()
    assert "clip_range" not in idle and "value_clip_range" in idle  # one step: no value has moved before it
    assert "sampler's log-probs" in idle["importance_correction"] == idle["importance_cap"]
    assert not config(sampling_lag=1).trains_on_policy


def test_a_run_keeps_its_lag(toy_folder, tmp_path):
    train_until(lagged(toy_folder, tmp_path / "run", save_every=1), 1)
    with pytest.raises(ValueError, match=r"sampling_lag \(stored 1, now 0\)"):
        lagged(toy_folder, tmp_path / "run", save_every=1, sampling_lag=0)


# Which policy has sampled


@pytest.mark.parametrize("name", SAMPLE_ONCE)
def test_a_step_trains_on_the_completions_of_the_policy_of_one_step_earlier(toy_folder, tmp_path, name):
    trainer = lagged(toy_folder, tmp_path / "run", algorithm=name)
    weights = [[p.detach().clone() for p in trainer.policy.parameters]]  # after 0, 1, ... steps
    rollouts = []
    step, score = trainer.step, trainer.score
    trainer.score = lambda each: rollouts.append(each) or score(each)

    def recorded(prompts):
        step(prompts)
        weights.append([p.detach().clone() for p in trainer.policy.parameters])

    trainer.step = recorded
    trainer.train()
    assert [len(each) for each in rollouts] == [len(rollouts[0])] * 4
    generations = len(rollouts[0]) // 4
    for step_number, sampled in enumerate(rollouts, start=1):
        put_weights(trainer.policy.parameters, weights[max(step_number - 2, 0)])
        logprobs = trainer.logprobs("policy", sampled)
        torch.testing.assert_close(sampled.sampling_logprobs, logprobs, atol=2e-6, rtol=0)
        # The noise is that of the step, whatever the weights: the same as without a lag.
        prompts = trainer.training_prompts(step_number)
        expected = trainer.policy_sampler.sample(prompts, num_generations=generations, purpose="train")
        assert expected.completion_tokens == sampled.completion_tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.1, "kl_place": "reward", "keep_per_group": True, "mask_truncated": True},
        {"sparse": True, "num_minibatches": 2, "num_update_epochs": 2},
    ],
    ids=["kept", "sparse"],
)
def test_the_ratio_is_to_the_samplers_logprobs_whichever_rows_are_trained_on(toy_folder, tmp_path, settings):
    trainer = lagged(toy_folder, tmp_path / "run", num_steps=2, **settings)
    seen, score = updates_of(trainer), trainer.score
    trainer.score = lambda rollouts: torch.where(rollouts.rows < 4, 0.5, score(rollouts))  # a group without signal
    trainer.train()
    assert len(seen) == 2
    for _, rollouts in seen:
        assert 0 < len(rollouts) < 16
        assert torch.equal(rollouts.old_logprobs, rollouts.sampling_logprobs)
    lines = metrics_of(tmp_path / "run")
    assert lines[1]["policy/first_ratio"] != 1 and not any(name.startswith("sampler/weight") for name in lines[1])
    timed = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[1])
    assert ("time/logprobs" in timed) == ("kl_coef" in settings)  # no pass for what the sampler has said


def test_the_kl_in_the_reward_is_that_of_the_policy_and_0_before_its_first_update(toy_folder, tmp_path):
    trainer = lagged(toy_folder, tmp_path / "run", kl_coef=1.0, kl_place="reward")
    trainer.current_step = 1
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    assert not trainer.token_rewards(rollouts, torch.zeros(16)).any()
    assert torch.equal(rollouts.old_logprobs, rollouts.sampling_logprobs)


def test_groups_that_refills_bring_are_of_the_current_policy(toy_folder, tmp_path):
    settings = {"refill_rounds": 1, "algorithm": "RLOO"}
    trainer = lagged(toy_folder, tmp_path / "run", num_steps=3, **settings)
    score, checked = trainer.score, []

    def of_one_group(rollouts):  # all groups are equal, but for those of refills
        if trainer.metrics.parts()[2].get("refill/completions") is None:
            return torch.zeros(len(rollouts))
        now = trainer.logprobs("policy", rollouts)
        checked.append(float((now - rollouts.sampling_logprobs).abs().max()))
        return score(rollouts)

    trainer.score = of_one_group
    trainer.train()
    lines = metrics_of(tmp_path / "run")
    assert len(checked) == 3 and max(checked) < 2e-6
    assert all(line["refill/filled"] for line in lines)
    assert [line["episodes"] for line in lines] == [16, 32, 48]


# Who draws, and when


@pytest.mark.slow
def test_a_sampler_elsewhere_draws_while_the_step_trains_and_time_changes_nothing(toy_folder, tmp_path):
    settings = {"eval_every": 2, "save_every": 1}
    lagged(toy_folder, tmp_path / "here", **settings).train()
    for seconds in (0.0, 0.2):
        trainer = lagged(toy_folder, tmp_path / str(seconds), **settings)
        sampler = Apart(trainer, seconds)
        trainer.train()
        # Evaluation before training; the first step's own, and the next one's in a thread; then a thread each, but for
        # the last step, which has none.
        begin = ["push", "main", "thread", "thread"]
        assert sampler.log == [*begin, "push", "thread", "push", "main", "thread", "push", "main"]
        assert metrics_of(tmp_path / str(seconds)) == metrics_of(tmp_path / "here")
        assert samples_of(tmp_path / str(seconds)) == samples_of(tmp_path / "here")


def test_the_update_need_not_wait_for_the_next_completions(toy_folder, tmp_path):
    trainer = lagged(toy_folder, tmp_path / "run", num_steps=3)
    sampler, has_updated = Apart(trainer), threading.Event()
    generate, update = sampler.generate, trainer.update

    def after_update(*args: object, **request: object) -> list[Completion]:
        if sampler.log.count("thread"):  # the first request is that of the first step itself
            assert has_updated.wait(60)
            has_updated.clear()
        return generate(*args, **request)

    def updated(*args: object, **options: object) -> None:
        update(*args, **options)
        has_updated.set()

    sampler.generate, trainer.update = after_update, updated
    trainer.train()
    assert sampler.log == ["push", "thread", "thread", "push", "thread"]


@pytest.mark.parametrize("when", ["first", "next"])
def test_what_the_sampler_raises_in_its_thread_ends_the_run_with_its_message(toy_folder, tmp_path, when):
    trainer = lagged(toy_folder, tmp_path / "run")
    sampler = Apart(trainer)
    generate, calls = sampler.generate, []

    def failing(*args, **request):
        calls.append(1)
        if len(calls) == {"first": 1, "next": 2}[when]:
            raise ValueError("the server at nowhere answered 500")
        return generate(*args, **request)

    sampler.generate = failing
    with pytest.raises(ValueError, match="the server at nowhere answered 500"):
        trainer.train()
    assert trainer.current_step == 1


def test_nothing_is_pushed_while_requests_run(toy_folder, tmp_path):
    """Also where an algorithm samples for another purpose after its update."""
    trainer = lagged(toy_folder, tmp_path / "run", num_steps=2)
    sampler, step = Apart(trainer, 0.2), trainer.step

    def more(prompts: PromptBatch) -> None:
        step(prompts)
        trainer.sample(prompts, purpose="look")

    trainer.step = more
    trainer.train()
    assert sampler.log == ["push", "thread", "thread", "push", "main", "push", "main"]


def test_a_step_that_begins_anew_after_out_of_memory_samples_nothing_again(toy_folder, tmp_path):
    lagged(toy_folder, tmp_path / "whole").train()
    trainer = lagged(toy_folder, tmp_path / "again")
    sampler, update, failed = Apart(trainer), trainer.update, []

    def short_of_memory(*args: object, **options: object) -> None:
        if trainer.current_step == 2 and not failed:
            failed.append(1)
            raise StepAgain
        update(*args, **options)

    trainer.update = short_of_memory
    trainer.train()
    assert failed and metrics_of(tmp_path / "again") == metrics_of(tmp_path / "whole")
    assert sampler.log.count("thread") == 4


def test_a_step_that_asks_for_other_completions_than_those_that_wait_is_told_so(toy_folder, tmp_path):
    trainer = lagged(toy_folder, tmp_path / "run")
    prompts = trainer.training_prompts(1)
    trainer.sample(prompts, num_generations=4)
    message = "step 1 asks for 4 .* 4 of each of the 4 prompts of step 2 were sampled before"
    with pytest.raises(ValueError, match=message):
        trainer.sample(prompts, num_generations=4)
    with pytest.raises(ValueError, match="step 2 asks for 2 completions"):
        trainer.sample(trainer.training_prompts(2), num_generations=2)
    with pytest.raises(ValueError, match="step 2 asks for 4 completions of each of 8 prompts"):
        trainer.sample(trainer.training_prompts(2, 8), num_generations=4)
    assert len(trainer.sample(prompts, num_generations=2, purpose="look")) == 8


# The checks know the lag


def test_a_wrong_sampler_is_found_in_the_first_step_where_both_have_the_same_weights(toy_folder, tmp_path):
    trainer = lagged(toy_folder, tmp_path / "run", learning_rate=1e-5)
    sampler = Apart(trainer)
    push = sampler.push
    sampler.push = lambda weights: push((name, 1.1 * tensor) for name, tensor in weights)
    with pytest.raises(WrongNumbers, match=r"step 1: log-probs of sampler and trainer differ by 0\.\d+ on average"):
        trainer.train()


def test_what_a_step_changes_is_no_finding_and_far_more_is(toy_folder, tmp_path, caplog):
    trainer = lagged(toy_folder, tmp_path / "run", learning_rate=1e-2, num_steps=3)
    trainer.train()
    lines = metrics_of(tmp_path / "run")
    assert lines[0]["sampler/logprob_diff"] < 1e-6 < 0.02 < lines[1]["sampler/logprob_diff"]
    assert not [record for record in caplog.records if "differ" in record.getMessage()]
    trainer = lagged(toy_folder, tmp_path / "wild", learning_rate=0.3, num_steps=3)
    with pytest.raises(WrongNumbers, match=r"step 2: .*explains no more than 0\.5.*(?s:.)*lower --learning_rate"):
        trainer.train()
    trainer = lagged(toy_folder, tmp_path / "asked", learning_rate=1e-2, num_steps=3, max_logprob_diff=0.01)
    with pytest.raises(WrongNumbers, match=r"step 2: .* max_logprob_diff=0\.01 allows no more"):
        trainer.train()


# A run that is interrupted


@pytest.mark.parametrize("name", ["GRPO", pytest.param("PPO", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_one_that_nobody_killed(toy_folder, tmp_path, name):
    settings = {"algorithm": name, "save_every": 2, "eval_every": 3, "num_steps": 5}
    lagged(toy_folder, tmp_path / "whole", **settings).train()
    train_until(lagged(toy_folder, tmp_path / "run", **settings), 3)
    assert (tmp_path / "run/checkpoint-2" / WAITING_FILE).is_file()
    trainer = lagged(toy_folder, tmp_path / "run", **settings)
    sampler = Apart(trainer)
    trainer.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert samples_of(tmp_path / "run") == samples_of(tmp_path / "whole")
    assert sampler.log[:2] == ["push", "thread"]  # for step 4: those of step 3 have waited
    assert not (
        tmp_path / "whole/checkpoint-5" / WAITING_FILE
    ).exists()  # nothing is sampled for a step after the last


@pytest.fixture
def default_handlers():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING if number != signal.SIGINT}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_a_run_that_signals_stop_in_an_evaluation_and_in_a_step_goes_on_too(toy_folder, tmp_path, default_handlers):
    settings = {"save_every": 100, "eval_every": 2, "num_steps": 4, "stop_grace": 0.5}
    lagged(toy_folder, tmp_path / "whole", **settings).train()
    for place, name, step in (("policy_sampler", "sample_for_evaluation", 2), ("scorer", "__call__", 3)):
        trainer = lagged(toy_folder, tmp_path / "run", **settings)
        Apart(trainer, 0.1)

        def stop(*args: object, trainer=trainer, step=step, method=None, **options: object) -> object:
            if trainer.current_step == step:
                signal.raise_signal(signal.SIGUSR1)
                time.sleep(20)
            return method(*args, **options)

        if name == "__call__":
            score = trainer.score
            trainer.score = lambda each, stop=stop, score=score: stop(each, method=score)
        else:
            owner = getattr(trainer, place)
            method = getattr(owner, name)
            setattr(owner, name, lambda *args, stop=stop, method=method, **more: stop(*args, method=method, **more))
        with pytest.raises(Stopped):
            trainer.train()
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
        assert (tmp_path / "run/checkpoint-2" / WAITING_FILE).is_file()
    lagged(toy_folder, tmp_path / "run", **settings).train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert samples_of(tmp_path / "run") == samples_of(tmp_path / "whole")


def test_a_run_that_is_made_longer_says_that_nothing_waits_for_its_next_step(toy_folder, tmp_path, caplog):
    lagged(toy_folder, tmp_path / "run", num_steps=2, save_every=1).train()
    with caplog.at_level("INFO"):
        lagged(toy_folder, tmp_path / "run", num_steps=4, save_every=1).train()
    said = [record.getMessage() for record in caplog.records if "no completions wait" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("step 3: sampling_lag=1")
    assert [line["episodes"] for line in metrics_of(tmp_path / "run")] == [16, 32, 48, 64]


def test_completions_that_wait_are_dealt_to_any_number_of_processes():
    completions = [Completion([i] * (i % 3 + 1), [-i / 3] * (i % 3 + 1), truncated=i % 2 == 0) for i in range(12)]
    prompts = [
        PromptBatch(step=7, rows=rows, prompt_ids=[], prompts=[], columns={}) for rows in ([0, 1, 2], [3, 4, 5])
    ]
    waiting = joined([packed(prompts[0], completions[:6], 2), packed(prompts[1], completions[6:], 2)])
    assert (waiting["step"], waiting["num_generations"]) == (7, 2)
    for rows in ([0, 1], [2, 3], [4, 5], [0, 1, 2, 3, 4, 5], []):
        found = unpacked(waiting, rows)
        expected = [completions[2 * row + g] for row in rows for g in range(2)]
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert [each.truncated for each in found] == [each.truncated for each in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == torch.tensor(other.logprobs, dtype=torch.float32).tolist()


OF_TWO = """
import sys
from pathlib import Path
import common
from tests.test_lag import LAG
from tests.toy import toy_trainer, train_until

model, folder = map(Path, sys.argv[1:])
trainer = toy_trainer(model, folder / "two", **LAG, save_every=1, mask_truncated=True)
train_until(trainer, 2)
again = toy_trainer(model, folder / "fails", **LAG)
if again.accelerator.process_index == 1:
    begin = again.policy_sampler.begin

    def broken(prompts, **request):
        drawn = begin(prompts, **request)
        if prompts.step == 2:
            drawn = type(drawn)()
            drawn.set_exception(ConnectionError("nobody answers"))
        return drawn

    again.policy_sampler.begin = broken
try:
    again.train()
except Exception as error:
    (folder / f"{again.accelerator.process_index}.txt").write_text(f"{type(error).__name__}: {error}")
trainer.accelerator.state.destroy_process_group()
"""


@pytest.mark.slow
def test_what_two_processes_have_sampled_is_trained_on_by_one_that_goes_on(toy_folder, tmp_path):
    (tmp_path / "run.py").write_text(OF_TWO)
    launch(2, [tmp_path / "run.py", toy_folder, tmp_path])
    lagged(toy_folder, tmp_path / "two", save_every=1, mask_truncated=True).train()
    lagged(toy_folder, tmp_path / "one", save_every=1, mask_truncated=True).train()
    lines = [metrics_of(tmp_path / name) for name in ("two", "one")]
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4]
    for two, one in zip(*lines, strict=True):
        assert two.keys() == one.keys()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, abs=1e-4), name
    # What fails in one process ends both, with its message.
    assert (tmp_path / "1.txt").read_text() == "ConnectionError: nobody answers"
    said = (tmp_path / "0.txt").read_text()
    assert said == "RuntimeError: sampling for step 2 failed in process 1: ConnectionError: nobody answers"
