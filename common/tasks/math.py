r"""Mathematics: reason step by step and put the answer in ``\boxed{}``; any equivalent form is right.

The last box outside the thoughts counts. `_meaning.py` says when two answers mean the same. Rows whose answer nobody
could match, such as a proof, are left out and counted.
"""

import json
import logging
import math
import re
from decimal import Decimal
from pathlib import Path

import transformers

from common.config import RLConfig
from common.data.rows import read_rows, split_held_out, take_held_out
from common.rewards.rules import rule, warmed_up_by
from common.tasks import Task
from common.tasks._meaning import MAX_ANSWER_LENGTH, means_the_same
from common.tasks._numbers import last_number
from common.tasks._places import Box, last_box, outside_thoughts
from common.terminal import names

logger = logging.getLogger("nanorlhf")

HUB_DATASET = "meta-math/MetaMathQA"
HUB_EVALUATION = "HuggingFaceH4/MATH-500"

QUESTION_COLUMNS = ("problem", "question", "query")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "response")
# Half of the guesses are right: such problems teach guessing.
GUESSABLE = frozenset({"yes", "no", "true", "false"})
# What data sets write where they have no answer; as words, and as they stand.
PLACEHOLDERS = frozenset(
    [
        "proof",
        "proved",
        "notfound",
        "answernotfound",
        "noanswer",
        "notprovided",
        "notgiven",
        "notavailable",
        "seesolution",
        "seeabove",
        "seebelow",
        "unknown",
        "omitted",
        "na",
        "tba",
        "tbd",
        "qed",
        "answersmayvary",
        "answersvary",
        "answerswillvary",
    ]
)
STYLE = re.compile(r"\\(?:text|math)(?:bf|it|rm|sf|tt|normal|up)?(?![A-Za-z])")
EMPTY_VALUES = frozenset(
    ("", "nan", "none", "null", "n/a", "-", "--", "?", "...", "[]", "{}", "\\square", "\\blacksquare")
)
MAX_WORDS = 8  # of an answer; more is a solution, which no model writes in the same words
SHOWN_ROWS = 3  # of those that are left out

INSTRUCTION = "Reason step by step. Put the final answer, and only that, in \\boxed{}."

MAX_TEXT_AFTER_BOX = 100  # characters: room to end the sentence, not to continue


def load(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Give problems, held-out problems and the two rewards.

    Args:
        config: `dataset` (None for MetaMathQA), `dataset_split` and `num_eval_prompts` are read. Held out are the
            first problems of MATH-500, or random ones of a local file.
        tokenizer: with a chat template, prompts are a user message, else plain text.

    Raises:
        ValueError: the data cannot be read, or has too few rows for `num_eval_prompts`.
    """
    source = config.dataset or HUB_DATASET
    is_chat = tokenizer.chat_template is not None
    train = read_problems(source, config.dataset_split, is_chat=is_chat)
    if Path(source).exists():
        train, held_out = split_held_out(train, config.num_eval_prompts)
    elif config.num_eval_prompts == 0:
        held_out = []
    else:
        held_out = take_held_out(read_problems(HUB_EVALUATION, "test", is_chat=is_chat), config.num_eval_prompts)
    return Task(
        train=train,
        eval=held_out,
        rewards={"correct": correct_reward, "boxed": boxed_reward},
        reward_weights={"correct": 1.0, "boxed": 0.1},
        accuracy="correct",
        format="boxed",
        lenient_accuracy=lenient_accuracy,
    )


def read_problems(source: str, split: str, *, is_chat: bool) -> list[dict]:
    """Read every row as `prompt` and `answer`; leave out those whose answer can be guessed, or matched by nobody.

    Columns are those of MATH, MetaMathQA or DeepMath-103K. Which answers are used: `gold_answer`. Rows without a
    usable one are counted in a warning. Yes, no, true and false are left out without a word.

    Raises:
        ValueError: the source cannot be read, a row has no problem, or half of the rows have no usable answer.
    """
    problems, unusable = [], []
    rows = read_rows(source, split, None)
    for number, row in enumerate(rows, start=1):
        question = next((row[name] for name in QUESTION_COLUMNS if row.get(name) is not None), None)
        answer = gold_answer(row)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(_refusal(source, number, row))
        if answer is None:
            unusable.append((number, row))
        elif _plain_words(answer) not in GUESSABLE:
            problems.append({"prompt": write_prompt(question, is_chat=is_chat), "answer": answer})
    if 2 * len(unusable) >= len(rows):
        count = f"{len(unusable)} of {len(rows)} rows have no answer that a model could match. "
        raise ValueError(_refusal(source, *unusable[0], count=count))
    if unusable:
        shown = "; ".join(f"row {number}: {_shown_answer(row)}" for number, row in unusable[:SHOWN_ROWS])
        logger.warning(
            "dataset=%s: %d of %d rows are left out, because no model could match their answer: %s%s",
            *(source, len(unusable), len(rows), shown, "; ..." if len(unusable) > SHOWN_ROWS else ""),
        )
    return problems


def _plain_words(answer: str) -> str:
    """Its letters and digits without styles of text, in lower case."""
    return re.sub(r"[\W_]", "", STYLE.sub("", answer)).lower()


def gold_answer(row: dict) -> str | None:
    r"""The answer of a row in LaTeX, without a box; None if it has none that a model could match.

    The first answer column that is not empty decides. A list or dict of one answer is that answer. In a solution the
    answer is what follows "The answer is:" or, at its end, ####; else it is the last box. Not used are placeholders
    such as "proof", nan, several answers in a list, and texts of more than 8 words or 300 characters.
    """
    name = next((name for name in ANSWER_COLUMNS if not _is_empty(row.get(name))), None)
    text = _as_text(row.get(name))
    answer = text and _final_part(text, is_solution=name in ("solution", "response"))
    return answer if answer and _can_be_matched(answer) else None


def _is_empty(value: object) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or str(value).strip().lower() in EMPTY_VALUES


def _as_text(value: object) -> str | None:
    """An answer column as text; None for what is no single answer."""
    if isinstance(value, str):
        if not value.lstrip().startswith('["'):
            return value
        try:
            return _as_text(json.loads(value))
        except (ValueError, RecursionError):  # not JSON, a number of 5,000 digits, nested too deeply
            return value
    if isinstance(value, list | tuple) and len(value) == 1:
        return _as_text(value[0])
    if isinstance(value, dict):
        named = [value[name] for name in (*ANSWER_COLUMNS[:2], "ground_truth", "value") if value.get(name) is not None]
        return _as_text(named[0]) if len(named) == 1 else None
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value == int(value) and abs(value) < 10**15 else str(value)
    return str(value) if isinstance(value, int) else None


def _final_part(text: str, *, is_solution: bool) -> str | None:
    _, marker, answer = text.rpartition("The answer is:")
    if marker:
        return answer.strip()
    _, marker, answer = text.rpartition("####")
    if marker and "\n" not in answer.strip():  # not a heading
        return answer.strip()
    box = last_box(text)
    if box is not None:
        return box.content.strip()
    return None if is_solution else text.strip()


def _can_be_matched(answer: str) -> bool:
    """Whether an answer is short, and no placeholder."""
    if (
        answer.strip("$ ").lower() in EMPTY_VALUES
        or _plain_words(answer) in PLACEHOLDERS
        or "://" in answer
        or "![" in answer
    ):
        return False
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\(?:begin|end)\{\w+\}", "", answer))
    return len(words) <= MAX_WORDS and len(answer) <= MAX_ANSWER_LENGTH


def _shown_answer(row: dict) -> str:
    columns = [name for name in ANSWER_COLUMNS if name in row]
    return ", ".join(f"{name}={row[name]!r:.80}" for name in columns) or "no answer"


def _refusal(source: str, number: int, row: dict, count: str = "") -> str:
    return (
        f"dataset={source}: row {number} has the columns {names(row)} with {_shown_answer(row)}. {count}Needed "
        f"are a problem ({', '.join(QUESTION_COLUMNS)}) and its answer ({', '.join(ANSWER_COLUMNS)}), in the last two "
        f'with \\boxed{{}}, #### or "The answer is:". Rename the columns, or correct or remove the rows.'
    )


def write_prompt(question: str, *, is_chat: bool) -> str | list[dict[str, str]]:
    """A user message, or the same as plain text for a policy without a chat template."""
    text = f"{question}\n\n{INSTRUCTION}"
    return [{"role": "user", "content": text}] if is_chat else f"{text}\n"


# Rewards

# The first answer of each kind loads and caches most of what Math-Verify and sympy have for it.
WARM_UP_ANSWERS = (
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"),
    (r"[0,\infty)", r"x \ge 0"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\\frac{4}{2}\end{bmatrix}"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"y=2x+\sqrt{8}", r"2x-y=-2\sqrt{2}"),
    (r"\{1,2\}\cup(3,4)", r"(3,4)\cup\{2,1\}"),
)


def warm_up() -> None:
    """Compare one pair of answers of each kind, about 1 second; else the first rows of every worker pay for it."""
    for gold, text in WARM_UP_ANSWERS:
        means_the_same(gold, text)


@warmed_up_by(warm_up)
@rule
def correct_reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1.0 if the content of the last box means the same as the answer; else 0.

    A box inside the thoughts does not count.

    Args:
        prompts: B prompts.
        completions: B completions.
        answer: B answers in LaTeX, without a box.
        columns: not used.

    Returns:
        B rewards.
    """
    rows = zip(prompts, completions, answer, strict=True)
    return [float(_is_correct(_box(prompt, text), gold)) for prompt, text, gold in rows]


@rule
def boxed_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """1.0 if the last box is closed, not empty and followed by at most 100 characters; else 0."""
    boxes = map(_box, prompts, completions)
    return [
        float(box is not None and box.content.strip() != "" and len(box.rest) <= MAX_TEXT_AFTER_BOX) for box in boxes
    ]


@warmed_up_by(warm_up)
@rule
def lenient_accuracy(prompts: list[str], completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1.0 if the last box or, without one, the last number of the text is the answer; for evaluation, no reward.

    The arguments are those of `correct_reward`.
    """
    rows = zip(prompts, completions, answer, strict=True)
    return [float(_is_said(prompt, text, gold)) for prompt, text, gold in rows]


def _box(prompt: str, completion: str) -> Box | None:
    return last_box(outside_thoughts(completion, prompt))


def _is_correct(box: Box | None, gold: str) -> bool:
    return box is not None and means_the_same(gold, box.content)


def _is_said(prompt: str, completion: str, gold: str) -> bool:
    text = outside_thoughts(completion, prompt) or completion
    box, number = last_box(text), last_number(text)
    return _is_correct(box, gold) if box or number is None else means_the_same(gold, str(number))
