"""Fingerprints (docs/format.md §3) on raw bits, compiled as in `cpu`: sums of 32-bit units times factors, and
how many elements there are.

1,024 units share a multiplier, by which their sum is multiplied once.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from .numba_cache import inlined, kernel
from .philox import Positions

UNITS = 1024
_LOW = np.uint64(0xFFFFFFFF)
_U32 = np.uint64(32)
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_THREE = np.uint64(3)
_TEN = np.uint64(10)
_TWELVE = np.uint64(12)
_UNITS = np.uint64(UNITS)
_LAST = np.uint64(UNITS - 1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30 = np.uint64(30)
_S27 = np.uint64(27)
_S31 = np.uint64(31)


@inlined
def _split_mix(number):
    """Output `number` of SplitMix64 seeded with 0."""
    v = (number + _ONE) * _GOLDEN
    v = (v ^ (v >> _S30)) * _MIX1
    v = (v ^ (v >> _S27)) * _MIX2
    return v ^ (v >> _S31)


@inlined
def _first(mixed):
    return mixed | _ONE


@inlined
def _second(mixed):
    return (mixed << _U32) | (mixed >> _U32) | _ONE


@inlined
def _length(start, done, size):
    """How many units from `done` on share a multiplier."""
    return min(_UNITS - ((start + done) & _LAST), size - done)


@inlined
def _add(units, done, length, number, factors, lanes):
    """Add the share of units from `done` on, the first of which has that number, which share a multiplier."""
    at = number & _LAST
    a = np.uint64(0)
    b = np.uint64(0)
    for i in range(length):
        unit = np.uint64(units[done + i])
        a += unit * np.uint64(factors[at + i])
        b += unit * np.uint64(factors[_UNITS + at + i])
    mixed = _split_mix(number >> _TEN)
    lanes[0] += a * _first(mixed)
    lanes[1] += b * _second(mixed)


@kernel
def _fingerprint(units, start, factors, lanes):
    done = np.uint64(0)
    size = np.uint64(units.size)
    while done < size:
        length = _length(start, done, size)
        _add(units, done, length, start + done, factors, lanes)
        done += length


@kernel
def _copy_with_fingerprint(units, start, out, factors, lanes):
    done = np.uint64(0)
    size = np.uint64(units.size)
    while done < size:
        length = _length(start, done, size)
        for i in range(done, done + length):
            out[i] = units[i]
        _add(out, done, length, start + done, factors, lanes)
        done += length


@inlined
def _end_of_group(positions, begin, last):
    """How many positions, ascending, are not beyond `last`, given that `begin` of them are not."""
    end = begin
    step = np.uint64(positions.size)
    while step:
        while end + step <= np.uint64(positions.size) and np.uint64(positions[end + step - _ONE]) <= last:
            end += step
        step >>= _ONE
    return end


@inlined
def _unit_of(word, byte):
    return (np.uint64(word) << ((byte & _THREE) << _THREE)) & _LOW


@kernel
def _change(old, new, positions, start, factors, lanes):
    """`factors` holds both lanes' of a unit in one number."""
    begin = np.uint64(0)
    size = np.uint64(old.itemsize)
    while begin < np.uint64(old.size):
        group = ((start + np.uint64(positions[begin])) * size) >> _TWELVE
        end = _end_of_group(positions, begin, ((group + _ONE) << _TWELVE) // size - start - _ONE)
        a = np.uint64(0)
        b = np.uint64(0)
        for i in range(begin, end):
            byte = (start + np.uint64(positions[i])) * size
            factor = factors[(byte >> _TWO) & _LAST]
            before = _unit_of(old[i], byte)
            after = _unit_of(new[i], byte)
            a += after * (factor & _LOW) - before * (factor & _LOW)
            b += after * (factor >> _U32) - before * (factor >> _U32)
        mixed = _split_mix(group)
        lanes[0] += a * _first(mixed)
        lanes[1] += b * _second(mixed)
        begin = end


def fingerprint(words: Words, start: int) -> tuple[int, int]:
    """Two 64-bit lanes of the elements whose flat indices begin at `start`; see `reference.fingerprint`."""
    lanes = np.full(2, words.size, np.uint64)
    _fingerprint(_units(words, start), np.uint64(start * words.itemsize // 4), _factors(), lanes)
    return int(lanes[0]), int(lanes[1])


def copy_with_fingerprint(words: Words, start: int, out: Words) -> tuple[int, int]:
    """`out[:] = words` and their `fingerprint`, in one pass over memory."""
    if not (_are_units(words, start) and _are_units(out, start)):
        out[:] = words
        return fingerprint(out, start)
    lanes = np.full(2, words.size, np.uint64)
    first = np.uint64(start * words.itemsize // 4)
    _copy_with_fingerprint(words.view(np.uint32), first, out.view(np.uint32), _factors(), lanes)
    return int(lanes[0]), int(lanes[1])


def fingerprint_change(old: Words, new: Words, positions: Positions, start: int) -> tuple[int, int]:
    """What is added to a fingerprint when the elements at `start + positions` (ascending) become `new` where
    they were `old`.
    """
    if old.itemsize == 8:
        halves = (2 * positions[:, None] + np.arange(2)).reshape(-1)
        return fingerprint_change(old.view(np.uint32), new.view(np.uint32), halves, 2 * start)
    lanes = np.zeros(2, np.uint64)
    _change(old, new, positions, np.uint64(start), _pairs(), lanes)
    return int(lanes[0]), int(lanes[1])


def _units(words: Words, start: int) -> NDArray[np.uint32]:
    """The units in which the words lie; what else is in the first and the last is zero."""
    if _are_units(words, start):
        return words.view(np.uint32)
    before = start * words.itemsize % 4
    padded = np.zeros(-(-(before + words.nbytes) // 4), np.uint32)
    padded.view(np.uint8)[before : before + words.nbytes] = words.view(np.uint8)
    return padded


def _are_units(words: Words, start: int) -> bool:
    """Whether they lie so that whole units can be read."""
    return start * words.itemsize % 4 == 0 and words.nbytes % 4 == 0 and words.ctypes.data % 4 == 0


@functools.cache
def _factors() -> NDArray[np.uint32]:
    """Those of 1,024 units in the first lane, then in the second."""
    return np.concatenate([_pairs() & _LOW, _pairs() >> _U32]).astype(np.uint32)


@functools.cache
def _pairs() -> NDArray[np.uint64]:
    """The same with the first lane's in the low half and the second lane's in the high half of one number."""
    with np.errstate(over="ignore"):
        mixed: NDArray[np.uint64] = _split_mix(np.arange(UNITS, dtype=np.uint64) + (_ONE << np.uint64(63)))
    return mixed | _ONE | (_ONE << _U32)
