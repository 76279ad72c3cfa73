"""Files that take the place of older ones whole: written beside them, synced, and exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputExists
from ..reading.plain_files import instead_of_file
from .litter import clear, hidden_name, remove
from .place_lock import locked
from .staged_folder import storage_errors
from .synced import sync


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which takes the place of `path` when the block ends without an exception. The
    folder is made if need be.

    Raises:
        OutputExists: somebody else is writing there, or something else than a file is there: a device that
            root names would be gone.
        StorageError: it cannot be written; `path` is as it was.
    """
    if found := instead_of_file(path):
        raise OutputExists(str(path), expected="a file there, or nothing", found=found)
    with storage_errors(path), _beside(path) as alone:
        clear(path, alone=alone)
        beside = hidden_name(path, "partial")
        try:
            with beside.open("xb") as file:
                yield file
            sync(beside)
            beside.replace(path)
        except BaseException:
            remove(beside)
            raise
        sync(path.parent)


@contextmanager
def _beside(path: Path) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path) as alone:
        yield alone


def tidy(path: Path) -> None:
    """Remove what killed processes left of a file.

    Raises:
        As `staged_file`.
    """
    with storage_errors(path), locked(path) as alone:
        clear(path, alone=alone)


def write_whole(path: Path, content: bytes) -> None:
    """Make `content` that of a file, in one step.

    Raises:
        As `staged_file`.
    """
    with staged_file(path) as file:
        file.write(content)
