"""Breaks the code in one line at a time, and reports which test sees it.

    python tools/breakages.py                  # all of tests/breakages.yaml: about half an hour on two cores
    python tools/breakages.py whiten clip      # those whose text or file contains one of these words
    python tools/breakages.py --own            # only the test that each names, never the whole suite
    python tools/breakages.py --write          # break nothing, and write the table of tests/README.md

Each entry of tests/breakages.yaml says what is broken, in which file, the line (a part of it that occurs once) and
what it becomes, and the test that should see it. A breakage that this test does not see is given to the whole suite.
An entry with `equivalent` changes nothing that could be seen, and says why; it counts in neither number.
Everything happens in copies of the working tree, with a cache folder of their own; the suite itself must pass.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import yaml

ROOT = Path(__file__).parent.parent
LIST, README = ROOT / "tests" / "breakages.yaml", ROOT / "tests" / "README.md"
# A test that a breakage keeps from ending has seen it. The whole suite takes about seven minutes.
SECONDS_OF_ONE, SECONDS_OF_ALL = 600, 3600
# It reads the list itself, whose lines a broken copy lacks.
CHECK_OF_THE_LIST = "tests/test_readme.py::test_the_table_of_breakages_is_that_of_the_list_and_the_list_is_true"
HEAD = "| breakage | in | test that fails |\n|---|---|---|\n"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Breakage:
    """One line that is made wrong.

    Attributes:
        what: in words.
        file: from the repository's root.
        line: a part of it that occurs once in the file.
        becomes: what replaces that part.
        test: pytest's id of the test that sees it, from the root; parameters left out.
        equivalent: why nothing can see it; None for a real breakage.
    """

    what: str
    file: str
    line: str
    becomes: str
    test: str = ""
    equivalent: str | None = None

    def broken(self, text: str) -> str:
        """The text of the file with the breakage.

        Raises:
            ValueError: if the line does not occur exactly once.
        """
        if (count := text.count(self.line)) != 1:
            raise ValueError(f"{self.what}: {self.line!r} occurs {count} times in {self.file}, not once.")
        return text.replace(self.line, self.becomes)


def read_breakages() -> list[Breakage]:
    """The entries of tests/breakages.yaml."""
    return [Breakage(**entry) for entry in yaml.safe_load(LIST.read_text(encoding="utf-8"))]


def copied(folder: Path) -> Path:
    """Copy the files of the working tree that git does not ignore, link the environment, and copy the cache.

    Broken code must not write into the user's cache: what it makes there would be used by sound code later.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    (folder / ".cache").mkdir()
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.name == "nanorlhf":
            shutil.copytree(path, folder / ".cache" / path.name)
        else:
            (folder / ".cache" / path.name).symlink_to(path)
    return folder


def failing(copy: Path, *arguments: str, seconds: int) -> str:
    """The first test that fails in a copy; empty if none does.

    Raises:
        RuntimeError: if pytest could not run.
    """
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["XDG_CACHE_HOME"] = str(copy / ".cache")
    command = [".venv/bin/python", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = subprocess.Popen(command, cwd=copy, env=environment, start_new_session=True, **pipe)
    try:
        output, _ = started.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    finally:
        with suppress(ProcessLookupError):  # its own processes too
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    if found := FAILED.findall(output):
        return found[0]
    if started.returncode == 1 or started.returncode < 0:  # a crash of the whole process
        return "a test that ends pytest itself"
    if started.returncode:
        raise RuntimeError(f"pytest {' '.join(arguments)} ended with {started.returncode}: {output[-1000:]}")
    return ""


def seen_by(breakage: Breakage, copy: Path, *, own: bool) -> str:
    """The test that fails: its own, else (without `own`) the first of the whole suite; empty if none does."""
    path = copy / breakage.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(breakage.broken(whole), encoding="utf-8")
    try:
        found = failing(copy, breakage.test, seconds=SECONDS_OF_ONE)
        return found if found or own else failing(copy, "--deselect", CHECK_OF_THE_LIST, seconds=SECONDS_OF_ALL)
    finally:
        path.write_text(whole, encoding="utf-8")


def table(breakages: list[Breakage]) -> str:
    """The table of tests/README.md."""
    rows = [
        f"| {b.what} | {b.file} | {b.test.replace('::', ': ') if b.equivalent is None else 'none: ' + b.equivalent} |"
        for b in breakages
    ]
    return HEAD + "\n".join(rows) + "\n"


def write_table(breakages: list[Breakage]) -> None:
    """Replace the table in tests/README.md."""
    before, _, rest = README.read_text(encoding="utf-8").partition(HEAD)
    rows = rest.splitlines(keepends=True)
    after = next((number for number, row in enumerate(rows) if not row.startswith("|")), len(rows))
    README.write_text(before + table(breakages) + "".join(rows[after:]), encoding="utf-8")


def main() -> None:
    """Try the breakages, and exit with 1 if one was seen by no test or another test than its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only breakages whose text or file contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="copies at the same time")
    parser.add_argument("--own", action="store_true", help="run only the test that a breakage names")
    parser.add_argument("--write", action="store_true", help="only write the table of tests/README.md")
    arguments = parser.parse_args()
    every = read_breakages()
    for breakage in every:
        breakage.broken((ROOT / breakage.file).read_text(encoding="utf-8"))
    if arguments.write:
        write_table(every)
        return
    chosen = [b for b in every if not arguments.words or any(word in f"{b.what} {b.file}" for word in arguments.words)]
    real = [b for b in chosen if b.equivalent is None]
    with tempfile.TemporaryDirectory() as root:
        copies: Queue[Path] = Queue()
        for number in range(arguments.jobs):
            copies.put(copied(Path(root) / str(number)))

        def tried(breakage: Breakage) -> str:
            copy = copies.get()
            try:
                test = seen_by(breakage, copy, own=arguments.own)
            except RuntimeError as error:
                mark = f"not tried: {error}"
            else:
                other = f"seen by {test}, not its own test"
                mark = "survived" if not test else "seen" if test == breakage.test else other
            copies.put(copy)
            print(f"{mark:8}  {breakage.what} ({breakage.file})", flush=True)
            return mark

        with ThreadPoolExecutor(arguments.jobs) as pool:
            marks = list(pool.map(tried, real))
    seen = sum(mark.startswith("seen") for mark in marks)
    print(f"{seen} of {len(real)} seen, {len(chosen) - len(real)} equivalent")
    sys.exit(marks != ["seen"] * len(real))


if __name__ == "__main__":
    main()
