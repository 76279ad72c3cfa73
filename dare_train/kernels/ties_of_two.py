"""TIES of two models from words to words, in one pass.

Most merges are of two, and what lies between the steps of `sums` would go through memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from .numba_cache import inlined, kernel
from .philox import BLOCK, block_draws
from .sums import MAGNITUDE, NAN_SIZE, narrowed, widened

_MASKS = np.uint64(0)
"""The domain of masks' draws: docs/format.md §4."""
_LEAST = np.uint32(0)
_MOST = np.uint32(0xFFFFFFFF)
"""Bits between which every magnitude lies."""


class Cut(NamedTuple):
    """What is dropped of a model's delta, and what multiplies the rest."""

    key: int
    """Of the draws."""
    threshold: int
    """The smallest draw that is kept; 0 keeps all."""
    factor: float
    least: np.uint32
    most: np.uint32
    """Kept are magnitudes, after they were multiplied, of bits in [least, most), and NaN."""


_KINDS = (np.uint64, np.uint16, np.float32, np.uint32, np.uint32)
"""Of a cut's fields."""


@inlined
def _rest(own, other, draw, threshold, factor, least, most):
    """A model's delta of an element after dropping."""
    delta = np.float32(factor * np.float32(widened(other) - widened(own)))
    bits = delta.view(np.uint32) & MAGNITUDE
    kept = (draw >= threshold) & (own != other)
    kept &= (bits >= least) & ((bits < most) | (bits >= NAN_SIZE))
    return delta if kept else np.float32(0)


@inlined
def _along(weighted, sign):
    along = np.float32(weighted * sign)
    return np.float32(0) if along <= np.float32(0) else along


@inlined
def _elected(one, other, one_weight, other_weight, normalize):
    zero = np.float32(0)
    unit = np.float32(1)
    one = np.float32(one * one_weight)
    other = np.float32(other * other_weight)
    sign = unit if np.float32(one + other) >= zero else -unit
    one = _along(one, sign)
    other = _along(other, sign)
    sum_ = np.float32(np.float32(one + other) * sign)
    count = (one_weight if one > zero else zero) + (other_weight if other > zero else zero)
    return np.float32(sum_ / (unit if (count == zero) | (normalize == 0) else count))


@inlined
def _move(base, one, other, first, draws, offset, size, cuts, least, most, weights, normalize, scale, out):
    """A part of a block, from `first` on."""
    thresholds, factors = cuts
    drawn, others_drawn = draws
    for i in range(size):
        at = first + np.uint64(i)
        place = offset + np.uint64(i)
        own = base[at]
        rest = _rest(own, one[at], drawn[place], thresholds[0], factors[0], least[0], most[0])
        others = _rest(own, other[at], others_drawn[place], thresholds[1], factors[1], least[1], most[1])
        delta = np.float32(_elected(rest, others, weights[0], weights[1], normalize) * scale)
        moved = narrowed(np.float32(widened(own) + delta))
        out[at] = own if delta == np.float32(0) else moved


@kernel
def _ties_of_two_bf16(
    base, one, other, start, keys, thresholds, factors, least, most, weights, normalize, scale, out,
    draws, others_draws,
):  # fmt: skip
    """The last two hold a block each."""
    every = (_LEAST, _LEAST), (_MOST, _MOST)
    bounds = (least[0], least[1]), (most[0], most[1])
    drawn = draws, others_draws
    cuts = (thresholds[0], thresholds[1]), (factors[0], factors[1])
    both = weights[0], weights[1]
    plain = (bounds == every) & (normalize == 0)
    begun = 0
    while begun < out.size:
        index = start + np.uint64(begun)
        offset = index % np.uint64(BLOCK)
        size = min(BLOCK - np.int64(offset), out.size - begun)
        first = np.uint64(begun)
        for n in range(2):
            if thresholds[n] > 0:
                block_draws(keys[n], index // np.uint64(BLOCK), _MASKS, drawn[n], np.uint64(0))
        if plain:  # a loop of its own, without the comparisons and the division
            _move(
                base, one, other, first, drawn, offset, size, cuts, every[0], every[1], both, np.uint8(0),
                scale, out,
            )  # fmt: skip
        else:
            _move(
                base, one, other, first, drawn, offset, size, cuts, bounds[0], bounds[1], both, normalize,
                scale, out,
            )  # fmt: skip
        begun += size


def ties_of_two_bf16(
    base: Words,
    models: Sequence[Words],
    start: int,
    cuts: Sequence[Cut],
    weights: NDArray[np.float32],
    *,
    normalize: bool,
    scale: float,
) -> Words:
    """The base's words, moved by `scale` times the TIES of two models' deltas, each with its cut; where that
    is zero, the base's own. The same bits as step by step: `sums.masked_deltas_bf16`, `keep_sizes`, `ties`,
    `moved_bf16`.

    Args:
        base: bfloat16 words of a run, from flat index `start` on.
        models: the two models' words of the run.
    """
    one, other = models
    columns = [np.array(column, kind) for column, kind in zip(zip(*cuts, strict=True), _KINDS, strict=True)]
    out = np.empty_like(base)
    _ties_of_two_bf16(
        base, one, other, np.uint64(start), *columns, weights, np.uint8(normalize), np.float32(scale), out,
        *_scratch.draws,
    )  # fmt: skip
    return out


class _Scratch(threading.local):
    """Memory that a thread uses again and again: kernels allocate none."""

    def __init__(self) -> None:
        self.draws = np.zeros((2, BLOCK), np.uint16)


_scratch = _Scratch()
