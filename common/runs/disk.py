"""What a run does where its disk does not take what it writes: say so in one message, and leave nothing half written.

Every error of the file system on the way to a file or folder becomes one `CannotWrite`, whatever library it comes
from. A disk that is away for a moment, as network disks are, is tried again for some seconds first.
"""

import errno
import logging
import math
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from common.mistakes import CannotWrite
from common.runs.manifest import MANIFEST_FILE, find_damage
from common.runs.own_files import open_own

logger = logging.getLogger("nanorlhf")

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

# Seconds before each further try, where a disk may come back.
PAUSES = (1.0, 3.0, 6.0)

# What the system says of a disk on the network that is away.
_AWAY = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
_AWAY |= {errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNRESET, errno.ECONNABORTED, errno.EREMOTEIO, errno.ESHUTDOWN}
_ROOM = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
# A checkpoint has about ten files.
_FEW_FILES = 100
# Libraries in Rust put the system's number into a text.
_NUMBER = re.compile(r"\(os error (\d+)\)")


def written(path: Path, write: Callable[[], Result], *, needed: int = 0, tries_again: bool = True) -> Result:
    """Call a function that writes; an error of the file system becomes one message.

    Args:
        path: of the file or folder that it writes.
        write: leaves nothing incomplete behind when it fails, and can be called again.
        needed: bytes that it writes, as far as they are known.
        tries_again: where a disk may come back; not if other processes write with this one.

    Returns:
        What `write` returns.

    Raises:
        CannotWrite: says what could not be written, why, and what stands. Errors of another kind stay as they are.
    """
    pauses = list(PAUSES) if tries_again else []
    while True:
        try:
            return write()
        except Exception as error:
            number = number_of(error)
            if number is None or isinstance(error, CannotWrite):
                raise
            if number not in _AWAY or not pauses:
                raise CannotWrite(_in_words(path, number, needed, tries_again=tries_again)) from error
            logger.warning("%s: %s. It is tried again in %g s.", path, os.strerror(number), pauses[0])
            time.sleep(pauses.pop(0))


def reached(folder: Path, call: Callable[[], Result]) -> Result:
    """Call a function that reads and writes in a run's folder; an error of the file system becomes one message.

    It is for what `written` does not say, such as a file that this user may not read.

    Args:
        folder: the run's folder.
        call: is not called again.

    Returns:
        What `call` returns.

    Raises:
        CannotWrite: names the file, and what stands.
    """
    try:
        return call()
    except OSError as error:
        if error.errno is None:  # of a library for networks
            raise
        named = error.filename if isinstance(error.filename, str | os.PathLike) else folder
        raise CannotWrite(_in_words(Path(named), error.errno, 0, folder=folder, how="read or written")) from error


def reported(
    write: Callable[Concatenate[Path, Parameters], Result],
) -> Callable[Concatenate[Path, Parameters], Result]:
    """Have a function that writes the path of its first argument raise what `written` raises."""

    @wraps(write)
    def call(path: Path, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return written(path, partial(write, path, *args, **kwargs))

    return call


def number_of(error: BaseException | None) -> int | None:
    """The system's number (errno) of the error behind an error of any library; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := _NUMBER.search(str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def check_room(path: Path, needed: int, *, largest: int = 0, hint: str = "") -> None:
    """Refuse to begin what cannot be finished, as far as the file system says.

    Args:
        path: of what is to be written; its folder exists.
        needed: bytes, all together.
        largest: bytes of the largest file of it.
        hint: another way to have room, at the end of the message.

    Raises:
        CannotWrite: there is less room.
    """
    if largest > file_limit():
        raise CannotWrite(_in_words(path, errno.EFBIG, largest))
    if needed > free_bytes(path.parent):
        raise CannotWrite(_in_words(path, errno.ENOSPC, needed) + hint)


def free_bytes(folder: Path) -> float:
    """Bytes that this user may still write to a folder's file system; infinite where it does not say."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return math.inf
    if not status.f_blocks:  # file systems that are not on a disk
        return math.inf
    return status.f_bavail * status.f_frsize


def file_limit() -> float:
    """Bytes that a file may have by the limit of this process (ulimit -f)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return math.inf if limit == resource.RLIM_INFINITY else limit


def append(path: Path, content: bytes, *, expected: int | None = None) -> int:
    """Append whole lines to a file, to the disk itself; what fails is cut back, so no line is there in part or twice.

    Args:
        path: of the file, which need not exist.
        content: lines with their ends.
        expected: the file's size in bytes; one of another size is left alone. None: any.

    Returns:
        The size that it had.

    Raises:
        ValueError: it is a link.
        CannotWrite: as `written`.
    """
    before: list[int] = []

    def once() -> None:
        with open_own(path) as file:
            before.append(os.fstat(file.fileno()).st_size)
            if expected not in (None, before[0]):
                return
            if before[-1] > before[0]:  # a disk was away, and then part of it was there all the same
                os.ftruncate(file.fileno(), before[0])
            append_to(file.fileno(), content)

    written(path, once)
    return before[0]


def append_to(descriptor: int, content: bytes) -> None:
    """As `append`, for a file that is open for appending; the errors are the system's own."""
    size = os.fstat(descriptor).st_size
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)  # after a power cut, no checkpoint may be without its line of metrics
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def remove_folder(folder: Path) -> None:
    """Remove what is incomplete, as far as the disk lets; the next start removes the rest."""
    shutil.rmtree(folder, ignore_errors=True)


def reason(number: int, folder: Path) -> str:
    """Why nothing could be written to a folder: the system's words for its number, and what it leaves unsaid."""
    said = os.strerror(number)
    if number == errno.EFBIG and file_limit() < math.inf:
        return f"{said}: a file may have {in_bytes(file_limit())} at most (ulimit -f)"
    if number not in _ROOM:
        return said
    free = free_bytes(folder)
    if number == errno.EDQUOT or free == math.inf:
        return said
    status = os.statvfs(folder)
    is_short = status.f_files and status.f_favail < _FEW_FILES
    files = f", and room for {status.f_favail} more files" if is_short else ""  # each takes an inode
    return f"{said}: {in_bytes(free)} are free{files}"


def in_bytes(number: float) -> str:
    """A number of bytes for a reader."""
    power = min(int(math.log10(max(number, 1))) // 3, 3)
    return f"{number:.0f} bytes" if power == 0 else f"{number / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def _in_words(
    path: Path,
    number: int,
    needed: int,
    *,
    folder: Path | None = None,
    how: str = "written",
    tries_again: bool = True,
) -> str:
    run_folder, folder = folder or path.parent, next(filter(os.path.isdir, path.parents), path.parent)
    amount = f" About {in_bytes(needed)} are needed." if needed else ""
    if number in _ROOM:
        remedy = "Make room there"
    elif number == errno.EFBIG:
        remedy = "Raise the limit"
    elif number in _AWAY:
        tried = f"It was tried {len(PAUSES) + 1} times. " if tries_again else ""
        remedy = f"{tried}See that the disk is there"
    else:
        allowed = "Make the folder writable" if how == "written" else "Let this user read and write it"
        remedy = allowed if number in _REFUSED else "Repair that"
    # Where nothing can be written, nothing can be removed either.
    left = "The next start removes what is incomplete" if number == errno.EROFS else "Nothing incomplete is left"
    return (
        f"{path} could not be {how}: {reason(number, folder)}.{amount} {left}. {remedy}; "
        f"the same command then {_where(run_folder)}."
    )


def _where(folder: Path) -> str:
    """Where a run goes on, or a command that writes into a folder that is no run's."""
    steps = (path.parent.name.removeprefix("checkpoint-") for path in folder.glob(f"checkpoint-*/{MANIFEST_FILE}"))
    latest_first = sorted((int(step) for step in steps if step.isdecimal()), reverse=True)
    whole = (step for step in latest_first if find_damage(folder / f"checkpoint-{step}") is None)
    if step := next(whole, None):
        return f"goes on from checkpoint-{step}, which stands"
    has_begun = os.path.lexists(folder / "metrics.jsonl")  # False where nothing can be seen
    return "begins the run again, which has no checkpoint" if has_begun else "goes on"
