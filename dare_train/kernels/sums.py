"""Sums of several deltas on raw bits, and the counts by which merging finds its thresholds; compiled as in `cpu`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from .compiled import inlined, kernel
from .philox import Positions

_HALF = np.uint32(0x7FFF)
_U16 = np.uint32(16)
_ONE = np.uint32(1)
_NAN = np.uint32(0x7FC0)


@inlined
def _widened(word):
    return np.uint32(np.uint32(word) << _U16).view(np.float32)


@inlined
def _narrowed(value):
    bits = np.float32(value).view(np.uint32)
    rounded = (bits + _HALF + ((bits >> _U16) & _ONE)) >> _U16
    return np.uint16(_NAN if value != value else rounded)


@kernel
def _add_at_bf16(own, tuned, positions, factor, total, movers):
    for i in range(positions.size):
        p = positions[i]
        moved = own[i] != tuned[i]
        delta = np.float32(_widened(tuned[i]) - _widened(own[i]))
        sum_ = np.float32(total[p] + np.float32(factor * delta))
        total[p] = sum_ if moved else total[p]
        movers[p] += np.uint16(moved)


@kernel
def _add_all_bf16(own, tuned, factor, total, movers):
    for i in range(own.size):
        moved = own[i] != tuned[i]
        delta = np.float32(_widened(tuned[i]) - _widened(own[i]))
        sum_ = np.float32(total[i] + np.float32(factor * delta))
        total[i] = sum_ if moved else total[i]
        movers[i] += np.uint16(moved)


@kernel
def _round_moved_bf16(words, total, movers):
    for i in range(words.size):
        words[i] = _narrowed(total[i]) if movers[i] else words[i]


@kernel
def _put_alone(words, positions, own, tuned, movers):
    for i in range(positions.size):
        p = positions[i]
        alone = (movers[p] == 1) & (own[i] != tuned[i])
        words[p] = tuned[i] if alone else words[p]


@kernel
def _deltas_bf16(own, tuned, factor, out):
    for i in range(own.size):
        out[i] = factor * np.float32(_widened(tuned[i]) - _widened(own[i]))


@kernel
def _moved_bf16(base, delta, out):
    for i in range(base.size):
        d = delta[i]
        out[i] = base[i] if d == np.float32(0.0) else _narrowed(np.float32(_widened(base[i]) + d))


@kernel
def _count_leading(bits, counts):
    for i in range(bits.size):
        counts[bits[i] >> _U16] += 1


def add_at_bf16(
    own: Words, tuned: Words, positions: Positions | None, factor: float, total: NDArray[np.float32], movers: NDArray[np.uint16]
) -> None:
    """`total[positions] += f32(factor) · (f32(tuned) - f32(own))` where words differ, in place; `movers` counts those.

    `own` and `tuned` are bfloat16 words at the positions; None stands for every element.
    """
    if positions is None:
        _add_all_bf16(own, tuned, np.float32(factor), total, movers)
    else:
        _add_at_bf16(own, tuned, positions, np.float32(factor), total, movers)


def round_moved_bf16(words: Words, total: NDArray[np.float32], movers: NDArray[np.uint16]) -> None:
    """`words = bf16(total)` where something moved, in place."""
    _round_moved_bf16(words, total, movers)


def put_alone(words: Words, positions: Positions, own: Words, tuned: Words, movers: NDArray[np.uint16]) -> None:
    """`words[positions] = tuned` where `tuned` differs from `own` and nothing else moved the element, in place."""
    _put_alone(words, positions, own, tuned, movers)


def deltas_bf16(own: Words, tuned: Words, factor: float) -> NDArray[np.float32]:
    """f32(factor) · (f32(tuned) - f32(own)) of bfloat16 words."""
    out = np.empty(own.size, np.float32)
    _deltas_bf16(own, tuned, np.float32(factor), out)
    return out


def moved_bf16(base: Words, delta: NDArray[np.float32]) -> Words:
    """bf16(f32(base) + delta); where the delta is zero, the base's words."""
    out = np.empty_like(base)
    _moved_bf16(base, delta, out)
    return out


def count_leading(sizes: NDArray[np.float32], counts: NDArray[np.int64]) -> None:
    """Count float32 magnitudes, none negative, by the leading 16 bits of each, into `counts`, shape (32768,)."""
    _count_leading(sizes.view(np.uint32), counts)
