"""CPU seconds until a command answers, in this checkout and in another: `python -m benchmarks.starting OTHER`.

Both take turns, in a process of their own each time; user and system time of the process and its children count.
"""

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "a mistyped setting": ("GRPO/grpo.py", "--num_step", "3"),
    "--help of a script": ("GRPO/grpo.py", "--help"),
    "common.samples --help": ("-m", "common.samples", "--help"),
    "common.merge --help": ("-m", "common.merge", "--help"),
    "common.evaluation --help": ("-m", "common.evaluation", "--help"),
}
ROUNDS = 5


def cpu_seconds(root: Path, command: tuple[str, ...]) -> float:
    """CPU seconds of one run of a command in a checkout."""
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the medians and the median of the ratios."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.starting OTHER_CHECKOUT")
    other = Path(sys.argv[1]).resolve()
    print("| until it answers | here, CPU s | there, CPU s | ratio |\n|---|---|---|---|")
    for name, command in COMMANDS.items():
        pairs = [(cpu_seconds(ROOT, command), cpu_seconds(other, command)) for _ in range(ROUNDS + 1)][1:]
        here, there = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {name} | {here:.2f} | {there:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
