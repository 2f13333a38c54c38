"""Work that a step does once although its passes may begin anew after out of memory: sampling, scoring, samples.

Sampling takes long and rewards need not be functions of what they see, so a step that begins anew gets their results
from before. Everything else of a step is a function of them and is computed again.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")


class Replay:
    """Results of a step's work, in the order in which it is done."""

    def __init__(self) -> None:
        self._results: list[object] | None = None  # outside of a step nothing is kept
        self._next = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep results inside."""
        self._results, self._next = [], 0
        try:
            yield
        finally:
            self._results = None

    def begin_anew(self) -> None:
        """The step is done from its beginning, with the results that there are."""
        self._next = 0

    def __call__(self, work: Callable[[], Result]) -> Result:
        """The result of the work; if the step has done it before, the one from then.

        Args:
            work: does something that must happen once. Its result may get other attributes later, but what they hold
                now must not change.
        """
        if self._results is None:
            return work()
        if self._next == len(self._results):
            self._results.append(work())
        self._next += 1
        return copy.copy(self._results[self._next - 1])
