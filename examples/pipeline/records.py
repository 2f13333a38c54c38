"""Made-up problems in the form of GSM8K, easy enough for a tiny model: `python records.py --output_dir records`.

Each is a story of one or two additions or subtractions; `answer` is the calculation and ends in "#### 42". The files
train.jsonl and test.jsonl share no question. Everything is a function of the seed.
"""

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import parse_settings, run_script
from common.runs.writable import check_folder

TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"

NAMES = ("Tom", "Ann", "Max", "Eva", "Leo", "Mia", "Sam", "Zoe")
THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "nuts", "toys")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("loses", "sells", "drops", "spends")


@dataclass(kw_only=True)
class RecordSettings:
    """How many problems, and how hard."""

    num_train: int = 4000
    """Problems in train.jsonl."""
    num_test: int = 400
    """Problems in test.jsonl."""
    largest: int = 9
    """Largest number that a problem names."""
    share_two_steps: float = 0.5
    """Share of problems with two steps."""
    output_dir: str = "records"
    """A new folder."""
    seed: int = 0


def write_record(rng: random.Random, settings: RecordSettings) -> dict[str, str]:
    """One problem: its numbers and results are at least 1."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    amount = rng.randint(2, settings.largest)
    story, lines = [f"{name} has {amount} {things}."], []
    for _ in range(1 + (rng.random() < settings.share_two_steps)):
        gains = amount < 3 or rng.random() < 0.5
        change = rng.randint(2, settings.largest if gains else min(settings.largest, amount - 1))
        story.append(f"{name} {rng.choice(GAINS if gains else LOSSES)} {change}.")
        result = amount + change if gains else amount - change
        lines.append(f"{amount} {'+' if gains else '-'} {change} = {result}")
        amount = result
    question = " ".join([*story, f"How many {things} does {name} have now?"])
    return {"question": question, "answer": "\n".join([*lines, f"#### {amount}"])}


def write_records(settings: RecordSettings) -> None:
    """Write both files or none.

    Raises:
        ValueError: there are not enough different problems, or the folder is not empty.
    """
    folder = Path(settings.output_dir)
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir={folder}: it is not empty, and nothing is overwritten. Pass another --output_dir."
        )
    if min(settings.num_train, settings.num_test) < 1 or settings.largest < 2:
        raise ValueError(
            f"num_train={settings.num_train}, num_test={settings.num_test}, largest={settings.largest}: at least 1, 1 "
            "and 2 are needed to write a problem. Pass larger ones."
        )
    rng = random.Random(settings.seed)
    records: dict[str, dict[str, str]] = {}
    wanted = settings.num_train + settings.num_test
    for _ in range(100 * wanted):
        record = write_record(rng, settings)
        records[record["question"]] = record
        if len(records) == wanted:
            break
    else:
        raise ValueError(
            f"num_train={settings.num_train}, num_test={settings.num_test}: after {100 * wanted} draws there are "
            f"{len(records)} different problems. Pass smaller numbers or a larger --largest."
        )
    rows = [json.dumps(record) + "\n" for record in records.values()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        complete = Path(temporary) / "records"
        complete.mkdir()
        (complete / TRAIN_FILE).write_text("".join(rows[: settings.num_train]), encoding="utf-8")
        (complete / TEST_FILE).write_text("".join(rows[settings.num_train :]), encoding="utf-8")
        complete.replace(folder)


def main() -> None:
    """Write the records with the settings of the command line."""
    write_records(parse_settings(RecordSettings))


if __name__ == "__main__":
    run_script(main)
