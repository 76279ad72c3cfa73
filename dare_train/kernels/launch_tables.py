"""What kernels of a device are called with: flat runs of many tensors as one table, so that one launch does a
whole model.

Rows lie where their tensors lie, and are changed in place. A launch has one program for each *block* of 8,192
elements that share Philox counters, in eight *planes* of 1,024 (docs/format.md §4.3); a table says which row
a program belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..dtypes import DType
from .transfers import to_device

BLOCK = 8192
PLANES = 8
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what words are moved as, without being interpreted."""

ABSENT = 1 << 16
"""A threshold that no draw reaches: nothing is kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """Elements [start, start + count) of a tensor's flat order."""

    flat: Tensor
    """Bit patterns, 1-D, contiguous, of one of `INTEGERS`, among them the row's."""
    start: int
    count: int
    offset: int = 0
    """Where in `flat` the row begins."""

    @property
    def words(self) -> Tensor:
        return self.flat[self.offset : self.offset + self.count]

    @property
    def address(self) -> int:
        return self.flat.data_ptr() + self.offset * self.flat.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of one dtype on one device."""

    dtype: DType
    rows: tuple[Row, ...]

    @property
    def device(self) -> torch.device:
        return self.rows[0].flat.device

    @property
    def word(self) -> torch.dtype:
        return INTEGERS[self.dtype.itemsize]

    @cached_property
    def first_blocks(self) -> list[int]:
        """The number of the block in which each row begins, and of all blocks at the end."""
        firsts = [0]
        for row in self.rows:
            firsts.append(
                firsts[-1] + (-(-(row.start + row.count) // BLOCK) - row.start // BLOCK if row.count else 0)
            )
        return firsts

    @property
    def blocks(self) -> int:
        return self.first_blocks[-1]

    @cached_property
    def table(self) -> Tensor:
        """int64 [rows, 4]: address, start, elements, first block."""
        lines = [
            [row.address, row.start, row.count, first]
            for row, first in zip(self.rows, self.first_blocks, strict=False)
        ]
        return to_device(torch.tensor(lines, dtype=torch.int64).reshape(-1, 4), self.device)

    @cached_property
    def row_of_block(self) -> Tensor:
        """int32 [blocks]."""
        firsts = torch.tensor(self.first_blocks)
        return to_device(
            torch.repeat_interleave(torch.arange(len(self.rows), dtype=torch.int32), firsts.diff()),
            self.device,
        )

    @cached_property
    def aligned(self) -> bool:
        """Whether every row's eights of elements, and sixteens of bytes, lie where they can be read at
        once.
        """
        each = max(8, 16 // self.dtype.itemsize)
        return all(row.address % 16 == 0 and row.start % each == 0 for row in self.rows)

    @property
    def nbytes(self) -> int:
        """Memory that the tables take."""
        return 32 * len(self.rows) + 4 * self.blocks

    def per_row(self, counts: Tensor) -> list[int]:
        """Sums over each row's blocks of int64 [blocks, 8]. Waits for the device."""
        through = torch.cat([counts.new_zeros(1), counts.sum(dim=1).cumsum(0)]).cpu()
        return through[torch.tensor(self.first_blocks)].diff().tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """The mask of every row: what draws of `keys` keep at `thresholds` (0: all, `ABSENT`: none), or the set
    bits of a bitmap.
    """

    keys: Sequence[int]
    """64-bit Philox keys (`masks.key_of`)."""
    thresholds: Sequence[int]
    bitmaps: Sequence[Tensor | None] = ()
    """uint8, least significant bit first, from the row's first element on; None where draws decide. Empty:
    everywhere."""

    def bitmap(self, row: int) -> Tensor | None:
        return self.bitmaps[row] if self.bitmaps else None

    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def table(self, device: torch.device) -> Tensor:
        """int64 [rows, 3]: key, threshold, address of the bitmap or 0. Made once for each device."""
        if device not in self._tables:
            self._tables[device] = self._table(device)
        return self._tables[device]

    def _table(self, device: torch.device) -> Tensor:
        lines = []
        for row, (key, threshold) in enumerate(zip(self.keys, self.thresholds, strict=True)):
            bitmap = self.bitmap(row)
            lines.append(
                [
                    key - (1 << 64) if key >> 63 else key,
                    threshold,
                    bitmap.data_ptr() if bitmap is not None else 0,
                ]
            )
        return to_device(torch.tensor(lines, dtype=torch.int64).reshape(-1, 3), device)

    @property
    def stored(self) -> bool:
        """Whether a bitmap decides anywhere."""
        return any(bitmap is not None for bitmap in self.bitmaps)


@dataclass(frozen=True, kw_only=True, eq=False)
class Term:
    """What one package adds to every row: the words that kept elements have, or their deltas, one after
    another.
    """

    masks: Masks
    offsets: Tensor
    """int64 [blocks, 8]: where in `values` each plane's begin."""
    values: Tensor
    """1-D. Words of the rows' dtype, or deltas: float32, of float64 rows float64."""
    factors: Sequence[float]
    """Of each row: w·γ."""
    deltas: bool = False
    """Whether the values are deltas."""


def offsets_of(counts: Tensor) -> Tensor:
    """Where each plane's values begin, given how many elements each keeps."""
    return (torch.cumsum(counts.reshape(-1), 0) - counts.reshape(-1)).reshape(counts.shape)
