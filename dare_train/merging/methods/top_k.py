"""The k largest of a tensor's elements, found run by run: exactly k, equals told apart by their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FloatArray
from ...kernels import sums

Sizes = NDArray[np.float32]
"""Magnitudes of a run's elements, none negative. Elements that a run leaves out are zero. NaN is larger than
infinity."""

Bits = NDArray[np.uint32]
"""Of magnitudes: in the same order, and NaNs have a place in it."""

_LEADING = 1 << 15
_TRAILING = np.uint32(0xFFFF)


def sizes_of(deltas: FloatArray) -> Sizes:
    """Magnitudes of deltas, every NaN with the same bits."""
    sizes: Sizes = np.abs(deltas).astype(np.float32, copy=False)
    bits = sizes.view(np.uint32)
    np.minimum(bits, sums.NAN_SIZE, out=bits)
    return sizes


@dataclass(frozen=True, kw_only=True)
class Largest:
    """Which elements belong to the k largest of a tensor.

    All those above `bound` do, and of those equal to it as many as are wanted: the first, or the last, by
    flat index.
    """

    bound: np.uint32
    """Bits of a magnitude."""
    wanted: int
    """Elements equal to the bound that belong."""
    equals: dict[int, tuple[int, int]]
    """By the start of each run, how many elements equal to the bound lie before it, and how many in it."""
    equal: int
    """Elements equal to the bound in all."""
    last: bool

    @property
    def chosen(self) -> tuple[int, int]:
        """[begin, end) of those equal to the bound that belong, counted over the tensor."""
        return (self.equal - self.wanted, self.equal) if self.last else (0, self.wanted)

    def among(self, sizes: Sizes, start: int) -> NDArray[np.bool_]:
        """Those of a run, which must begin where one of the runs began that were counted."""
        bits = sizes.view(np.uint32)
        keep = bits > self.bound
        equals = np.flatnonzero(bits == self.bound)
        begin, end = self.chosen
        before, _ = self.equals.get(start, (0, 0))
        keep[equals[max(begin - before, 0) : max(end - before, 0)]] = True
        return keep

    def least(self, start: int) -> np.uint32 | None:
        """From which bits on the elements of a run belong; None where of those equal to the bound some do and
        some do not.
        """
        begin, end = self.chosen
        before, count = self.equals.get(start, (0, 0))
        inside = min(before + count, end) - max(before, begin)
        if count and 0 < inside < count:
            return None
        return np.uint32(self.bound if not count or inside > 0 else self.bound + np.uint32(1))


EVERY = Largest(bound=np.uint32(0), wanted=1 << 62, equals={}, equal=0, last=False)
NONE = Largest(bound=np.uint32(0xFFFFFFFF), wanted=0, equals={}, equal=0, last=False)

Runs = Callable[[Callable[[int, Sizes], object]], Iterable[object]]
"""Calls a function with the start and the sizes of every run of a tensor, on any thread; its results in
order."""


def _counted(sizes: Sizes) -> NDArray[np.int64]:
    counts = np.zeros(_LEADING, np.int64)
    sums.count_leading(np.ascontiguousarray(sizes), counts)
    return counts


def _within(sizes: Sizes, border: int) -> Bits:
    """Those whose leading bits are `border`."""
    bits: Bits = sizes.view(np.uint32)
    on_border: Bits = bits[bits >> np.uint32(16) == border]
    return on_border


def largest(
    each_run: Runs,
    k: int,
    *,
    last: bool = False,
    counted: Callable[[Any], NDArray[np.int64]] = _counted,
    within: Callable[[Any, int], Bits] = _within,
) -> Largest:
    """The k largest elements of a tensor. Two passes: count the leading bits, then the others of those on the
    border.

    Args:
        each_run: walks over the tensor.
        k: how many; zeros that runs leave out are taken last.
        last: of equal elements take those with the highest flat indices.
        counted, within: of a run's sizes, how many have each of the 2¹⁵ leading bits after the sign, and the
            bits of those that have certain ones. By default sizes are numpy's.
    """
    if k <= 0:
        return NONE
    counts = np.zeros(_LEADING, np.int64)
    for part in each_run(lambda _, sizes: counted(sizes)):
        counts += part  # type: ignore[arg-type]
    above = int(counts.sum()) - np.cumsum(counts)
    if above[0] + counts[0] <= k:
        return EVERY
    border = int(np.argmax(above < k))
    on_border: list[tuple[int, Bits]] = list(each_run(lambda start, sizes: (start, within(sizes, border))))  # type: ignore[arg-type]
    trailing = np.zeros(1 << 16, np.int64)
    for _, part in on_border:
        trailing += np.bincount(part & _TRAILING, minlength=1 << 16)
    rest = k - int(above[border])
    over = trailing.sum() - np.cumsum(trailing)
    last_bits = int(np.argmax(over < rest))
    bound = np.uint32(border << 16 | last_bits)
    equals = [(start, int(np.count_nonzero(part == bound))) for start, part in on_border]
    places = np.cumsum([0, *(count for _, count in equals)])
    return Largest(
        bound=bound,
        wanted=rest - int(over[last_bits]),
        equals={start: (int(before), count) for (start, count), before in zip(equals, places, strict=False)},
        equal=int(places[-1]),
        last=last,
    )


def of_rank(each_run: Runs, numel: int, rank: int) -> float:
    """The element of a tensor that has `rank` smaller ones, or equals, before it: 0 is the least.

    Args:
        each_run: walks over the tensor, and leaves no element out.
    """
    if rank == 0:
        least: list[np.float32] = list(each_run(lambda _, sizes: np.fmin.reduce(sizes)))  # type: ignore[arg-type]
        return float(np.fmin.reduce(least))
    return float(largest(each_run, numel - rank).bound.view(np.float32))
