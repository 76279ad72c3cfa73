"""Where the segments of a package lie, by tensor: kept as columns, since a part may have millions of rows,
and made into segments when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PackageError
from .codec import FETCH_AGAIN
from .manifest import Manifest, TensorRecord
from .part import Part
from .segments import Segment

_GROUP = 1 << 12
"""Rows that are made into segments at once."""
_TENSOR, _START, _LENGTH, _KEPT, _CHANGED, _SIZE = range(6)


class Place(NamedTuple):
    """Where a segment's frame lies."""

    segment: Segment
    part: Part
    offset: int


class SegmentIndex:
    """The segments of a package's parts, sorted by tensor and start.

    Raises:
        PackageError: a table breaks a rule, or segments overlap.
    """

    def __init__(self, parts: Sequence[Part], manifest: Manifest, label: str) -> None:
        self._parts = parts
        self._label = label
        self._numbers = {record.name: number for number, record in enumerate(manifest.tensors)}
        self._tables = [part.table(manifest) for part in parts]
        self._first_rows = np.cumsum([0, *map(len, self._tables)])
        self._ends = [np.cumsum(table[:, _SIZE]) for table in self._tables]
        self._sorted = dict[int, NDArray[np.int64]]()
        tensors = self._column(_TENSOR)
        self._order = np.lexsort((self._column(_START), tensors))
        self._bounds = np.searchsorted(tensors[self._order], np.arange(len(self._numbers) + 1))
        self._starts = self._column(_START)[self._order]
        self._stops = self._starts + self._column(_LENGTH)[self._order]
        self._check_apart(tensors, manifest)

    def meeting(self, tensor: str, start: int, stop: int) -> Iterator[Place]:
        """Those of a tensor that meet [start, stop), in order."""
        first, last = self._slice(tensor)
        after = first + int(np.searchsorted(self._starts[first:last], stop))
        first += int(np.searchsorted(self._stops[first:last], start, side="right"))
        for group in range(first, after, _GROUP):
            yield from map(self._place, self._order[group : min(group + _GROUP, after)].tolist())

    def size(self, tensor: str) -> int:
        """Bytes of a tensor's frames."""
        return int(self._of(tensor, _SIZE).sum())

    def check_coverage(self, record: TensorRecord) -> None:
        """A tensor's segments hold as many elements as its record says.

        Raises:
            PackageError: they do not.
        """
        first, last = self._slice(record.name)
        base_numel = record.base_info.numel if record.kind == "delta" else 0
        inside = self._starts[first:last] < base_numel
        lengths = self._of(record.name, _LENGTH)
        covered = int(lengths[inside].sum())
        whole = int(lengths.sum()) - covered
        if record.kind != "base" and whole != record.info.numel - base_numel:
            self._refuse(record, f"{record.info.numel - base_numel} elements carried whole", whole)
        if record.kind == "delta":
            kept = int(self._of(record.name, _KEPT)[inside].sum())
            if not kept <= record.kept <= kept + base_numel - covered:
                self._refuse(record, f"{record.kept} kept elements", kept)
            changed = int(self._of(record.name, _CHANGED)[inside].sum())
            too_few = record.changed > changed
            if too_few or (record.counts_changes and record.changed < changed):
                self._refuse(record, f"{record.changed} changed elements", changed)

    def _refuse(self, record: TensorRecord, expected: str, found: int) -> None:
        where = f"{self._label}: {record.name}"
        raise PackageError(where, expected=expected, found=str(found), remedy=FETCH_AGAIN)

    def _slice(self, tensor: str) -> tuple[int, int]:
        """Of the sorted rows, those of a tensor."""
        number = self._numbers.get(tensor)
        return (0, 0) if number is None else (int(self._bounds[number]), int(self._bounds[number + 1]))

    def _of(self, tensor: str, column: int) -> NDArray[np.int64]:
        first, last = self._slice(tensor)
        if column not in self._sorted:
            self._sorted[column] = self._column(column)[self._order]
        return self._sorted[column][first:last]

    def _column(self, column: int) -> NDArray[np.int64]:
        """In the order of parts and rows."""
        columns = [table[:, column] for table in self._tables]
        return columns[0] if len(columns) == 1 else np.concatenate([np.empty(0, np.int64), *columns])

    def _place(self, row: int) -> Place:
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        row -= int(self._first_rows[number])
        segment = Segment.of(self._tables[number][row].tolist())
        return Place(segment, self._parts[number], int(self._ends[number][row]) - segment.size)

    def _check_apart(self, tensors: NDArray[np.int64], manifest: Manifest) -> None:
        of_one = tensors[self._order]
        overlapping = np.flatnonzero((of_one[1:] == of_one[:-1]) & (self._stops[:-1] > self._starts[1:]))
        if overlapping.size:
            place = int(overlapping[0]) + 1
            where = f"{self._label}: {manifest.tensors[int(of_one[place])].name}"
            found = f"two at {int(self._starts[place])}"
            raise PackageError(
                where, expected="segments that do not overlap", found=found, remedy=FETCH_AGAIN
            )
