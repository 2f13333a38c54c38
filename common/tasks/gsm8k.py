"""GSM8K: school problems whose answer is one number; completions put reasoning and answer in tags.

The data set (huggingface.co/papers/2110.14168) comes from the hub or from a local file with its columns `question` and
`answer`, which ends in ``#### 42``. Five rules score a completion: the number, two formats, the tags, and the length
of the reasoning. All of them read the tags: text outside the tags earns nothing.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import transformers

from common.config import RLConfig
from common.data.rows import read_rows, split_held_out, take_held_out
from common.rewards.rules import rule
from common.tasks import Task

HUB_DATASET = "openai/gsm8k:main"
TOLERANCE = 1e-6
PENALTY_PER_CHARACTER = 0.002  # of text after the answer, in units of all four tags

SYSTEM_TEXT = """\
You think before you answer. Write your thoughts between reasoning tags; once you have a result, say "Wait," and \
check every step again. Between answer tags give the final answer, one number, and nothing else. Keep to this layout:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""

_TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
_TAG_LINES = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
# A fraction, a mixed number or a decimal number.
_NUMBER = re.compile(
    r"(?P<sign>-?)(?:(?P<whole>\d+) )?(?:\\[dt]?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}|(?P<over>\d+)/(?P<under>\d+))"
    r"|(?P<decimal>-?(?:\d+(?:\.\d+)?|\.\d+))",
    re.ASCII,
)
_GOLD = re.compile(r"-?\d+(?:\.\d+)?", re.ASCII)


def load(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Give GSM8K prompts, held-out prompts and the five rewards.

    Args:
        config: `dataset` (None for GSM8K of the hub), `dataset_split`, `num_eval_prompts` and `max_completion_length`
            are read. Held out are the first problems of a hub data set's test split, or random ones of a local file.
        tokenizer: with a chat template, prompts are a system and a user message, else plain text. It also counts
            the tokens of the reasoning.

    Raises:
        ValueError: the data cannot be read, or has too few rows for `num_eval_prompts`.
    """
    source = config.dataset or HUB_DATASET
    write_prompt = plain_prompt if tokenizer.chat_template is None else chat_prompt
    train = read_problems(source, config.dataset_split, write_prompt)
    if Path(source).exists():
        train, held_out = split_held_out(train, config.num_eval_prompts)
    else:
        held_out = take_held_out(read_problems(source, "test", write_prompt), config.num_eval_prompts)
    return Task(
        train=train,
        eval=held_out,
        rewards={
            "correct": correct_reward,
            "strict_format": strict_format_reward,
            "soft_format": soft_format_reward,
            "tags": tags_reward,
            "length": partial(length_reward, tokenizer=tokenizer, full_length=config.max_completion_length),
        },
        reward_weights={"correct": 2.0, "strict_format": 0.5, "soft_format": 0.5, "tags": 0.5, "length": 2.0},
        accuracy="correct",
        format="strict_format",
    )


def chat_prompt(question: str) -> list[dict[str, str]]:
    """System and user message."""
    return [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": question}]


def plain_prompt(question: str) -> str:
    """The same as plain text, for a policy without a chat template."""
    return f"{SYSTEM_TEXT}\n\n{question}\n"


def read_problems(source: str, split: str, write_prompt: Callable[[str], str | list[dict]]) -> list[dict]:
    """Read every row as `prompt` and `answer`, the number alone as text.

    Raises:
        ValueError: the source cannot be read or lacks a column (see `read_rows`), or an answer ends without a number.
    """
    problems = []
    for number, row in enumerate(read_rows(source, split, ["question", "answer"]), start=1):
        answer = str(row["answer"]).rpartition("####")[2].strip().replace(",", "")
        if not (isinstance(row["question"], str) and _GOLD.fullmatch(answer)):
            raise ValueError(
                f"dataset={source}: row {number} has question={row['question']!r:.80} and answer="
                f"{row['answer']!r:.80}; GSM8K needs text, and an answer that ends in #### and a number. Correct or "
                "remove the row."
            )
        problems.append({"prompt": write_prompt(row["question"]), "answer": answer})
    return problems


# Rewards


@rule
def correct_reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1.0 if the first number between the last answer tags is the answer, within 1e-6; else 0.

    Args:
        prompts: not used.
        completions: B completions.
        answer: B numbers as text.
        columns: not used.

    Returns:
        B rewards.
    """
    rows = zip(completions, answer, strict=True)
    return [float(abs(_first_number(_block(text, "answer")) - float(gold)) < TOLERANCE) for text, gold in rows]


@rule
def strict_format_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """1.0 if the completion is exactly the two blocks, with each tag once and on its own line; else 0."""
    return [float(_is_strict(text.removesuffix("\n"))) for text in completions]


@rule
def soft_format_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """1.0 if the completion begins with a reasoning block and then, after any white space, an answer block; else 0."""
    return [float(_is_soft(text)) for text in completions]


@rule
def tags_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """0.25 for each of the four tags that occurs exactly once with its line breaks, minus a penalty for trailing text.

    Each character after the closing answer tag, other than a last line break, costs 0.002.
    """
    rewards = []
    for text in completions:
        _, closing, rest = text.removesuffix("\n").rpartition("</answer>")
        penalty = PENALTY_PER_CHARACTER * len(rest) if closing else 0.0
        rewards.append(sum(text.count(tag) == 1 for tag in _TAG_LINES) / len(_TAG_LINES) - penalty)
    return rewards


@rule
def length_reward(
    prompts: list[str],
    completions: list[str],
    *,
    tokenizer: transformers.PreTrainedTokenizerBase,
    full_length: int,
    **columns: list,
) -> list[float]:
    """Tokens between the last reasoning tags / full_length, at most 1.0; 0 without the tags."""
    encoded = tokenizer([_block(text, "reasoning") for text in completions], add_special_tokens=False)["input_ids"]
    return [min(1.0, len(ids) / full_length) for ids in encoded]


def _block(text: str, tag: str) -> str:
    """Text from the last opening tag to the next closing one; empty if either is missing."""
    _, opening, rest = text.rpartition(f"<{tag}>")
    block, closing, _ = rest.partition(f"</{tag}>")
    return block if opening and closing else ""


def _first_number(text: str) -> float:
    """Value of the first number, ignoring commas and dollar signs; NaN without one."""
    match = _NUMBER.search(text.replace(",", "").replace("$", "").replace("\N{MINUS SIGN}", "-"))
    if match is None:
        return math.nan
    if match["decimal"]:
        return float(match["decimal"])
    top, bottom = float(match["top"] or match["over"]), float(match["bottom"] or match["under"])
    value = float(match["whole"] or 0) + (top / bottom if bottom else math.nan)
    return -value if match["sign"] else value


def _is_strict(text: str) -> bool:
    if not (text.startswith("<reasoning>\n") and text.endswith("\n</answer>")):
        return False
    blocks = text.removeprefix("<reasoning>\n").removesuffix("\n</answer>")
    thought, boundary, answer = blocks.partition("\n</reasoning>\n<answer>\n")
    return bool(boundary) and not any(tag in thought or tag in answer for tag in _TAGS)


def _is_soft(text: str) -> bool:
    thought, _, rest = text.partition("</reasoning>")
    answer, closing, _ = rest.lstrip().partition("</answer>")
    return thought.startswith("<reasoning>") and answer.startswith("<answer>") and bool(closing)
