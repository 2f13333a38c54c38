"""Large sets row by row into Arrow files, through `datasets.map`, on several processes, with a bar.

The processes end with the one that started them, however it ends, and leave Ctrl-C to it.
"""

from __future__ import annotations  # for type hints whose import would take seconds

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.host import num_cpus
from common.mistakes import is_ours
from common.signals import Stopped

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("nanorlhf")

ROWS_PER_PROCESS = 20_000  # what one process encodes in a second or two, several times its start
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends

Encode = Callable[[Sequence[int]], "pa.RecordBatch"]


class _Mistake(ValueError):
    """One of our messages, on its way from another process."""


def map_rows(
    encode: Encode,
    count: int,
    folder: Path,
    *,
    schema: pa.Schema,
    batch_size: int,
    can_share: bool,
    progress: bool,
) -> None:
    """Encode rows into Arrow files in a folder.

    Args:
        encode: gives the encoded rows of some numbers; picklable.
        count: number of rows.
        folder: an empty one.
        schema: of what `encode` gives.
        batch_size: how many rows it gets at once.
        can_share: use several processes, if there are enough rows.
        progress: show a bar, or a line in a file.

    Raises:
        ValueError: what `encode` raises.
        KeyboardInterrupt: after Ctrl-C.
        Stopped: after another signal that asks a script to end.
    """
    import datasets

    shows_bar = progress and sys.stderr.isatty()
    if progress and not shows_bar:
        logger.info("encoding %d prompts, which later starts with the same data find in %s ...", count, folder.parent)
    numbers = datasets.Dataset.from_dict({"number": range(count)}).with_format("arrow")
    num_processes = _num_processes(count) if can_share else 1
    try:
        with _bars(shows_bar), _own_processes(num_processes > 1):
            numbers.map(
                partial(_mapped_batch, encode),
                batched=True,
                batch_size=batch_size,
                remove_columns=["number"],
                features=datasets.Features.from_arrow_schema(schema),
                num_proc=num_processes if num_processes > 1 else None,
                cache_file_name=str(folder / "prompts.arrow"),
                load_from_cache_file=False,
                new_fingerprint="prompts",  # the folder's name says what they are
                desc="Encoding prompts",
            )
    except _Mistake as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        if signalled := _signal_behind(error):  # `datasets` waits for its processes, and complains that they take long
            raise signalled from None
        raise


def _mapped_batch(encode: Encode, numbers: pa.Table) -> pa.Table:
    import pyarrow as pa

    try:
        return pa.Table.from_batches([encode(numbers["number"].to_pylist())])
    except ValueError as error:
        if is_ours(error.__traceback__):
            raise _Mistake(str(error)) from None
        raise


def _signal_behind(error: BaseException | None) -> BaseException | None:
    """What a signal raised, in whose handling a library raised the error; None if there was none."""
    while error is not None and not isinstance(error, KeyboardInterrupt | Stopped):
        error = error.__context__
    return error


def _num_processes(count: int) -> int:
    # The machine's other processes of the run wait meanwhile, for the cache.
    return max(1, min(num_cpus(), count // ROWS_PER_PROCESS))


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Bars of `datasets`, or none."""
    import datasets

    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


@contextmanager
def _own_processes(enabled: bool) -> Iterator[None]:
    """Processes that are forked meanwhile end with this one, and their tokenizers start no threads."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    if enabled:
        os.environ[name] = "false"
        _forking.append(os.getpid())
    try:
        yield
    finally:
        if enabled:
            _forking.remove(os.getpid())
        if enabled and before is None:
            del os.environ[name]
        elif enabled:
            os.environ[name] = before


_forking: list[int] = []  # this process, while it forks those that encode


def _depend_on_parent() -> None:
    """In a new process: leave Ctrl-C to the parent, and end when it does."""
    if not _forking:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _forking[-1]:  # it has ended already
            os._exit(1)
    _forking.clear()


os.register_at_fork(after_in_child=_depend_on_parent)
