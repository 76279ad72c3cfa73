"""Weights whose tensors are cut, joined or turned otherwise than where they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...dtypes import Words
from ..live.layouts import Block, Place
from ..protocol import TensorInfo, Weights

Joined = Sequence[tuple[str, Block]]
"""A tensor made of others: a tensor's name, and where a run of it lies in the whole."""


class Relaid:
    """The same weights in another layout.

    Args:
        cut: tensors that are parts of others, by their new names.
        joined: tensors that others are parts of, by their new names.
        tensors: what there is then: those, and what stays as it is.
    """

    def __init__(
        self,
        weights: Weights,
        tensors: Mapping[str, TensorInfo],
        *,
        cut: Mapping[str, Place],
        joined: Mapping[str, Joined],
    ) -> None:
        self.label = weights.label
        self.tensors = tensors
        self._weights = weights
        self._cut = cut
        self._joined = joined

    def read(self, name: str, start: int, count: int) -> Words:
        if name in self._cut:
            return self._read_cut(name, start, count)
        if name in self._joined:
            return self._read_joined(name, start, count)
        return self._weights.read(name, start, count)

    def _read_cut(self, name: str, start: int, count: int) -> Words:
        parts = [np.empty(0, self.tensors[name].dtype.word)]
        for block in self._cut[name].blocks:
            first = max(start - block.start, 0)
            stop = min(start + count - block.start, block.length)
            if first < stop and block.is_run:
                parts.append(self._weights.read(block.source, block.offset + first, stop - first))
            elif first < stop:
                places = block.places(first, stop)
                low, high = int(places.min()), int(places.max()) + 1
                parts.append(self._weights.read(block.source, low, high - low)[places - low])
        return np.concatenate(parts)

    def _read_joined(self, name: str, start: int, count: int) -> Words:
        words = np.empty(count, self.tensors[name].dtype.word)
        for source, block in self._joined[name]:
            for part in block.within(start, start + count):
                read = self._weights.read(source, part.start, part.length)
                if part.is_run:
                    words[part.offset - start :][: part.length] = read
                else:
                    words[part.places(0, part.length) - start] = read
        return words
