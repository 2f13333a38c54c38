"""A run's hold on its folder: the lock, and what is done if files of it, or all of it, vanish while the run works.

One process works on a folder, and in it one run at a time. Readers, such as the page of completions, need no lock.
"""

import errno
import fcntl
import gc
import logging
import os
import time
import weakref
from pathlib import Path

from common.mistakes import CannotWrite
from common.runs.checkpoints import write_file
from common.runs.own_files import what_else

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without them
# Seconds before anything is written again: perhaps the whole folder is being deleted.
_SETTLE = 0.3

logger = logging.getLogger("nanorlhf")

_held: list["HeldFolder"] = []  # by this process; what no run has released is held until the process ends


class HeldFolder:
    """A folder that is locked against other processes until it is released or this process ends, even by a kill.

    Args:
        folder: which exists.

    Attributes:
        folder: the path.
        descriptor: of the folder; None: it is released.
        is_ready: the run that works on it could be set up.

    Raises:
        ValueError: another process holds it, or it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.is_ready = False
        self._run: weakref.ref | None = None
        self._kept: dict[str, bytes] = {}
        self._lock = _lock(self.folder)
        # As long as it is open, no other folder gets its number.
        self.descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        _held.append(self)

    def give_to(self, run: object) -> None:
        """Note which run works on the folder; when it is garbage, the folder is released.

        Raises:
            ValueError: another one of this process does, and has neither ended nor failed.
        """
        if self._run_at_work(run) and gc.collect() >= 0 and self._run_at_work(run):  # trainers are in cycles
            raise ValueError(
                f"output_dir={self.folder}: another trainer of this process has this run, and two would damage each "
                "other's files. Let it finish; or delete it (del trainer), and this one continues the run; or pass "
                "another --output_dir."
            )
        self._run, self.is_ready, self._kept = weakref.ref(run, self._run_is_gone), False, {}

    def _run_at_work(self, run: object) -> bool:
        # One that is not ready while another begins has failed; a traceback may keep it alive.
        return self.is_ready and self._run is not None and self._run() not in (None, run)

    def _run_is_gone(self, run: weakref.ref) -> None:
        if run is self._run:
            self.release()

    def keep(self, name: str) -> None:
        """From now on, `check` writes this file of the folder again when somebody has deleted it."""
        self._kept[name] = (self.folder / name).read_bytes()

    def check(self) -> None:
        """See that the folder is there and locked, and write again what was deleted from it; costs microseconds.

        Raises:
            CannotWrite: the folder is gone, or another process holds it.
        """
        if self.descriptor is None:  # released
            return
        self._check_there()
        if not self._missing():
            return
        time.sleep(_SETTLE)
        self._check_there()
        try:
            self._restore()
        except (OSError, ValueError):
            self._check_there()
            raise

    def _check_there(self) -> None:
        if self.is_there():
            return
        taken = " Another folder has its name, and nothing was written into that." if self.folder.exists() else ""
        raise CannotWrite(
            f"output_dir={self.folder}: the folder of this run was deleted or moved while the run worked, and its "
            f"metrics and checkpoints with it, so the run ends here.{taken} If it was moved, move it back and repeat "
            "the command, which continues from its last checkpoint. Otherwise the same command begins a new run."
        )

    def _missing(self) -> list[str]:
        missing = [name for name in self._kept if not os.path.lexists(self.folder / name)]
        has_lost_lock = self._lock is not None and not _is_at(self._lock, self.folder / LOCK_FILE)
        return [*missing, LOCK_FILE] if has_lost_lock else missing

    def _restore(self) -> None:
        for name in self._missing():
            if name == LOCK_FILE:
                before, self._lock = self._lock, None
                os.close(before)
                self._lock = _lock(self.folder)
            else:
                write_file(self.folder / name, self._kept[name])
            logger.warning("%s was deleted while the run worked, and is written again", self.folder / name)

    def holds(self, folder: os.stat_result) -> bool:
        """Whether this is a folder, whatever path leads to it; False once it is released."""
        descriptor = self.descriptor
        return descriptor is not None and os.path.samestat(folder, os.fstat(descriptor))

    @property
    def is_released(self) -> bool:
        """True if this process has let go of the folder, or was forked from the one that holds it."""
        return self.descriptor is None

    def is_there(self) -> bool:
        """False if the folder was deleted or moved, also if another one has its name."""
        return self.descriptor is None or _is_at(self.descriptor, self.folder)

    def release(self) -> None:
        """Let go of the folder: the run has ended."""
        for descriptor in (self._lock, self.descriptor):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self.descriptor = self._run = None
        if self in _held:
            _held.remove(self)


def hold(folder: Path, run: object = None) -> HeldFolder:
    """Lock a folder, unless this process has locked it.

    Args:
        folder: which exists.
        run: which will work on it; None: none in particular.

    Raises:
        ValueError: another process holds it, or another run of this one, or it cannot be written to.
    """
    here = os.stat(folder)  # a link to it leads to the same
    held = next((each for each in _held[:] if each.holds(here)), None)  # a copy: garbage lets go at any moment
    held = held or HeldFolder(folder)
    if run is not None:
        held.give_to(run)
    held.check()
    return held


def _lock(folder: Path) -> int | None:
    """The descriptor that holds the lock; None on a file system without locks.

    It is one of flock, which, other than one of lockf, is not lost when this process opens and closes the file again,
    for example to copy the folder.
    """
    path = folder / LOCK_FILE
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        reason = f"it is {found}" if (found := what_else(path)) else error.strerror
        raise ValueError(
            f"output_dir={folder}: {LOCK_FILE} cannot be written there ({reason}), so neither can a run. Make "
            "the folder writable, or pass another --output_dir."
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in NO_LOCKS:
            return None
        raise CannotWrite(
            f"output_dir={folder}: another process is working on this run, and two would damage each other's files. "
            "Wait for it or stop it, or pass another --output_dir."
        ) from None
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path leads to an open file or folder; True, too, where the disk does not answer."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def _let_go_in_child() -> None:
    """A process that is forked, such as that of a rule, would keep the lock of a run that was killed."""
    for each in _held[:]:
        each.release()


os.register_at_fork(after_in_child=_let_go_in_child)
