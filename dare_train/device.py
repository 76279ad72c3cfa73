"""Packages where a model's weights lie: decoded once into kept values, which one launch for all tensors puts into place.

A `Resident` holds, for the tensors of one dtype on one device, the values of kept elements and the words that these had before,
one after another; which elements they are, the seed says. Putting them into place, and back, moves nothing between host and device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .dtypes import DType, Words
from .errors import DeviceMemoryError
from .fingerprint import Fingerprint
from .kernels.choice import kernels_for
from .kernels.rows import ABSENT, BLOCK, PLANES, Masks, Row, Rows, Term, offsets_of, to_device, to_host
from .law import Term as LawTerm
from .manifest import TensorRecord
from .masks import Mask
from .package import DeltaPackage, Segment
from .parallel import ordered_map
from .resolve import Link
from .segments import Opened, decode_whole
from .shards import LiveWeights

_AT_ONCE = 1 << 20
"""Kept elements that one thread decodes between two copies: enough to hide what a copy costs to begin."""

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors of one dtype on one device, and the kernels that work on them there."""

    kernels: ModuleType
    dtype: DType
    flats: Mapping[str, Tensor]
    """Words by checkpoint name."""


def groups(live: LiveWeights, names: Iterable[str]) -> list[Group]:
    """Those tensors that kernels can work on where they lie; the others are for the CPU."""
    found: dict[tuple[torch.device, DType], tuple[ModuleType, dict[str, Tensor]]] = {}
    for name in names:
        flat = live.flat(name)
        kernels = kernels_for(flat.device) if flat is not None else None
        if flat is not None and kernels is not None:
            found.setdefault((flat.device, live.tensors[name].dtype), (kernels, {}))[1][name] = flat
    return [Group(kernels=kernels, dtype=dtype, flats=flats) for (_, dtype), (kernels, flats) in found.items()]


def fingerprints(live: LiveWeights, leading: Mapping[str, int]) -> dict[str, Fingerprint]:
    """Of so many leading elements of each of those tensors that kernels can work on where they lie.

    One launch for each dtype, and one wait for each.
    """
    prints: dict[str, Fingerprint] = {}
    for group in groups(live, leading):
        rows = Rows(dtype=group.dtype, rows=tuple(Row(flat=flat, start=0, count=leading[name]) for name, flat in group.flats.items()))
        lanes = group.kernels.fingerprint(rows).cpu().tolist()
        prints |= {name: Fingerprint(first % 2**64, second % 2**64) for name, (first, second) in zip(group.flats, lanes, strict=True)}
    return prints


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """The elements of some rows that one package keeps, and the words they had before."""

    masks: Masks
    offsets: Tensor
    own: Tensor

    @property
    def nbytes(self) -> int:
        bitmaps = sum(bitmap.nbytes for bitmap in self.masks.bitmaps if bitmap is not None)
        return self.offsets.nbytes + self.own.nbytes + bitmaps


@dataclass(frozen=True, kw_only=True, eq=False)
class Overwritten:
    """The way back from what packages changed of some rows."""

    kernels: ModuleType
    rows: Rows
    kept: tuple[Kept, ...]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.kept)

    def undo(self) -> None:
        """Make the rows the base again."""
        for one in self.kept:
            self.kernels.put(self.rows, one.masks, one.offsets, one.own)


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """What one package has for the elements that it keeps."""

    tensor: Tensor
    """The words of the result, where the package is alone; else its own words or its deltas, to be added up."""
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
        return self.before.nbytes + sum(one.tensor.nbytes for one in self.values)

    def apply(self) -> None:
        """Make the rows, which are the base, what the packages make of it."""
        kernels, rows = self.before.kernels, self.before.rows
        if len(self.values) == 1:
            kernels.put(rows, self.before.kept[0].masks, self.before.kept[0].offsets, self.values[0].tensor)
        else:
            kernels.add(rows, [self._term(kept, own) for kept, own in zip(self.before.kept, self.values, strict=True)])

    @staticmethod
    def _term(kept: Kept, own: Values) -> Term:
        return Term(masks=kept.masks, offsets=kept.offsets, values=own.tensor, factors=own.factors, deltas=own.deltas)


def decodable(link: Link, name: str) -> bool:
    """Whether a tensor's part of a link can be decoded for a device: its segments do not overlap, and what adds up are deltas."""
    records = [record for package in link.packages if (record := package.records.get(name)) is not None]
    if len(link.packages) > 1 and any(record.kind == "whole" or record.base_rows is not None for record in records):
        return False
    return all(stop <= start for (_, stop), (start, _) in pairwise(_spans(link, name)))


def _spans(link: Link, name: str) -> list[Span]:
    """[start, stop) of the segments that some package has, each once."""
    return sorted({(segment.start, segment.stop) for package in link.packages for segment, _ in _frames(package, name)})


def _frames(package: DeltaPackage, name: str) -> Iterator[tuple[Segment, memoryview]]:
    record = package.records.get(name)
    if record is not None:
        yield from package.frames(name, 0, record.info.numel)


def residents(group: Group, link: Link) -> list[Resident]:
    """Decode a link for those of a group's tensors that it changes, which are the base now. Nothing of theirs is changed.

    Raises:
        DeviceMemoryError: the device has too little memory.
        PackageError: a package is damaged.
    """
    alike: dict[tuple[bool, ...], list[tuple[str, Span]]] = {}
    for name in group.flats:
        alike.setdefault(_forms(link, name), []).extend((name, span) for span in _spans(link, name))
    return [_resident(group, link, places) for places in alike.values() if places]


def _forms(link: Link, name: str) -> tuple[bool, ...]:
    """Of each package, whether it has deltas of a tensor, rather than words."""
    records = [package.records.get(name) for package in link.packages]
    return tuple(record is not None and record.values != "exact" for record in records)


def _resident(group: Group, link: Link, places: Sequence[tuple[str, Span]]) -> Resident:
    made = (Row(flat=group.flats[name], start=start, count=stop - start, offset=start) for name, (start, stop) in places)
    rows = Rows(dtype=group.dtype, rows=tuple(made))
    alone = len(link.packages) == 1
    try:
        decoded = [
            _decoded(group, rows, places, package, weight, alone=alone) for package, weight in zip(link.packages, link.weights, strict=True)
        ]
    except torch.OutOfMemoryError as error:
        raise _too_little(rows, places, link, error) from error
    before = Overwritten(kernels=group.kernels, rows=rows, kept=tuple(kept for kept, _ in decoded))
    return Resident(before=before, values=tuple(values for _, values in decoded))


def bytes_needed(groups: Iterable[Group], link: Link) -> int:
    """Memory that a link's residents take on devices: two words for each kept element, and places of the planes of blocks."""
    return sum(_needed(group.dtype, link, name) for group in groups for name in group.flats)


def _needed(dtype: DType, link: Link, name: str) -> int:
    segments = [segment for package in link.packages for segment, _ in _frames(package, name)]
    return sum(2 * segment.kept * dtype.itemsize + 8 * PLANES * (segment.length // BLOCK + 2) for segment in segments)


def _too_little(rows: Rows, places: Sequence[tuple[str, Span]], link: Link, error: Exception) -> DeviceMemoryError:
    needed = sum(_needed(rows.dtype, link, name) for name in {name for name, _ in places})
    return DeviceMemoryError(
        str(rows.device),
        expected=f"{needed / 1e6:,.1f} MB for kept values and the words they replace",
        found=str(error).partition(". Process")[0],
        remedy="free some memory, or set DARE_TRAIN_KERNELS=cpu; the model is as it was",
    )


def _decoded(
    group: Group, rows: Rows, places: Sequence[tuple[str, Span]], package: DeltaPackage, weight: float, *, alone: bool
) -> tuple[Kept, Values]:
    segments = {(name, (s.start, s.stop)): (s, frame) for name in group.flats for s, frame in _frames(package, name)}
    opened = [_open(package, name, segments.get((name, span))) for name, span in places]
    masks = _masks(opened, rows.device)
    counts = group.kernels.counts(rows, masks)
    sizes = rows.per_row(counts)
    for one, size in zip(opened, sizes, strict=True):
        if one is not None:
            one.check_kept(size)
    deltas = not alone and any(one is not None and one.record.values != "exact" for one in opened)
    own = torch.empty(sum(sizes), dtype=rows.word, device=rows.device)
    compute = torch.float64 if group.dtype.code == "F64" else torch.float32
    values = torch.empty_like(own, dtype=compute if deltas else rows.word)
    kept = Kept(masks=masks, offsets=offsets_of(counts), own=own)
    group.kernels.take(rows, masks, kept.offsets, own)
    _decode(opened, sizes, own, values, weight, group.dtype, alone=alone, deltas=deltas)
    factors = tuple(weight * one.factor if one is not None else 1.0 for one in opened)
    return kept, Values(tensor=values, factors=factors, deltas=deltas)


@dataclass(frozen=True, kw_only=True)
class _Carried:
    """A segment that is no delta: every element becomes what it says."""

    record: TensorRecord
    segment: Segment
    words: Words
    bitmap: bytes = b""
    factor: float = 1.0

    @property
    def mask(self) -> Mask:
        return Mask(kind="all")

    def check_kept(self, kept: int) -> None:
        """Nothing is dropped."""

    def term(self, own: Words, weight: float) -> LawTerm:
        return LawTerm(positions=None, factor=1.0, tuned=self.words)


def _open(package: DeltaPackage, name: str, found: tuple[Segment, memoryview] | None) -> Opened | _Carried | None:
    if found is None:
        return None
    record, (segment, frame) = package.records[name], found
    if record.kind == "whole" or segment.start >= record.base_info.numel:
        return _Carried(record=record, segment=segment, words=decode_whole(record, segment, frame))
    return Opened.of(package.manifest, record, segment, frame)


def _masks(opened: Sequence[Opened | _Carried | None], device: torch.device) -> Masks:
    """Where a package has no segment, it keeps nothing."""
    masks = [one.mask if one is not None else None for one in opened]
    stored = any(mask is not None and mask.kind == "stored" for mask in masks)
    return Masks(
        keys=[mask.key if mask is not None else 0 for mask in masks],
        thresholds=[ABSENT if mask is None else mask.threshold if mask.kind == "seeded" else 0 for mask in masks],
        bitmaps=[_bitmap(one, device) for one in opened] if stored else (),
    )


def _bitmap(one: Opened | _Carried | None, device: torch.device) -> Tensor | None:
    return to_device(torch.from_numpy(np.frombuffer(one.bitmap, np.uint8).copy()), device) if one is not None and one.bitmap else None


def _decode(
    opened: Sequence[Opened | _Carried | None],
    sizes: Sequence[int],
    own: Tensor,
    values: Tensor,
    weight: float,
    dtype: DType,
    *,
    alone: bool,
    deltas: bool,
) -> None:
    """Fill `values` on threads: each copies some of the base's words to the host, decodes, and copies the values back."""

    def one(work: tuple[int, list[Opened | _Carried]]) -> None:
        first, several = work
        count = sum(each.segment.kept for each in several)
        words = to_host(own[first : first + count]).view(dtype.word)
        made, at = [], 0
        for each in several:
            before = words[at : at + each.segment.kept]
            made.append(_values(each.term(before, weight), before, dtype, alone=alone, deltas=deltas))
            at += each.segment.kept
        values[first : first + count].copy_(_as_tensor(np.concatenate(made), values.dtype))

    with closing(ordered_map(one, _in_shares(opened, sizes))) as done:
        for _ in done:
            pass


def _in_shares(opened: Sequence[Opened | _Carried | None], sizes: Sequence[int]) -> Iterator[tuple[int, list[Opened | _Carried]]]:
    """Segments that lie one after another, with the place of their first value, about `_AT_ONCE` at a time."""
    first, at, several = 0, 0, list[Opened | _Carried]()
    for one, size in zip(opened, sizes, strict=True):
        if one is not None:
            several.append(one)
        at += size
        if several and at - first >= _AT_ONCE:
            yield first, several
            first, several = at, []
    if several:
        yield first, several


def _values(term: LawTerm, own: Words, dtype: DType, *, alone: bool, deltas: bool) -> np.ndarray:
    if alone:
        return term.result(own, dtype)
    if not deltas:
        assert term.tuned is not None
        return term.tuned
    assert term.delta is not None
    return np.asarray(term.delta, dtype.compute)


def _as_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array if dtype.is_floating_point else array.view(f"i{array.itemsize}"))
