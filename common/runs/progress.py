"""How far a run is, and how far a part of it is that may take long: on a terminal and in a file."""

import math
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """One line with step, score, last evaluation and time left; in a file or pipe, a few plain lines instead.

    Args:
        num_steps: steps of the whole run.
        start: steps finished before this process began.
        enabled: False shows nothing, as on all processes but the main one.
        file: the output; None is standard error.
    """

    MAX_PLAIN_LINES = 40

    def __init__(self, num_steps: int, *, start: int = 0, enabled: bool = True, file: TextIO | None = None) -> None:
        self._num_steps, self._start = num_steps, start
        self._file = file or sys.stderr
        self._plain = enabled and not self._file.isatty()
        self._every = math.ceil(num_steps / self.MAX_PLAIN_LINES)
        self._began = time.monotonic()
        self._evaluation: list[str] = []
        self._bar = tqdm(
            total=num_steps,
            initial=start,
            file=self._file,
            disable=not enabled or self._plain,
            dynamic_ncols=True,
            bar_format="{n_fmt}/{total_fmt} |{bar:12}| {remaining} left, {desc}",
        )

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a finished step; step 0 is an evaluation before training."""
        evaluations = [f"{name} {metrics[name]:.3f}" for name in ("eval/accuracy", "eval/score") if name in metrics]
        self._evaluation = evaluations[:1] or self._evaluation
        score = [f"score {metrics['score']:.3f}"] if "score" in metrics else []
        text = ", ".join(score + self._evaluation)
        if self._plain and (step % self._every == 0 or step == self._num_steps):
            left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._num_steps - step)
            remaining = f", {tqdm.format_interval(left)} left" if step > self._start else ""
            self._file.write(f"step {step}/{self._num_steps}: {text}{remaining}\n")
            self._file.flush()
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def close(self) -> None:
        """Ends the line."""
        self._bar.close()


class LongWork:
    """A part of a run that may take minutes: a bar on a terminal; in a file or pipe, a line a minute.

    Use it as a context. Work that is over within a minute leaves nothing in a file, and a bar goes when it is full.

    Args:
        name: what is done, such as "evaluation".
        total: how many units the whole work has.
        unit: their name in the plural, such as "completions".
        done: units that were done before.
        enabled: False shows nothing, as on all processes but the main one.
        file: the output; None is standard error.
    """

    SECONDS_BETWEEN_LINES = 60.0

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        *,
        done: int = 0,
        enabled: bool = True,
        file: TextIO | None = None,
    ) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._start = self._done = done
        self._file = file or sys.stderr
        self._plain = enabled and not self._file.isatty()
        self._over = threading.Event()
        self._options = {"desc": name, "unit": f" {unit}", "disable": not enabled or self._plain, "leave": False}

    def __enter__(self) -> "LongWork":
        """Start the clock."""
        self._began = time.monotonic()
        self._bar = tqdm(total=self._total, initial=self._start, file=self._file, dynamic_ncols=True, **self._options)
        if self._plain:
            # A clock of its own: one sampling step of a large model on a CPU takes longer than a minute.
            threading.Thread(target=self._write_lines, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        """End the bar, or the lines."""
        self._over.set()
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """More units are done."""
        self._done += count
        self._bar.update(count)
        if self._done == self._total:
            self._bar.refresh()

    def _write_lines(self) -> None:
        while not self._over.wait(self.SECONDS_BETWEEN_LINES):
            self._file.write(f"{self.line(time.monotonic() - self._began)}\n")
            self._file.flush()

    def line(self, seconds: float) -> str:
        """What a file gets after so many seconds."""
        new = self._done - self._start
        left = f", {tqdm.format_interval(seconds / new * (self._total - self._done))} left" if new else ""
        passed = tqdm.format_interval(seconds)
        return f"{self._name}: {self._done} of {self._total} {self._unit} after {passed}{left}"
