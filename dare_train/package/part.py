"""One part of a package: a safetensors file of a table and of the frames that it tells of, open as long as it
is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, PackageError
from ..weights.files.checkpoint import SafetensorsFile
from .codec import FETCH_AGAIN
from .manifest import Manifest
from .segment_table import check_table
from .segments import COLUMNS

_LARGEST_HEADER = 1 << 16
"""Two tensors need some 200 bytes; parsing a header of megabytes would take hundreds of them."""


class Part:
    """An open part. Whoever hashes it and whoever decodes it read the same file, which must not change
    meanwhile.

    Raises:
        PackageError: it is no part of a package.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_header(path)
        try:
            self._file = SafetensorsFile(path)
        except CheckpointError as error:
            expected = error.expected
            raise PackageError(
                error.name, expected=expected, found=error.found, remedy=FETCH_AGAIN
            ) from error
        tensors = self._file.tensors
        shapes = {name: (info.dtype.code, len(info.shape)) for name, info in tensors.items()}
        if shapes != {"segments": ("I64", 2), "data": ("U8", 1)} or tensors["segments"].shape[1] != COLUMNS:
            layout = "segments I64 [n, 6] and data U8 [bytes]"
            raise PackageError(str(path), expected=layout, found=_listed(shapes), remedy=FETCH_AGAIN)

    def table(self, manifest: Manifest) -> NDArray[np.int64]:
        """The segments, checked, shape [n, 6]: their frames follow one another.

        Raises:
            PackageError: the table breaks a rule.
        """
        file = self._file
        table = file.read("segments", 0, file.tensors["segments"].numel).view(np.int64).reshape(-1, COLUMNS)
        size = file.tensors["data"].nbytes
        check_table(table, manifest, size, str(self.path))
        told = int(table[:, -1].sum())
        if told != size:
            expected = f"{told} bytes of frames, as its table says"
            raise PackageError(str(self.path), expected=expected, found=f"{size}", remedy=FETCH_AGAIN)
        return table

    def frame(self, offset: int, size: int) -> memoryview:
        """So many bytes of the frames.

        Raises:
            PackageError: the file has changed since it was opened.
        """
        try:
            content = self._file.read("data", offset, size)
        except CheckpointError as error:
            self._check_unchanged()
            remedy = FETCH_AGAIN
            raise PackageError(
                error.name, expected=error.expected, found=error.found, remedy=remedy
            ) from error
        return content.data

    def sha256(self) -> str:
        """Of the whole file, as it is now.

        Raises:
            PackageError: it has changed since it was opened.
        """
        digest = self._file.sha256()
        self._check_unchanged()
        return digest

    def _check_unchanged(self) -> None:
        if self._file.changed():
            expected = "the file that was opened"
            remedy = "leave the package alone while it is read, and run again"
            raise PackageError(str(self.path), expected=expected, found="changes to it", remedy=remedy)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LARGEST_HEADER:
        expected = "a safetensors file with a header of at most 65,536 bytes"
        raise PackageError(str(path), expected=expected, found=f"{size:,}", remedy=FETCH_AGAIN)


def _listed(shapes: Mapping[str, object]) -> str:
    return f"{list(shapes.items())[:3]}{' …' if len(shapes) > 3 else ''}"
