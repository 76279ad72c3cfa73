"""Segments kept as columns: which meet a run, in which part and where, as the definition says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_train.errors import PackageError
from dare_train.package.manifest import Manifest
from dare_train.package.part import Part
from dare_train.package.segment_index import SegmentIndex

Row = tuple[int, int, int, int, int, int]
NAMES = ("a", "b", "c")


def index(parts: list[list[Row]]) -> SegmentIndex:
    tables = [np.array(rows, np.int64).reshape(-1, 6) for rows in parts]
    opened = [cast("Part", SimpleNamespace(table=lambda _, table=table: table)) for table in tables]
    records = [SimpleNamespace(name=name) for name in NAMES]
    return SegmentIndex(opened, cast("Manifest", SimpleNamespace(tensors=records)), "package")


@st.composite
def tables(draw: Any) -> list[list[Row]]:
    parts: list[list[Row]] = [[] for _ in range(draw(st.integers(0, 3)))]
    if parts:
        for tensor in range(len(NAMES)):
            start = 0
            for gap, length in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=6)):
                row = (tensor, start + gap, length, 1, 1, draw(st.integers(1, 9)))
                draw(st.sampled_from(parts)).append(row)
                start += gap + length
        parts = [draw(st.permutations(rows)) for rows in parts]
    return parts


@given(tables(), st.sampled_from([*NAMES, "none"]), st.integers(0, 12), st.integers(0, 12))
def test_segments_that_meet_a_run(parts: list[list[Row]], name: str, start: int, count: int) -> None:
    wanted = []
    for number, rows in enumerate(parts):
        offset = 0
        for row in rows:
            inside = row[1] < start + count and start < row[1] + row[2]
            if NAMES[row[0]] == name and inside:
                wanted.append((row, number, offset))
            offset += row[5]
    found = index(parts)
    places = [*found.meeting(name, start, start + count)]
    told = [(place.segment.row, found._parts.index(place.part), place.offset) for place in places]
    assert told == sorted(wanted, key=lambda each: each[0][1])
    assert found.size(name) == sum(row[5] for rows in parts for row in rows if NAMES[row[0]] == name)


def test_segments_that_overlap_are_refused() -> None:
    with pytest.raises(
        PackageError, match="package: b: expected segments that do not overlap, found two at 3"
    ):
        index([[(0, 0, 4, 1, 1, 1), (1, 3, 4, 1, 1, 1)], [(1, 0, 4, 1, 1, 1)]])


def test_a_row_takes_little_memory() -> None:
    count = 100_000
    found = index([[(1, start, 1, 1, 1, 1) for start in range(count)]])
    held = sum(value.nbytes for value in vars(found).values() if isinstance(value, np.ndarray))
    assert held < 40 * count
    assert len([*found.meeting("b", count - 3, count)]) == 3
