"""Models with the sizes of published ones and random weights: as slow as those, without a download."""

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from common.embedded.policy import build_tokenizer
from common.memory.fit import configuration

# Small enough for a CPU; its head has the same share of the weights as that of the smallest of the others: a third.
MINI = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
SHAPES = ("mini", "0.5b", "1.5b", "3b")


def save_shape(name: str, folder: Path) -> Path:
    """Write a model of random bfloat16 weights; its tokenizer is the embedded policy's, filled up to all its tokens.

    Args:
        name: one of SHAPES: mini, or the size of a Qwen2.5.
        folder: created if missing.

    Returns:
        The folder.
    """
    config = Qwen2Config(**MINI) if name == "mini" else configuration(name.upper())
    tokenizer = build_tokenizer()
    # A token that the tokenizer does not have ends a completion, and random weights would soon draw one.
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), config.vocab_size)])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config.update({**ends, "bos_token_id": None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
