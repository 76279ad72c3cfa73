"""The operations of `reference` on raw bits, compiled by Numba for the CPU. Needs no torch.

All functions release the GIL, so threads run them side by side. They are compiled on first use,
once per machine, and cached; the first compilation announces itself on stderr.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
from numba import njit, types
from numba.core import event
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..dtypes import Words

BLOCK = 8192
"""Elements that share 1,024 consecutive Philox counters; see docs/format.md."""

_COUNTERS = 1024
_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint64(0x9E3779B9)
_W1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_U16 = np.uint64(16)
_U32 = np.uint64(32)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30 = np.uint64(30)
_S27 = np.uint64(27)
_S31 = np.uint64(31)
_S56 = np.uint64(56)
_GATHER = np.uint64(0x0102040810204080)
"""Multiplies eight bytes of 0 or 1 so that their bits meet in the highest byte."""

Positions = NDArray[np.int64]


class _Announcer(event.Listener):  # type: ignore[misc]
    """Says once per process that kernels are being compiled, so that the first run's wait explains itself."""

    def __init__(self) -> None:
        self.told = False

    def on_start(self, _event: object) -> None:
        if not self.told:
            self.told = True
            print("dare_train: compiling CPU kernels, once on this machine (about 8 s) ...", file=sys.stderr)

    def on_end(self, _event: object) -> None:
        pass


event.register("numba:compile", _Announcer())


@njit(nogil=True, cache=True, forceinline=True)
def _round(c0, c1, c2, c3, k0, k1):
    p0 = _M0 * c0
    p1 = _M1 * c2
    return (p1 >> _U32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _U32) ^ c3 ^ k1, p0 & _LOW


@njit(nogil=True, cache=True, forceinline=True)
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011). Words are uint32 values in uint64; unrolled so that loops over it vectorise."""
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return _round(c0, c1, c2, c3, k0, k1)


@njit(nogil=True, cache=True, forceinline=True)
def _block_draws(key, block, domain, out):
    """The 8,192 draws of one block, planar: word w of counter j is draws 2w*1024+j (low half) and (2w+1)*1024+j."""
    k0, k1 = key & _LOW, key >> _U32
    first = block * np.uint64(_COUNTERS)
    high = first >> _U32
    for j in range(_COUNTERS):
        c0 = (first + np.uint64(j)) & _LOW
        w0, w1, w2, w3 = _philox(c0, high, domain, np.uint64(0), k0, k1)
        out[j] = np.uint16(w0)
        out[j + 1024] = np.uint16(w0 >> _U16)
        out[j + 2048] = np.uint16(w1)
        out[j + 3072] = np.uint16(w1 >> _U16)
        out[j + 4096] = np.uint16(w2)
        out[j + 5120] = np.uint16(w2 >> _U16)
        out[j + 6144] = np.uint16(w3)
        out[j + 7168] = np.uint16(w3 >> _U16)


@njit(nogil=True, cache=True)
def _draws(key, start, domain, out):
    buffer = np.empty(BLOCK, np.uint16)
    done = 0
    while done < out.size:
        index = start + np.uint64(done)
        offset = np.int64(index % np.uint64(BLOCK))
        take = min(BLOCK - offset, out.size - done)
        _block_draws(key, index // np.uint64(BLOCK), domain, buffer)
        out[done : done + take] = buffer[offset : offset + take]
        done += take


@intrinsic
def _trailing_zeros(_context, _word):
    """Position of the lowest set bit of a uint64 that is not zero."""

    def generate(context, builder, _signature, arguments):
        return builder.cttz(arguments[0], context.get_constant(types.boolean, 1))

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True, forceinline=True)
def _bits_of(flags, first):
    """64 bytes of 0 or 1 as the bits of a word; `flags` holds eight of them in each of its words."""
    bits = np.uint64(0)
    for k in range(8):
        bits |= ((flags[first + k] * _GATHER) >> _S56) << np.uint64(8 * k)
    return bits


@njit(nogil=True, cache=True)
def _kept_positions(key, start, count, threshold, out):
    buffer = np.empty(BLOCK, np.uint16)
    flags = np.empty(BLOCK, np.uint8)
    words = flags.view(np.uint64)
    done, kept = 0, 0
    while done < count:
        index = start + np.uint64(done)
        offset = np.int64(index % np.uint64(BLOCK))
        take = min(BLOCK - offset, count - done)
        _block_draws(key, index // np.uint64(BLOCK), np.uint64(0), buffer)
        for i in range(BLOCK):
            flags[i] = np.uint8(buffer[i] >= threshold)
        flags[:offset] = 0
        flags[offset + take :] = 0
        for group in range(BLOCK // 64):
            bits = _bits_of(words, 8 * group)
            while bits:  # as many turns as elements are kept: few
                out[kept] = done - offset + 64 * group + np.int64(_trailing_zeros(bits))
                kept += 1
                bits &= bits - np.uint64(1)
        done += take
    return kept


@njit(nogil=True, cache=True, forceinline=True)
def _mix(word, offset):
    v = np.uint64(word) + offset
    v = (v ^ (v >> _S30)) * _MIX1
    v = (v ^ (v >> _S27)) * _MIX2
    v = v ^ (v >> _S31)
    return v, (v & _LOW) * (v >> _U32)


@njit(nogil=True, cache=True)
def _fingerprint(words, start):
    a, b = np.uint64(0), np.uint64(0)
    offset = start * _GOLDEN
    for i in range(words.size):
        v, u = _mix(words[i], offset)
        offset += _GOLDEN
        a += v
        b += u
    return a, b


@njit(nogil=True, cache=True)
def _copy_with_fingerprint(words, start, out):
    a, b = np.uint64(0), np.uint64(0)
    offset = start * _GOLDEN
    for i in range(words.size):
        out[i] = words[i]
        v, u = _mix(words[i], offset)
        offset += _GOLDEN
        a += v
        b += u
    return a, b


@njit(nogil=True, cache=True)
def _fingerprint_at(words, positions, start):
    a, b = np.uint64(0), np.uint64(0)
    for i in range(words.size):
        v, u = _mix(words[i], (start + np.uint64(positions[i])) * _GOLDEN)
        a += v
        b += u
    return a, b


@njit(nogil=True, cache=True)
def _any_all_ones(words, mask):
    found = False
    for i in range(words.size):
        found |= (words[i] & mask) == mask
    return found


@njit(nogil=True, cache=True)
def _group_starts(base, shift, groups):
    """Histogram of the exponent fields as exclusive prefix sums; shape (groups + 1,)."""
    starts = np.zeros(groups + 1, np.int64)
    mask = base.dtype.type(groups - 1)
    for i in range(base.size):
        starts[np.int64((base[i] >> shift) & mask) + 1] += 1
    for g in range(groups):
        starts[g + 1] += starts[g]
    return starts


@njit(nogil=True, cache=True)
def _distances_by_exponent(base, tuned, shift, groups, sign, out):
    """Zigzag ordered-bits distances, stably sorted by the base's exponent field; returns the group starts."""
    one = sign // sign
    top = base.dtype.type(base.itemsize * 8 - 1)
    mask = base.dtype.type(groups - 1)
    starts = _group_starts(base, shift, groups)
    cursor = starts.copy()
    for i in range(base.size):
        b, t = base[i], tuned[i]
        b_order = ~b if b & sign else b | sign
        t_order = ~t if t & sign else t | sign
        d = base.dtype.type(t_order - b_order)
        zigzag = base.dtype.type((d << one) ^ (base.dtype.type(0) - (d >> top)))
        g = np.int64((b >> shift) & mask)
        out[cursor[g]] = zigzag
        cursor[g] += 1
    return starts


@njit(nogil=True, cache=True)
def _from_distances(base, symbols, shift, groups, sign, out):
    one = sign // sign
    zero = base.dtype.type(0)
    mask = base.dtype.type(groups - 1)
    cursor = _group_starts(base, shift, groups)
    for i in range(base.size):
        b = base[i]
        g = np.int64((b >> shift) & mask)
        z = symbols[cursor[g]]
        cursor[g] += 1
        b_order = ~b if b & sign else b | sign
        order = base.dtype.type(b_order + ((z >> one) ^ (zero - (z & one))))
        out[i] = order ^ sign if order & sign else ~order


@njit(nogil=True, cache=True)
def _take(words, positions, out):
    for i in range(positions.size):
        out[i] = words[positions[i]]


@njit(nogil=True, cache=True)
def _put(words, positions, values):
    for i in range(positions.size):
        words[positions[i]] = values[i]


@njit(nogil=True, cache=True)
def _expand(bitmap, values, out):
    """out[i] = the next of `values` plus one where bit i is set, else 0; returns how many bits were set."""
    one, last = out.dtype.type(1), values.size - 1
    found = 0
    for i in range(out.size):
        bit = (bitmap[i >> 3] >> np.uint8(i & 7)) & np.uint8(1)
        out[i] = (values[min(found, last)] + one) * out.dtype.type(bit)  # branchless: bits are hard to predict
        found += bit
    return found


@njit(nogil=True, cache=True)
def _collapse(symbols, starts, bitmap, values, before):
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


@njit(nogil=True, cache=True)
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


def draws(key: int, start: int, count: int, domain: int) -> NDArray[np.uint16]:
    """`count` 16-bit draws for flat indices `start` onwards; see `reference.draws`."""
    out = np.empty(count, np.uint16)
    _draws(np.uint64(key), np.uint64(start), np.uint64(domain), out)
    return out


def keep_mask(key: int, start: int, count: int, threshold: int) -> NDArray[np.bool_]:
    """Boolean mask, True where the element is kept; see `reference.keep_mask`."""
    return draws(key, start, count, 0) >= threshold


def kept_positions(key: int, start: int, count: int, threshold: int) -> Positions:
    """Ascending positions relative to `start` of the kept elements among `count`: the set bits of `keep_mask`."""
    room = _scratch.positions(count + 1)
    kept = _kept_positions(np.uint64(key), np.uint64(start), count, np.uint16(threshold), room)
    return room[:kept].copy()


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
    a, b = _fingerprint(words, np.uint64(start))
    return int(a), int(b)


def copy_with_fingerprint(words: Words, start: int, out: Words) -> tuple[int, int]:
    """`out[:] = words` and their `fingerprint`, in one pass over memory."""
    a, b = _copy_with_fingerprint(words, np.uint64(start), out)
    return int(a), int(b)


def fingerprint_at(words: Words, positions: Positions, start: int) -> tuple[int, int]:
    """The share that the elements at `start + positions` have in a fingerprint."""
    a, b = _fingerprint_at(words, positions, np.uint64(start))
    return int(a), int(b)


def has_nonfinite(words: Words, exponent_mask: int) -> bool:
    """Whether any exponent field is all ones: NaN or infinity."""
    return bool(_any_all_ones(words, words.dtype.type(exponent_mask)))


def distances_by_exponent(base: Words, tuned: Words, exponent_bits: int) -> tuple[Words, NDArray[np.int64]]:
    """Distances from `base` to `tuned`, grouped by base exponent, and the group starts; see `reference`."""
    out = np.empty_like(base)
    starts = _distances_by_exponent(base, tuned, *_layout(base, exponent_bits), out)
    return out, starts


def from_distances(base: Words, symbols: Words, exponent_bits: int) -> Words:
    """Undo `distances_by_exponent`: the tuned words."""
    out = np.empty_like(base)
    _from_distances(base, symbols, *_layout(base, exponent_bits), out)
    return out


def expand(bitmap: NDArray[np.uint8], values: Words, kept: int) -> tuple[Words, int]:
    """`kept` symbols from a bitmap of those that are not zero and the others less one, and how many bits were set."""
    out = np.zeros(kept, values.dtype)
    return out, int(_expand(bitmap, values, out)) if values.size else int(np.unpackbits(bitmap, count=kept, bitorder="little").sum())


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


class _Scratch(threading.local):
    """Memory that a thread uses again and again, so that the kernel need not hand out fresh pages each time."""

    def __init__(self) -> None:
        self._positions = np.empty(0, np.int64)

    def positions(self, size: int) -> Positions:
        if self._positions.size < size:
            self._positions = np.empty(size, np.int64)
        return self._positions[:size]


_scratch = _Scratch()


def _layout(base: Words, exponent_bits: int) -> tuple[np.unsignedinteger, int, np.unsignedinteger]:
    bits = base.itemsize * 8
    word = base.dtype.type
    return word(bits - 1 - exponent_bits), 1 << exponent_bits, word(1 << (bits - 1))
