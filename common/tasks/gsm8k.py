"""GSM8K: school problems whose answer is one number; completions put reasoning and answer in tags.

The data set (huggingface.co/papers/2110.14168) comes from the hub or from a local file with its columns `question` and
`answer`, which ends in ``#### 42``. Five rules score a completion: the number, two formats, the tags, and the length
of the reasoning. All of them read the tags: text outside the tags earns nothing. An evaluation also counts right
numbers outside the tags, as `lenient_accuracy`.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import transformers

from common.config import RLConfig
from common.data.rows import read_rows, split_held_out, take_held_out
from common.rewards.rules import rule
from common.tasks import Task
from common.tasks._numbers import exact_number, last_number, read_number
from common.tasks._places import THOUGHT_TAGS, last_block, last_box, outside_thoughts

HUB_DATASET = "openai/gsm8k:main"
TOLERANCE = Fraction(1, 10**6)
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
_THOUGHTS = (*THOUGHT_TAGS, "reasoning")


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
        lenient_accuracy=lenient_accuracy,
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
        answer = gold_number(row["answer"])
        if answer is None or not (isinstance(row["question"], str) and row["question"].strip()):
            raise ValueError(
                f"dataset={source}: row {number} has question={row['question']!r:.80} and answer="
                f"{row['answer']!r:.80}; GSM8K needs text, and an answer that ends in #### and a number. Correct or "
                "remove the row."
            )
        problems.append({"prompt": write_prompt(row["question"]), "answer": answer})
    return problems


def gold_number(answer: object) -> str | None:
    """The number of an answer column, which is all of it or follows ####; None if `read_number` finds none.

    Args:
        answer: text, or a number.

    Returns:
        The number as text, in digits, with a point and a sign where it has them; 1/2 and 50 stand for ½ and 50%.
    """
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    text = str(answer).rpartition("####")[2].strip()
    number = exact_number(text.removesuffix("."))
    if number is None or not number.decimals or number.value.denominator == 1:
        value = read_number(text) if number is None else number.value
        return None if value is None else str(value)
    return f"{float(number.value):.{number.decimals}f}"


# Rewards


@rule
def correct_reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1.0 if the text between the last answer tags gives the answer as its number, within 1e-6; else 0.

    Tags inside the thoughts do not count. Which writings of a number are read: `read_number`.

    Args:
        prompts: B prompts.
        completions: B completions.
        answer: B numbers as text.
        columns: not used.

    Returns:
        B rewards.
    """
    rows = zip(prompts, completions, answer, strict=True)
    return [float(_is_correct(prompt, text, gold)) for prompt, text, gold in rows]


@rule
def lenient_accuracy(prompts: list[str], completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    r"""1.0 if the answer is right wherever the completion says it: for evaluation alone, it is no reward.

    Read are the answer tags, else the last ``\boxed{}``, else the last number of the text, outside the thoughts if
    the thoughts end. The arguments are those of `correct_reward`.
    """
    rows = zip(prompts, completions, answer, strict=True)
    return [float(_is_correct(prompt, text, gold) or _is_said(prompt, text, gold)) for prompt, text, gold in rows]


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
    thoughts = [last_block(text, "reasoning") or "" for text in completions]
    encoded = tokenizer(thoughts, add_special_tokens=False)["input_ids"]
    return [min(1.0, len(ids) / full_length) for ids in encoded]


def _is_correct(prompt: str, completion: str, gold: str) -> bool:
    block = last_block(outside_thoughts(completion, prompt, _THOUGHTS), "answer")
    return block is not None and _is_near(read_number(block), gold)


def _is_said(prompt: str, completion: str, gold: str) -> bool:
    text = outside_thoughts(completion, prompt, _THOUGHTS) or completion
    if last_block(text, "answer") is not None:
        return False
    box = last_box(text)
    return _is_near(last_number(text) if box is None else read_number(box.content), gold)


def _is_near(number: Fraction | None, gold: str) -> bool:
    right = read_number(gold)
    return number is not None and right is not None and abs(number - right) < TOLERANCE


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
