"""Packages where a model's weights lie: decoded once into kept values, which one launch puts into place.

A `Resident` holds, for the tensors of one dtype on one device, the values of kept elements and the words that
these had before, one after another; which elements they are, the seed says. Putting them into place, and
back, moves nothing between host and device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from types import ModuleType

import torch
from torch import Tensor

from ..dtypes import DType
from ..errors import DeviceMemoryError
from ..kernels.backends import kernels_for
from ..kernels.launch_tables import BLOCK, PLANES, Masks, Row, Rows, Term, offsets_of
from ..kernels.law_in_torch import compute
from ..package.reader import DeltaPackage
from ..weights.fingerprint import Fingerprint, prints_of, total
from ..weights.live.live import LiveWeights
from ..weights.live.ownership import Span, Spans
from .chain import Link
from .device_decoding import Place, decode, masks_of, parts_of, segments_of


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of tensors of one dtype on one device, and the kernels that work on them there."""

    kernels: ModuleType
    dtype: DType
    rows: Mapping[str, list[Row]]
    """By checkpoint name, ascending."""

    def part(self, name: str, span: Span) -> Row | None:
        """[start, stop) of a tensor, where it lies in one of the runs."""
        start, stop = span
        place = bisect_right(self.rows[name], start, key=attrgetter("start")) - 1
        row = self.rows[name][place]
        if (row.start, row.start + row.count) == span:
            return row
        if place < 0 or stop > row.start + row.count:
            return None
        return replace(row, start=start, count=stop - start, offset=row.offset + start - row.start)


def groups(live: LiveWeights, spans: Spans) -> list[Group]:
    """Those runs that kernels can work on where they lie; the others are for the CPU."""
    rows_by_kind: dict[tuple[torch.device, DType], dict[str, list[Row]]] = {}
    for name, tensor_spans in spans.items():
        for row in _lying(live, name, tensor_spans):
            kind = (row.flat.device, live.tensors[name].dtype)
            rows_by_kind.setdefault(kind, {}).setdefault(name, []).append(row)
    groups_here = []
    for (device, dtype), rows in rows_by_kind.items():
        kernels = kernels_for(device, live.kernels)
        if kernels is not None:
            groups_here.append(Group(kernels=kernels, dtype=dtype, rows=rows))
    return groups_here


def _lying(live: LiveWeights, name: str, spans: Sequence[Span]) -> Iterator[Row]:
    """Those of a tensor's runs that lie in one piece. Mostly they do so all together: torch is asked once."""
    first = spans[0][0] if spans else 0
    last = spans[-1][1] if spans else 0
    together = live.lying(name, first, last - first)
    for start, stop in spans:
        if together is not None:
            flat, offset = together
            yield Row(flat=flat, start=start, count=stop - start, offset=offset + start - first)
        elif (alone := live.lying(name, start, stop - start)) is not None:
            flat, offset = alone
            yield Row(flat=flat, start=start, count=stop - start, offset=offset)


def fingerprints(live: LiveWeights, spans: Spans) -> dict[str, Fingerprint]:
    """Of runs of those tensors all of whose runs kernels can work on where they lie, added up.

    One launch for each dtype, and one wait for each.
    """
    shares: dict[str, list[Fingerprint]] = {}
    for group in groups(live, spans):
        names = [name for name, rows in group.rows.items() for _ in rows]
        table = Rows(dtype=group.dtype, rows=tuple(row for rows in group.rows.values() for row in rows))
        for name, share in zip(names, prints_of(group.kernels, table), strict=True):
            shares.setdefault(name, []).append(share)
    complete = [name for name in shares if len(shares[name]) == len(spans[name])]
    return {name: total(shares[name]) for name in complete}


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """The elements of some rows that one package keeps, and the words they had before."""

    masks: Masks
    offsets: Tensor
    base_words: Tensor

    @property
    def nbytes(self) -> int:
        bitmaps = sum(bitmap.nbytes for bitmap in self.masks.bitmaps if bitmap is not None)
        return self.offsets.nbytes + self.base_words.nbytes + bitmaps


@dataclass(frozen=True, kw_only=True, eq=False)
class Overwritten:
    """The way back from what packages changed of some rows."""

    kernels: ModuleType
    rows: Rows
    kept: tuple[Kept, ...]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + sum(kept.nbytes for kept in self.kept)

    def undo(self) -> None:
        """Make the rows the base again."""
        for kept in self.kept:
            self.kernels.put(self.rows, kept.masks, kept.offsets, kept.base_words)


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """What one package has for the elements that it keeps."""

    tensor: Tensor
    """The words of the result, where the package is alone; else its words or its deltas, to be added up."""
    factors: tuple[float, ...]
    """Of each row."""
    deltas: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """Packages that share a base, decoded for the rows of one dtype on one device."""

    before: Overwritten
    values: tuple[Values, ...]

    @property
    def nbytes(self) -> int:
        """Memory that it takes on the device."""
        return self.before.nbytes + sum(values.tensor.nbytes for values in self.values)

    def apply(self) -> None:
        """Make the rows, which are the base, what the packages make of it."""
        kernels = self.before.kernels
        rows = self.before.rows
        packages = list(zip(self.before.kept, self.values, strict=True))
        if len(packages) == 1:
            ((kept, values),) = packages
            kernels.put(rows, kept.masks, kept.offsets, values.tensor)
        else:
            kernels.add(rows, [self._term(kept, values) for kept, values in packages])

    @staticmethod
    def _term(kept: Kept, values: Values) -> Term:
        return Term(
            masks=kept.masks,
            offsets=kept.offsets,
            values=values.tensor,
            factors=values.factors,
            deltas=values.deltas,
        )


def decodable(link: Link, name: str) -> bool:
    """Whether a tensor's part of a link can be decoded for a device: its segments do not overlap, and what
    adds up are deltas.
    """
    records = [record for package in link.packages if (record := package.records.get(name)) is not None]
    carries_words = any(record.kind == "whole" or record.base_rows is not None for record in records)
    if carries_words and len(link.packages) > 1:
        return False
    return all(stop <= start for (_, stop), (start, _) in pairwise(_spans(link, name)))


def _spans(link: Link, name: str) -> list[Span]:
    """[start, stop) of the segments that some package has, each once."""
    segments = [segment for package in link.packages for segment in segments_of(package, name)]
    return sorted({(segment.start, segment.stop) for segment in segments})


def residents(group: Group, link: Link) -> list[Resident]:
    """Decode a link for those of a group's tensors that it changes, which are the base now, and stay it.

    Raises:
        DeviceMemoryError: the device has too little memory.
        PackageError: a package is damaged.
    """
    alike: dict[tuple[bool, ...], dict[Place, Row]] = {}
    for name in group.rows:
        parts = {
            (name, span): part for span in _spans(link, name) if (part := group.part(name, span)) is not None
        }
        alike.setdefault(_forms(link, name), {}).update(parts)
    return [_resident(group, link, places) for places in alike.values() if places]


def _forms(link: Link, name: str) -> tuple[bool, ...]:
    """Of each package, whether it has deltas of a tensor, rather than words."""
    records = [package.records.get(name) for package in link.packages]
    return tuple(record is not None and record.values != "exact" for record in records)


def _resident(group: Group, link: Link, places: Mapping[Place, Row]) -> Resident:
    rows = Rows(dtype=group.dtype, rows=tuple(places.values()))
    alone = len(link.packages) == 1
    try:
        packages = [
            decoded(group.kernels, rows, list(places), package, weight, alone=alone)
            for package, weight in zip(link.packages, link.weights, strict=True)
        ]
    except torch.OutOfMemoryError as error:
        raise _too_little(rows, places, link, error) from error
    before = Overwritten(kernels=group.kernels, rows=rows, kept=tuple(kept for kept, _ in packages))
    return Resident(before=before, values=tuple(values for _, values in packages))


def bytes_needed(groups: Iterable[Group], link: Link) -> int:
    """Memory that a link's residents take on devices: two words for each kept element, and where the planes
    of blocks begin.
    """
    return sum(
        _needed(group.dtype, link, name, set(_spans(link, name))) for group in groups for name in group.rows
    )


def _needed(dtype: DType, link: Link, name: str, spans: set[Span]) -> int:
    segments = [segment for package in link.packages for segment in segments_of(package, name)]
    return sum(
        2 * segment.kept * dtype.itemsize + (8 * PLANES + 4) * (segment.length // BLOCK + 2) + 64
        for segment in segments
        if (segment.start, segment.stop) in spans
    )


def _too_little(rows: Rows, places: Iterable[Place], link: Link, error: Exception) -> DeviceMemoryError:
    spans: dict[str, set[Span]] = {}
    for name, span in places:
        spans.setdefault(name, set()).add(span)
    needed = sum(_needed(rows.dtype, link, name, tensor_spans) for name, tensor_spans in spans.items())
    return DeviceMemoryError(
        str(rows.device),
        expected=f"{needed / 1e6:,.1f} MB for kept values and the words they replace",
        found=str(error).partition(". Process")[0],
        remedy="free some memory, or set DARE_TRAIN_KERNELS=cpu; the model is as it was",
    )


def decoded(
    kernels: ModuleType,
    rows: Rows,
    places: Sequence[Place],
    package: DeltaPackage,
    weight: float,
    *,
    alone: bool,
) -> tuple[Kept, Values]:
    """What a package has for rows that are its segments at `places`; `alone`: the words of the result.

    Raises:
        PackageError: the package is damaged.
    """
    parts = parts_of(package, places)
    masks = masks_of(parts, rows.device)
    counts = kernels.counts(rows, masks)
    sizes = rows.per_row(counts)
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            part.check_kept(size)
    deltas = not alone and any(part is not None and part.record.values != "exact" for part in parts)
    base_words = torch.empty(sum(sizes), dtype=rows.word, device=rows.device)
    values = torch.empty_like(base_words, dtype=compute(rows.dtype) if deltas else rows.word)
    kept = Kept(masks=masks, offsets=offsets_of(counts), base_words=base_words)
    kernels.take(rows, masks, kept.offsets, base_words)
    present = [part for part in parts if part is not None]
    decode(present, base_words, values, rows.dtype, weight, alone=alone)
    factors = tuple(1.0 if part is None else part.factor(weight) for part in parts)
    return kept, Values(tensor=values, factors=factors, deltas=deltas)
