"""Checkpoints written tensor by tensor, in any order, by several processes: sharded files and an index."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...dtypes import Words
from ...errors import TensorMismatch
from ...parallel.synced import begin_to_sync
from ..protocol import TensorInfo
from .checkpoint import SINGLE, Checkpoint
from .headers import METADATA

_MUCH = 32 << 20
"""Bytes of a file that lie in memory before the disk is to begin with them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which files of a checkpoint hold what."""

    files: Mapping[str, Mapping[str, TensorInfo]]
    """File, relative to the folder -> tensor name -> what it holds."""
    index: str | None = None
    """Name of the index, where one says which file holds which tensor."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Of files in sub-folders, which the index leaves out: what stands before the names that their tensors
    have in them."""

    def read_back(self, folder: Path) -> None:
        """Open what was written as those who use it do.

        Raises:
            CheckpointError: it cannot be read.
            TensorMismatch: it holds others than these tensors.
        """
        found = Checkpoint.open(folder).tensors
        for name, info in ((name, info) for held in self.files.values() for name, info in held.items()):
            if found.get(name) != info:
                where = f"{folder}: {name}"
                raise TensorMismatch(where, expected=f"{info}", found=f"{found.get(name, 'none')}")


def layout_like(
    base: Checkpoint | None,
    tensors: Mapping[str, TensorInfo],
    base_name: Callable[[str], str],
    modules: Mapping[str, str],
) -> Layout:
    """The base's files, by their names; tensors that it does not have go to their module's, or to the last.

    Args:
        tensors: of the result.
        base_name: the base's name of a tensor of the result.
        modules: those of the result behind its first: see `module_folders`.
    """
    places = _places(base) if base is not None else {}
    names = sorted({*places.values()}) or [SINGLE if base is None else base.single]
    files: dict[str, dict[str, TensorInfo]] = {name: {} for name in names}
    prefixes = {}
    folders = {name: folder for folder, name in modules.items()}
    for name, info in tensors.items():
        file = places.get(base_name(name), names[-1])
        module, _, name_in_module = name.partition(".")
        if name_in_module not in ("", METADATA) and module in folders and base_name(name) not in places:
            file = f"{folders[module]}/{SINGLE}"
            prefixes[file] = f"{module}."
        files.setdefault(file, {})[name] = info
    index = base.index if base is not None else None
    return Layout(files={name: held for name, held in files.items() if held}, index=index, prefixes=prefixes)


def _places(base: Checkpoint) -> dict[str, str]:
    """The names of files that hold a base's tensors, except those of later modules."""
    return {
        name: file.path.name if base.index is not None else base.single
        for name, file in base.files.items()
        if not file.prefix
    }


class CheckpointWriter:
    """Writes tensors into safetensors files piece by piece, from any thread, in any order; headers first.

    Several processes may write to the same files: one makes them, the others open theirs with `join=True`.
    """

    def __init__(self, folder: Path, layout: Layout, *, join: bool = False) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        # The kernel locks a file that is written to; waiting for that burns a processor.
        self._writing = threading.Lock()
        self._in_memory: Counter[int] = Counter()
        self._descriptors: list[int] = []
        for file, tensors in layout.files.items():
            self._create(folder / file, tensors, join, prefix=layout.prefixes.get(file, ""))
        if layout.index is not None and not join:
            _write_index(folder / layout.index, layout)

    def _create(self, path: Path, tensors: Mapping[str, TensorInfo], join: bool, *, prefix: str) -> None:
        header: dict[str, object] = {METADATA: {"format": "pt"}}
        ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.bits, item[0]))
        places: dict[str, int] = {}
        offset = 0
        for name, info in ordered:
            places[name] = offset
            header[name.removeprefix(prefix)] = {
                "dtype": info.dtype.code,
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR if join else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        if not join:
            _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
            os.ftruncate(descriptor, 8 + len(text) + offset)
        for name, begin in places.items():
            self._places[name] = (descriptor, 8 + len(text) + begin)

    def write(self, name: str, start: int, words: Words) -> None:
        """Put words at flat index `start` of a tensor."""
        descriptor, offset = self._places[name]
        with self._writing:
            _write_all(descriptor, memoryview(words.data).cast("B"), offset + start * words.itemsize)
            self._in_memory[descriptor] += words.nbytes
            much = self._in_memory[descriptor] >= _MUCH
            if much:
                self._in_memory[descriptor] = 0
        if much:
            begin_to_sync(descriptor)

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
    listed = {file: tensors for file, tensors in layout.files.items() if file not in layout.prefixes}
    total = sum(info.nbytes for tensors in listed.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in listed.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(index, indent=2) + "\n")
