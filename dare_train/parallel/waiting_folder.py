"""Folders that wait beside what a process writes, for as long as it is at work: locked, so that others leave
them.
"""

from __future__ import annotations

import os
from pathlib import Path

from .litter import machine, remove
from .system_lock import SystemLock, flocked

_PREFIX = ".companions-"
_LOCK = ".lock"
_mine: dict[Path, SystemLock] = {}
"""Those of this process."""


def waiting_folder(folder: Path) -> Path:
    """A new one, with a name of its own: configuration and tokenizer of packages to come."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{_PREFIX}{machine()}-{os.getpid()}-{os.urandom(4).hex()}"
    place.mkdir()
    descriptor = _opened(place)
    if flocked(descriptor):
        _mine[place] = SystemLock(descriptor)
    else:
        os.close(descriptor)
    return place


def remove_waiting(place: Path) -> None:
    """What it waited for is over."""
    remove(place)
    lock = _mine.pop(place, None)
    if lock is not None and lock.held:
        lock.let_go()


def clear_waiting(folder: Path) -> None:
    """Remove those whose process is dead, and what an earlier training of this one has left."""
    for place in sorted(folder.glob(f"{_PREFIX}*")):
        if not place.is_symlink() and place.is_dir() and not _in_use(place):
            remove_waiting(place)


def _in_use(place: Path) -> bool:
    """Whether another process that lives has it. Where the file system has no locks, only those of this
    machine are known.
    """
    owner = place.name.removeprefix(_PREFIX).split("-")
    mine = len(owner) == 3 and owner[0] == machine()
    if mine and owner[1] == str(os.getpid()):
        return False
    descriptor = _opened(place)
    try:
        flocked(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return mine and Path(f"/proc/{owner[1]}").exists()


def _opened(place: Path) -> int:
    return os.open(place / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
