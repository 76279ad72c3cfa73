"""One run of one tensor: from words to a compressed segment, and from a segment to a term of the law."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import codec
from .codec import Content, Encoding, Positions
from .dtypes import FloatArray, Words, to_float
from .errors import NonFiniteDelta, PackageError
from .fingerprint import Fingerprint
from .kernels import cpu
from .law import Term
from .manifest import Manifest, TensorRecord
from .masks import Mask
from .package import Segment
from .stats import Magnitudes
from .weights import TensorInfo


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What is going to happen to one tensor of the result."""

    index: int
    name: str
    info: TensorInfo
    kind: str
    """`base`, `delta` or `whole`."""
    base_rows: int | None = None
    in_base: bool = True
    p: float = 0.0
    mask: Mask = field(default_factory=lambda: Mask(kind="all"))
    stored: NDArray[np.bool_] | None = None
    """Flat boolean mask of a `stored` tensor."""
    values: Encoding = "exact"
    factor: float = 1.0
    """The rescale γ."""
    allow_nonfinite: bool = False
    cut_groups: Mapping[int, float] = field(default_factory=dict)
    """Largest |δ| of the scale groups that lie across the border between two ranks, by number."""

    @property
    def base_numel(self) -> int:
        """Leading elements that have a counterpart in the base."""
        if not self.in_base:
            return 0
        return self.info.numel if self.base_rows is None else self.base_rows * (self.info.numel // self.info.shape[0])

    def positions(self, start: int, length: int) -> Positions:
        """Kept elements of a run, relative to `start`."""
        if self.stored is not None:
            return np.flatnonzero(self.stored[start : start + length])
        return self.mask.positions(start, length)


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A run after encoding. `segment` is None where no kept element changed: then nothing is written."""

    index: int
    base: Fingerprint = field(default_factory=Fingerprint)
    result: Fingerprint
    kept: int = 0
    changed: int = 0
    segment: Segment | None = None
    frame: bytes = b""
    magnitudes: Magnitudes = field(default_factory=Magnitudes)


def encode_whole(plan: TensorPlan, start: int, words: Words) -> Encoded:
    """A run carried as it is."""
    planes = codec.to_planes(words)
    cuts = [words.size * plane for plane in range(1, words.itemsize)]
    frame = codec.compress(Content(data=planes.tobytes(), cuts=cuts))
    segment = Segment(tensor=plan.index, start=start, length=words.size, kept=words.size, changed=words.size, size=len(frame))
    return Encoded(index=plan.index, result=Fingerprint.of(words, start), segment=segment, frame=frame)


def encode_delta(plan: TensorPlan, start: int, base: Words, positions: Positions, tuned: Words) -> Encoded:
    """A run of a delta: `base` holds its every word, `tuned` those at `positions`.

    Raises:
        NonFiniteDelta: a kept element is NaN or infinite, or the delta does not fit float32; unless allowed.
    """
    return encode_kept(plan, start, base.size, positions, cpu.take(base, positions), tuned, Fingerprint.of(base, start))


def encode_kept(plan: TensorPlan, start: int, length: int, positions: Positions, own: Words, tuned: Words, base: Fingerprint) -> Encoded:
    """The same of a run of which only the kept words are at hand: `own` of the base, whose fingerprint the run's is, and `tuned`.

    Raises:
        NonFiniteDelta: as `encode_delta`.
    """
    magnitudes, strange = Magnitudes.between(own, tuned, plan.info.dtype)
    _check_finite(plan, strange)
    content, term, changed, symbols = _encode_values(plan, start, length, positions, own, tuned)
    common: dict[str, Any] = dict(index=plan.index, base=base, kept=positions.size, changed=changed, magnitudes=magnitudes)
    if not changed:
        return Encoded(result=base, **common)
    change = cpu.fingerprint_change(own, term.result(own, plan.info.dtype), positions, start)
    return _framed(plan, start, length, content, symbols, result=base.plus(change), **common)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What a device made of a run of a delta with `exact` values: all but the frame."""

    content: Content
    kept: int
    changed: int
    magnitudes: Magnitudes
    strange: int
    """How many deltas are not finite."""
    base: Fingerprint = field(default_factory=Fingerprint)
    result: Fingerprint = field(default_factory=Fingerprint)


def encode_packed(plan: TensorPlan, start: int, length: int, packed: Packed) -> Encoded:
    """What `encode_kept` makes of the words that were packed.

    Raises:
        NonFiniteDelta: as `encode_delta`.
    """
    _check_finite(plan, packed.strange)
    common: dict[str, Any] = dict(
        index=plan.index, base=packed.base, kept=packed.kept, changed=packed.changed, magnitudes=packed.magnitudes, result=packed.result
    )
    return _framed(plan, start, length, packed.content, packed.changed, **common) if packed.changed else Encoded(**common)


def _framed(plan: TensorPlan, start: int, length: int, content: Content, symbols: int, **common: Any) -> Encoded:
    frame = codec.compress(_with_bitmap(plan, start, length, content))
    segment = Segment(tensor=plan.index, start=start, length=length, kept=common["kept"], changed=symbols, size=len(frame))
    return Encoded(segment=segment, frame=frame, **common)


def receiver_words(plan: TensorPlan, start: int, length: int, positions: Positions, own: Words, tuned: Words) -> Words:
    """The kept words of a run as they will be after applying: what `encode_delta` encodes, decoded."""
    _, term, _, _ = _encode_values(plan, start, length, positions, own, tuned)
    return term.result(own, plan.info.dtype)


def _checked_delta(plan: TensorPlan, own: Words, tuned: Words) -> FloatArray:
    """The delta that a lossy encoding rounds."""
    dtype = plan.info.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        delta = to_float(tuned, dtype) - to_float(own, dtype)
    finite = np.isfinite(codec.round_delta(delta))
    if not finite.all():
        _refuse_nonfinite(plan, delta.size - int(np.count_nonzero(finite)))
    return delta


def _check_finite(plan: TensorPlan, strange: int) -> None:
    if strange and not (plan.values == "exact" and plan.allow_nonfinite):
        _refuse_nonfinite(plan, strange)


def _refuse_nonfinite(plan: TensorPlan, count: int) -> NoReturn:
    remedy = "did training diverge? allow_nonfinite=True with values='exact' (--allow-nonfinite --values exact) carries them as they are"
    found = f"{count} that are NaN, infinite or too large for {plan.values} values"
    raise NonFiniteDelta(plan.name, expected="finite deltas", found=found, remedy=remedy)


def _encode_values(
    plan: TensorPlan, start: int, length: int, positions: Positions, own: Words, tuned: Words
) -> tuple[Content, Term, int, int]:
    """Content of the frame, what decoding it will give, kept elements whose delta is not zero, and the segment's `changed`."""
    if plan.values == "exact":
        changed = int(np.count_nonzero(own != tuned))
        content = codec.encode_exact(own, tuned, plan.info.dtype)
        return content, Term(positions=positions, factor=plan.factor, tuned=tuned), changed, changed
    delta = _checked_delta(plan, own, tuned)
    if plan.values == "rounded":
        rounded = codec.round_delta(delta)
        symbols = int(np.count_nonzero(codec.rounded_symbols(delta)))
        return codec.encode_rounded(delta), Term(positions=positions, factor=plan.factor, delta=rounded), symbols, symbols
    size = codec.group_length(plan.mask.threshold)
    group, groups = codec.groups_of(positions, start, length, size)
    least = (
        np.array([plan.cut_groups.get(start // size + number, 0.0) for number in range(groups)], np.float32) if plan.cut_groups else None
    )
    scales, codes = codec.quantize(delta, group, groups, positions, start, plan.mask.key, plan.values, least)
    values = codec.dequantize(scales, codes, group, plan.values)
    content = codec.encode_codes(scales, codes, plan.values)
    return content, Term(positions=positions, factor=plan.factor, delta=values), int(np.count_nonzero(values)), positions.size


def _with_bitmap(plan: TensorPlan, start: int, length: int, content: Content) -> Content:
    if plan.stored is None:
        return content
    bitmap = np.packbits(plan.stored[start : start + length], bitorder="little").tobytes()
    return Content(data=bitmap + content.data, cuts=[len(bitmap), *(len(bitmap) + cut for cut in content.cuts)])


def decode_whole(record: TensorRecord, segment: Segment, frame: memoryview) -> Words:
    """The words of a run that was carried as it is."""
    size = codec.content_size("whole", record.info.dtype, segment.length, segment.length, 0)
    content = codec.decompress(frame, size, name=record.name)
    return codec.from_planes(memoryview(content), segment.length, record.info.dtype.word)


def decode_delta(manifest: Manifest, record: TensorRecord, segment: Segment, frame: memoryview, base: Words, weight: float) -> Term:
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
        raise PackageError(record.name, expected=expected, found=f"{segment.kept}", remedy="fetch the package again")


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
        _, groups = codec.groups_of(np.empty(0, np.int64), segment.start, segment.length, codec.group_length(record.threshold))
        size = codec.content_size(record.values, record.info.dtype, segment.kept, segment.changed, groups)
        content = memoryview(codec.decompress(frame, bitmap_size + size, name=record.name))
        return cls(manifest=manifest, record=record, segment=segment, bitmap=content[:bitmap_size], data=content[bitmap_size:])

    def positions(self) -> Positions:
        """Kept elements, relative to the segment."""
        return self.record.mask_of(self.manifest.seed).positions(self.segment.start, self.segment.length, bytes(self.bitmap))

    def term(self, own: Words | None, weight: float, positions: Positions | None = None) -> Term:
        """What the segment adds to its kept elements, whose base words are `own`; those are needed for `exact` values only.

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
        numbers, groups = codec.groups_of(places, segment.start, segment.length, codec.group_length(record.threshold))
        scales, codes = codec.decode_codes(self.data, segment.kept, groups, record.values, name=record.name)
        return Term(positions=None, factor=factor, delta=codec.dequantize(scales, codes, numbers, record.values))
