"""Locks that the system holds on open files: a kill frees them, and what is forked does not have them."""

from __future__ import annotations

import errno
import fcntl
import os

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""How file systems say that they have none."""
_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
_held: set[SystemLock] = set()
"""Those of this process."""


class SystemLock:
    """An open file that this process has locked, for as long as it keeps the lock."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        _held.add(self)

    @property
    def held(self) -> bool:
        """False once it was let go, and in every process but the one that took it."""
        return self in _held

    def let_go(self) -> None:
        """Close the file, and with it the lock."""
        _held.remove(self)
        os.close(self.descriptor)


def flocked(descriptor: int) -> bool:
    """Lock an open file; false where the file system has no locks.

    Raises:
        BlockingIOError: somebody else has it.
        OSError: it cannot be had.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise BlockingIOError(error.errno, error.strerror) from error
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _let_go() -> None:
    """What is forked would hold the locks beyond the life of the process that took them."""
    while _held:
        os.close(_held.pop().descriptor)


os.register_at_fork(after_in_child=_let_go)
