"""Segments of a package decoded into a device's memory: what it has for the elements that it keeps.

Threads decompress. `exact` values are decoded on the device, from the words that lie there; others on the
threads, which fetch those words first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dtypes import DType, Words
from ..errors import PackageError
from ..kernels import unpack_in_torch as unpack
from ..kernels.launch_tables import ABSENT, Masks
from ..kernels.transfers import Ring, to_device
from ..package import codec
from ..package.arithmetic import Term
from ..package.codec import FETCH_AGAIN
from ..package.manifest import TensorRecord
from ..package.masks import Mask
from ..package.reader import DeltaPackage
from ..package.segments import Opened, Segment, check_kept, decode_whole
from ..parallel.threads import ordered_map, thread_count
from ..weights.live.ownership import Span

_AT_ONCE = 1 << 20
"""Kept elements that one thread decodes between two copies: enough to hide what a copy costs to begin."""

Place = tuple[str, Span]
"""A segment of a tensor, by checkpoint name."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A segment, still compressed: threads open it when its turn comes."""

    package: DeltaPackage
    record: TensorRecord
    segment: Segment
    frame: memoryview

    @property
    def whole(self) -> bool:
        """Whether it is no delta: every element becomes what it says."""
        return self.record.kind == "whole" or self.segment.start >= self.record.base_info.numel

    @property
    def exact(self) -> bool:
        """Whether it can be decoded where the base's words lie."""
        return not self.whole and self.record.values == "exact"

    @property
    def content_size(self) -> int:
        """Bytes of an `exact` part, decompressed."""
        return codec.content_size("exact", self.record.info.dtype, self.segment.kept, self.segment.changed, 0)

    @property
    def mask(self) -> Mask:
        return Mask(kind="all") if self.whole else self.record.mask_of(self.package.manifest.seed)

    def factor(self, weight: float) -> float:
        """w·γ."""
        return 1.0 if self.whole else weight * self.package.manifest.factor(self.record)

    def bitmap(self, device: torch.device) -> Tensor | None:
        """Of a stored mask."""
        if self.mask.kind != "stored":
            return None
        return to_device(torch.from_numpy(np.frombuffer(self.opened().bitmap, np.uint8).copy()), device)

    def check_kept(self, kept: int) -> None:
        if not self.whole:
            check_kept(self.record, self.segment, kept)

    def term(self, base: Words, weight: float) -> Term:
        """What it adds to its kept elements, whose words in the base are `base`."""
        if self.whole:
            return Term(positions=None, factor=1.0, tuned=decode_whole(self.record, self.segment, self.frame))
        return self.opened().term(base, weight)

    def opened(self) -> Opened:
        return Opened.of(self.package.manifest, self.record, self.segment, self.frame)


def parts_of(package: DeltaPackage, places: Sequence[Place]) -> list[Part | None]:
    """A package's segment at each place, or None where it has none: there it changes nothing."""
    parts: dict[Place, Part] = {}
    for name in {name for name, _ in places} & package.records.keys():
        for segment, frame in package.frames(name, 0, package.records[name].info.numel):
            part = Part(package=package, record=package.records[name], segment=segment, frame=frame)
            parts[name, (segment.start, segment.stop)] = part
    return [parts.get(place) for place in places]


def segments_of(package: DeltaPackage, name: str) -> Iterator[Segment]:
    """All segments of a tensor."""
    record = package.records.get(name)
    if record is not None:
        yield from package.segments(name, 0, record.info.numel)


def masks_of(parts: Sequence[Part | None], device: torch.device) -> Masks:
    """Where a package has no segment, it keeps nothing."""
    masks = [part.mask if part is not None else None for part in parts]
    stored = any(mask is not None and mask.kind == "stored" for mask in masks)
    return Masks(
        keys=[mask.key if mask is not None else 0 for mask in masks],
        thresholds=[ABSENT if mask is None else _threshold(mask) for mask in masks],
        bitmaps=[part.bitmap(device) if part is not None else None for part in parts] if stored else (),
    )


def _threshold(mask: Mask) -> int:
    return mask.threshold if mask.kind == "seeded" else 0


def decode(
    parts: Sequence[Part], base: Tensor, values: Tensor, dtype: DType, weight: float, *, alone: bool
) -> None:
    """Fill `values`, of one part after another, given the words of the `base` for their kept elements.

    `alone` says that they are the words of the result; else they are the package's own words, or deltas if
    `values` has floats.

    Raises:
        PackageError: a frame is damaged or contradicts the table.
    """
    shares = list(_shares(parts))
    begins = _begins(shares)
    exact_bytes = sum(share.nbytes for share in shares if share.exact)
    contents = torch.empty(exact_bytes, dtype=torch.uint8, device=base.device)
    there_and_back = base.itemsize + values.itemsize
    most = max((share.nbytes if share.exact else share.kept * there_and_back for share in shares), default=0)
    ring = Ring(base.device, slots=thread_count() + 2, nbytes=most + values.itemsize)

    def work(numbered: tuple[int, _Share]) -> torch.cuda.Event | None:
        number, share = numbered
        with ring.slot() as slot:
            if share.exact:
                data = [np.frombuffer(part.opened().data, np.uint8) for part in share.parts]
                return slot.send(data, contents[begins[number] : begins[number] + share.nbytes])
            words = slot.fetch(share.of(base)).view(dtype.word)
            ends = np.cumsum([part.segment.kept for part in share.parts])
            decoded = [
                _values(part.term(base_words, weight), base_words, dtype, alone=alone)
                for part, base_words in zip(share.parts, np.split(words, ends[:-1]), strict=True)
            ]
            return slot.send(decoded, share.of(values))

    counted: list[Tensor] = []
    with closing(ring), closing(ordered_map(work, enumerate(shares))) as arrivals:
        for share, begin, arrived in zip(shares, begins, arrivals, strict=True):
            if share.exact:
                ring.after(arrived)
                content = contents[begin : begin + share.nbytes]
                share_base = share.of(base)
                share_values = share.of(values)
                counted.append(
                    _unpacked(share, content, share_base, share_values, dtype, weight, alone=alone)
                )
    _check_changed([part for share in shares if share.exact for part in share.parts], counted)


@dataclass(frozen=True, kw_only=True)
class _Share:
    """Parts that lie one after another and are decoded in the same way."""

    first: int
    """The place of their first value."""
    parts: list[Part]

    @cached_property
    def kept(self) -> int:
        return sum(part.segment.kept for part in self.parts)

    @property
    def exact(self) -> bool:
        return self.parts[0].exact

    @cached_property
    def nbytes(self) -> int:
        """Of what `exact` parts hold."""
        return sum(part.content_size for part in self.parts)

    def of(self, words: Tensor) -> Tensor:
        return words[self.first : self.first + self.kept]


def _shares(parts: Sequence[Part]) -> Iterator[_Share]:
    """About `_AT_ONCE` elements at a time."""
    first = 0
    at = 0
    several: list[Part] = []
    for part in parts:
        if several and (part.exact != several[0].exact or at - first >= _AT_ONCE):
            yield _Share(first=first, parts=several)
            first = at
            several = []
        several.append(part)
        at += part.segment.kept
    if several:
        yield _Share(first=first, parts=several)


def _begins(shares: Sequence[_Share]) -> list[int]:
    """Where the contents of each `exact` share begin, one after another."""
    begins = []
    at = 0
    for share in shares:
        begins.append(at)
        at += share.nbytes if share.exact else 0
    return begins


def _unpacked(
    share: _Share, content: Tensor, base: Tensor, values: Tensor, dtype: DType, weight: float, *, alone: bool
) -> Tensor:
    """Decode on the device. Returns how many symbols each part's bitmap has."""
    kept = [part.segment.kept for part in share.parts]
    changed = [part.segment.changed for part in share.parts]
    words, counted = unpack.exact(base, content, kept, changed, dtype)
    if alone:
        words = unpack.law(base, words, kept, [part.factor(weight) for part in share.parts], dtype)
    values.copy_(words)
    return counted


def _check_changed(parts: Sequence[Part], counted: Sequence[Tensor]) -> None:
    counts = torch.cat(list(counted)).tolist() if counted else []
    for part, count in zip(parts, counts, strict=True):
        if count != part.segment.changed:
            expected = f"{part.segment.changed} changed elements"
            raise PackageError(part.record.name, expected=expected, found=f"{count}", remedy=FETCH_AGAIN)


def _values(term: Term, base: Words, dtype: DType, *, alone: bool) -> NDArray[Any]:
    if alone:
        return term.result(base, dtype)
    return term.tuned if term.tuned is not None else np.asarray(term.delta, dtype.compute)
