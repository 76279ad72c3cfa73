"""Checkpoints written tensor by tensor, in any order, by several processes: sharded files and an index."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..dtypes import Words
from .checkpoint import SINGLE, Checkpoint
from .protocol import TensorInfo


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files of a checkpoint hold what."""

    files: Mapping[str, Mapping[str, TensorInfo]]
    """File name -> tensor name -> what it holds."""
    index: str | None = None
    """Name of the index, where one says which file holds which tensor."""


def layout_like(
    base: Checkpoint | None, tensors: Mapping[str, TensorInfo], base_name: Callable[[str], str]
) -> Layout:
    """The base's files, by their names; tensors that it does not have go to the last.

    Args:
        tensors: of the result.
        base_name: the base's name of a tensor of the result.
    """
    if base is None or base.index is None:
        return Layout(files={base.single if base is not None else SINGLE: tensors})
    places = {name: file.path.name for name, file in base.files.items()}
    names = sorted(set(places.values())) or [base.single]
    files: dict[str, dict[str, TensorInfo]] = {name: {} for name in names}
    for name, info in tensors.items():
        files[places.get(base_name(name), names[-1])][name] = info
    return Layout(files={name: held for name, held in files.items() if held}, index=base.index)


class CheckpointWriter:
    """Writes tensors into safetensors files piece by piece, from any thread, in any order; headers first.

    Several processes may write to the same files: one makes them, the others open theirs with `join=True`.
    """

    def __init__(self, folder: Path, layout: Layout, *, join: bool = False) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        # The kernel locks a file that is written to; waiting for that burns a processor.
        self._writing = threading.Lock()
        self._descriptors: list[int] = []
        for file, tensors in layout.files.items():
            self._create(folder / file, tensors, join)
        if layout.index is not None and not join:
            _write_index(folder / layout.index, layout)

    def _create(self, path: Path, tensors: Mapping[str, TensorInfo], join: bool) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.bits, item[0]))
        offset = 0
        for name, info in ordered:
            header[name] = {
                "dtype": info.dtype.code,
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR if join else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        if not join:
            _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
            os.ftruncate(descriptor, 8 + len(text) + offset)
        for name, _ in ordered:
            begin: int = header[name]["data_offsets"][0]  # type: ignore[index]
            self._places[name] = (descriptor, 8 + len(text) + begin)

    def write(self, name: str, start: int, words: Words) -> None:
        """Put words at flat index `start` of a tensor."""
        descriptor, offset = self._places[name]
        with self._writing:
            _write_all(descriptor, memoryview(words.data).cast("B"), offset + start * words.itemsize)

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_all(descriptor: int, data: bytes | memoryview, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written


def _write_index(path: Path, layout: Layout) -> None:
    total = sum(info.nbytes for tensors in layout.files.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in layout.files.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")
