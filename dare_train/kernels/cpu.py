"""The operations of `reference` on raw bits, compiled by Numba for the CPU. Needs no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from .compiled import inlined, kernel
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
    "fingerprint_at",
    "from_distances",
    "has_nonfinite",
    "keep_mask",
    "kept_positions",
    "law_bf16",
    "magnitudes_bf16",
    "put",
    "take",
]

_LOW = np.uint64(0xFFFFFFFF)
_U32 = np.uint64(32)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30 = np.uint64(30)
_S27 = np.uint64(27)
_S31 = np.uint64(31)


@inlined
def _mix(word, offset):
    v = np.uint64(word) + offset
    v = (v ^ (v >> _S30)) * _MIX1
    v = (v ^ (v >> _S27)) * _MIX2
    v = v ^ (v >> _S31)
    return v, (v & _LOW) * (v >> _U32)


@kernel
def _fingerprint(words, start, lanes):
    a, b = np.uint64(0), np.uint64(0)
    offset = start * _GOLDEN
    for i in range(words.size):
        v, u = _mix(words[i], offset)
        offset += _GOLDEN
        a += v
        b += u
    lanes[0], lanes[1] = a, b


@kernel
def _copy_with_fingerprint(words, start, out, lanes):
    a, b = np.uint64(0), np.uint64(0)
    offset = start * _GOLDEN
    for i in range(words.size):
        out[i] = words[i]
        v, u = _mix(words[i], offset)
        offset += _GOLDEN
        a += v
        b += u
    lanes[0], lanes[1] = a, b


@kernel
def _fingerprint_at(words, positions, start, lanes):
    a, b = np.uint64(0), np.uint64(0)
    for i in range(words.size):
        v, u = _mix(words[i], (start + np.uint64(positions[i])) * _GOLDEN)
        a += v
        b += u
    lanes[0], lanes[1] = a, b


@kernel
def _any_all_ones(words, mask) -> int:
    found = 0
    for i in range(words.size):
        found |= int((words[i] & mask) == mask)
    return found


@inlined
def _group_starts(base, shift, groups, starts):
    """Histogram of the exponent fields as exclusive prefix sums; shape (groups + 1,)."""
    for g in range(groups + 1):
        starts[g] = 0
    mask = base.dtype.type(groups - 1)
    for i in range(base.size):
        starts[np.int64((base[i] >> shift) & mask) + 1] += 1
    for g in range(groups):
        starts[g + 1] += starts[g]


@kernel
def _distances_by_exponent(base, tuned, shift, groups, sign, out, starts, cursor):
    """Zigzag ordered-bits distances, stably sorted by the base's exponent field; fills the group starts."""
    one = sign // sign
    top = base.dtype.type(base.itemsize * 8 - 1)
    mask = base.dtype.type(groups - 1)
    _group_starts(base, shift, groups, starts)
    for group in range(groups):
        cursor[group] = starts[group]
    for i in range(base.size):
        b, t = base[i], tuned[i]
        b_order = ~b if b & sign else b | sign
        t_order = ~t if t & sign else t | sign
        d = base.dtype.type(t_order - b_order)
        zigzag = base.dtype.type((d << one) ^ (base.dtype.type(0) - (d >> top)))
        g = np.int64((b >> shift) & mask)
        out[cursor[g]] = zigzag
        cursor[g] += 1


@kernel
def _from_distances(base, symbols, shift, groups, sign, out, cursor):
    one = sign // sign
    zero = base.dtype.type(0)
    mask = base.dtype.type(groups - 1)
    _group_starts(base, shift, groups, cursor)
    for i in range(base.size):
        b = base[i]
        g = np.int64((b >> shift) & mask)
        z = symbols[cursor[g]]
        cursor[g] += 1
        b_order = ~b if b & sign else b | sign
        order = base.dtype.type(b_order + ((z >> one) ^ (zero - (z & one))))
        out[i] = order ^ sign if order & sign else ~order


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
    one, last = out.dtype.type(1), values.size - 1
    found = 0
    for i in range(out.size):
        bit = (bitmap[i >> 3] >> np.uint8(i & 7)) & np.uint8(1)
        out[i] = (values[min(found, last)] + one) * out.dtype.type(bit)  # branchless: bits are hard to predict
        found += bit
    return found


@kernel
def _collapse(symbols, starts, bitmap, values, before) -> int:
    """Undo `_expand`; before[g] is how many values come before symbol starts[g]. Returns how many there are."""
    one = symbols.dtype.type(1)
    found, group = 0, 0
    for i in range(symbols.size):
        while group < starts.size and starts[group] == i:
            before[group] = found
            group += 1
        changed = symbols[i] != 0
        bitmap[i >> 3] |= np.uint8(changed) << np.uint8(i & 7)
        values[found] = symbols[i] - one  # branchless: overwritten by the next one unless it counts
        found += changed
    return found


@kernel
def _law_bf16(base, tuned, factor, out):
    """round_to_bf16(f32(base) + factor * (f32(tuned) - f32(base))), each operation rounded; equal words stay."""
    for i in range(base.size):
        b = np.uint32(np.uint32(base[i]) << np.uint32(16)).view(np.float32)
        t = np.uint32(np.uint32(tuned[i]) << np.uint32(16)).view(np.float32)
        moved = np.float32(b + np.float32(factor * np.float32(t - b)))
        bits = np.float32(moved).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        rounded = np.uint32(0x7FC0) if moved != moved else rounded
        out[i] = base[i] if base[i] == tuned[i] else np.uint16(rounded)


@kernel
def _magnitudes_bf16(own, tuned, counts, largest) -> int:
    """Adds float32 |tuned - own| to `counts`, by the leading bits of each; returns how many are not finite and not counted."""
    top, strange = np.uint32(0), 0
    for i in range(own.size):
        b = np.uint32(np.uint32(own[i]) << np.uint32(16)).view(np.float32)
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


def fingerprint(words: Words, start: int) -> tuple[int, int]:
    """Two 64-bit lanes of the elements whose flat indices begin at `start`; see `reference.fingerprint`."""
    lanes = np.empty(2, np.uint64)
    _fingerprint(words, np.uint64(start), lanes)
    return int(lanes[0]), int(lanes[1])


def copy_with_fingerprint(words: Words, start: int, out: Words) -> tuple[int, int]:
    """`out[:] = words` and their `fingerprint`, in one pass over memory."""
    lanes = np.empty(2, np.uint64)
    _copy_with_fingerprint(words, np.uint64(start), out, lanes)
    return int(lanes[0]), int(lanes[1])


def fingerprint_at(words: Words, positions: Positions, start: int) -> tuple[int, int]:
    """The share that the elements at `start + positions` have in a fingerprint."""
    lanes = np.empty(2, np.uint64)
    _fingerprint_at(words, positions, np.uint64(start), lanes)
    return int(lanes[0]), int(lanes[1])


def has_nonfinite(words: Words, exponent_mask: int) -> bool:
    """Whether any exponent field is all ones: NaN or infinity."""
    return bool(_any_all_ones(words, words.dtype.type(exponent_mask)))


def distances_by_exponent(base: Words, tuned: Words, exponent_bits: int) -> tuple[Words, NDArray[np.int64]]:
    """Distances from `base` to `tuned`, grouped by base exponent, and the group starts; see `reference`."""
    out = np.empty_like(base)
    starts, cursor = np.empty((2, (1 << exponent_bits) + 1), np.int64)
    _distances_by_exponent(base, tuned, *_layout(base, exponent_bits), out, starts, cursor)
    return out, starts


def from_distances(base: Words, symbols: Words, exponent_bits: int) -> Words:
    """Undo `distances_by_exponent`: the tuned words."""
    out = np.empty_like(base)
    cursor = np.empty((1 << exponent_bits) + 1, np.int64)
    _from_distances(base, symbols, *_layout(base, exponent_bits), out, cursor)
    return out


def expand(bitmap: NDArray[np.uint8], values: Words, kept: int) -> tuple[Words, int]:
    """`kept` symbols from a bitmap of those that are not zero and the others less one, and how many bits were set."""
    out = np.zeros(kept, values.dtype)
    return out, _expand(bitmap, values, out) if values.size else int(np.unpackbits(bitmap, count=kept, bitorder="little").sum())


def collapse(symbols: Words, starts: NDArray[np.int64]) -> tuple[NDArray[np.uint8], Words, NDArray[np.int64]]:
    """A bitmap of the symbols that are not zero, those less one, and how many of them come before each of `starts`."""
    bitmap = np.zeros(-(-symbols.size // 8), np.uint8)
    values, before = np.empty(symbols.size + 1, symbols.dtype), np.empty(starts.size, np.int64)
    return bitmap, values[: _collapse(symbols, starts, bitmap, values, before)], before


def law_bf16(base: Words, tuned: Words, factor: float) -> Words:
    """The arithmetic law on bfloat16 words, one package; see `reference.law`."""
    out = np.empty_like(base)
    _law_bf16(base, tuned, np.float32(factor), out)
    return out


def magnitudes_bf16(own: Words, tuned: Words, counts: NDArray[np.int64]) -> tuple[float, int]:
    """Count float32 |tuned - own| of bfloat16 words by the leading 11 bits after the sign, into `counts`, shape (2048,).

    Returns the largest, and how many are not finite: those are not counted.
    """
    largest = np.zeros(1, np.uint32)
    strange = _magnitudes_bf16(own, tuned, counts, largest)
    return float(largest.view(np.float32)[0]), strange


def _layout(base: Words, exponent_bits: int) -> tuple[np.unsignedinteger, int, np.unsignedinteger]:
    bits = base.itemsize * 8
    word = base.dtype.type
    return word(bits - 1 - exponent_bits), 1 << exponent_bits, word(1 << (bits - 1))
