"""The operations of `reference` on raw bits, compiled by Numba for the CPU. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from .fingerprints import copy_with_fingerprint, fingerprint, fingerprint_change
from .numba_cache import inlined, kernel
from .philox import BLOCK, Positions, draws, keep_mask, kept_positions

__all__ = [
    "BLOCK",
    "Positions",
    "collapse",
    "copy_with_fingerprint",
    "distances_by_exponent",
    "draws",
    "expand",
    "fingerprint",
    "fingerprint_change",
    "from_distances",
    "has_nonfinite",
    "join",
    "keep_mask",
    "kept_positions",
    "law_bf16",
    "magnitudes_bf16",
    "put",
    "take",
]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_THREE = np.uint64(3)
_FOUR = np.uint64(4)


@kernel
def _any_all_ones(words, mask) -> int:
    any_found = 0
    for i in range(words.size):
        any_found |= int((words[i] & mask) == mask)
    return any_found


@inlined
def _group_of(word, shift, groups):
    return (np.uint64(word) >> shift) & (groups - _ONE)


@inlined
def _count_groups(base, shift, groups, cursor):
    """Where in a stable sort by exponent field each quarter of `base` puts its first word of each group:
    cursor[quarter * groups + group].

    Quarters, because neighbours are often of one group, and a counter cannot be raised again before it has
    been written.
    """
    quarter = np.uint64(base.size // 4)
    for g in range(cursor.size):
        cursor[g] = 0
    for i in range(quarter):
        for lane in range(_ZERO, _FOUR):
            cursor[lane * groups + _group_of(base[lane * quarter + i], shift, groups)] += _ONE
    for i in range(_FOUR * quarter, np.uint64(base.size)):
        cursor[_THREE * groups + _group_of(base[i], shift, groups)] += _ONE
    before = _ZERO
    for g in range(groups):
        for lane in range(_ZERO, _FOUR):
            count = cursor[lane * groups + g]
            cursor[lane * groups + g] = before
            before += count


@inlined
def _next(cursor, place):
    at = cursor[place]
    cursor[place] = at + _ONE
    return at


@inlined
def _all_if(bit):
    """All ones or all zeros."""
    return _ZERO - (bit & _ONE)


@inlined
def _order(word, top):
    """Words of floats as uint64 that ascend with their values, in the bits of a word; what is above them
    means nothing.
    """
    wide = np.uint64(word)
    return wide ^ (_all_if(wide >> top) | (_ONE << top))


@inlined
def _distance(base, tuned, top):
    """Zigzag ordered-bits distance, in the bits of a word. `top` is the place of the sign bit."""
    distance = _order(tuned, top) - _order(base, top)
    return (distance << _ONE) ^ _all_if(distance >> top)


@inlined
def _at_distance(base, zigzag, top):
    """The word at that distance from `base`."""
    z = np.uint64(zigzag)
    order = _order(base, top) + ((z >> _ONE) ^ _all_if(z))
    return order ^ (~_all_if(order >> top) | (_ONE << top))


@kernel
def _distances_by_exponent(base, tuned, shift, groups, top, out, starts, cursor):
    """Distances stably sorted by the base's exponent field; fills the group starts."""
    word = out.dtype.type
    quarter = np.uint64(base.size // 4)
    _count_groups(base, shift, groups, cursor)
    for g in range(groups):
        starts[g] = cursor[g]
    starts[groups] = base.size
    for i in range(quarter):
        for lane in range(_ZERO, _FOUR):
            b = base[lane * quarter + i]
            t = tuned[lane * quarter + i]
            out[_next(cursor, lane * groups + _group_of(b, shift, groups))] = word(_distance(b, t, top))
    for i in range(_FOUR * quarter, np.uint64(base.size)):
        out[_next(cursor, _THREE * groups + _group_of(base[i], shift, groups))] = word(
            _distance(base[i], tuned[i], top)
        )


@kernel
def _from_distances(base, symbols, shift, groups, top, out, cursor):
    word = out.dtype.type
    quarter = np.uint64(base.size // 4)
    _count_groups(base, shift, groups, cursor)
    for i in range(quarter):
        for lane in range(_ZERO, _FOUR):
            b = base[lane * quarter + i]
            out[lane * quarter + i] = word(
                _at_distance(b, symbols[_next(cursor, lane * groups + _group_of(b, shift, groups))], top)
            )
    for i in range(_FOUR * quarter, np.uint64(base.size)):
        out[i] = word(
            _at_distance(
                base[i], symbols[_next(cursor, _THREE * groups + _group_of(base[i], shift, groups))], top
            )
        )


@kernel
def _take(words, positions, out):
    for i in range(positions.size):
        out[i] = words[positions[i]]


@kernel
def _put(words, positions, values):
    for i in range(positions.size):
        words[positions[i]] = values[i]


@kernel
def _expand(bitmap, values, out) -> int:
    """out[i] = the next of `values` plus one where bit i is set, else 0; returns how many bits were set."""
    unit = out.dtype.type(1)
    last = values.size - 1
    count = 0
    for i in range(out.size):
        bit = (bitmap[i >> 3] >> np.uint8(i & 7)) & np.uint8(1)
        out[i] = (values[min(count, last)] + unit) * out.dtype.type(
            bit
        )  # branchless: bits are hard to predict
        count += bit
    return count


@kernel
def _join(planes, width, out):
    """out[i] = the bytes at i, n + i, 2n + i ... of `width` planes of n bytes, the least significant
    first.
    """
    for i in range(out.size):
        out[i] = out.dtype.type(planes[i])
    for plane in range(1, width):
        first = np.uint64(plane * out.size)
        shift = out.dtype.type(8 * plane)
        for i in range(out.size):
            out[i] |= out.dtype.type(out.dtype.type(planes[first + np.uint64(i)]) << shift)


@kernel
def _collapse(symbols, starts, bitmap, values, before) -> int:
    """Undo `_expand`; before[g] is how many values come before symbol starts[g]. Returns how many there
    are.
    """
    unit = symbols.dtype.type(1)
    count = 0
    group = 0
    for i in range(symbols.size):
        while group < starts.size and starts[group] == i:
            before[group] = count
            group += 1
        changed = symbols[i] != 0
        bitmap[i >> 3] |= np.uint8(changed) << np.uint8(i & 7)
        values[count] = symbols[i] - unit  # branchless: overwritten by the next one unless it counts
        count += changed
    return count


@kernel
def _law_bf16(base, tuned, factor, out):
    """round_to_bf16(f32(base) + factor * (f32(tuned) - f32(base))), each operation rounded; equal words
    stay.
    """
    for i in range(base.size):
        b = np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32)
        t = np.uint32(np.uint32(tuned[i]) << np.uint32(16)).view(np.float32)
        moved = np.float32(b + np.float32(factor * np.float32(t - b)))
        bits = np.float32(moved).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        rounded = np.uint32(0x7FC0) if moved != moved else rounded
        out[i] = base[i] if base[i] == tuned[i] else np.uint16(rounded)


@kernel
def _magnitudes_bf16(base, tuned, counts, largest) -> int:
    """Adds float32 |tuned - own| to `counts`, by the leading bits of each; returns how many are not finite
    and not counted.
    """
    top = np.uint32(0)
    strange = 0
    for i in range(base.size):
        b = np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32)
        t = np.uint32(np.uint32(tuned[i]) << np.uint32(16)).view(np.float32)
        bits = np.float32(t - b).view(np.uint32) & np.uint32(0x7FFFFFFF)
        if bits < np.uint32(0x7F800000):
            counts[bits >> np.uint32(20)] += 1
            top = max(top, bits)
        else:
            strange += 1
    largest[0] = top
    return strange


def take(words: Words, positions: NDArray[np.signedinteger]) -> Words:
    """`words[positions]`, for positions of any width: numpy would widen them first."""
    out = np.empty(positions.size, words.dtype)
    _take(words, positions, out)
    return out


def put(words: Words, positions: NDArray[np.signedinteger], values: Words) -> None:
    """`words[positions] = values`, in place."""
    _put(words, positions, values)


def has_nonfinite(words: Words, exponent_mask: int) -> bool:
    """Whether any exponent field is all ones: NaN or infinity."""
    return bool(_any_all_ones(words, words.dtype.type(exponent_mask)))


def distances_by_exponent(base: Words, tuned: Words, exponent_bits: int) -> tuple[Words, NDArray[np.int64]]:
    """Distances from `base` to `tuned`, grouped by base exponent, and the group starts; see `reference`."""
    out = np.empty_like(base)
    starts = np.empty((1 << exponent_bits) + 1, np.int64)
    cursor = np.empty(4 << exponent_bits, np.uint64)
    _distances_by_exponent(base, tuned, *_layout(base, exponent_bits), out, starts, cursor)
    return out, starts


def from_distances(base: Words, symbols: Words, exponent_bits: int) -> Words:
    """Undo `distances_by_exponent`: the tuned words."""
    out = np.empty_like(base)
    cursor = np.empty(4 << exponent_bits, np.uint64)
    _from_distances(base, symbols, *_layout(base, exponent_bits), out, cursor)
    return out


def expand(bitmap: NDArray[np.uint8], values: Words, kept: int) -> tuple[Words, int]:
    """`kept` symbols from a bitmap of those that are not zero and the others less one, and how many bits were
    set.
    """
    out = np.zeros(kept, values.dtype)
    return out, _expand(bitmap, values, out) if values.size else int(
        np.unpackbits(bitmap, count=kept, bitorder="little").sum()
    )


def join(planes: NDArray[np.uint8], out: Words) -> None:
    """Make words of byte planes, least significant first, one plane after another."""
    _join(planes, out.itemsize, out)


def collapse(symbols: Words, starts: NDArray[np.int64]) -> tuple[NDArray[np.uint8], Words, NDArray[np.int64]]:
    """A bitmap of the symbols that are not zero, those less one, and how many of them come before each of
    `starts`.
    """
    bitmap = np.zeros(-(-symbols.size // 8), np.uint8)
    values = np.empty(symbols.size + 1, symbols.dtype)
    before = np.empty(starts.size, np.int64)
    return bitmap, values[: _collapse(symbols, starts, bitmap, values, before)], before


def law_bf16(base: Words, tuned: Words, factor: float) -> Words:
    """The arithmetic law on bfloat16 words, one package; see `reference.law`."""
    out = np.empty_like(base)
    _law_bf16(base, tuned, np.float32(factor), out)
    return out


def magnitudes_bf16(base: Words, tuned: Words, counts: NDArray[np.int64]) -> tuple[float, int]:
    """Count float32 |tuned - own| of bfloat16 words by the leading 11 bits after the sign, into `counts`,
    shape (2048,).

    Returns the largest, and how many are not finite: those are not counted.
    """
    largest = np.zeros(1, np.uint32)
    strange = _magnitudes_bf16(base, tuned, counts, largest)
    return float(largest.view(np.float32)[0]), strange


def _layout(base: Words, exponent_bits: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Where the exponent field begins, how many exponents there are, and where the sign is."""
    bits = base.itemsize * 8
    return np.uint64(bits - 1 - exponent_bits), np.uint64(1 << exponent_bits), np.uint64(bits - 1)
