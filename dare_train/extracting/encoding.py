"""One run of one tensor, from words to a compressed segment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from ..dtypes import FloatArray, Words, to_float
from ..errors import NonFiniteDelta
from ..kernels import cpu
from ..package import codec
from ..package.arithmetic import Term
from ..package.codec import Content, Positions
from ..package.magnitudes import Magnitudes
from ..package.segments import Segment
from ..weights.fingerprint import Fingerprint
from .plan import TensorPlan


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
    segment = Segment(
        tensor=plan.index,
        start=start,
        length=words.size,
        kept=words.size,
        changed=words.size,
        size=len(frame),
    )
    return Encoded(index=plan.index, result=Fingerprint.of(words, start), segment=segment, frame=frame)


def encode_delta(plan: TensorPlan, start: int, base: Words, positions: Positions, tuned: Words) -> Encoded:
    """A run of a delta: `base` holds its every word, `tuned` those at `positions`.

    Raises:
        NonFiniteDelta: a kept element is NaN or infinite, or the delta does not fit float32; unless allowed.
    """
    return encode_kept(
        plan, start, base.size, positions, cpu.take(base, positions), tuned, Fingerprint.of(base, start)
    )


def encode_kept(
    plan: TensorPlan,
    start: int,
    length: int,
    positions: Positions,
    own: Words,
    tuned: Words,
    base: Fingerprint,
) -> Encoded:
    """The same of a run of which only the kept words are at hand: `own` of the base, whose fingerprint the
    run's is, and `tuned`.

    Raises:
        NonFiniteDelta: as `encode_delta`.
    """
    magnitudes, strange = Magnitudes.between(own, tuned, plan.info.dtype)
    _check_finite(plan, strange)
    content, term, changed, symbols = _encode_values(plan, start, length, positions, own, tuned)
    common: dict[str, Any] = dict(
        index=plan.index, base=base, kept=positions.size, changed=changed, magnitudes=magnitudes
    )
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
        index=plan.index,
        base=packed.base,
        kept=packed.kept,
        changed=packed.changed,
        magnitudes=packed.magnitudes,
        result=packed.result,
    )
    return (
        _framed(plan, start, length, packed.content, packed.changed, **common)
        if packed.changed
        else Encoded(**common)
    )


def _framed(
    plan: TensorPlan, start: int, length: int, content: Content, symbols: int, **common: Any
) -> Encoded:
    frame = codec.compress(_with_bitmap(plan, start, length, content))
    segment = Segment(
        tensor=plan.index, start=start, length=length, kept=common["kept"], changed=symbols, size=len(frame)
    )
    return Encoded(segment=segment, frame=frame, **common)


def receiver_words(
    plan: TensorPlan, start: int, length: int, positions: Positions, own: Words, tuned: Words
) -> Words:
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
    remedy = (
        "did training diverge? allow_nonfinite=True with values='exact' (--allow-nonfinite "
        "--values exact) carries them as they are"
    )
    found = f"{count} that are NaN, infinite or too large for {plan.values} values"
    raise NonFiniteDelta(plan.name, expected="finite deltas", found=found, remedy=remedy)


def _encode_values(
    plan: TensorPlan, start: int, length: int, positions: Positions, own: Words, tuned: Words
) -> tuple[Content, Term, int, int]:
    """Content of the frame, what decoding it will give, kept elements whose delta is not zero, and the
    segment's `changed`.
    """
    if plan.values == "exact":
        changed = int(np.count_nonzero(own != tuned))
        content = codec.encode_exact(own, tuned, plan.info.dtype)
        return content, Term(positions=positions, factor=plan.factor, tuned=tuned), changed, changed
    delta = _checked_delta(plan, own, tuned)
    if plan.values == "rounded":
        rounded = codec.round_delta(delta)
        symbols = int(np.count_nonzero(codec.rounded_symbols(delta)))
        return (
            codec.encode_rounded(delta),
            Term(positions=positions, factor=plan.factor, delta=rounded),
            symbols,
            symbols,
        )
    size = codec.group_length(plan.mask.threshold)
    group, groups = codec.groups_of(positions, start, length, size)
    least = (
        np.array([plan.cut_groups.get(start // size + number, 0.0) for number in range(groups)], np.float32)
        if plan.cut_groups
        else None
    )
    scales, codes = codec.quantize(delta, group, groups, positions, start, plan.mask.key, plan.values, least)
    values = codec.dequantize(scales, codes, group, plan.values)
    content = codec.encode_codes(scales, codes, plan.values)
    return (
        content,
        Term(positions=positions, factor=plan.factor, delta=values),
        int(np.count_nonzero(values)),
        positions.size,
    )


def _with_bitmap(plan: TensorPlan, start: int, length: int, content: Content) -> Content:
    if plan.stored is None:
        return content
    bitmap = np.packbits(plan.stored[start : start + length], bitorder="little").tobytes()
    return Content(
        data=bitmap + content.data, cuts=[len(bitmap), *(len(bitmap) + cut for cut in content.cuts)]
    )


@dataclass(frozen=True)
class Taken:
    """Kept words of one run, copied out of the live model."""

    plan: TensorPlan
    start: int
    length: int
    words: Words
    """Empty where an adapter will be merged into the base when the run is encoded."""
