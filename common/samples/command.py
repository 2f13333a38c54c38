"""``python -m common.samples RUN [RUN ...]``: the page of completed steps, or one that follows the run."""

import argparse
from pathlib import Path

from common.samples.page import PAGE_FILE, write_page
from common.samples.watch import watch


def main(args: list[str] | None = None) -> None:
    """Write the page of the runs on the command line and print its path."""
    description = "Write an HTML page of a run's curves and completions."
    parser = argparse.ArgumentParser(prog="python -m common.samples", description=description)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the page; default for one run: RUN/{PAGE_FILE}")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="write the page again whenever completions were added, until the run has finished; an open page reloads "
        "itself. Ctrl-C ends it",
    )
    given = parser.parse_args(args)
    if given.watch:
        watch(given.runs, given.output)
    else:
        print(write_page(given.runs, given.output).resolve())
