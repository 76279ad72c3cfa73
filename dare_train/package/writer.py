"""Segments, collected into parts of bounded size."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from .manifest import FileRecord, file_record
from .segments import COLUMNS, Segment

PART_LIMIT = 128 << 20
"""Compressed bytes after which a writer begins another part: the most it ever holds in memory."""


class PackageWriter:
    """Collects segments, in any order that is the same every time, and writes them as parts of bounded
    size.
    """

    def __init__(self, folder: Path, *, stem: str = "part", at_least_one: bool = True) -> None:
        self._folder, self._stem, self._at_least_one = folder, stem, at_least_one
        self._rows: list[tuple[int, ...]] = []
        self._data = bytearray()
        self._parts: list[FileRecord] = []

    def add(self, segment: Segment, frame: bytes) -> None:
        if self._data and len(self._data) + len(frame) > PART_LIMIT:
            self._flush()
        self._rows.append(segment.row)
        self._data += frame

    def _flush(self) -> None:
        path = self._folder / f"{self._stem}-{len(self._parts)}"
        table = np.array(self._rows, np.int64).reshape(-1, COLUMNS)
        try:
            save_file({"segments": table, "data": np.frombuffer(self._data, np.uint8)}, path)
        except SafetensorError as error:  # its own way to say that the disk is full
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
        self._parts.append(file_record(path, self._folder))
        self._rows, self._data = [], bytearray()

    def close(self) -> list[FileRecord]:
        """Write what is left. The parts have provisional names: see `number_parts`."""
        if self._rows or (self._at_least_one and not self._parts):
            self._flush()
        return self._parts


def number_parts(folder: Path, parts: list[FileRecord]) -> tuple[FileRecord, ...]:
    """Give all parts of a package their names."""
    named = []
    for number, part in enumerate(parts, 1):
        name = (
            "dare_delta.safetensors"
            if len(parts) == 1
            else f"dare_delta-{number:05d}-of-{len(parts):05d}.safetensors"
        )
        (folder / part.file).rename(folder / name)
        named.append(replace(part, file=name))
    return tuple(named)
