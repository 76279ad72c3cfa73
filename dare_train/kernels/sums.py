"""Sums of several deltas on raw bits, and the counts by which merging finds its thresholds; compiled as in
`cpu`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from .numba_cache import inlined, kernel
from .philox import Positions

_HALF = np.uint32(0x7FFF)
_UNSIGNED = np.uint32(0x7FFF)
_U16 = np.uint32(16)
_ONE = np.uint32(1)
_NAN = np.uint32(0x7FC0)
_CANONICAL = np.float32(np.nan)
MAGNITUDE = np.uint32(0x7FFFFFFF)
_AT_A_TIME = 2048

NAN_SIZE = np.uint32(0x7F800001)
"""Bits of every NaN among magnitudes, since hardware disagrees on the payloads of those that it makes: the
smallest one's."""


@inlined
def widened(word):
    return np.uint32(np.uint32(word) << _U16).view(np.float32)


@inlined
def narrowed(value):
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + _HALF + ((bits >> _U16) & _ONE)) >> _U16
    return np.uint16(_NAN if value != value else rounded)


@inlined
def _sum(total, base, tuned, factor):
    """Of a word that moves; every NaN with the same bits."""
    sum_ = np.float32(total + np.float32(factor * np.float32(widened(tuned) - widened(base))))
    sum_ = _CANONICAL if sum_ != sum_ else sum_
    return sum_ if base != tuned else total


@kernel
def _widen_bf16(words, out):
    for i in range(words.size):
        out[i] = widened(words[i])


@kernel
def _add_at_bf16(base, tuned, positions, factor, total):
    for i in range(positions.size):
        p = np.uint64(positions[i])
        total[p] = _sum(total[p], base[i], tuned[i], factor)


@kernel
def _add_all_bf16(base, tuned, factor, total):
    for i in range(base.size):
        total[i] = _sum(total[i], base[i], tuned[i], factor)


@kernel
def _count_movers(base, tuned, positions, movers):
    for i in range(positions.size):
        movers[np.uint64(positions[i])] += np.uint16(base[i] != tuned[i])


@kernel
def _round_moved_bf16(words, total):
    for i in range(words.size):
        same = np.uint32(np.uint32(words[i]) << _U16) == np.float32(total[i]).view(np.uint32)
        words[i] = words[i] if same else narrowed(total[i])


@kernel
def _put_alone(words, positions, base, tuned, movers):
    for i in range(positions.size):
        p = np.uint64(positions[i])
        alone = (movers[p] == 1) & (base[i] != tuned[i])
        words[p] = tuned[i] if alone else words[p]


@kernel
def _deltas_bf16(base, tuned, factor, out):
    zero = np.float32(0)
    for i in range(base.size):
        delta = np.float32(factor * np.float32(widened(tuned[i]) - widened(base[i])))
        out[i] = delta if base[i] != tuned[i] else zero


@kernel
def _sizes_bf16(base, tuned, factor, out):
    zero = np.uint32(0)
    for i in range(base.size):
        bits = (
            np.float32(factor * np.float32(widened(tuned[i]) - widened(base[i]))).view(np.uint32) & MAGNITUDE
        )
        bits = bits if bits < NAN_SIZE else NAN_SIZE
        out[i] = bits if base[i] != tuned[i] else zero


@kernel
def _keep_sizes(row, least, most):
    zero = np.float32(0)
    for i in range(row.size):
        bits = np.float32(row[i]).view(np.uint32) & MAGNITUDE
        row[i] = row[i] if (bits >= least) & ((bits < most) | (bits >= NAN_SIZE)) else zero


@kernel
def _keep(row, flags):
    zero = np.float32(0)
    none = np.uint8(0)
    for i in range(row.size):
        row[i] = row[i] if flags[i] != none else zero


@kernel
def _masked_deltas_bf16(base, tuned, draws, threshold, factor, out):
    zero = np.float32(0)
    for i in range(base.size):
        delta = np.float32(factor * np.float32(widened(tuned[i]) - widened(base[i])))
        out[i] = delta if (draws[i] >= threshold) & (base[i] != tuned[i]) else zero


@inlined
def _add_row(rows, first, size, weight, total):
    for i in range(size):
        total[i] += np.float32(rows[first + np.uint64(i)] * weight)


@inlined
def _add_agreeing(rows, first, size, weight, sums, total, counts):
    zero = np.float32(0)
    unit = np.float32(1)
    for i in range(size):
        sign = unit if sums[i] >= zero else -unit
        along = np.float32(np.float32(rows[first + np.uint64(i)] * weight) * sign)
        along = zero if along <= zero else along
        total[i] += along
        counts[i] += weight if along > zero else zero


@kernel
def _ties(rows, weights, normalize, out, sums, total, counts):
    """`rows` holds weights.size rows of out.size; `sums`, `total` and `counts` as many elements as are worked
    on at a time.
    """
    zero = np.float32(0)
    unit = np.float32(1)
    begun = 0
    while begun < out.size:
        size = min(sums.size, out.size - begun)
        for i in range(size):
            sums[i] = zero
            total[i] = zero
            counts[i] = zero
        for n in range(weights.size):
            _add_row(rows, np.uint64(n * out.size + begun), size, weights[n], sums)
        for n in range(weights.size):
            _add_agreeing(rows, np.uint64(n * out.size + begun), size, weights[n], sums, total, counts)
        first = np.uint64(begun)
        for i in range(size):
            elected = np.float32(total[i] * (unit if sums[i] >= zero else -unit))
            count = unit if (counts[i] == zero) | (normalize == 0) else counts[i]
            out[first + np.uint64(i)] = np.float32(elected / count)
        begun += size


@kernel
def _moved_bf16(base, delta, out):
    for i in range(base.size):
        d = delta[i]
        out[i] = base[i] if d == np.float32(0.0) else narrowed(np.float32(widened(base[i]) + d))


@kernel
def _count_leading(bits, counts):
    for i in range(bits.size):
        counts[(bits[i] >> _U16) & _UNSIGNED] += 1


def widened_bf16(words: Words) -> NDArray[np.float32]:
    """bfloat16 words as numbers."""
    out = np.empty(words.size, np.float32)
    _widen_bf16(words, out)
    return out


def add_at_bf16(
    base: Words, tuned: Words, positions: Positions | None, factor: float, total: NDArray[np.float32]
) -> None:
    """`total[positions] += f32(factor) · (f32(tuned) - f32(own))` where words differ, in place; NaNs become
    canonical.

    `base` and `tuned` are bfloat16 words at the positions; None stands for every element.
    """
    if positions is None:
        _add_all_bf16(base, tuned, np.float32(factor), total)
    else:
        _add_at_bf16(base, tuned, positions, np.float32(factor), total)


def count_movers(base: Words, tuned: Words, positions: Positions, movers: NDArray[np.uint16]) -> None:
    """`movers[positions] += own != tuned`, in place."""
    _count_movers(base, tuned, positions, movers)


def round_moved_bf16(words: Words, total: NDArray[np.float32]) -> None:
    """`words = bf16(total)` where the total is no longer the word itself, in place."""
    _round_moved_bf16(words, total)


def put_alone(
    words: Words, positions: Positions, base: Words, tuned: Words, movers: NDArray[np.uint16]
) -> None:
    """`words[positions] = tuned` where `tuned` differs from `base` and nothing else moved the element, in
    place.
    """
    _put_alone(words, positions, base, tuned, movers)


def deltas_bf16(base: Words, tuned: Words, factor: float) -> NDArray[np.float32]:
    """f32(factor) · (f32(tuned) - f32(own)) of bfloat16 words; of equal ones zero, whatever they are."""
    out = np.empty(base.size, np.float32)
    _deltas_bf16(base, tuned, np.float32(factor), out)
    return out


def sizes_bf16(base: Words, tuned: Words, factor: float) -> NDArray[np.float32]:
    """Magnitudes of `deltas_bf16`; NaNs have the bits `NAN_SIZE`."""
    out = np.empty(base.size, np.uint32)
    _sizes_bf16(base, tuned, np.float32(factor), out)
    return out.view(np.float32)


def keep_sizes(row: NDArray[np.float32], least: np.uint32, most: np.uint32) -> None:
    """Make zero, in place, what has magnitudes of other bits than [least, most); NaN is above every number,
    and too large for no `most`.
    """
    _keep_sizes(row, least, most)


def keep(row: NDArray[np.float32], kept: NDArray[np.bool_]) -> None:
    """Make zero, in place, what is not kept."""
    _keep(row, kept.view(np.uint8))


def masked_deltas_bf16(
    base: Words,
    tuned: Words,
    draws: NDArray[np.uint16],
    threshold: int,
    factor: float,
    out: NDArray[np.float32],
) -> None:
    """`deltas_bf16` where the draw is at least the threshold, else zero, into `out`."""
    _masked_deltas_bf16(base, tuned, draws, np.uint16(threshold), np.float32(factor), out)


def ties(
    deltas: NDArray[np.float32], weights: NDArray[np.float32], *, normalize: bool
) -> NDArray[np.float32]:
    """`merge.elements.ties` of float32 deltas [n, k], to the bit."""
    out = np.empty(deltas.shape[1], np.float32)
    _ties(deltas.reshape(-1), weights, np.uint8(normalize), out, *np.empty((3, _AT_A_TIME), np.float32))
    return out


def moved_bf16(base: Words, delta: NDArray[np.float32]) -> Words:
    """bf16(f32(base) + delta); where the delta is zero, the base's words."""
    out = np.empty_like(base)
    _moved_bf16(base, delta, out)
    return out


def count_leading(sizes: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    """Count float32 magnitudes by the 15 bits after the sign, into `counts`, shape (32768,)."""
    _count_leading(sizes.view(np.uint32), counts)
