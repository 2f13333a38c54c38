"""What the sampler is asked for; completions of a policy whose vocabulary is larger than its tokenizer's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config import RLConfig
from common.embedded.policy import build_tokenizer
from common.models.loading import unused_token_ids
from common.rollouts import Completion
from common.sampling.policy_sampler import largest_request
from common.sampling.torch_sampler import TransformersSampler
from tests.toy import algorithms, facts, metrics_of, save_toy_policy, toy_config, toy_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of 1000 ids the tokenizer knows fewer than half."""
    folder = save_toy_policy(tmp_path_factory.mktemp("wide") / "policy", hidden_size=128)  # heads wide enough for vLLM
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)  # the new rows are drawn
    model.resize_token_embeddings(1000, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


def test_ids_without_a_token_are_those_after_the_tokenizers_last(folder, tiny_folder):
    tokenizer = build_tokenizer()
    assert unused_token_ids(str(folder), tokenizer) == range(len(tokenizer), 1000)
    assert not unused_token_ids(str(tiny_folder), tokenizer)


@pytest.mark.parametrize("sampler", ["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def test_an_id_without_a_token_ends_the_completion_as_truncated_and_training_goes_on(folder, tmp_path, sampler):
    trainer = toy_trainer(folder, tmp_path / "run", sampler=sampler, num_steps=1, max_completion_length=12)
    unused = unused_token_ids(str(folder), trainer.tokenizer)
    rollouts = trainer.sample(trainer.training_prompts(1), num_generations=4)
    bad = [tokens[-1] in unused for tokens in rollouts.completion_tokens]
    assert any(bad) and not all(bad)
    for tokens, ends_badly, truncated in zip(rollouts.completion_tokens, bad, rollouts.truncated, strict=True):
        assert not set(tokens[:-1]) & set(unused)
        assert truncated == (ends_badly or tokens[-1] not in trainer.policy_sampler.end_token_ids)
    trainer.train()
    line = metrics_of(tmp_path / "run")[-1]
    assert line["sampler/logprob_diff"] < 1e-4 and line["policy/first_ratio"] == 1


class Recorder:
    """A sampler with weights of its own that writes down what it is asked for."""

    needs_push, has_weights, resident_bytes, samples_apart = True, False, 0, False

    def __init__(self) -> None:
        self.asked: list = []
        self.seeds: list = []

    def push(self, weights) -> None:
        self.asked.append(("push", len(list(weights)) > 0))
        self.has_weights = True

    def generate(self, prompt_ids, settings, *, num_generations=1, seeds=None) -> list[Completion]:
        self.seeds.append(seeds)
        self.asked.append((settings.temperature, settings.top_p, settings.top_k, num_generations, seeds is not None))
        return [Completion([3], [-1.0], truncated=False)] * (len(prompt_ids) * num_generations)

    def sleep(self) -> None:
        pass

    wake = sleep


@pytest.fixture
def recorded(toy_folder, tmp_path):
    """A trainer and what its sampler is asked for."""
    settings = {"temperature": 0.9, "eval_temperature": 0.6, "eval_top_p": 0.8, "eval_top_k": 5, "eval_num_samples": 2}
    trainer = toy_trainer(toy_folder, tmp_path / "run", eval_every=1, **settings)
    trainer.policy_sampler.sampler = Recorder()
    return trainer, trainer.policy_sampler.sampler.asked


@pytest.mark.parametrize(
    ("name", "settings"),
    [(name, settings) for name in algorithms() for settings in ({}, *facts(name).get("VARIANTS", {}).values())],
)
def test_no_request_of_a_run_is_larger_than_what_its_settings_say(toy_folder, tmp_path, monkeypatch, name, settings):
    sizes, generate = [], TransformersSampler.generate

    def counted(self, prompt_ids, *args, num_generations=1, **kwargs):
        sizes.append(len(prompt_ids) * num_generations)
        return generate(self, prompt_ids, *args, num_generations=num_generations, **kwargs)

    monkeypatch.setattr(TransformersSampler, "generate", counted)
    trainer = toy_trainer(toy_folder, tmp_path / "run", algorithm=name, **{"num_steps": 1} | settings)
    trainer.train()
    assert 0 < max(sizes) <= trainer.config.completions_at_once


@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("GRPO", {}, 16),
        ("PPO", {"value_init": "zero_head"}, 16),
        ("PPO", {"value_init": "fit", "value_init_prompts": 21, "value_init_generations": 4}, 20),
        ("VinePPO", {"max_completion_length": 12, "chunk_length": 5, "vine_k": 2}, 96),
    ],
)
def test_the_largest_request_by_hand(toy_folder, tmp_path, name, settings, most):
    assert toy_config(toy_folder, tmp_path, algorithm=name, **settings).completions_at_once == most


def test_weights_are_pushed_once_for_each_change_of_the_policy_and_again_when_the_sampler_lost_them(recorded):
    trainer, asked = recorded
    prompts = trainer.training_prompts(1)
    for _ in range(2):
        trainer.sample(prompts)
    assert asked.count(("push", True)) == 1 and asked[0] == ("push", True)
    trainer.policy_sampler.policy_has_changed()
    trainer.sample(prompts)
    assert asked.count(("push", True)) == 2 and asked[-2] == ("push", True)
    trainer.policy_sampler.sampler.has_weights = False  # as after a sleep that drops them
    trainer.sample(prompts)
    assert asked.count(("push", True)) == 3 and asked[-2] == ("push", True)


def test_training_samples_by_the_temperature_alone_and_evaluation_as_its_own_settings_say(recorded):
    trainer, asked = recorded
    trainer.sample(trainer.training_prompts(1), num_generations=4)
    trainer.sample(trainer.training_prompts(1), greedy=True)
    trainer.policy_sampler.sample_for_evaluation(trainer.eval_prompts.share())
    assert asked[1:] == [(0.9, 1.0, 0, 4, True), (0.0, 1.0, 0, 1, False), (0.6, 0.8, 5, 2, True)]


def test_an_evaluation_has_noise_of_its_own_for_the_same_rows_of_the_same_step(recorded):
    trainer, _ = recorded
    prompts = trainer.eval_prompts.share()
    trainer.sample(prompts)
    trainer.policy_sampler.sample_for_evaluation(prompts)
    training, evaluation = map(set, trainer.policy_sampler.sampler.seeds)
    assert len(training) == len(evaluation) == len(prompts) and not training & evaluation


@pytest.mark.parametrize(("processes", "held_out", "rows"), [(1, 255, 1020), (2, 255, 512), (4, 3, 16), (3, 0, 22)])
def test_the_largest_request_of_a_process_is_of_whole_prompts(processes, held_out, rows):
    config = RLConfig(prompts_per_step=8, num_generations=8, num_minibatches=1, eval_num_samples=4)
    assert largest_request(config, held_out, processes) == rows
