"""A model as a receiver of the package gets it, for as long as it is looked at."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from ..weights.live import LiveWeights
from .snapshotter import Snapshotter


class ReceivedWeights:
    """A `with` block in which the model is what a receiver gets. The weights it displaces wait in a file, not
    in memory.
    """

    def __init__(self, live: LiveWeights, snapshotter: Snapshotter, folder: Path) -> None:
        self._live, self._snapshotter = live, snapshotter
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def __enter__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=self._folder)
        self._displaced: list[tuple[str, int, int]] = []
        for name, start, words in self._snapshotter.preview(self._live):
            self._file.write(self._live.read(name, start, words.size).tobytes())
            self._displaced.append((name, start, words.size))
            self._live.overwrite(name, start, words)
        self._live.settle()

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        for name, start, size in self._displaced:
            word = self._live.tensors[name].dtype.word
            self._live.overwrite(name, start, np.frombuffer(self._file.read(size * word.itemsize), word))
        self._live.settle()
        self._file.close()
