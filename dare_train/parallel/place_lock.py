"""One writer at a place: a lock that the system holds, so that a kill frees it.

The lock of `out` is a hidden file beside it, `.out.lock`, there while somebody writes; it says who. A writer
that was killed leaves the file, not the lock: the next one takes it, and removes the file when it is done.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path

from ..errors import OutputExists, StorageError
from .litter import remove
from .system_lock import SystemLock, flocked

_SUFFIX = ".lock"
_LONGEST = 400
"""Bytes that are read of who holds a lock."""
_WRITTEN_WITHIN = 0.1
"""Seconds after which a lock says who has it."""
_ATTEMPTS = 10_000
"""At a lock that others take and remove. On some network file systems an open file is never the one that
its name leads to."""
_kept: ContextVar[frozenset[Path]] = ContextVar("kept", default=frozenset())
"""Files of locks that this thread has for more than one writer."""


@contextmanager
def locked(out: Path, within: Path | None = None) -> Iterator[bool]:
    """Be the only one who writes to `out`, of all processes and threads; its folder, or `within`, is there.

    Yields whether the file system has locks. Where it has none, others may be at work on the same place.

    Raises:
        OutputExists: somebody else is; it says who.
        StorageError: what lies at the lock's name is no lock.
        OSError: the folder cannot be written to.
    """
    path = lock_name(out, within)
    if path.parent.resolve() / path.name in _kept.get():
        yield True
        return
    lock = _taken(path, out)
    if lock is None:
        yield False
        return
    try:
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, _who().encode(), 0)
        yield True
    finally:
        if lock.held:  # what was forked meanwhile holds nothing
            try:
                remove(path)
            finally:
                lock.let_go()


@contextmanager
def occupied(out: Path, within: Path | None = None) -> Iterator[None]:
    """`locked`, of a folder that is written into file by file: by any of its paths. Where nobody may make
    anything beside `out`, nobody can take its place either, and nothing is locked.

    Raises:
        As `locked`.
    """
    beside = within or out.resolve().parent
    beside.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if os.access(beside, os.W_OK):
            stack.enter_context(locked(out.resolve(), within))
        yield


@contextmanager
def kept(out: Path) -> Iterator[None]:
    """`occupied`, for all that this thread writes to `out` in the block: what locks it again passes.

    Raises:
        As `locked`.
    """
    path = lock_name(out.resolve())
    if path in _kept.get():
        yield
        return
    with occupied(out):
        before = _kept.set(_kept.get() | {path})
        try:
            yield
        finally:
            _kept.reset(before)


def lock_name(out: Path, within: Path | None = None) -> Path:
    return (within or out.parent) / f".{out.name}{_SUFFIX}"


def lock_names(folder: Path) -> set[str]:
    """Names of what is being written into a folder, or was by a process that was killed."""
    return {path.name[1 : -len(_SUFFIX)] for path in folder.glob(f".?*{_SUFFIX}")}


def remove_locks(folder: Path) -> None:
    """Of places in a folder that nobody writes into any more, where one could not be removed at its time."""
    for path in folder.glob(f".?*{_SUFFIX}"):
        remove(path)


def _taken(path: Path, out: Path) -> SystemLock | None:
    """A lock that is held now; None where there are none to be had."""
    for _ in range(_ATTEMPTS):
        with ExitStack() as stack:
            descriptor = _opened(path)
            stack.callback(os.close, descriptor)
            if not _is_plain(descriptor):
                raise _no_lock(path)
            try:
                if not flocked(descriptor):
                    path.unlink(missing_ok=True)
                    return None
            except BlockingIOError as error:
                raise _in_use(out, _holder(descriptor)) from error
            if _still_there(descriptor, path):
                stack.pop_all()
                return SystemLock(descriptor)
            # whoever held it is done, and has removed the file: another one counts now
    return None


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _no_lock(path) from error
        raise


def _holder(descriptor: int) -> str:
    """Who has the lock, once that is written in it."""
    deadline = time.monotonic() + _WRITTEN_WITHIN
    while time.monotonic() < deadline:
        text = os.pread(descriptor, _LONGEST, 0).decode(errors="replace")
        if text:
            return text
        time.sleep(0.001)
    return "a process"


def _is_plain(descriptor: int) -> bool:
    found = os.fstat(descriptor)
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def _still_there(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _in_use(out: Path, who: str) -> OutputExists:
    remedy = "wait until it is done, or choose another place"
    return OutputExists(str(out), expected="a place that nobody is writing to", found=who, remedy=remedy)


def _no_lock(path: Path) -> StorageError:
    return StorageError(str(path), expected="a lock's file", found="something else", remedy="remove it")


def _who() -> str:
    program = Path(sys.argv[0]).name if sys.argv else ""
    command = shlex.join([program, *sys.argv[1:2]]) if program.startswith("dare") else program
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {os.uname().nodename} ({command or 'python'}), since {since}"
