"""The disk begins with large files before they are finished."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from dare_train.dtypes import DTYPES
from dare_train.parallel.synced import begin_to_sync
from dare_train.weights.files import checkpoint_writer
from dare_train.weights.files.checkpoint import Checkpoint
from dare_train.weights.files.checkpoint_writer import CheckpointWriter, Layout
from dare_train.weights.protocol import TensorInfo


class _OfAnotherSystem:
    """A C library that has nothing."""

    def __init__(self, name: str | None) -> None: ...


@pytest.mark.parametrize("has_the_call", [True, False])
def test_a_file_is_what_it_was(has_the_call: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_the_call:
        monkeypatch.setattr(ctypes, "CDLL", _OfAnotherSystem)
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"12345678" * 4096)
    begin_to_sync(descriptor)
    os.close(descriptor)
    begin_to_sync(descriptor)  # a descriptor that is no more is no error: this is a hint
    assert path.read_bytes() == b"12345678" * 4096


def test_a_writer_lets_the_disk_begin_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(checkpoint_writer, "begin_to_sync", begun.append)
    monkeypatch.setattr(checkpoint_writer, "_MUCH", 4000)
    info = TensorInfo(DTYPES["BF16"], (1000,))
    files = {f"{file}.safetensors": {f"{file}.{n}": info for n in range(5)} for file in "ab"}
    with CheckpointWriter(tmp_path, Layout(files=files)) as writer:
        for file in "ab":
            for n in range(5):
                writer.write(f"{file}.{n}", 0, np.full(1000, n, np.uint16))
    first, *_, last = begun
    assert begun == [first, first, last, last]
    assert first != last
    written = Checkpoint.open(tmp_path / "b.safetensors")
    assert [int(written.read(f"b.{n}", 999, 1)[0]) for n in range(5)] == [*range(5)]
