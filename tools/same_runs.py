"""Checks that runs wrote the same: `python tools/same_runs.py RUNS_BEFORE RUNS_AFTER`, two folders of runs.

Compares samples.jsonl byte for byte, and metrics.jsonl except for time/* and memory/*, which depend on the machine. To
check that a change leaves the results as they are, train each algorithm before and after it:

    for name in GRPO PPO RLOO ReMax RAFT Reinforce VinePPO; do
        (cd $name && python ${name,,}.py --preset cpu --num_steps 3 --output_dir ~/before/$name)
    done
"""

import json
import sys
from pathlib import Path


def content(run: Path) -> tuple[list[str], bytes]:
    """Lines of metrics.jsonl without clock and memory, and the bytes of samples.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [
        {name: value for name, value in json.loads(line).items() if not name.startswith(("time/", "memory/"))}
        for line in lines
    ]
    return [json.dumps(row) for row in measured], (run / "samples.jsonl").read_bytes()


def main() -> None:
    """Compare the runs of both folders by name; a run that only one of them has is different."""
    before, after = map(Path, sys.argv[1:3])
    runs = [{path.parent.name for path in folder.glob("*/metrics.jsonl")} for folder in (before, after)]
    names, in_both = sorted(runs[0] | runs[1]), runs[0] & runs[1]
    different = [name for name in names if name not in in_both or content(before / name) != content(after / name)]
    print(f"{len(names)} runs: {', '.join(names)}; different: {', '.join(different) or 'none'}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
