"""Work beside the thread that trains: completions of the next step, and calls of a server during a push."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

Result = TypeVar("Result")


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Begin work in a thread of its own; Python does not wait for it when it ends.

    Args:
        work: takes nothing.

    Returns:
        What it gives, or raises, once it is done.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
