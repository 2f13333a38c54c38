"""Completions of an evaluation that has not ended, in a file beside the folder of its result.

A line is appended for each problem as soon as its completions are there, so that an evaluation that is interrupted, in
whatever way, goes on from there. Scores are not kept: rewards see all completions together, interrupted or not. So
another evaluation, of the same completions by other rewards, can go on from there too.
"""

import contextlib
import fcntl
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from common.rollouts import Completion
from common.runs.disk import append_to, written
from common.runs.held import NO_LOCKS
from common.runs.log import json_line
from common.runs.own_files import open_own


class Unfinished:
    """The file of the completions of an evaluation.

    Args:
        path: of the file.
        identity: everything that the completions depend on, by name.

    Attributes:
        path: of the file.
        completions: what was sampled, by the number of the problem.
        texts: of these completions, as rewards see them.
        seconds: how long sampling them took.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.completions: dict[int, list[Completion]] = {}
        self.texts: dict[int, list[str]] = {}
        self.seconds = 0.0
        self._identity = json.loads(json_line(identity))  # as it comes back from a file
        self._file: BinaryIO | None = None
        self._last = 0.0

    def check(self) -> int:
        """Refuse to go on with other completions.

        Returns:
            How many problems have their completions.

        Raises:
            ValueError: those in the file were sampled with other settings.
        """
        lines = _lines(self.path.read_bytes())[0] if self.path.is_file() else []
        self._check(lines)
        return len(lines[1:])

    def _check(self, lines: list[dict[str, Any]]) -> None:
        stored = lines[0] if lines else self._identity
        names = self._identity.keys() | stored.keys()
        different = sorted(name for name in names if stored.get(name) != self._identity.get(name))
        if different:
            raise ValueError(
                f"{self.path}: an unfinished evaluation that differs from this one in {', '.join(different)}, and the "
                "completions of two are not mixed. Delete the file, or pass an --output_dir in another folder."
            )

    def __enter__(self) -> "Unfinished":
        """Read what there is, and lock the file against other processes.

        Raises:
            ValueError: another process is sampling the same completions.
        """
        self._file = written(self.path, self._open)
        try:
            # Not inherited by the processes of rules. It ends when any descriptor of the file is closed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                self._file.close()
                raise ValueError(
                    f"{self.path}: another process is sampling the same completions. Wait for it, or stop it and "
                    "repeat the command: what it has sampled is kept. To sample them twice at the same time, pass an "
                    "--output_dir in another folder."
                ) from None
        self._file.seek(0)
        lines, size = _lines(self._file.read())
        self._check(lines)
        written(self.path, lambda: self._file.truncate(size))
        for line in lines[1:]:
            self.completions[line["problem"]] = [_completion(each) for each in line["completions"]]
            self.texts[line["problem"]] = [each["text"] for each in line["completions"]]
            self.seconds += line["seconds"]
        if not lines:
            self._append(self._identity)
        return self

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open_own(self.path)

    def __exit__(self, *_: object) -> None:
        """Close the file; the completions in it stay."""
        self._file.close()
        if not self.completions:
            self.remove()

    def start_clock(self) -> None:
        """Sampling begins now."""
        self._last = time.perf_counter()

    def add(self, problem: int, completions: Sequence[Completion], texts: Sequence[str]) -> None:
        """Keep the completions of a problem.

        Args:
            problem: its number.
            completions: all of them.
            texts: of each, as rewards see it.
        """
        now = time.perf_counter()
        rows = [vars(each) | {"text": text} for each, text in zip(completions, texts, strict=True)]
        self._append({"problem": problem, "seconds": now - self._last, "completions": rows})
        self.completions[problem], self.texts[problem] = list(completions), list(texts)
        self._last = now

    def remove(self) -> None:
        """Delete the file: the result is written."""
        self.path.unlink(missing_ok=True)

    def _append(self, row: dict[str, Any]) -> None:
        written(self.path, lambda: append_to(self._file.fileno(), json_line(row)))


def _lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """What the lines hold, and their size, up to one that a kill cut off or a power cut spoiled."""
    rows, size = [], 0
    with contextlib.suppress(ValueError):
        for line in content.split(b"\n")[:-1]:
            if not isinstance(row := json.loads(line), dict):
                break
            rows.append(row)
            size += len(line) + 1
    return rows, size


def _completion(row: dict[str, Any]) -> Completion:
    logprobs = [math.nan if each is None else each for each in row["logprobs"]]
    return Completion(row["token_ids"], logprobs, row["truncated"])
