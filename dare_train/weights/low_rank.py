"""Low-rank updates of a weight, as LoRA and DoRA adapters hold them, merged into it run by run.

    W' = W + s · B A                              LoRA (arXiv 2106.09685, eq. 3)
    W' = m / ‖W + s · B A‖ · (W + s · B A)        DoRA (arXiv 2402.09353, eq. 5), one norm for each output

A mixture's stacked experts have a B A for each.

evaluated in float64 and rounded once, to the weight's dtype unless another is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType, Words, from_float, to_float
from ..kernels.products import thin_product
from .protocol import TensorInfo

UNROUNDED = DTYPES["F64"]
"""What merging is evaluated in."""
Matrix = NDArray[np.float64]
Places = NDArray[np.int64]

BLOCK = 1 << 16
"""Elements that are computed together, in whole rows."""


def finest(info: TensorInfo) -> TensorInfo:
    """Of a weight after merging, where rounding is left to others: float64 where it has 16 bits."""
    return TensorInfo(UNROUNDED, info.shape) if info.dtype.bits == 16 else info


class Readable(Protocol):
    def read(self, name: str, start: int, count: int) -> Words: ...


class Update(Protocol):
    """What an adapter does to one tensor, seen as a matrix: its first axis by all others."""

    @property
    def by_rows(self) -> bool:
        """Whether what it gives for one element depends on others."""

    @property
    def by_all(self) -> bool:
        """Whether it depends on others than those of its row."""

    def added(self, first: int, stop: int) -> Matrix:
        """What is added to rows [first, stop), float64."""

    def squares(self, alone: Matrix, first: int) -> NDArray[np.float64]:
        """The share of some rows in the squared norms, where these are `by_all`: `alone` are the rows from
        `first` on, with this update alone.
        """

    def rescaled(
        self, total: Matrix, alone: Matrix, first: int, squares: NDArray[np.float64] | None
    ) -> Matrix:
        """Rows from `first` on, where it is `by_rows`: `total` with all updates up to this one; `squares`
        of all rows, where it is `by_all`.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """What one adapter does to one weight W, seen as a matrix: its first axis by all others. An `Update`."""

    a: Matrix
    """A, float64 [rank, in]."""
    b: Matrix
    """B, float64 [out, rank]."""
    scaling: float
    """s, which is α / rank or α / √rank."""
    transposed: bool = False
    """W lies as [in, out] (GPT-2's Conv1D) or as [num, dim] (an Embedding): what is added is (s · B A)ᵀ."""
    magnitude: NDArray[np.float64] | None = None
    """m of DoRA, float64 [out]; None for LoRA."""

    @property
    def by_rows(self) -> bool:
        return self.magnitude is not None

    @property
    def by_all(self) -> bool:
        return self.by_rows and self.transposed

    def added(self, first: int, stop: int) -> Matrix:
        left = self.a.T if self.transposed else self.b
        right = self.b.T if self.transposed else self.a
        return thin_product(left[first:stop], right, self.scaling)

    def at(self, rows: Places, columns: Places) -> Matrix:
        """What is added where some rows and columns of W meet, float64 [rows, columns]."""
        left = self.a.T if self.transposed else self.b
        right = self.b.T if self.transposed else self.a
        return thin_product(left[rows], right[:, columns], self.scaling)

    def squares(self, alone: Matrix, first: int) -> NDArray[np.float64]:
        sums: NDArray[np.float64] = np.square(alone).sum(axis=0)
        return sums

    def rescaled(
        self, total: Matrix, alone: Matrix, first: int, squares: NDArray[np.float64] | None
    ) -> Matrix:
        assert self.magnitude is not None
        if squares is not None:
            factors = (self.magnitude / np.sqrt(squares))[None, :]
        else:
            norm = np.sqrt(np.square(alone).sum(axis=1))
            factors = (self.magnitude[first : first + len(total)] / norm)[:, None]
        scaled: Matrix = factors * total
        return scaled


@dataclass(frozen=True, kw_only=True, eq=False)
class Stacked:
    """What one adapter does to the weights of experts that lie one on the other, as one matrix of all their
    rows.
    """

    experts: tuple[LowRank, ...]
    height: int
    """Rows of each."""

    def at(self, rows: Places, columns: Places) -> Matrix:
        """As `LowRank.at`."""
        found = np.empty((rows.size, columns.size))
        of = rows // self.height
        for number in np.unique(of).tolist():
            here = of == number
            found[here] = self.experts[number].at(rows[here] - number * self.height, columns)
        return found


def stacked_factors(a: Matrix, b: Matrix, count: int, *, scaling: float, transposed: bool) -> Stacked:
    """As PEFT lays out the factors of `count` experts: A [experts · rank, in], B [out, rank · experts]."""
    by_expert = a.reshape(count, -1, a.shape[1])
    experts = tuple(
        LowRank(a=by_expert[number], b=b[:, number::count], scaling=scaling, transposed=transposed)
        for number in range(count)
    )
    return Stacked(experts=experts, height=a.shape[1] if transposed else b.shape[0])


def merged_words(
    base: Readable,
    updates: Sequence[Update],
    info: TensorInfo,
    name: str,
    start: int,
    count: int,
    *,
    into: DType | None = None,
) -> Words:
    """Words of elements [start, start + count) of a weight after merging, the same however it is cut in runs.

    Args:
        base: reads the weight's words before merging.
        updates: each fits the weight; they are merged in this order, with no rounding in between.
        info: dtype (floating point, 16 bits or more) and shape of the weight.
        into: dtype of the result; by default the weight's.

    An element that merging leaves equal keeps its bits: -0 stays -0. So does a NaN.
    """
    into = into or info.dtype
    if not count:
        return np.empty(0, into.word)
    columns = info.numel // (info.shape[0] if info.shape else 1)
    first = start // columns
    stop = -(-(start + count) // columns)
    squares = [_squares(base, update, info, name) if update.by_all else None for update in updates]
    blocks: list[Words] = []
    skipped = start
    for row, words in _rows(base, info, name, first, stop):
        skipped = skipped if blocks else start - row * columns
        blocks.append(_merged_block(words, updates, squares, info.dtype, row, into))
    return np.concatenate(blocks)[skipped : skipped + count]


def _rows(base: Readable, info: TensorInfo, name: str, first: int, stop: int) -> Iterator[tuple[int, Words]]:
    """Rows [first, stop) and some around them, in blocks that are always the same: the first of each, and its
    words, [rows, columns].
    """
    rows = info.shape[0] if info.shape else 1
    columns = info.numel // rows
    together = max(1, BLOCK // columns)
    for row in range(first // together * together, stop, together):
        height = min(together, rows - row)
        yield row, base.read(name, row * columns, height * columns).reshape(height, columns)


_known: WeakKeyDictionary[Update, NDArray[np.float64]] = WeakKeyDictionary()


def _squares(base: Readable, update: Update, info: TensorInfo, name: str) -> NDArray[np.float64]:
    """Squared norms over all of a tensor: worked out once, for an update is of one base."""
    known = _known.get(update)
    if known is None:
        rows = info.shape[0] if info.shape else 1
        shares = []
        for row, words in _rows(base, info, name, 0, rows):
            alone = to_float(words, info.dtype).astype(np.float64) + update.added(row, row + len(words))
            shares.append(update.squares(alone, row))
        known = _known[update] = np.sum(shares, axis=0)
    return known


def _merged_block(
    words: Words,
    updates: Sequence[Update],
    squares: Sequence[NDArray[np.float64] | None],
    dtype: DType,
    first: int,
    into: DType,
) -> Words:
    """The words of rows from `first` on after merging, flat."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        base = to_float(words, dtype).astype(np.float64)
        total = base
        for update, of_all in zip(updates, squares, strict=True):
            added = update.added(first, first + len(words))
            total = total + added
            if update.by_rows:  # PEFT takes the norm of the base with this update alone
                total = update.rescaled(total, base + added, first, of_all)
    merged = from_float(total.reshape(-1), into)
    if into != dtype:
        return merged
    kept = (total == base) | np.isnan(base)
    return np.where(kept.reshape(-1), words.reshape(-1), merged)
