"""The model of `--model tiny`: an untrained Qwen2 of half a million weights, and a tokenizer for the data."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from common.embedded.policy import TinySettings, build_policy
from common.tasks import gsm8k, math

VOCABULARY = 1024
MAX_POSITIONS = 2048

# Marks the assistant's turns, so that the loss is on them alone.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(rows: list[dict]) -> PreTrainedTokenizerBase:
    """Learn the words of the rows' texts and of the tasks' instructions; digits stay single tokens.

    The class is Qwen2's, since AutoTokenizer loads no other with a Qwen2 model.
    """
    blank = Qwen2Tokenizer(unk_token=None, eos_token="<|im_end|>", pad_token="<pad>")
    # Repeated, so that each word of an instruction becomes a token.
    texts = [*([gsm8k.SYSTEM_TEXT, math.INSTRUCTION, "<|im_start|>system user assistant"] * len(rows))]
    texts += [str(value) for row in rows for value in row.values()]
    tokenizer = blank.train_new_from_iterator(texts, VOCABULARY, show_progress=False)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Write an untrained model and its tokenizer into a folder.

    Args:
        folder: created if missing.
        tokenizer: from build_tokenizer.
        seed: of the weights.
    """
    sizes = TinySettings(num_hidden_layers=2, max_position_embeddings=MAX_POSITIONS, seed=seed)
    build_policy(sizes, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
