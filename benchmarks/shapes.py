"""Models with the sizes of published ones and random weights: as slow as those, without a download."""

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from common.embedded.policy import build_tokenizer

# From the config.json of Qwen/Qwen2.5-0.5B, Qwen/Qwen2.5-1.5B and Qwen/Qwen2.5-3B. "mini" is small enough for a CPU,
# and its head has the same share of the weights as that of the smallest: a third.
SHAPES = {
    "mini": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


def save_shape(name: str, folder: Path) -> Path:
    """Write a model of random bfloat16 weights; its tokenizer is the embedded policy's, filled up to all its tokens.

    Args:
        name: key of SHAPES.
        folder: created if missing.

    Returns:
        The folder.
    """
    tokenizer = build_tokenizer()
    # A token that the tokenizer does not have ends a completion, and random weights would soon draw one.
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), SHAPES[name]["vocab_size"])])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        **SHAPES[name], **ends, bos_token_id=None, tie_word_embeddings=True, max_position_embeddings=32768
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
