"""Files of weights, read at any place by any thread: one descriptor from the first look to the last byte.

Not through a map: where a file is cut short while it is read, by whoever writes over it or by a network disk,
a map ends the process, and reading is an error that can be told.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...reading.plain_files import regular

_BLOCK = 1 << 20


class ReadFile:
    """An open regular file.

    Raises:
        CheckpointError: it is none, or cannot be opened; where it is read, there is less than at first, it
            was written to since it was opened, or the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = regular(path, expected="a safetensors file")
        weakref.finalize(self, os.close, self.descriptor)
        found = os.fstat(self.descriptor)
        self.size = found.st_size
        self._state = _state(found)

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fill a contiguous buffer with what begins at a byte."""
        view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
        while view:
            try:
                count = os.preadv(self.descriptor, [view], offset)
            except OSError as error:
                raise self._failed(offset, error.strerror or "an error") from error
            if not count:
                raise self._failed(offset, f"its end at {os.fstat(self.descriptor).st_size:,}")
            view = view[count:]
            offset += count
        if self.changed():
            raise self._failed(offset, "changes to it", expected="the file that was opened")

    def read(self, offset: int, count: int) -> bytearray:
        """So many bytes from one on."""
        content = bytearray(count)
        self.read_into(content, offset)
        return content

    def sha256(self) -> str:
        """Of all that is in it."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_BLOCK))
        offset = 0
        while count := os.preadv(self.descriptor, [buffer], offset):
            digest.update(buffer[:count])
            offset += count
        return digest.hexdigest()

    def changed(self) -> bool:
        """Whether somebody has written to it since it was opened."""
        return self._state != _state(os.fstat(self.descriptor))

    def _failed(self, offset: int, found: str, *, expected: str = "") -> CheckpointError:
        remedy = "was it written over, or cut short, while it was read? Leave it alone, and run again"
        expected = expected or f"a byte at {offset:,}"
        return CheckpointError(str(self.path), expected=expected, found=found, remedy=remedy)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
