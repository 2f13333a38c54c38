"""Distillation alone: what is refused as a teacher, by hand what a step makes of its judgement, and that it teaches."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from Distill.distill_trainer import DistillConfig, DistillTrainer
from tests.by_hand import assert_advantages, trained_on
from tests.toy import CLIP, LORA, SEVERAL, metrics_of, save_toy_policy, toy_config, toy_trainer, weights_of


def writes_digits(policy: Path) -> str:
    """The folder of a teacher that was made of a policy, and that writes digits more often than all else.

    One number of every token's embedding is large, so that the last hidden state has it whatever was read.
    """
    folder = policy.with_name(f"{policy.name} writes digits")
    if folder.is_dir() or not policy.is_dir():
        return str(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    texts = [tokenizer.decode([token]) for token in range(model.config.vocab_size)]
    head = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    is_digits = torch.tensor([text.strip().isdigit() for text in texts])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 200.0
        head[:, 0] = torch.where(is_digits, 1.2, -0.4)
    model.config.tie_word_embeddings, model.lm_head.weight = False, head
    temporary = folder.with_name(f"{folder.name} {os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return str(folder)


TOY_SETTINGS = {"teacher": writes_digits}
# For each setting of its own: with which others it shows, and changed to what.
ACTS = CLIP | {
    "teacher": None,  # below
    "gamma": ({}, 1.0),
    "reward_coef": ({}, 3.0),
}
VALUES = {"gamma": [0.0, 1.0, 0.5], "reward_coef": [0.0, 1.0, -0.5]}
VARIANTS = {"lora": LORA | {"gamma": 1.0, "reward_coef": 0.5}}


def distill(model, folder, **settings) -> DistillTrainer:
    return toy_trainer(model, folder, algorithm="Distill", **settings)
