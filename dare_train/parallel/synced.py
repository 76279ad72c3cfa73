"""What is on the disk, not only on its way there."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <fcntl.h>


def sync_tree(folder: Path) -> None:
    """A folder with everything in it."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """A file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_to_sync(descriptor: int) -> None:
    """Let the disk begin with what lies in memory of a file, without waiting for it, so that little is left
    for `sync` at the end. Where the system cannot, all of it is: what fails is told there.
    """
    sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if sync_file_range is not None:
        sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)
