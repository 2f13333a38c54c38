r"""Mathematics: reason step by step and put the answer in ``\boxed{}``; any equivalent form is right.

Math-Verify parses and compares answers. Only its LaTeX parser is used, which passes only digits of numbers to sympy's
evaluator. Answers that could take forever to evaluate, such as 9^(9^9), are compared as text only. There is no time
limit here, so scores are the same on every machine, unless scoring exceeds the worker's limit.
"""

import logging
import math
import re
from functools import lru_cache
from pathlib import Path

import sympy
import transformers
from math_verify import LatexExtractionConfig, parse, verify
from sympy.functions.combinatorial.factorials import CombinatorialFunction

from common.config import RLConfig
from common.data.rows import read_rows, split_held_out, take_held_out
from common.rewards.rules import rule
from common.tasks import Task

# Math-Verify warns that its time limits are off. They use signals, which work only in the main thread.
logging.getLogger("math_verify").setLevel(logging.ERROR)

HUB_DATASET = "meta-math/MetaMathQA"
HUB_EVALUATION = "HuggingFaceH4/MATH-500"

QUESTION_COLUMNS = ("problem", "question", "query")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "response")
# Half of the guesses are right: such problems teach guessing.
GUESSABLE = frozenset({"yes", "no", "true", "false"})

INSTRUCTION = "Reason step by step. Put the final answer, and only that, in \\boxed{}."

MAX_TEXT_AFTER_BOX = 100  # characters: room to end the sentence, not to continue
MAX_ANSWER_LENGTH = 300  # characters; the longest answer of MATH-500 has 53
MAX_NESTING = 10  # levels of brackets; parsing takes seconds from 40 on
MAX_SIZE = 10_000  # limit of `_size`; comparisons below it take milliseconds, at worst seconds
SYMBOL_SIZE = 30  # a symbolic expression takes far longer to compare than a number with as many parts

# Commands allowed in a finished answer. Others, such as sums, integrals, binomials and the gamma function, leave
# something to compute, and Math-Verify would compute it, however long it takes.
_FINISHED = """
frac dfrac tfrac cfrac sqrt cdot times div pm mp left right text textbf mbox mathrm mathbf mathbb begin end circ
infty degree angle overline bar hat vec prime in notin cup cap setminus emptyset varnothing subset subseteq le
leq ge geq lt gt ne neq approx equiv mod pmod land lor ldots dots cdots quad qquad displaystyle big Big bigl
bigr lfloor rfloor lceil rceil lvert rvert vert mid langle rangle to sin cos tan sec csc cot arcsin arccos
arctan sinh cosh tanh log ln exp pi alpha beta delta epsilon varepsilon zeta eta theta kappa lambda mu nu
xi rho sigma tau phi varphi chi psi omega Delta Theta Lambda Sigma Phi Psi Omega
"""
_COMMANDS = frozenset(_FINISHED.split())
_COMMAND = re.compile(r"\\([A-Za-z]+)")
# What Math-Verify would evaluate while parsing, or parse in exponential time.
_UNFINISHED = re.compile(
    r"""
    \|\s*[_^]                              # a value put in
    | \{[vV]matrix                         # a determinant
    | \d\s*[eE]\s*[+-]?\s*\d{3}            # a number of that many digits
    | ^(?=.*\\begin).*(?:[eE]\W*\^|exp)    # the exponential of a matrix
    | (?:\^\s*(?:\\[A-Za-z]+|\w)\s*){4}   # powers of powers without braces
    | (?:(?:\||vert\b)(?:(?!\||vert\b).)*){9}   # many bars, each of which may open or close
    """,
    re.VERBOSE | re.DOTALL,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0)]


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
    )


def read_problems(source: str, split: str, *, is_chat: bool) -> list[dict]:
    """Read every row as `prompt` and `answer`; skip those whose answer is yes, no, true or false.

    Columns are those of MATH, MetaMathQA or DeepMath-103K. An answer inside a solution is its last box, or what
    follows "The answer is:".

    Raises:
        ValueError: the source cannot be read, or a row has no problem or no answer.
    """
    problems = []
    for number, row in enumerate(read_rows(source, split, None), start=1):
        question = next((row[name] for name in QUESTION_COLUMNS if row.get(name) is not None), None)
        answer = _gold_answer(row)
        if not question or not answer:
            raise ValueError(
                f"dataset={source}: row {number} has the columns {', '.join(row)}; needed are a problem "
                f"({', '.join(QUESTION_COLUMNS)}) and its answer ({', '.join(ANSWER_COLUMNS)}), in the last two with "
                f'\\boxed{{}} or "The answer is:". Rename the columns, or correct or remove the row.'
            )
        if re.sub(r"\\text|\W", "", answer).lower() in GUESSABLE:
            continue
        problems.append({"prompt": write_prompt(question, is_chat=is_chat), "answer": answer})
    return problems


def write_prompt(question: str, *, is_chat: bool) -> str | list[dict[str, str]]:
    """A user message, or the same as plain text for a policy without a chat template."""
    text = f"{question}\n\n{INSTRUCTION}"
    return [{"role": "user", "content": text}] if is_chat else f"{text}\n"


def _gold_answer(row: dict) -> str | None:
    name = next((name for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    text = str(row[name]) if name else ""
    _, marker, answer = text.rpartition("The answer is:")
    if marker:
        return answer.strip()
    box = _last_box(text)
    if box is not None:
        return box[0].strip()
    return text.strip() if name in ("answer", "final_answer") else None


# Rewards


@rule
def correct_reward(prompts: list[str], completions: list[str], *, answer: list[str], **columns: list) -> list[float]:
    """1.0 if the content of the last box means the same as the answer; else 0.

    Args:
        prompts: not used.
        completions: B completions.
        answer: B answers in LaTeX, without a box.
        columns: not used.

    Returns:
        B rewards.
    """
    boxes = map(_last_box, completions)
    return [float(box is not None and _is_same(gold, box[0])) for box, gold in zip(boxes, answer, strict=True)]


@rule
def boxed_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """1.0 if the last box is closed, not empty and followed by at most 100 characters; else 0."""
    boxes = map(_last_box, completions)
    return [float(box is not None and box[0].strip() != "" and len(box[1]) <= MAX_TEXT_AFTER_BOX) for box in boxes]


def _last_box(text: str) -> tuple[str, str] | None:
    """The content of the last box and the text after it; None if there is no box or the last one is not closed."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{"):
        return None
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start : brace.start()], text[brace.end() :]
    return None


def _is_same(gold: str, answer: str) -> bool:
    gold, answer = (text.strip().removesuffix(".") for text in (gold, answer))
    if gold == answer:
        return answer != ""
    return max(len(gold), len(answer)) <= MAX_ANSWER_LENGTH and _means_the_same(gold, answer)


# A step compares many completions with one answer, and many of them agree.
@lru_cache(maxsize=4096)
def _means_the_same(gold: str, answer: str) -> bool:
    return verify(_expressions(gold), _expressions(answer), timeout_seconds=None)


@lru_cache(maxsize=4096)
def _expressions(latex: str) -> list:
    """What Math-Verify parses from an answer; empty if it is not a finished answer of reasonable size."""
    latex = latex.replace("\\\\", "\\\\ ")  # else Math-Verify takes the line break before a letter for a command
    if _nesting(latex) > MAX_NESTING:
        return []
    if _UNFINISHED.search(latex) or not _COMMANDS.issuperset(_COMMAND.findall(latex)):
        return []
    found = parse(f"\\boxed{{{latex}}}", _EXTRACTION, extraction_mode="first_match", parsing_timeout=None)
    return found if all(isinstance(part, str) or _size(part) <= MAX_SIZE for part in found) else []


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _size(expression: sympy.Basic | sympy.MatrixBase) -> float:
    """Roughly the bits of an expression once it is evaluated; for 9^(9^9) more than fits in memory."""
    if isinstance(expression, sympy.MatrixBase):
        return sum(map(_size, expression))
    if isinstance(expression, sympy.Rational | sympy.Float):
        return 1 + abs(math.log2(abs(float(expression)) or 1))
    if not expression.args:
        return SYMBOL_SIZE
    if isinstance(expression, sympy.Pow) and not expression.exp.free_symbols:
        base, exponent = expression.args
        if not isinstance(exponent, sympy.Rational):
            return _size(base) * 2.0 ** min(_size(exponent), 100)
        num_terms = max(1, len(base.args))  # (x + y)^n expands to many more
        return _size(base) * max(1.0, abs(float(exponent)) * num_terms**2)
    total = sum(map(_size, expression.args))
    if isinstance(expression, sympy.exp | CombinatorialFunction) and not expression.free_symbols:
        return 2.0 ** min(total, 100)
    is_sum = isinstance(expression, sympy.Add | sympy.Mul | sympy.Set | sympy.Tuple | sympy.core.relational.Relational)
    return total if is_sum else 2 * total
