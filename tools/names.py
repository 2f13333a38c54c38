"""Writes the tables of docs/from-trl.md from common/foreign_names.yaml.

python tools/names.py                  # prints them
python tools/names.py --write          # writes them into the page, below its line of dashes
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.foreign_names import ForeignName, foreign_names
from common.mistakes import ROOT

PAGE = ROOT / "docs" / "from-trl.md"
# What stands above it in the page is written by hand.
RULE = "\n---\n"


def tables() -> str:
    """A heading for each library, and a table for each of its groups."""
    text = ""
    for library, rows in groupby(foreign_names(), key=lambda row: row.library):
        text += f"\n## {library}\n"
        for group, members in groupby(rows, key=lambda row: row.group):
            text += f"\n### {group}\n\n| there | here | |\n|---|---|---|\n"
            text += "".join(f"| {_names(row)} | {_here(row)} | {_remark(row)} |\n" for row in members)
    return text


def _names(row: ForeignName) -> str:
    return ", ".join(f"`{name}`" for name in row.names)


def _here(row: ForeignName) -> str:
    return "the same" if row.is_same else f"`{row.ours}`" if row.ours else "none"


def _remark(row: ForeignName) -> str:
    absent = f"where it does not exist: {row.none}" if row.ours and row.none else row.none
    return ". ".join(part for part in (row.how, row.note, absent) if part)


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(tables())
        return
    by_hand = PAGE.read_text(encoding="utf-8").partition(RULE)[0]
    PAGE.write_text(by_hand + RULE + tables(), encoding="utf-8")


if __name__ == "__main__":
    main()
