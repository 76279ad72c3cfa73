"""One run of one tensor: from words to a compressed segment, and from a segment to a term of the law."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..dtypes import Words
from ..errors import PackageError
from ..kernels import cpu
from . import codec
from .arithmetic import Term
from .codec import FETCH_AGAIN, Positions
from .manifest import Manifest, TensorRecord

COLUMNS = 6
"""Of a part's segment table."""


def decode_whole(record: TensorRecord, segment: Segment, frame: memoryview) -> Words:
    """The words of a run that was carried as it is."""
    size = codec.content_size("whole", record.info.dtype, segment.length, segment.length, 0)
    content = codec.decompress(frame, size, name=record.name)
    return codec.from_planes(memoryview(content), segment.length, record.info.dtype.word)


def decode_delta(
    manifest: Manifest, record: TensorRecord, segment: Segment, frame: memoryview, base: Words, weight: float
) -> Term:
    """The term that a segment adds to its run, whose base words are `base`, shape (segment.length,).

    Raises:
        PackageError: the frame is damaged or contradicts the table.
    """
    opened = Opened.of(manifest, record, segment, frame)
    positions = opened.positions()
    check_kept(record, segment, positions.size)
    own = cpu.take(base, positions) if record.values == "exact" else None
    return replace(opened.term(own, weight, positions), positions=positions)


def check_kept(record: TensorRecord, segment: Segment, kept: int) -> None:
    """A segment's mask keeps as many elements as the table says.

    Raises:
        PackageError: it does not.
    """
    if kept != segment.kept:
        expected = f"{kept} kept elements, as its mask says"
        raise PackageError(record.name, expected=expected, found=f"{segment.kept}", remedy=FETCH_AGAIN)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A segment of a delta, decompressed."""

    manifest: Manifest
    record: TensorRecord
    segment: Segment
    bitmap: memoryview
    """Of a `stored` mask, else empty."""
    data: memoryview

    @classmethod
    def of(cls, manifest: Manifest, record: TensorRecord, segment: Segment, frame: memoryview) -> Opened:
        """Raises PackageError: the frame is damaged, or is not of the size that the table says."""
        bitmap_size = -(-segment.length // 8) if record.mask == "stored" else 0
        _, groups = codec.groups_of(
            np.empty(0, np.int64), segment.start, segment.length, codec.group_length(record.threshold)
        )
        size = codec.content_size(record.values, record.info.dtype, segment.kept, segment.changed, groups)
        content = memoryview(codec.decompress(frame, bitmap_size + size, name=record.name))
        return cls(
            manifest=manifest,
            record=record,
            segment=segment,
            bitmap=content[:bitmap_size],
            data=content[bitmap_size:],
        )

    def positions(self) -> Positions:
        """Kept elements, relative to the segment."""
        return self.record.mask_of(self.manifest.seed).positions(
            self.segment.start, self.segment.length, bytes(self.bitmap)
        )

    def term(self, own: Words | None, weight: float, positions: Positions | None = None) -> Term:
        """What the segment adds to its kept elements, whose base words are `own`; those are needed for
        `exact` values only.

        Raises:
            PackageError: the content contradicts the table.
        """
        record, segment, factor = self.record, self.segment, weight * self.manifest.factor(self.record)
        if record.values == "exact":
            assert own is not None
            tuned = codec.decode_exact(self.data, own, segment.changed, record.info.dtype, name=record.name)
            return Term(positions=None, factor=factor, tuned=tuned, base=own)
        if record.values == "rounded":
            rounded = codec.decode_rounded(self.data, segment.kept, segment.changed, name=record.name)
            return Term(positions=None, factor=factor, delta=rounded)
        places = self.positions() if positions is None else positions
        numbers, groups = codec.groups_of(
            places, segment.start, segment.length, codec.group_length(record.threshold)
        )
        scales, codes = codec.decode_codes(self.data, segment.kept, groups, record.values, name=record.name)
        return Term(
            positions=None, factor=factor, delta=codec.dequantize(scales, codes, numbers, record.values)
        )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of one tensor inside a part: elements [start, start + length), of which `kept` are kept."""

    tensor: int
    """Index into the manifest's tensors."""
    start: int
    length: int
    kept: int
    changed: int
    """Symbols that are not zero in `exact` and `rounded`; equal to `kept` in the other encodings."""
    size: int
    """Bytes of the compressed frame."""

    @property
    def row(self) -> tuple[int, ...]:
        return self.tensor, self.start, self.length, self.kept, self.changed, self.size

    @classmethod
    def of(cls, row: Iterable[int]) -> Segment:
        """The segment that has this `row`."""
        tensor, start, length, kept, changed, size = row
        return cls(tensor=tensor, start=start, length=length, kept=kept, changed=changed, size=size)

    @property
    def stop(self) -> int:
        return self.start + self.length
