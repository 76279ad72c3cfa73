"""Low-rank updates of a weight, as LoRA and DoRA adapters hold them, merged into it run by run.

    W' = W + s · B A                              LoRA (arXiv 2106.09685, eq. 3)
    W' = m / ‖W + s · B A‖ · (W + s · B A)        DoRA (arXiv 2402.09353, eq. 5), one norm for each output

evaluated in float64 and rounded once, to the weight's dtype unless another is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, DType, Words, from_float, to_float
from ..kernels.products import thin_product
from .protocol import TensorInfo

UNROUNDED = DTYPES["F64"]
"""What merging is evaluated in."""
Matrix = NDArray[np.float64]

BLOCK = 1 << 16
"""Elements that are computed together, in whole rows."""


def finest(info: TensorInfo) -> TensorInfo:
    """Of a weight after merging, where rounding is left to others: float64 where it has 16 bits."""
    return TensorInfo(UNROUNDED, info.shape) if info.dtype.bits == 16 else info


class Readable(Protocol):
    def read(self, name: str, start: int, count: int) -> Words: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """What one adapter does to one weight W, seen as a matrix: its first axis by all others."""

    a: Matrix
    """A, float64 [rank, in]."""
    b: Matrix
    """B, float64 [out, rank]."""
    scaling: float
    """s, which is α / rank or α / √rank."""
    transposed: bool = False
    """W lies as [in, out] (GPT-2's Conv1D) or as [num, dim] (an Embedding): what is added is (s · B A)ᵀ."""
    magnitude: NDArray[np.float64] | None = None
    """m of DoRA, float64 [out]; None for LoRA. Not together with `transposed`."""

    @property
    def by_rows(self) -> bool:
        """Whether what it gives for one element depends on the row that it is in."""
        return self.magnitude is not None

    def added(self, first: int, stop: int) -> Matrix:
        """Rows [first, stop) of s · B A as W lies, float64 [stop - first, columns of W]."""
        left = self.a.T if self.transposed else self.b
        right = self.b.T if self.transposed else self.a
        return thin_product(left[first:stop], right, self.scaling)


def merged_words(
    base: Readable,
    updates: Sequence[LowRank],
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
    rows = info.shape[0] if info.shape else 1
    columns = info.numel // rows
    together = max(1, BLOCK // columns)
    first = start // columns // together * together
    stop = -(-(start + count) // columns)
    blocks = []
    for row in range(first, stop, together):
        height = min(together, rows - row)
        words = base.read(name, row * columns, height * columns)
        blocks.append(_merged_block(words, updates, info.dtype, row, height, into))
    skipped = start - first * columns
    return np.concatenate(blocks)[skipped : skipped + count]


def _merged_block(
    words: Words, updates: Sequence[LowRank], dtype: DType, first: int, height: int, into: DType
) -> Words:
    """The words of rows [first, first + height) after merging."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        base = to_float(words, dtype).astype(np.float64).reshape(height, -1)
        total = base
        for update in updates:
            added = update.added(first, first + height)
            total = total + added
            if update.magnitude is not None:  # PEFT takes the norm of the base with this update alone
                norm = np.sqrt(np.square(base + added).sum(axis=1))
                total = (update.magnitude[first : first + height] / norm)[:, None] * total
    merged = from_float(total.reshape(-1), into)
    if into != dtype:
        return merged
    kept = (total == base) | np.isnan(base)
    return np.where(kept.reshape(-1), words, merged)
