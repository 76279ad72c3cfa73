"""Where machine code is kept: only in folders and files that nobody else can have written.

A digest beside code tells of rot, not of who wrote it. What another user can write, another user can have
run here.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

_TO_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Unsafe(Exception):
    """Somebody else may have written what lies there. Says what, and why."""


class CodeFolder:
    """Object files by name, in `root/kernels/KEY`.

    Args:
        root: the cache's folder.
        key: of everything that the code depends on. It is in the files' digests, too.
    """

    def __init__(self, root: Path, key: str) -> None:
        self._key = key
        self._folders = (root, root / "kernels", root / "kernels" / key)

    def read(self, name: str) -> bytes | None:
        """The code that was kept under that name; None where there is none, or a bit of it rotted.

        Raises:
            Unsafe: somebody else may have written it.
            OSError: it cannot be read.
        """
        path = self._folders[-1] / name
        try:
            for folder in self._folders:
                check_owner(folder, folder.stat())
            descriptor = os.open(
                path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            )
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            check_owner(path, status)
            if not stat.S_ISREG(status.st_mode):
                raise Unsafe(f"{path} is no file")
            with open(descriptor, "rb", closefd=False) as file:
                stored = file.read()
        finally:
            os.close(descriptor)
        code = stored[32:]
        return code if self._digest(name, code) == stored[:32] else None

    def keep(self, name: str, code: bytes) -> None:
        """Have the code for later processes, in what this user alone can write, whatever the umask.

        Raises:
            Unsafe: a folder that is there can be written by somebody else.
            OSError: it cannot be written.
        """
        above = [folder for folder in self._folders[0].absolute().parents if not folder.exists()]
        for folder in (*reversed(above), *self._folders):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
        for folder in self._folders:
            check_owner(folder, folder.stat())
        path = self._folders[-1] / name
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with suppress(FileNotFoundError):
            temporary.unlink()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123
            file.write(self._digest(name, code) + code)
        temporary.replace(path)

    def _digest(self, name: str, code: bytes) -> bytes:
        return hashlib.sha256(f"{self._key} {name}\n".encode() + code).digest()


def check_owner(path: Path, status: os.stat_result) -> None:
    """Raises Unsafe unless the path belongs to this user or to root, and nobody else may write there."""
    if not hasattr(os, "getuid"):
        return
    if status.st_uid not in (0, os.getuid()):
        raise Unsafe(f"{path} belongs to user {status.st_uid}")
    if status.st_mode & _OTHERS_WRITE:
        raise Unsafe(f"others may write to {path}")
