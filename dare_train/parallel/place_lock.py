"""One writer at a place: a lock that the system holds, so that a kill frees it.

The lock of `out` is a hidden file beside it, `.out.lock`, there while somebody writes; it says who. A writer
that was killed leaves the file, not the lock: the next one takes it, and removes the file when it is done.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from ..errors import OutputExists, StorageError
from .litter import remove

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""How file systems say that they have none."""
_SUFFIX = ".lock"
_LONGEST = 400
"""Bytes that are read of who holds a lock."""
_WRITTEN_WITHIN = 0.1
"""Seconds after which a lock says who has it."""
_held: set[int] = set()
"""Descriptors of locks in this process."""


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
    descriptor = _taken(path, out)
    if descriptor is None:
        yield False
        return
    owner = os.getpid()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _who().encode(), 0)
        yield True
    finally:
        if os.getpid() == owner:  # what was forked meanwhile holds nothing
            _held.discard(descriptor)
            try:
                remove(path)
            finally:
                os.close(descriptor)


def lock_name(out: Path, within: Path | None = None) -> Path:
    return (within or out.parent) / f".{out.name}{_SUFFIX}"


def lock_names(folder: Path) -> set[str]:
    """Names of what is being written into a folder, or was by a process that was killed."""
    return {path.name[1 : -len(_SUFFIX)] for path in folder.glob(f".?*{_SUFFIX}")}


def _taken(path: Path, out: Path) -> int | None:
    """The descriptor of a lock that is held now; None where there are none to be had."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _no_lock(path) from error
            raise
        try:
            if not _is_plain(descriptor):
                raise _no_lock(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _still_there(descriptor, path):
                _held.add(descriptor)
                return descriptor
        except BlockingIOError as error:
            found = _holder(descriptor)
            os.close(descriptor)
            remedy = "wait until it is done, or choose another place"
            raise OutputExists(
                str(out), expected="a place that nobody is writing to", found=found, remedy=remedy
            ) from error
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)  # whoever held it is done, and has removed the file: another one counts now


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


def _no_lock(path: Path) -> StorageError:
    return StorageError(str(path), expected="a lock's file", found="something else", remedy="remove it")


def _who() -> str:
    program = Path(sys.argv[0]).name if sys.argv else ""
    command = shlex.join([program, *sys.argv[1:2]]) if program.startswith("dare") else program
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"process {os.getpid()} on {os.uname().nodename} ({command or 'python'}), since {since}"


def _let_go() -> None:
    """What is forked would hold the locks beyond the life of the process that took them."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
