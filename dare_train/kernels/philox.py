"""Which elements are kept: Philox draws and the positions they select, as `reference` defines them."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from .numba_cache import inlined, kernel

BLOCK = 8192
"""Elements that share 1,024 consecutive Philox counters; see docs/format.md."""

Positions = NDArray[np.int64]

_COUNTERS = 1024
_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint64(0x9E3779B9)
_W1 = np.uint64(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_U16 = np.uint64(16)
_U32 = np.uint64(32)
_S56 = np.uint64(56)
_SLACK = 12
_GATHER = np.uint64(0x0102040810204080)
"""Multiplies eight bytes of 0 or 1 so that their bits meet in the highest byte."""


@inlined
def _round(c0, c1, c2, c3, k0, k1):
    p0 = _M0 * c0
    p1 = _M1 * c2
    return (p1 >> _U32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _U32) ^ c3 ^ k1, p0 & _LOW


@inlined
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011). Words are uint32 values in uint64; unrolled so that loops over it
    vectorise.
    """
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0 = (k0 + _W0) & _LOW
    k1 = (k1 + _W1) & _LOW
    return _round(c0, c1, c2, c3, k0, k1)


@inlined
def block_draws(key, block, domain, out, at):
    """The 8,192 draws of one block from `at` on, planar: word w of counter j is draws 2w*1024+j (low half)
    and (2w+1)*1024+j.
    """
    k0 = key & _LOW
    k1 = key >> _U32
    first = block * np.uint64(_COUNTERS)
    high = first >> _U32
    for j in range(_COUNTERS):
        c0 = (first + np.uint64(j)) & _LOW
        w0, w1, w2, w3 = _philox(c0, high, domain, np.uint64(0), k0, k1)
        i = at + np.uint64(j)
        out[i] = np.uint16(w0)
        out[i + np.uint64(1024)] = np.uint16(w0 >> _U16)
        out[i + np.uint64(2048)] = np.uint16(w1)
        out[i + np.uint64(3072)] = np.uint16(w1 >> _U16)
        out[i + np.uint64(4096)] = np.uint16(w2)
        out[i + np.uint64(5120)] = np.uint16(w2 >> _U16)
        out[i + np.uint64(6144)] = np.uint16(w3)
        out[i + np.uint64(7168)] = np.uint16(w3 >> _U16)


@kernel
def _draws(key, start, domain, out, buffer):
    done = 0
    while done < out.size:
        index = start + np.uint64(done)
        offset = np.int64(index % np.uint64(BLOCK))
        take = min(BLOCK - offset, out.size - done)
        if take == BLOCK:
            block_draws(key, index // np.uint64(BLOCK), domain, out, np.uint64(done))
        else:
            block_draws(key, index // np.uint64(BLOCK), domain, buffer, np.uint64(0))
            for i in range(take):
                out[done + i] = buffer[offset + i]
        done += take


@inlined
def _ones(n):
    """How many bits of a uint64 are set; compilers know it by this form."""
    n = n - ((n >> np.uint64(1)) & np.uint64(0x5555555555555555))
    n = (n & np.uint64(0x3333333333333333)) + ((n >> np.uint64(2)) & np.uint64(0x3333333333333333))
    n = (n + (n >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((n * np.uint64(0x0101010101010101)) >> _S56)


@inlined
def _bits_of(flags, first):
    """64 bytes of 0 or 1 as the bits of a word; `flags` holds eight of them in each of its words."""
    bits = np.uint64(0)
    for k in range(8):
        bits |= ((flags[first + k] * _GATHER) >> _S56) << np.uint64(8 * k)
    return bits


@inlined
def _write_positions(bits, first, out, at):
    """first + position of each set bit, from out[at] on; up to 12 places behind the last may hold anything
    afterwards.

    How many there are is hard to predict, so they are written a few at a time, whether there are as many or
    not.
    """
    for k in range(4):
        out[at + k] = first + _ones(~bits & (bits - np.uint64(1)))
        bits &= bits - np.uint64(1)
    at += 4
    if bits:
        for k in range(8):
            out[at + k] = first + _ones(~bits & (bits - np.uint64(1)))
            bits &= bits - np.uint64(1)
        at += 8
    while bits:
        out[at] = first + _ones(~bits & (bits - np.uint64(1)))
        at += 1
        bits &= bits - np.uint64(1)


@kernel
def _kept_positions(key, start, count, threshold, out, buffer, flags, words) -> int:
    """`words` is `flags`, eight at a time."""
    done = 0
    kept = 0
    while done < count:
        index = start + np.uint64(done)
        offset = np.int64(index % np.uint64(BLOCK))
        take = min(BLOCK - offset, count - done)
        block_draws(key, index // np.uint64(BLOCK), np.uint64(0), buffer, np.uint64(0))
        for i in range(BLOCK):
            flags[i] = np.uint8(buffer[i] >= threshold)
        for i in range(offset):
            flags[i] = 0
        for i in range(offset + take, BLOCK):
            flags[i] = 0
        for group in range(BLOCK // 64):
            bits = _bits_of(words, 8 * group)
            _write_positions(bits, done - offset + 64 * group, out, kept)
            kept += _ones(bits)
        done += take
    return kept


def draws(key: int, start: int, count: int, domain: int) -> NDArray[np.uint16]:
    """`count` 16-bit draws for flat indices `start` onwards; see `reference.draws`."""
    out = np.empty(count, np.uint16)
    _draws(np.uint64(key), np.uint64(start), np.uint64(domain), out, _scratch.draws)
    return out


def keep_mask(key: int, start: int, count: int, threshold: int) -> NDArray[np.bool_]:
    """Boolean mask, True where the element is kept; see `reference.keep_mask`."""
    return draws(key, start, count, 0) >= threshold


def kept_positions(key: int, start: int, count: int, threshold: int) -> Positions:
    """Ascending positions relative to `start` of the kept elements among `count`: the set bits of
    `keep_mask`.
    """
    room = _scratch.positions(count + _SLACK)
    flags = _scratch.flags
    kept = _kept_positions(
        np.uint64(key),
        np.uint64(start),
        count,
        np.uint16(threshold),
        room,
        _scratch.draws,
        flags,
        flags.view(np.uint64),
    )
    return room[:kept].copy()


class _Scratch(threading.local):
    """Memory that a thread uses again and again: kernels allocate none, and fresh pages each time would be
    slow.
    """

    def __init__(self) -> None:
        self.draws = np.empty(BLOCK, np.uint16)
        self.flags = np.empty(BLOCK, np.uint8)
        self._positions = np.empty(0, np.int64)

    def positions(self, size: int) -> Positions:
        if self._positions.size < size:
            self._positions = np.empty(size, np.int64)
        return self._positions[:size]


_scratch = _Scratch()
