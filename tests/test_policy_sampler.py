"""Completions of a policy whose vocabulary is larger than its tokenizer's."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.embedded.policy import build_tokenizer
from common.models.loading import unused_token_ids
from tests.toy import metrics_of, save_toy_policy, toy_trainer


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
