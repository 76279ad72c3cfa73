"""Tensors of files that are views of a model's: where each element of the one lies in the other.

What a conversion cuts, joins, turns or interleaves is found from where it puts numbers that say where
they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError

Index = NDArray[np.int64]
_BLOCKS = 1 << 16
"""Blocks of one tensor beyond which a layout is not looked at as views any more."""


@dataclass(frozen=True)
class Block:
    """A run of a file's tensor that lies evenly spaced in one of the model's."""

    start: int
    """Flat index in the file's tensor at which it begins."""
    source: str
    """The model's tensor."""
    offset: int
    """Flat index there of its first element."""
    shape: tuple[int, ...]
    """Its elements, seen as a grid in the file's order."""
    strides: tuple[int, ...]
    """Of that grid in the model's tensor, in elements."""

    @property
    def length(self) -> int:
        return prod(self.shape)

    @property
    def is_run(self) -> bool:
        """Whether it is a contiguous run there, too."""
        return not self.shape or (len(self.shape) == 1 and self.strides[0] == 1)

    def places(self, first: int, stop: int) -> Index:
        """Where in the model's tensor its elements [first, stop) lie."""
        within = np.arange(first, stop)
        found = np.full(within.shape, self.offset)
        for count, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            within, along = np.divmod(within, count)
            found += along * stride
        return found

    def within(self, begin: int, end: int) -> Iterator[Block]:
        """The parts of it that lie in [begin, end) of the model's tensor."""
        if not self.length:
            return
        reach = sum((count - 1) * stride for count, stride in zip(self.shape, self.strides, strict=True))
        if begin <= self.offset and self.offset + reach < end:
            yield self
            return
        if self.offset >= end or self.offset + reach < begin:
            return
        (count, *inner), (stride, *inner_strides) = self.shape, self.strides
        row = replace(self, shape=tuple(inner), strides=tuple(inner_strides))
        across = reach - (count - 1) * stride
        first = max(0, -(-(begin - self.offset) // stride))
        last = min(count - 1, (end - 1 - across - self.offset) // stride)
        if first <= last:
            shape = (last - first + 1, *inner)
            start = self.start + first * row.length
            yield replace(self, start=start, offset=self.offset + first * stride, shape=shape)
        cut = [number for number in range(count) if not first <= number <= last] if inner else ()
        for number in cut:
            start = self.start + number * row.length
            yield from replace(row, start=start, offset=self.offset + number * stride).within(begin, end)


@dataclass(frozen=True)
class Place:
    """A tensor of the files: its shape, and the blocks that it is made of, in order."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> Place:
        """All of one of the model's tensors, as it lies there."""
        return cls(shape, (Block(0, name, 0, (prod(shape),), (1,)),))

    @property
    def sources(self) -> frozenset[str]:
        return frozenset(block.source for block in self.blocks)

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        """Whether it is all of one tensor that has this shape in the model."""
        one = len(self.blocks) == 1 and self.blocks[0].is_run
        return one and self.blocks[0].offset == 0 and self.shape == shape


def blocks_of(name: str, index: Index, bounds: Mapping[str, tuple[int, int]]) -> tuple[Block, ...]:
    """The blocks of a file's tensor.

    Args:
        name: what messages call it.
        index: flat, for each element where it lies, all of the model's tensors put one behind the other.
        bounds: [begin, end) of each of those.

    Raises:
        ConfigError: it lies in no order that a few blocks describe.
    """
    sources = sorted(bounds, key=lambda source: bounds[source])
    begins = np.array([bounds[source][0] for source in sources])
    if not index.size:
        return (Block(0, sources[0], 0, (0,), (1,)),)
    number = np.searchsorted(begins, index, side="right") - 1
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), index.size]
    blocks: list[Block] = []
    for begin, end in zip(edges, edges[1:], strict=False):
        if begin < end:
            source = sources[int(number[begin])]
            here = index[begin:end] - bounds[source][0]
            blocks += [replace(block, start=block.start + begin) for block in _grids(source, here)]
        if len(blocks) > _BLOCKS:
            expected = "a tensor that files have cut, joined or turned"
            remedy = "extract from the saved checkpoint instead"
            raise ConfigError(name, expected=expected, found="one in another order", remedy=remedy)
    return tuple(blocks)


def _grids(source: str, index: Index) -> list[Block]:
    """Indices as grids, from the innermost axis outwards; what is regular no further out comes one by one."""
    shape: list[int] = []
    strides: list[int] = []
    firsts = index
    while firsts.size > 1:
        step = int(firsts[1] - firsts[0])
        breaks = np.flatnonzero(np.diff(firsts) != step) + 1
        count = int(np.gcd.reduce([firsts.size, *breaks]))
        if count == 1 or step <= 0:
            break
        shape.insert(0, count)
        strides.insert(0, step)
        firsts = firsts[::count]
    size = prod(shape)
    return [
        Block(place * size, source, int(first), tuple(shape), tuple(strides))
        for place, first in enumerate(firsts.tolist())
    ]


def widened(blocks: Sequence[Block], widths: Mapping[str, tuple[int, int]]) -> tuple[Block, ...] | None:
    """Blocks as they are in tensors whose rows are longer than those that they were found in; None where they
    do not say that, since a row was cut.

    Args:
        widths: of each of the model's tensors, how long its rows were, and how long they are.
    """
    wide = []
    start = 0
    for block in blocks:
        narrow, real = widths[block.source]
        scaled = block if narrow == real else _scaled(block, narrow, real)
        if scaled is None:
            return None
        wide.append(replace(scaled, start=start))
        start += scaled.length
    return tuple(wide)


def _scaled(block: Block, narrow: int, real: int) -> Block | None:
    along = [
        stride == 1 and count % narrow == 0 for count, stride in zip(block.shape, block.strides, strict=True)
    ]
    across = [stride % narrow == 0 for stride in block.strides]
    if (
        block.offset % narrow
        or sum(along) != 1
        or not all(a or b for a, b in zip(along, across, strict=True))
    ):
        return None
    shape = [count // narrow * real if a else count for count, a in zip(block.shape, along, strict=True)]
    strides = [1 if a else stride // narrow * real for stride, a in zip(block.strides, along, strict=True)]
    return replace(block, offset=block.offset // narrow * real, shape=tuple(shape), strides=tuple(strides))
