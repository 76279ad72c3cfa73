"""Magnitudes of deltas as histograms fine enough for percentiles, small enough to keep for every tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, FloatArray, Words, to_float
from ..kernels import cpu

_SHIFT = 20  # of a float32's bits: 8 bins to the octave, so that a percentile is right within 6 %
_BINS = 1 << (31 - _SHIFT)


@dataclass(frozen=True)
class Magnitudes:
    """Counts of |δ| in logarithmic bins, zeros apart, and the largest. What float32 cannot hold is absent."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    largest: float = 0.0

    @classmethod
    def of(cls, delta: FloatArray) -> Magnitudes:
        with np.errstate(over="ignore"):
            size = np.abs(delta.astype(np.float32, copy=False))
        if not np.isfinite(size).all():
            size = size[np.isfinite(size)]
        counts = np.bincount(size.view(np.uint32) >> np.uint32(_SHIFT), minlength=_BINS)
        return cls(counts, float(size.max(initial=0.0)))

    @classmethod
    def between(cls, base: Words, tuned: Words, dtype: DType) -> tuple[Magnitudes, int]:
        """Of the float deltas between words, and how many deltas are not finite. An infinity that the base
        has, too, is no delta.
        """
        if dtype.code == "BF16":
            counts = np.zeros(_BINS, np.int64)
            largest, strange = cpu.magnitudes_bf16(base, tuned, counts)
            if not strange:
                return cls(counts, largest), 0
        with np.errstate(over="ignore", invalid="ignore"):
            delta = to_float(tuned, dtype) - to_float(base, dtype)
        return cls.of(delta), int(np.count_nonzero(~np.isfinite(delta) & (base != tuned)))

    def plus(self, other: Magnitudes) -> Magnitudes:
        return Magnitudes(self.counts + other.counts, max(self.largest, other.largest))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def percentile(self, q: float) -> float:
        """The value below which a share `q`, in [0, 1], of the magnitudes lies; within 6 %."""
        if not self.total:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self.counts), q * self.total))
        return min(_middle(min(place, _BINS - 2)), self.largest)

    def share_below(self, bound: float) -> float:
        """Share of the magnitudes up to `bound`, up to the width of the bin in which it lies."""
        place = int(np.float32(bound).view(np.uint32)) >> _SHIFT
        return float(self.counts[:place].sum()) / self.total if self.total else 1.0

    def histogram(self, bins: int = 64) -> tuple[list[int], list[float]]:
        """Counts and edges over the occupied range, for wandb.Histogram: at most `bins` logarithmic bins."""
        occupied = np.flatnonzero(self.counts)
        first = int(occupied[0]) if occupied.size else 0
        stop = int(occupied[-1]) + 1 if occupied.size else 1
        edges = np.unique(np.linspace(first, stop, min(bins, stop - first) + 1).round().astype(np.int64))
        counts = np.add.reduceat(self.counts[first:stop], edges[:-1] - first)
        return counts.tolist(), _edge(edges).tolist()

    def summary(self) -> tuple[float, float, float]:
        """Median, 99th percentile, maximum."""
        return self.percentile(0.5), self.percentile(0.99), self.largest


def _edge(bins: NDArray[np.int64]) -> NDArray[np.float64]:
    return (bins.astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)


def _middle(number: int) -> float:
    return float(_edge(np.array([number, number + 1])).mean()) if number else 0.0


def merged(parts: Iterable[Magnitudes]) -> Magnitudes:
    """The magnitudes of several tensors together."""
    result = Magnitudes()
    for part in parts:
        result = result.plus(part)
    return result
