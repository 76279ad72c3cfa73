"""One run of one tensor, from words to a compressed segment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

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
    """Of the tensor's plan."""
    base: Fingerprint = field(default_factory=Fingerprint)
    result: Fingerprint
    kept: int = 0
    changed: int = 0
    segment: Segment | None = None
    frame: bytes = b""
    magnitudes: Magnitudes = field(default_factory=Magnitudes)


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptRun:
    """A run of a delta of which only the kept words are at hand."""

    plan: TensorPlan
    start: int
    length: int
    positions: Positions
    """Of the kept elements, relative to `start`."""
    base_words: Words
    tuned_words: Words
    base: Fingerprint
    """Of the whole run of the base."""


class KeptWords(NamedTuple):
    """The kept words of a run of base and of tuned weights, and the fingerprint of the base's whole run."""

    base_words: Words
    tuned_words: Words
    base: Fingerprint


@dataclass(frozen=True, kw_only=True)
class PackedRun:
    """What a device made of a run of a delta with `exact` values: all but the frame."""

    content: Content
    kept: int
    changed: int
    magnitudes: Magnitudes
    not_finite: int
    """How many deltas are not finite."""
    too_large: int
    """How many elements of the result are not finite, though the base's are, or other ones."""
    base: Fingerprint = field(default_factory=Fingerprint)
    result: Fingerprint = field(default_factory=Fingerprint)


def encode(
    plan: TensorPlan,
    start: int,
    base_words: Words | None,
    tuned_words: Words,
    positions: Positions | None = None,
) -> Encoded:
    """One run of a package.

    Args:
        plan: of its tensor.
        start: flat index at which it begins.
        base_words: all words of the base's run; None where the base has none (`TensorPlan.base_words`).
        tuned_words: of a delta on the base the kept ones, else all, in the dtype that the plan has at hand;
            not looked at where the plan is `base`.
        positions: of the kept ones, where they are known already.

    Raises:
        NonFiniteDelta: a kept element is NaN or infinite, the delta does not fit float32, or what it is
            rescaled to does not fit the result's dtype; unless allowed.
    """
    base = Fingerprint.of(base_words, start) if base_words is not None else Fingerprint()
    if plan.kind == "base":
        return Encoded(index=plan.index, base=base, result=base)
    if plan.kind == "whole" or base_words is None:
        return replace(_encode_whole(plan, start, plan.in_result(tuned_words)), base=base)
    if positions is None:
        positions = plan.positions(start, base_words.size)
    return encode_kept(
        KeptRun(
            plan=plan,
            start=start,
            length=base_words.size,
            positions=positions,
            base_words=cpu.take(base_words, positions),
            tuned_words=tuned_words,
            base=base,
        )
    )


def encode_gathered(plan: TensorPlan, start: int, length: int, gathered: KeptWords | PackedRun) -> Encoded:
    """What `encode` makes of a run, of what was gathered of it on a device.

    Raises:
        NonFiniteDelta: as `encode`.
    """
    if isinstance(gathered, PackedRun):
        return _encode_packed(plan, start, length, gathered)
    return encode_kept(
        KeptRun(
            plan=plan,
            start=start,
            length=length,
            positions=plan.positions(start, length),
            **gathered._asdict(),
        )
    )


def encode_kept(run: KeptRun) -> Encoded:
    """A run of a delta.

    Raises:
        NonFiniteDelta: as `encode`.
    """
    plan = run.plan
    magnitudes, not_finite = _magnitudes(run)
    _check_finite(plan, not_finite)
    run = _landed(run)
    values = _encode_values(run)
    unchanged = Encoded(
        index=plan.index,
        base=run.base,
        result=run.base,
        kept=run.positions.size,
        changed=values.changed,
        magnitudes=magnitudes,
    )
    if not values.changed:
        return unchanged
    received_words = values.term.result(run.base_words, plan.info.dtype)
    if not values.term.exact(plan.info.dtype):
        _check_fits(plan, run.base_words, received_words)
    change = cpu.fingerprint_change(run.base_words, received_words, run.positions, run.start)
    moved = replace(unchanged, result=run.base.plus(change))
    return _framed(moved, plan, run.start, run.length, values.content, values.symbols)


def _encode_packed(plan: TensorPlan, start: int, length: int, packed: PackedRun) -> Encoded:
    _check_finite(plan, packed.not_finite)
    if packed.too_large and not plan.allow_nonfinite:
        raise _too_large(plan)
    encoded = Encoded(
        index=plan.index,
        base=packed.base,
        kept=packed.kept,
        changed=packed.changed,
        magnitudes=packed.magnitudes,
        result=packed.result,
    )
    if not packed.changed:
        return encoded
    return _framed(encoded, plan, start, length, packed.content, packed.changed)


def receiver_words(
    plan: TensorPlan, start: int, length: int, positions: Positions, base_words: Words, tuned_words: Words
) -> Words:
    """The kept words of a run as they will be after applying: what `encode` encodes, decoded."""
    run = KeptRun(
        plan=plan,
        start=start,
        length=length,
        positions=positions,
        base_words=base_words,
        tuned_words=tuned_words,
        base=Fingerprint(),
    )
    return _encode_values(_landed(run)).term.result(base_words, plan.info.dtype)


def _magnitudes(run: KeptRun) -> tuple[Magnitudes, int]:
    """Of the deltas before rescaling, and how many are not finite."""
    dtype, landing = run.plan.info.dtype, run.plan.landing
    if landing is None:
        return Magnitudes.between(run.base_words, run.tuned_words, dtype)
    delta = landing.delta(run.base_words, run.tuned_words, dtype)
    return Magnitudes.of(delta), delta.size - int(np.count_nonzero(np.isfinite(delta)))


def _landed(run: KeptRun) -> KeptRun:
    """The run with words of the result's dtype, if finer ones are at hand."""
    plan, dtype = run.plan, run.plan.info.dtype
    if plan.landing is None:
        return run
    words = plan.landing.landed(run.base_words, run.tuned_words, dtype, run.start, run.positions)
    _check_fits(plan, run.base_words, words)
    return replace(run, tuned_words=words)


def _check_fits(plan: TensorPlan, base_words: Words, words: Words) -> None:
    """What finite deltas were rescaled, rounded or landed to is finite."""
    mask = plan.info.dtype.exponent_mask
    if plan.allow_nonfinite or not cpu.has_nonfinite(words, mask):
        return
    if cpu.has_nonfinite(words[words != base_words], mask):
        raise _too_large(plan)


def _too_large(plan: TensorPlan) -> NonFiniteDelta:
    expected = f"rescaled deltas that fit {plan.info.dtype.code}"
    finer = "p=0 (--p 0)" if plan.landing is None else 'dtype="trained" (--dtype trained)'
    return NonFiniteDelta(
        plan.name, expected=expected, found="larger ones", remedy=f"a smaller p, or {finer}"
    )


def _encode_whole(plan: TensorPlan, start: int, words: Words) -> Encoded:
    """A run carried as it is."""
    planes = codec.to_planes(words)
    cuts = [words.size * plane for plane in range(1, words.itemsize)]
    frame = codec.compress(Content(data=planes.tobytes(), cuts=cuts))
    size = words.size
    segment = Segment(tensor=plan.index, start=start, length=size, kept=size, changed=size, size=len(frame))
    return Encoded(index=plan.index, result=Fingerprint.of(words, start), segment=segment, frame=frame)


def _framed(
    encoded: Encoded, plan: TensorPlan, start: int, length: int, content: Content, symbols: int
) -> Encoded:
    """The same with its segment and its frame."""
    frame = codec.compress(_with_bitmap(plan, start, length, content))
    segment = Segment(
        tensor=plan.index, start=start, length=length, kept=encoded.kept, changed=symbols, size=len(frame)
    )
    return replace(encoded, segment=segment, frame=frame)


def _with_bitmap(plan: TensorPlan, start: int, length: int, content: Content) -> Content:
    if plan.stored is None:
        return content
    bitmap = np.packbits(plan.stored[start : start + length], bitorder="little").tobytes()
    cuts = [len(bitmap), *(len(bitmap) + cut for cut in content.cuts)]
    return Content(data=bitmap + content.data, cuts=cuts)


@dataclass(frozen=True, kw_only=True)
class _Values:
    """The values of a run, encoded."""

    content: Content
    """Of the frame."""
    term: Term
    """What decoding it will give."""
    changed: int
    """Kept elements whose delta is not zero."""
    symbols: int
    """The segment's `changed`."""


def _encode_values(run: KeptRun) -> _Values:
    if run.plan.values == "exact":
        return _exact(run)
    delta = _checked_delta(run)
    return _rounded(run, delta) if run.plan.values == "rounded" else _quantized(run, delta)


def _exact(run: KeptRun) -> _Values:
    plan = run.plan
    changed = int(np.count_nonzero(run.base_words != run.tuned_words))
    return _Values(
        content=codec.encode_exact(run.base_words, run.tuned_words, plan.info.dtype),
        term=Term(positions=run.positions, factor=plan.factor, tuned=run.tuned_words),
        changed=changed,
        symbols=changed,
    )


def _rounded(run: KeptRun, delta: FloatArray) -> _Values:
    changed = int(np.count_nonzero(codec.rounded_symbols(delta)))
    return _Values(
        content=codec.encode_rounded(delta),
        term=Term(positions=run.positions, factor=run.plan.factor, delta=codec.round_delta(delta)),
        changed=changed,
        symbols=changed,
    )


def _quantized(run: KeptRun, delta: FloatArray) -> _Values:
    plan = run.plan
    size = codec.group_length(plan.mask.threshold)
    group, groups = codec.groups_of(run.positions, run.start, run.length, size)
    first = run.start // size
    least = None
    if plan.cut_groups:
        least = np.array([plan.cut_groups.get(first + n, 0.0) for n in range(groups)], np.float32)
    scales, codes = codec.quantize(
        delta, group, groups, run.positions, run.start, plan.mask.key, plan.values, least
    )
    values = codec.dequantize(scales, codes, group, plan.values)
    return _Values(
        content=codec.encode_codes(scales, codes, plan.values),
        term=Term(positions=run.positions, factor=plan.factor, delta=values),
        changed=int(np.count_nonzero(values)),
        symbols=run.positions.size,
    )


def _checked_delta(run: KeptRun) -> FloatArray:
    """The delta that a lossy encoding rounds."""
    dtype = run.plan.info.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        delta = to_float(run.tuned_words, dtype) - to_float(run.base_words, dtype)
    if not np.isfinite(delta).all():
        delta[run.tuned_words == run.base_words] = 0  # also between infinities
    finite = np.isfinite(codec.round_delta(delta))
    if not finite.all():
        _refuse_nonfinite(run.plan, delta.size - int(np.count_nonzero(finite)))
    return delta


def _check_finite(plan: TensorPlan, not_finite: int) -> None:
    if not_finite and not (plan.values == "exact" and plan.allow_nonfinite):
        _refuse_nonfinite(plan, not_finite)


def _refuse_nonfinite(plan: TensorPlan, count: int) -> NoReturn:
    remedy = (
        "did training diverge? allow_nonfinite=True with values='exact' (--allow-nonfinite "
        "--values exact) carries them as they are"
    )
    found = f"{count} that are NaN, infinite or too large for {plan.values} values"
    raise NonFiniteDelta(plan.name, expected="finite deltas", found=found, remedy=remedy)
