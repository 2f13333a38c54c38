"""Countdown: combine the given numbers, each exactly once, with + - * / to reach a target.

Problems are generated here (small enough for the tiny policy), or read from a hub data set or a local file in the
schema of Jiayi-Pan/Countdown-Tasks-3to4. The rewards are two rules: one for the format of the completion, one for the
equation. common/embedded/policy.py builds the lessons of the tiny policies from `problems` and `tries`.
"""

import logging
import re
from functools import cache, partial
from itertools import chain, combinations_with_replacement, permutations, product
from math import prod
from typing import NamedTuple

import transformers

from common.config import RLConfig
from common.data.rows import read_rows, split_held_out
from common.rewards.rules import rule
from common.tasks import Task
from common.tasks._arithmetic import MAX_CHARACTERS, MAX_DIGITS, evaluate, plain_expression
from common.tasks._places import first_block, outside_thoughts

logger = logging.getLogger("nanorlhf")

NUM_HELD_OUT = 256  # generated problems of each size; the tiny policies' warm start and RL never see them
TOLERANCE = 1e-5
MAX_NUMBERS = 20  # of a problem
MAX_EXACT = 3  # of a problem whose expressions are all tried when it is read, in 0.06 to 0.2 ms; four take far longer

OPERATORS = "+-*"
NUMBERS = range(1, 10)
RESULTS = range(1, 51)
TARGETS = range(10, 51)
# Values of `dataset` for generated problems, with the most numbers of a problem; the fewest are three.
GENERATED = {None: 3, "generated-3to4": 4}

SYSTEM_TEXT = "You are a careful assistant. You think a problem through before you give your answer."
USER_TEXT = (
    "Reach {target} with the numbers {nums}. You may add, subtract, multiply and divide (+, -, *, /), and each number "
    "must be used exactly once. Think it through inside <think> </think> tags. On the next line give the finished "
    "expression, without an equals sign, inside <answer> </answer> tags, for example <answer>(1 + 2) / 3</answer>."
)
ASSISTANT_START = "Let me solve this step by step.\n<think>"

_ARITHMETIC = re.compile(r"(?:[0-9+\-*/()\s]|(?<=[0-9])\.(?=[0-9]))+", re.ASCII)
_NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def load(config: RLConfig, tokenizer: transformers.PreTrainedTokenizerBase) -> Task:
    """Give Countdown prompts, held-out prompts and the two rewards.

    Args:
        config: `dataset` (None for generated problems with three numbers, "generated-3to4" for three and four),
            `dataset_split` and `num_eval_prompts` are read.
        tokenizer: with a chat template, prompts are chat messages that end with the start of the assistant's turn;
            without one they are the one line that the tiny policy knows.

    Raises:
        ValueError: the data cannot be read, or has too few rows for `num_eval_prompts`.
    """
    if config.dataset in GENERATED:
        train, held_out = problems(GENERATED[config.dataset])
        if config.num_eval_prompts > len(held_out):
            raise ValueError(
                f"num_eval_prompts={config.num_eval_prompts}: only {len(held_out)} generated Countdown problems are "
                f"held out, since tiny policies are warm-started on the others. Pass --num_eval_prompts "
                f"{len(held_out)} or fewer, or a data set with --dataset."
            )
        held_out = held_out[: config.num_eval_prompts]
    else:
        rows = read_problems(config.dataset, config.dataset_split)
        train, held_out = split_held_out(rows, config.num_eval_prompts, key=lambda row: problem_key(**row))
    write_prompt = compact_prompt if tokenizer.chat_template is None else chat_prompt
    return Task(
        train=[{"prompt": write_prompt(**row), **row} for row in train],
        eval=[{"prompt": write_prompt(**row), **row} for row in held_out],
        rewards={"format": partial(format_reward, eos_token=tokenizer.eos_token), "equation": equation_reward},
        reward_weights={"format": 1.0, "equation": 1.0},
        accuracy="equation",
        format="format",
    )


def compact_prompt(nums: list[int], target: int) -> str:
    """The prompt of the tiny policy: ``3 5 6 make 48`` and a line break."""
    return f"{' '.join(map(str, nums))} make {target}\n"


def chat_prompt(nums: list[int], target: int) -> list[dict[str, str]]:
    """System and user message, and the beginning of the assistant's turn with the think tag already open."""
    return [
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": USER_TEXT.format(nums=", ".join(map(str, nums)), target=target)},
        {"role": "assistant", "content": ASSISTANT_START},
    ]


# Rewards


@rule
def format_reward(
    prompts: list[str], completions: list[str], *, eos_token: str | None = None, **columns: list
) -> list[float]:
    """1.0 for one think block, a line break and one answer block of arithmetic only; 0.5 if the answer holds more.

    Anything before, between, inside (nested tags) or after the blocks gives 0. A think tag that the prompt already
    opened counts as part of the completion, and so does an empty think block at its end: the answer block is then
    enough. Whether the answer is right does not matter.

    Args:
        prompts: B prompts.
        completions: B completions, with or without the end token at their end.
        eos_token: text of the end token.
        columns: not used.

    Returns:
        B rewards.
    """
    rows = zip(prompts, completions, strict=True)
    return [_format_score(prompt, completion, eos_token) for prompt, completion in rows]


def _format_score(prompt: str, completion: str, eos_token: str | None) -> float:
    text = completion.removesuffix(eos_token) if eos_token else completion
    if prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    elif text.startswith("<answer>") and _NO_THOUGHTS.fullmatch(prompt, max(0, prompt.rfind("<think>"))):
        text = "<think></think>\n" + text
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    blocks = text.removeprefix("<think>").removesuffix("</answer>")
    thought, boundary, answer = blocks.partition("</think>\n<answer>")
    nested = "<think>" in thought or "</think>" in thought or any(tag in answer for tag in _TAGS)
    if not boundary or nested:
        return 0.0
    return 1.0 if _ARITHMETIC.fullmatch(plain_expression(answer)) else 0.5


@rule
def equation_reward(
    prompts: list[str], completions: list[str], *, nums: list[list[int]], target: list[int], **columns: list
) -> list[float]:
    """1.0 if the first answer uses exactly the given numbers, each once, and reaches the target; else 0.

    An answer inside the thoughts does not count, nor a second one. White space, line breaks and the usual ways to
    write an operator are no fault: see `plain_expression`.

    Args:
        prompts: B prompts; one that ends with an open think tag begins the thoughts.
        completions: B completions.
        nums: B lists of the numbers to use.
        target: B values to reach, within 1e-5.
        columns: not used.

    Returns:
        B rewards.
    """
    rows = zip(prompts, completions, nums, target, strict=True)
    return [_equation_score(outside_thoughts(text, prompt), *problem) for prompt, text, *problem in rows]


def _equation_score(said: str, nums: list[int], target: int) -> float:
    answer = first_block(said, "answer")
    if answer is None:
        return 0.0
    try:
        value, used = evaluate(plain_expression(answer))
    except ValueError:
        return 0.0
    return float(sorted(used) == sorted(nums) and abs(value - target) < TOLERANCE)


# Problems


class Try(NamedTuple):
    """One way to combine numbers one after another.

    Attributes:
        steps: the operations with their results, as on the tape of a calculator: ``3+5=8 *6=48``.
        value: the result.
        expression: the same as one expression: ``(3+5)*6``.
    """

    steps: str
    value: int
    expression: str


@cache
def tries(nums: tuple[int, ...]) -> list[Try]:
    """All distinct ways to combine two numbers, the result with a third, and so on, with all results within 1 to 50.

    Other ways, such as subtracting a result from a number, are left out.
    """
    found = []
    for (first, *others), operators in product(
        sorted(set(permutations(nums))), product(OPERATORS, repeat=len(nums) - 1)
    ):
        steps, value, expression = [], first, str(first)
        for operator, number in zip(operators, others, strict=True):
            left = f"({expression})" if steps else expression
            shown = "" if steps else first
            value = _apply(value, operator, number)
            steps.append(f"{shown}{operator}{number}={value}")
            expression = f"{left}{operator}{number}"
            if value not in RESULTS:
                break
        else:
            found.append(Try(" ".join(steps), value, expression))
    return found


def _apply(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


@cache
def problems(max_numbers: int = 3) -> tuple[list[dict], list[dict]]:
    """All generated problems, as rows for training and rows that are held out; the same on every call and machine.

    Numbers from 1 to 9 and a target from 10 to 50 that `tries` reaches. Three numbers make 1020 problems, 256 of them
    held out; four make 10122, of which 256 are held out too.

    Args:
        max_numbers: 3, or 4 for problems with three or four numbers; held-out ones then alternate in size.
    """
    splits = []
    for size in range(3, max_numbers + 1):
        rows = []
        for nums in combinations_with_replacement(NUMBERS, size):
            reachable = sorted({attempt.value for attempt in tries(nums) if attempt.value in TARGETS})
            rows += [{"nums": list(nums), "target": target} for target in reachable]
        splits.append(split_held_out(rows, NUM_HELD_OUT, key=lambda row: problem_key(**row)))
    train, held_out = zip(*splits, strict=True)
    return list(chain(*train)), list(chain(*zip(*held_out, strict=True)))


def problem_key(nums: list[int], target: int) -> tuple[tuple[int, ...], int]:
    """The key that equal problems share: the numbers in any order, and the target."""
    return tuple(sorted(nums)), target


def read_problems(source: str, split: str) -> list[dict]:
    """Read `nums` and `target` of every row of a local file or of a hub data set.

    Raises:
        ValueError: the source cannot be read or lacks a column (see `read_rows`), a value has another type, or no
            expression can be right in half of the rows or more. Fewer such rows are left out and counted in a warning.
    """
    rows = read_rows(source, split, ["nums", "target"])
    out_of_reach = []
    for number, row in enumerate(rows, start=1):
        nums, target = row["nums"], row["target"]
        integers = isinstance(nums, list) and nums and all(type(value) is int for value in [target, *nums])
        if not (integers and len(nums) <= MAX_NUMBERS and all(0 <= value < 10**MAX_DIGITS for value in nums)):
            raise ValueError(
                f"dataset={source}: row {number} has nums={nums!r:.80} and target={target!r:.80}; Countdown needs a "
                f"list of up to {MAX_NUMBERS} integers from 0 on with at most {MAX_DIGITS} digits, and an integer, or "
                "no expression can be right. Correct or remove the row."
            )
        if not may_be_reached(nums, target):
            out_of_reach.append(number)
    if out_of_reach:
        first = rows[out_of_reach[0] - 1]
        found = (
            f"dataset={source}: in {len(out_of_reach)} of {len(rows)} rows no expression of up to {MAX_CHARACTERS} "
            f"characters that uses each number once reaches the target, such as row {out_of_reach[0]} with nums="
            f"{first['nums']!r:.80} and target={first['target']!r:.80}"
        )
        if 2 * len(out_of_reach) >= len(rows):
            raise ValueError(f"{found}. Correct or remove these rows.")
        logger.warning("%s; they are left out", found)
        skipped = set(out_of_reach)
        rows = [row for number, row in enumerate(rows, start=1) if number not in skipped]
    return rows


def may_be_reached(nums: list[int], target: int) -> bool:
    """Whether an expression may be right: exact up to three numbers, a bound on size and length above that.

    The bound: every value is p/q with |p| + |q| at most the product of all (number + 1). It holds for one number, and
    each operator keeps it, since (|p| + |q|) (|r| + |s|) is at least the new numerator plus the new denominator.

    Args:
        nums: at least one integer from 0 on.
        target: any integer.
    """
    if sum(len(str(number)) for number in nums) + len(nums) - 1 > MAX_CHARACTERS:
        return False
    if len(nums) > MAX_EXACT:
        return abs(target) < prod(number + 1 for number in nums)
    return _is_reached([(number, 1) for number in nums], abs(target))


def _is_reached(values: list[tuple[int, int]], target: int) -> bool:
    """Whether fractions (top, bottom) reach a target or its negative; signs are free, so all are sizes from 0 on."""
    if len(values) == 1:
        ((top, bottom),) = values
        return abs(top - target * bottom) < TOLERANCE * bottom
    for first, (a, b) in enumerate(values):
        for second, (c, d) in enumerate(values[:first]):
            rest = values[:second] + values[second + 1 : first] + values[first + 1 :]
            ad, cb, bd = a * d, c * b, b * d
            for top, bottom in ((ad + cb, bd), (abs(ad - cb), bd), (a * c, bd), (ad, cb), (cb, ad)):
                if bottom and _is_reached([*rest, (top, bottom)], target):
                    return True
    return False
