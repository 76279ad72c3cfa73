"""The segment tables of parts: one rule of docs/format.md §4 after another, before any frame is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PackageError
from ..weights.protocol import SEGMENT
from .codec import FETCH_AGAIN
from .manifest import Manifest, TensorRecord

Column = NDArray[np.int64]
Holds = NDArray[np.bool_]


_GROUP = 1 << 16
"""Rows that are looked at together: their rules take some times their memory."""


class Rule(NamedTuple):
    """What every row has to obey."""

    expected: str
    holds: Holds
    """By row."""


class _Limits(NamedTuple):
    """What the rows of a tensor may be."""

    numel: int
    base_numel: int
    """Leading elements that the base has."""
    has_segments: bool
    whole: bool
    """Whether it is carried whole."""
    counts_changes: bool

    @classmethod
    def of(cls, record: TensorRecord) -> _Limits:
        return cls(
            numel=record.info.numel,
            base_numel=record.base_info.numel,
            has_segments=record.kind != "base",
            whole=record.kind == "whole",
            counts_changes=record.counts_changes,
        )


_NONE = _Limits(numel=0, base_numel=0, has_segments=False, whole=False, counts_changes=False)
"""Of a tensor that the manifest does not have."""


def check_table(table: NDArray[np.int64], manifest: Manifest, nbytes: int, where: str) -> None:
    """Every row, int64 [n, 6], is a segment that lies within its tensor and, after those before it, within so
    many bytes of frames.

    Raises:
        PackageError: naming the first row that is not, and the rule that it breaks.
    """
    limits = np.array([tuple(limit) for limit in [*map(_Limits.of, manifest.tensors), _NONE]], np.int64)
    left = nbytes
    for first in range(0, len(table), _GROUP):
        group = table[first : first + _GROUP]
        rules = list(_rules(group, limits, left, nbytes))
        bad = np.flatnonzero(~np.logical_and.reduce([rule.holds for rule in rules]))
        if bad.size:
            row = int(bad[0])
            broken = next(rule for rule in rules if not rule.holds[row])
            found = f"row {first + row}, {tuple(group[row].tolist())}"
            raise PackageError(
                where, expected=f"a segment of {broken.expected}", found=found, remedy=FETCH_AGAIN
            )
        left -= int(group[:, -1].sum())


def _rules(table: NDArray[np.int64], of_tensors: Column, left: int, nbytes: int) -> Iterator[Rule]:
    """In the order in which a row is told of them: later ones count on the earlier ones. `left` of the file's
    bytes are for these rows.
    """
    tensor, start, length, kept, changed, size = table.T
    tensors = len(of_tensors) - 1
    known = (tensor >= 0) & (tensor < tensors)
    yield Rule(f"one of the manifest's {tensors} tensors", known)
    limits = _columns(of_tensors, np.where(known, tensor, -1))
    yield Rule("a tensor that is not as in the base", limits.has_segments)
    yield Rule(f"1 to {SEGMENT:,} elements", (length > 0) & (length <= SEGMENT))
    yield Rule("elements within its tensor", (start >= 0) & (start <= limits.numel - length))
    whole = limits.whole | (start >= limits.base_numel)
    apart = (start >= limits.base_numel) | (limits.base_numel >= start + length)
    yield Rule("elements on one side of where the base ends", apart)
    counted = (changed >= 0) & (changed <= kept) & (kept <= length)
    yield Rule("no more changed than kept elements, and no more kept ones than it has", counted)
    yield Rule("elements that are all kept and changed", ~whole | ((kept == length) & (changed == length)))
    yield Rule("as many changed as kept elements", whole | limits.counts_changes | (changed == kept))
    yield Rule("at least one byte", size > 0)
    ends = np.cumsum(np.clip(size, 0, left + 1))  # so that no sum is too large
    yield Rule(f"bytes within its file's {nbytes:,}", ends <= left)


class _Columns(NamedTuple):
    """`_Limits` of the tensors of many rows."""

    numel: Column
    base_numel: Column
    has_segments: Holds
    whole: Holds
    counts_changes: Holds


def _columns(limits: Column, tensor: Column) -> _Columns:
    numel, base_numel, has_segments, whole, counts_changes = limits[tensor].T
    return _Columns(numel, base_numel, has_segments != 0, whole != 0, counts_changes != 0)
