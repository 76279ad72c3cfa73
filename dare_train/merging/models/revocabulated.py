"""Weights with the rows of another vocabulary: each row from where its token is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DType, Words, cast, from_float, to_float
from ...errors import TensorMismatch
from ...weights.protocol import SEGMENT, TensorInfo, Weights, runs

Source = tuple[Weights, int]
"""Weights, and a row of theirs."""


class Revocabulated:
    """Implements `Placed`.

    Args:
        axis: names of the tensors with a row for each token.
        rows: for each row of the result, the weights' own row, or -1.
        others: by row, the rows whose mean stands where the weights have none; zeros where there are none.
        padding: how many rows follow, each the mean of those before.
    """

    def __init__(
        self,
        weights: Weights,
        axis: Collection[str],
        rows: NDArray[np.int64],
        others: Mapping[int, Sequence[Source]],
        *,
        folder: Path | None,
        padding: int = 0,
    ) -> None:
        self._weights = weights
        self._rows = rows
        self._others = others
        self._axis = axis
        self._mean: dict[str, Words] = {}
        self.folder = folder
        self.label = weights.label
        height = rows.size + padding
        self.tensors = {
            name: TensorInfo(info.dtype, (height, *info.shape[1:])) if name in axis else info
            for name, info in weights.tensors.items()
        }

    def read(self, name: str, start: int, count: int) -> Words:
        if name not in self._axis:
            return self._weights.read(name, start, count)
        width = self._width(name)
        if not count or not width:
            return np.empty(count, self.tensors[name].dtype.word)
        first, last = start // width, -(-(start + count) // width)
        words = self._read_rows(name, first, last).reshape(-1)
        begin = start - first * width
        return words[begin : begin + count]

    def _width(self, name: str) -> int:
        info = self.tensors[name]
        return info.numel // info.shape[0] if info.shape[0] else 0

    def _read_rows(self, name: str, first: int, last: int) -> Words:
        """Rows [first, last), of shape [rows, width]."""
        width = self._width(name)
        found = np.empty((last - first, width), self.tensors[name].dtype.word)
        inside = self._rows[first : min(last, self._rows.size)]
        breaks = np.flatnonzero((np.diff(inside) != 1) | (inside[:-1] < 0)) + 1
        for run in np.split(np.arange(inside.size), breaks):
            if not run.size:
                continue
            begin, own = int(run[0]), int(inside[run[0]])
            if own >= 0:
                words = self._weights.read(name, own * width, run.size * width)
                found[begin : begin + run.size] = words.reshape(run.size, width)
            else:
                found[begin] = self._other(name, first + begin, width)
        if last > self._rows.size:
            found[max(0, self._rows.size - first) :] = self._padding(name, width)
        return found

    def _other(self, name: str, row: int, width: int) -> Words:
        dtype = self.tensors[name].dtype
        given = self._others.get(row, ())
        having = [source for source in given if name in source[0].tensors]
        if given and not having:
            labels = ", ".join(dict.fromkeys(weights.label for weights, _ in given))
            remedy = "give models that all have it, or another source for the token"
            raise TensorMismatch(
                name, expected=f"a row for token {row}", found=f"no such tensor in {labels}", remedy=remedy
            )
        if len(having) == 1:
            weights, own = having[0]
            self._check(weights, name, width)
            return cast(weights.read(name, own * width, width), weights.tensors[name].dtype, dtype)
        total = np.zeros(width)
        for weights, own in having:
            self._check(weights, name, width)
            total += to_float(weights.read(name, own * width, width), weights.tensors[name].dtype)
        return _rounded(total / max(len(having), 1), dtype)

    def _check(self, weights: Weights, name: str, width: int) -> None:
        info = weights.tensors[name]
        if info.shape[1:] != self.tensors[name].shape[1:]:
            raise TensorMismatch(
                f"{weights.label}: {name}",
                expected=f"rows of {width} numbers, as in {self.label}",
                found=str(list(info.shape)),
                remedy="merge models of one width",
            )

    def _padding(self, name: str, width: int) -> Words:
        if name not in self._mean:
            dtype = self.tensors[name].dtype
            total = np.zeros(width)
            for first, count in runs(self._rows.size, max(1, SEGMENT // width)):
                words = self._read_rows(name, first, first + count)
                total += (
                    to_float(words.reshape(-1), dtype).reshape(count, width).sum(axis=0, dtype=np.float64)
                )
            self._mean[name] = _rounded(total / max(self._rows.size, 1), dtype)
        return self._mean[name]


def _rounded(values: NDArray[np.float64], dtype: DType) -> Words:
    return from_float(values.astype(dtype.compute), dtype)
