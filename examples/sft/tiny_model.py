"""What `--model tiny` is: an untrained Qwen2 of half a million weights, and a tokenizer with the words of the data."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from common.tasks import gsm8k, math

VOCABULARY = 1024
MAX_POSITIONS = 2048

# Marks the assistant's turns, as loss on them alone needs it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(rows: list[dict]) -> PreTrainedTokenizerBase:
    """Learn the words of the rows' texts and of the tasks' instructions; digits stay single tokens.

    The class is Qwen2's, since AutoTokenizer reads no other beside a Qwen2 model.
    """
    blank = Qwen2Tokenizer(unk_token=None, eos_token="<|im_end|>", pad_token="<pad>")
    # Often enough that each word of an instruction becomes a token.
    texts = [*([gsm8k.SYSTEM_TEXT, math.INSTRUCTION, "<|im_start|>system user assistant"] * len(rows))]
    texts += [str(value) for row in rows for value in row.values()]
    tokenizer = blank.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Write an untrained model and its tokenizer into a folder.

    Args:
        folder: made if it is not there.
        tokenizer: from build_tokenizer.
        seed: of the weights.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,  # vLLM on the CPU wants heads of at least 32
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
