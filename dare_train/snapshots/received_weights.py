"""A model as a receiver of the package gets it, for as long as it is looked at."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from ..dtypes import cast
from ..weights.live.live import LiveWeights
from ..weights.live.live_lora import silenced
from ..weights.live.named_tensors import Live
from .snapshotter import Received, Snapshotter


@contextmanager
def received_weights(model: Live, snapshotter: Snapshotter, folder: Path) -> Iterator[None]:
    """Within the block the model is what a receiver gets; afterwards, and if that fails, it is as before. The
    weights it displaces wait in a file, not in memory. All ranks enter and leave it together.
    """

    def opened() -> tuple[LiveWeights, LiveWeights, IO[bytes]]:
        folder.mkdir(parents=True, exist_ok=True)
        read = LiveWeights(model, source=snapshotter.source)
        return LiveWeights(model), read, tempfile.TemporaryFile(dir=folder)

    live, read, file = snapshotter.ranks.each(opened)
    with file:
        displaced = _Displaced(live, file)
        try:
            displaced.put(snapshotter, read)
            with silenced(model):
                yield
        finally:
            displaced.put_back()


class _Displaced:
    """Words of the live model that had to make room."""

    def __init__(self, live: LiveWeights, file: IO[bytes]) -> None:
        self._live = live
        self._file = file
        self._runs: list[tuple[str, int, int]] = []

    def put(self, snapshotter: Snapshotter, read: LiveWeights) -> None:
        """Put what a package would give, of the weights as they are `read`, in place of the live ones."""
        runs = snapshotter.preview(read)
        snapshotter.ranks.each(lambda: self._put(runs))
        self._live.settle()

    def _put(self, runs: Iterator[Received]) -> None:
        for name, start, words, dtype in runs:
            self._file.write(self._live.read(name, start, words.size).tobytes())
            self._runs.append((name, start, words.size))
            self._live.overwrite(name, start, cast(words, dtype, self._live.tensors[name].dtype))

    def put_back(self) -> None:
        self._file.seek(0)
        for name, start, size in self._runs:
            word = self._live.tensors[name].dtype.word
            self._live.overwrite(name, start, np.frombuffer(self._file.read(size * word.itemsize), word))
        self._live.settle()
