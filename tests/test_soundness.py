"""A run whose numbers cannot be right stops before its policy learns from them, and says what is likely wrong."""

import json
import logging
import math
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from common.cli import run_script
from common.config import RLConfig
from common.embedded.policy import build_tokenizer, save_untrained
from common.evaluation.results import write_result
from common.mistakes import WrongNumbers
from common.runs.best import better_checkpoint
from common.runs.soundness import IMPOSSIBLE, SUSPICIOUS, Soundness
from common.sampling.torch_sampler import TransformersSampler
from tests import forked
from tests.toy import ROOT, algorithms, metrics_of, toy_config, toy_task, toy_trainer, weights_of

NAN, INF = math.nan, math.inf


class OtherWeights(TransformersSampler):
    """Draws from a policy that is not the one that is trained, from a step on."""

    def __init__(self, trainer, *, noise, first_step=1):
        self._trainer, self._noise, self._first_step = trainer, noise, first_step
        super().__init__(lambda: trainer.models.use("policy"), device=torch.device("cpu"))

    def generate(self, *args, **kwargs):
        """Completions of the other policy."""
        if self._trainer.current_step < self._first_step:
            return super().generate(*args, **kwargs)
        with self._trainer.models.use("policy") as policy, torch.no_grad():
            kept = deepcopy(policy.state_dict())
            for parameter in policy.parameters():
                parameter.add_(self._noise * torch.randn_like(parameter))
            try:
                return super().generate(*args, **kwargs)
            finally:
                policy.load_state_dict(kept)


class NoLogprobs(TransformersSampler):
    """Loses the log-prob of the last token of the last completion."""

    bad = NAN

    def generate(self, *args, **kwargs):
        """Completions, one of them with a log-prob that is no number."""
        *first, last = super().generate(*args, **kwargs)
        return [*first, replace(last, logprobs=[*last.logprobs[:-1], self.bad])]


def use_sampler(trainer, sampler):
    trainer.policy_sampler.sampler = sampler
    return trainer


def spoil(trainer, name, bad=NAN, layer="norm"):
    """Put a number that is none into one weight of a model of the pool."""
    with trainer.models.use(name) as model, torch.no_grad():
        weight = next(weight for key, weight in model.named_parameters() if layer in key)
        weight.view(-1)[0] = bad
    return trainer


def stopped(trainer):
    """The message of a run that stops; it fits on a screen, and no weight has changed."""
    before = weights_of(trainer)
    with pytest.raises(WrongNumbers) as caught:
        trainer.train()
    torch.testing.assert_close(weights_of(trainer), before, rtol=0, atol=0, equal_nan=True)
    message = str(caught.value)
    assert message.count("\n") < 8
    return message


# A sampler that draws from another policy


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_a_sampler_with_other_weights_stops_the_run_before_its_first_update(toy_folder, tmp_path, algorithm):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=algorithm)
    message = stopped(use_sampler(trainer, OtherWeights(trainer, noise=0.3)))
    assert re.match(r"step 1: log-probs of sampler and trainer differ by \d\.\d+ on average, and no rounding", message)
    assert "float32 explains more than 0.01" in message and "This step has changed no weight" in message
    # It is the transformers sampler already, so it is no way out.
    assert "--sampler transformers" not in message and "--attn_implementation eager --dtype float32" in message
    assert "dropout" in message and "--max_logprob_diff 0 goes on anyway" in message


def test_a_sampler_that_goes_wrong_later_is_found_then_and_the_run_can_go_on(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", num_steps=4, save_every=2)
    with pytest.raises(WrongNumbers, match=r"^step 3: log-probs of sampler and trainer differ"):
        use_sampler(trainer, OtherWeights(trainer, noise=0.3, first_step=3)).train()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]
    toy_trainer(toy_folder, tmp_path / "run", num_steps=4, save_every=2).train()
    toy_trainer(toy_folder, tmp_path / "whole", num_steps=4, save_every=2).train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_who_wants_to_goes_on_in_the_same_folder_and_is_warned_once(toy_folder, tmp_path, caplog):
    trainer = toy_trainer(toy_folder, tmp_path / "run", num_steps=3)
    stopped(use_sampler(trainer, OtherWeights(trainer, noise=0.3)))
    trainer = toy_trainer(toy_folder, tmp_path / "run", num_steps=3, max_logprob_diff=0)
    with caplog.at_level(logging.WARNING, logger="nanorlhf"):
        use_sampler(trainer, OtherWeights(trainer, noise=0.3)).train()
    assert [line["sampler/logprob_diff"] > 0.01 for line in metrics_of(tmp_path / "run")] == [True] * 3
    said = [message for message in caplog.messages if "log-probs of sampler and trainer differ" in message]
    assert len(said) == 1 and said[0].startswith("step 1: ")


def test_a_bound_of_ones_own_holds_in_place_of_the_precisions(toy_folder, tmp_path):
    message = stopped(toy_trainer(toy_folder, tmp_path / "run", max_logprob_diff=1e-12))
    assert "max_logprob_diff=1e-12 allows no more" in message


def soundness(dtype=torch.float32, **settings):
    return Soundness(RLConfig(**settings), dtype, sum_over_processes=lambda tensor: tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 7])
def test_the_bounds_are_those_of_the_precision_and_the_way_out_is_another_sampler(dtype, step):
    checks, model = soundness(dtype), torch.nn.Linear(1, 1)
    parts = [("sampler/logprob_diff", torch.tensor(2 * IMPOSSIBLE[dtype]), torch.tensor(2)), ("entropy", NAN, 1)]
    checks.check_first_minibatch(parts, model, step=step)
    parts.append(("sampler/logprob_diff", torch.tensor(IMPOSSIBLE[dtype] * 1.1), torch.tensor(1)))
    with pytest.raises(WrongNumbers) as caught:
        checks.check_first_minibatch(parts, model, step=step)
    message = str(caught.value)
    assert f"step {step}: " in message and f"explains more than {IMPOSSIBLE[dtype]:g}" in message
    assert "--sampler transformers" in message and message.count("\n") < 8
    assert ("the last update did not reach vLLM" in message) is (step > 1)


@pytest.mark.parametrize(
    ("metrics", "dtype", "said"),
    [
        ({}, torch.float32, None),
        ({"policy/first_ratio": 1.0, "sampler/logprob_diff": 1e-4}, torch.float32, None),
        ({"policy/first_ratio": 1.0001}, torch.float32, "step 3: the ratio .* is 1.00010000, not 1"),
        ({"policy/first_ratio": 0.9999}, torch.float32, "step 3: the ratio .* is 0.99990000, not 1"),
        ({"policy/first_ratio": NAN}, torch.float32, "step 3: the ratio .* is nan, not 1"),
        (
            {"sampler/logprob_diff": 0.009},
            torch.float32,
            "step 3: log-probs of sampler and trainer differ by 0.009",
        ),
        ({"sampler/logprob_diff": 0.01}, torch.bfloat16, None),
        # The largest that a right model gave, and an exact GELU in place of an approximate one.
        ({"sampler/logprob_diff": 7e-6}, torch.float32, None),
        ({"sampler/logprob_diff": 1.7e-4}, torch.float32, "step 3: .* differ by 0.00017 on average, and rounding"),
        ({"sampler/logprob_diff": 0.2}, torch.bfloat16, "step 3: log-probs of sampler and trainer differ by 0.2 on"),
        ({"sampler/logprob_diff": NAN}, torch.float32, "step 3: log-probs of sampler and trainer differ by nan"),
        ({"entropy": NAN}, torch.float32, r"step 3: entropy is nan, and metrics\.jsonl has null"),
        ({"eval/kl": INF}, torch.float32, r"step 3: eval/kl is inf"),
        ({"logged/mine": NAN, "eval/logged/mine": INF}, torch.float32, None),
    ],
    ids=str,
)
def test_what_is_not_right_but_may_go_on_is_warned_of(metrics, dtype, said, caplog):
    with caplog.at_level(logging.WARNING, logger="nanorlhf"):
        soundness(dtype).warn(metrics, step=3)
    assert len(caplog.messages) == (said is not None)
    assert all(re.match(said, message) for message in caplog.messages)


def test_a_warning_comes_again_only_when_it_is_worse(caplog):
    checks, bound = soundness(), SUSPICIOUS[torch.float32]
    differences = [bound, 1.5 * bound, 1.4 * bound, 9 * bound, 20 * bound, 30 * bound, NAN, NAN]
    with caplog.at_level(logging.WARNING, logger="nanorlhf"):
        for step, difference in enumerate(differences, 1):
            checks.warn({"sampler/logprob_diff": difference, "policy/first_ratio": 1.001}, step=step)
    steps = [int(message[5]) for message in caplog.messages if "sampler" in message]
    assert steps == [2, 5, 7]
    assert len(caplog.messages) == 3 + 1


# Numbers that are none


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_log_probs_of_the_sampler_that_are_no_numbers_stop_the_run(toy_folder, tmp_path, bad):
    trainer = toy_trainer(toy_folder, tmp_path / "run")
    sampler = NoLogprobs(lambda: trainer.models.use("policy"), device=torch.device("cpu"))
    sampler.bad = bad
    message = stopped(use_sampler(trainer, sampler))
    assert message.startswith("step 1: log-probs of the sampler are not finite (NaN or infinite), those of the policy")
    assert "So transformers fails" in message


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_a_policy_with_one_weight_that_is_no_number_is_named(toy_folder, tmp_path, algorithm, bad):
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=algorithm)
    message = stopped(spoil(trainer, "policy", bad))
    assert re.match(r"step 1: the policy: \d+ of its outputs are not finite \(NaN or infinite\), nor are its", message)
    assert "model.layers.0.input_layernorm.weight" in message and "another --model" in message


def test_a_weight_under_an_adapter_is_named_as_in_the_checkpoint(toy_folder, tmp_path):
    trainer = spoil(toy_trainer(toy_folder, tmp_path, use_lora=True, lora_r=4), "policy", layer="up_proj.base_layer")
    message = stopped(trainer)
    assert re.search(r"nor are its weights: model\.layers\.0\.mlp\.up_proj\.weight\.", message), message
    assert "checkpoint-" not in message  # there is none yet


def test_of_a_run_that_fails_later_the_last_checkpoint_is_not_called_intact(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path, num_steps=4, save_every=1)
    trained = trainer.policy.optimizer_step

    def step(number, *args, **options):
        norm = trained(number, *args, **options)
        if number == 2:
            spoil(trainer, "policy")
        return norm

    trainer.policy.optimizer_step = step
    with pytest.raises(WrongNumbers) as caught:
        trainer.train()
    assert str(caught.value).startswith("step 3: the policy")
    assert "A checkpoint-2 holds the weights that gave these numbers" in str(caught.value)


def test_it_is_found_in_the_evaluation_before_the_first_step(toy_folder, tmp_path):
    message = stopped(spoil(toy_trainer(toy_folder, tmp_path / "run", eval_every=1), "policy"))
    assert message.startswith("before the first step: the policy: ")


def test_a_reference_and_a_value_model_are_named_too(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "ref", kl_coef=0.1)
    assert stopped(spoil(trainer, "ref")).startswith("step 1: the reference: ")
    trainer = toy_trainer(toy_folder, tmp_path / "value", algorithm="PPO")
    assert stopped(spoil(trainer, "value")).startswith("step 1: the value model: ")


def with_loss(trainer, change):
    """The trainer with another loss, or other metrics."""
    loss = trainer.loss
    trainer.loss = lambda policy, minibatch: change(*loss(policy, minibatch))
    return trainer


def test_a_policy_that_fails_only_in_the_update_is_found_before_the_step(toy_folder, tmp_path):
    name = "first/sampler/logprob_diff"
    trainer = with_loss(
        toy_trainer(toy_folder, tmp_path / "run"),
        lambda loss, metrics: (loss, metrics | {name: metrics[name] * NAN}),
    )
    message = stopped(trainer)
    assert message.startswith("step 1: the policy: log-probs are not finite (NaN or infinite), though all its weights")
    assert "--dtype float32" in message


def test_a_gradient_that_is_no_number_stops_the_run(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run")
    assert "the gradient of policy is nan" in stopped(with_loss(trainer, lambda loss, metrics: (loss * NAN, metrics)))


def test_a_loss_that_is_no_number_stops_the_run_before_its_checkpoint(toy_folder, tmp_path):
    """Its gradient is one, so the step is taken."""
    trainer = toy_trainer(toy_folder, tmp_path / "run", save_every=1)
    trainer = with_loss(trainer, lambda loss, metrics: (loss + NAN, metrics))
    with pytest.raises(WrongNumbers, match=r"^step 1: policy/loss is nan"):
        trainer.train()
    assert metrics_of(tmp_path / "run")[0]["policy/loss"] is None
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_reward_that_is_no_number_is_refused(toy_folder, tmp_path, bad):
    task = toy_task()
    task.rewards["digits"] = lambda completions, **columns: [bad, *[0.0] * (len(completions) - 1)]
    trainer = algorithms()["GRPO"].trainer(toy_config(toy_folder, tmp_path / "run"), task=task)
    with pytest.raises(ValueError, match=rf"reward 'digits' returned {bad} in row 0 .* need a finite number"):
        trainer.train()


def test_a_reward_model_that_gives_no_number_is_refused(toy_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(toy_folder, num_labels=1)
    with torch.no_grad():
        model.score.weight[0, 0] = NAN
    model.save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(toy_folder).save_pretrained(tmp_path / "reward")
    trainer = toy_trainer(toy_folder, tmp_path / "run", rewards=[str(tmp_path / "reward")])
    with pytest.raises(ValueError, match=r"returned nan in row 0 .* Take another reward model"):
        trainer.train()


def test_what_a_reward_logs_in_an_evaluation_may_be_no_number_and_the_result_is_json(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run")
    rollouts = trainer.sample(trainer.training_prompts(1))
    rollouts.scores = trainer.score(rollouts)
    score = {"model": "m", "adapter": "", "task": "t", "num_problems": 4, "num_samples": 1, "score": 0.5}
    score |= {"score_ci95": None, "rewards": {"digits": 0.5}, "length": 1.0, "truncated": 0.0, "num_too_long": 0}
    sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "max_completion_length": 12}
    score |= {"num_left_out": 0, "tokens_per_second": 1.0, "settings": sampled, "logged": {"mine": NAN}}
    write_result(tmp_path / "result", score, rollouts, accuracy=None)
    text = (tmp_path / "result" / "score.json").read_text()
    assert "NaN" not in text and json.loads(text)["logged"] == {"mine": None}


def test_an_evaluation_that_is_no_number_is_never_the_best():
    best = better_checkpoint(None, 1, "eval/score", NAN)
    assert best is None
    best = better_checkpoint(best, 2, "eval/score", 0.25)
    assert better_checkpoint(best, 3, "eval/score", NAN) == better_checkpoint(best, 4, "eval/score", INF) == best


# Scripts and processes


def test_a_script_ends_with_the_message_and_status_three(capsys, monkeypatch):
    def main():
        raise WrongNumbers("step 1: no.")

    for rank, said in (("0", "error: step 1: no.\n"), ("1", "")):  # all processes raise it, one says it
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert ended.value.code == 3 and capsys.readouterr().err == said
    logging.getLogger("nanorlhf").setLevel(logging.INFO)


ONE_PROCESS_IS_WRONG = """
import sys
from pathlib import Path
import torch
import common
from common.cli import run_script
from tests.test_soundness import NoLogprobs, OtherWeights, use_sampler
from tests.toy import toy_trainer

def main():
    trainer = toy_trainer(Path(sys.argv[1]), Path(sys.argv[2]))
    if trainer.accelerator.process_index == 1:
        sampler = OtherWeights(trainer, noise=0.5)
        if sys.argv[3] == "nan":
            sampler = NoLogprobs(lambda: trainer.models.use("policy"), device=torch.device("cpu"))
        use_sampler(trainer, sampler)
    trainer.train()

run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nan", "other"])
def test_all_processes_stop_if_the_sampler_of_one_is_wrong(toy_folder, tmp_path, case):
    (tmp_path / "run.py").write_text(ONE_PROCESS_IS_WRONG)
    done = forked.launch(2, [tmp_path / "run.py", toy_folder, tmp_path / "run", case], timeout=120, status=3)
    assert "".join(each.stderr for each in done).count("error: step 1: log-probs of") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rope", "said"),
    [
        # vLLM reads keys here that transformers does not know: positions turn otherwise, or by no number at all.
        ({"alpha": 50.0}, "log-probs of sampler and trainer differ by "),
        ({"alpha": 0.0}, "log-probs of the sampler are not finite (NaN or infinite), those of the policy"),
    ],
)
def test_a_model_that_vllm_runs_in_another_way_is_not_trained(tmp_path, rope, said):
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0} | rope
    config = AutoConfig.for_model("llama", **sizes, **heads, **ends, initializer_range=0.3, rope_parameters=rope)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = stopped(toy_trainer(tmp_path / "model", tmp_path / "run", sampler="vllm"))
    assert said in message and "rope" in message and "--sampler transformers samples from the policy" in message
    toy_trainer(tmp_path / "model", tmp_path / "other", sampler="transformers").train()


@pytest.mark.slow
def test_a_policy_that_is_no_number_is_told_apart_from_a_sampler_that_is_none(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    save_untrained(tmp_path / "model", **sizes, num_attention_heads=2, num_key_value_heads=1)
    trainer = toy_trainer(tmp_path / "model", tmp_path / "run", sampler="vllm")
    message = stopped(spoil(trainer, "policy"))
    assert message.startswith("push of model.layers.0.input_layernorm.weight: the policy's own weight has 1 NaN")


@pytest.mark.slow
def test_an_evaluation_of_a_broken_model_gives_no_result(toy_folder, tmp_path):
    trainer = toy_trainer(toy_folder, tmp_path / "run", num_steps=1)
    trainer.train()
    broken = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    with torch.no_grad():
        broken.model.norm.weight[0] = NAN
    broken.save_pretrained(tmp_path / "run" / "final")
    command = ["-m", "common.evaluation", "--model", tmp_path / "run" / "final", "--task"]
    command += ["countdown", "--sampler", "transformers", "--num_problems", "2", "--num_samples", "1"]
    command += ["--max_completion_length", "8", "--output_dir", tmp_path / "result"]
    done = forked.run(command, cwd=ROOT)
    assert done.returncode == 3 and "error: " in done.stderr and "not finite" in done.stderr, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
