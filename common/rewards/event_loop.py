"""An event loop for asynchronous rewards, in a thread of its own.

Where a loop already runs, as in every cell of a notebook, no second one can run in the same thread. One loop serves
the whole run: a client that a function keeps open belongs to the loop that opened it.
"""

import asyncio
import threading
import weakref
from collections.abc import Awaitable


class EventLoop:
    """Waits for awaitables; its thread starts when it is first used and ends with the object."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def outcomes(self, awaitables: list[Awaitable]) -> list[object]:
        """What each gives, or the exception that it raises; they wait together.

        Raises:
            BaseException: one that ends the program, such as KeyboardInterrupt.
        """
        if self._loop is None:
            self._start()
        waiting = asyncio.run_coroutine_threadsafe(_together(awaitables), self._loop)
        try:
            outcomes = waiting.result()
        except BaseException:  # Ctrl-C here
            waiting.cancel()
            raise
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=_serve, args=(self._loop,), name="rewards", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._loop, thread)


async def _together(awaitables: list[Awaitable]) -> list[object]:
    return await asyncio.gather(*map(_outcome, awaitables))


async def _outcome(awaitable: Awaitable) -> object:
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        if asyncio.current_task().cancelling():
            raise
        return RuntimeError(f"its task was cancelled {error}".rstrip())
    except (
        BaseException
    ) as error:  # raised in the loop, KeyboardInterrupt would end it, and nobody would get an answer
        return error


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:  # it cancels what is left and closes the loop
        runner.get_loop().run_forever()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():
        thread.join(timeout=5)
