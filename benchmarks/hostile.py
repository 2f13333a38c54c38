"""Completions that try to fool, hang or crash a rule: python -m benchmarks.hostile [--num_completions 10000].

Every rule of every task scores all of them in its worker. Printed and saved, per rule: milliseconds per completion,
mean and of the slowest batch, rows over a limit, and rows with a full score.
"""

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path

from common.embedded.policy import build_tokenizer
from common.rewards.scorer import Scorer
from common.tasks import countdown, gsm8k, math

RESULTS = Path(__file__).parent / "results" / "hostile-rewards.json"
LONG = 100_000  # characters

_INSIDE = [
    "(" * 5000 + "1" + ")" * 5000,
    "[{(" * 2000,
    "9**9**9",
    "9^{9^{9^{9}}}",
    "9**9**9**9**9",
    "2^{99999999}",
    "1" * 5000,
    "1" + "0" * 4000 + "/3",
    "1/0",
    "1/(3-3)",
    "0/0",
    "\u0663+\u0664*\uff15",
    "\uff11\uff12 + \uff13",
    "\u00b2\u00b3\u00b9",
    "1e999999",
    "-" * 3000 + "1",
    "1.2.3.4",
    "__import__('os').system('echo hacked')",
    "exec('while True: pass')",
    "().__class__.__bases__[0].__subclasses__()",
    "(lambda f: f(f))(lambda f: f(f))",
    "\\frac{" * 300 + "1" + "}{2}" * 300,
    "\\sqrt{" * 400 + "2" + "}" * 400,
    "\\sum_{k=1}^{10^{9}} \\frac{1}{k}",
    "\\prod_{n=1}^{1000000} n",
    "100000!",
    "(((10!)!)!)!",
    "\\binom{1000000}{500000}",
    "\\int_0^1 x^{x^{x^{x}}} dx",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}^{99999}",
    "(x+y+z)^{200}",
    "\\left(" * 500,
    "x" * 500,
    "+".join(f"x_{{{i}}}" for i in range(200)),
    "|" * 400,
    "\\def\\a{\\a\\a}\\a",
    "\\newcommand{\\x}{\\x\\x}\\x",
    "\x00\x01\x02\ud7ff\ufffe",
    "\u202e\u200b\u0301" * 300,
    "NaN",
    "Infinity",
    "1_000_000",
    "0x10",
    "`rm -rf /`",
    "{}".join("<answer>" for _ in range(500)),
]
_FRAMES = [
    "{}",
    "<think>{}</think>\n<answer>{}</answer>",
    "<answer>{}",
    "<think><think>{}</answer></answer>",
    "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n",
    "<reasoning>{}</reasoning><answer>{}</answer>",
    "\\boxed{{{}}}",
    "\\boxed{{\\boxed{{{}}}",
    "$$\\boxed{{{}}}$$ so the answer is \\boxed{{{}}}",
    "</answer>" * 200 + "{}" + "<answer>" * 200,
]


def hostile_completions(num_completions: int, seed: int = 0) -> list[str]:
    """Write hostile completions: known attacks in every frame, long texts, and pieces of attacks joined.

    Args:
        num_completions: how many.
        seed: of the choices.
    """
    rng = random.Random(seed)
    completions = [frame.format(text, text) for text in _INSIDE for frame in _FRAMES]
    completions += [character * LONG for character in "(<1-\\{ \n_$|9é"]
    while len(completions) < num_completions:
        pieces = [rng.choice(_INSIDE) for _ in range(rng.randint(1, 3))]
        cuts = [text[: rng.randint(1, len(text))] for text in pieces]
        text = rng.choice(["", " ", "+", "*", "^", "\n", "=", ","]).join(cuts)
        completions.append(rng.choice(_FRAMES).format(text, text))
    return completions[:num_completions]


def task_rules() -> dict[str, tuple]:
    """Every rule of every task, with columns for one row."""
    tokenizer = build_tokenizer()
    length = partial(gsm8k.length_reward, tokenizer=tokenizer, full_length=1024)
    return {
        "countdown/format": (countdown.format_reward, {}),
        "countdown/equation": (countdown.equation_reward, {"nums": [3, 5, 6], "target": 48}),
        "gsm8k/correct": (gsm8k.correct_reward, {"answer": "72"}),
        "gsm8k/strict_format": (gsm8k.strict_format_reward, {}),
        "gsm8k/soft_format": (gsm8k.soft_format_reward, {}),
        "gsm8k/tags": (gsm8k.tags_reward, {}),
        "gsm8k/length": (length, {}),
        "math/correct": (math.correct_reward, {"answer": "\\frac{3}{4}"}),
        "math/boxed": (math.boxed_reward, {}),
    }


def measure(completions: list[str], batch: int = 500) -> dict[str, dict[str, float]]:
    """Score completions by every rule, as a run does.

    Args:
        completions: what to score.
        batch: rows at a time.

    Returns:
        For each rule the milliseconds per completion, mean and of the slowest batch, rows over a limit, and rows with
        a score of 1.
    """
    table = {}
    for name, (function, row) in task_rules().items():
        scorer = Scorer({name: function}, {name: 1.0})
        columns = {key: [value] * batch for key, value in row.items()}
        seconds, over, full = [], 0, 0
        for start in range(0, len(completions), batch):
            texts = completions[start : start + batch]
            begun = time.perf_counter()
            _, parts = scorer(
                ["p"] * len(texts), texts, {key: values[: len(texts)] for key, values in columns.items()}
            )
            seconds.append((time.perf_counter() - begun) / len(texts))
            over += int(scorer.over_limit[name].sum())
            full += int((parts[name] == 1).sum())
        mean = sum(seconds) / len(seconds)
        table[name] = {
            "milliseconds": round(1e3 * mean, 3),
            "slowest_batch": round(1e3 * max(seconds), 3),
            "over_limit": over,
            "full_score": full,
        }
    return table


def main() -> None:
    """Measure, print a table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_completions", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = measure(hostile_completions(arguments.num_completions, arguments.seed))
    for name, row in table.items():
        print(f"{name:20}", ", ".join(f"{key} {value}" for key, value in row.items()))
    RESULTS.write_text(json.dumps(vars(arguments) | {"rules": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
