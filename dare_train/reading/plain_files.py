"""Content of files that may be anything: a pipe that never ends, a device, a folder, a file without end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError, DareError, printable

_NO_WAITING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFDIR: "a folder",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

FETCH_AGAIN = "fetch it again"


def regular(
    path: Path,
    *,
    expected: str = "a file",
    error: type[DareError] = CheckpointError,
    remedy: str = FETCH_AGAIN,
) -> int:
    """A descriptor of a regular file, to read it. Whatever else has the name is not waited for.

    Raises:
        error: it is none, or cannot be opened.
    """
    where = str(path)
    try:
        descriptor = os.open(path, _NO_WAITING)
    except FileNotFoundError as problem:
        raise error(where, expected=expected, found="no such file", remedy=remedy) from problem
    except (OSError, ValueError) as problem:  # ValueError: no file can have such a name
        raise error(where, expected=expected, found=reason(problem), remedy=remedy) from problem
    found = _instead(os.fstat(descriptor))
    if found is not None:
        os.close(descriptor)
        raise error(where, expected=expected, found=found, remedy=remedy)
    return descriptor


def instead_of_file(path: Path) -> str | None:
    """What lies at a place, where it is neither a regular file, nor a link to one, nor nothing."""
    try:
        return _instead(path.stat())
    except (OSError, ValueError):
        return None


def _instead(found: os.stat_result) -> str | None:
    kind = stat.S_IFMT(found.st_mode)
    return None if kind == stat.S_IFREG else _KINDS.get(kind, "something else")


@contextmanager
def opened(
    path: Path,
    *,
    expected: str = "a file",
    error: type[DareError] = CheckpointError,
    remedy: str = FETCH_AGAIN,
) -> Iterator[BinaryIO]:
    """A regular file, to be read.

    Raises:
        error: it is none, or cannot be opened or read.
    """
    descriptor = regular(path, expected=expected, error=error, remedy=remedy)
    try:
        with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
            yield file
    except DareError:
        raise
    except OSError as problem:
        raise error(str(path), expected=expected, found=reason(problem), remedy=remedy) from problem


def content(
    path: Path,
    *,
    at_most: int,
    expected: str = "a file",
    error: type[DareError] = CheckpointError,
    remedy: str = FETCH_AGAIN,
) -> bytes:
    """All bytes of a regular file.

    Raises:
        error: it is none, cannot be read, or is larger than `at_most` bytes.
    """
    with opened(path, expected=expected, error=error, remedy=remedy) as file:
        raw = file.read(at_most + 1)
    if len(raw) > at_most:
        size = f"{path.stat().st_size:,}"
        raise error(str(path), expected=f"at most {at_most:,} bytes", found=size, remedy=remedy)
    return raw


def reason(problem: Exception) -> str:
    """What the system or a parser says, without the path that the error names already."""
    said = problem.strerror if isinstance(problem, OSError) else None
    return printable(said or str(problem) or type(problem).__name__, 200)


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8: JSON can hold halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
