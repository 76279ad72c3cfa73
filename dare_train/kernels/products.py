"""Products of thin matrices, compiled by Numba for the CPU: the same bits on every processor, without threads
of their own, which a BLAS has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .numba_cache import inlined, kernel

_Matrix = NDArray[np.float64]


@inlined
def _plus(out, at, a, right, row, columns):
    """out += a * right, of one row of each."""
    for j in range(columns):
        out[at + np.uint64(j)] += a * right[row + np.uint64(j)]


@inlined
def _plus_four(out, at, a, b, c, d, right, row, columns):
    """The same of four rows of `right`, one after another."""
    width = np.uint64(columns)
    for j in range(columns):
        place = row + np.uint64(j)
        total = out[at + np.uint64(j)] + a * right[place]
        total = total + b * right[place + width]
        total = total + c * right[place + width + width]
        out[at + np.uint64(j)] = total + d * right[place + width + width + width]


@kernel
def _thin_product(left, right, rank, factor, out):
    """out = factor * (left @ right), of rows one after another; products are added in the order of `rank`."""
    rows = left.size // rank
    columns = right.size // rank
    for i in range(rows):
        at = np.uint64(i * columns)
        first = np.uint64(i * rank)
        for j in range(columns):
            out[at + np.uint64(j)] = left[first] * right[np.uint64(j)]
        k = 1
        while k + 3 < rank:
            n = first + np.uint64(k)
            a, b, c, d = left[n], left[n + np.uint64(1)], left[n + np.uint64(2)], left[n + np.uint64(3)]
            _plus_four(out, at, a, b, c, d, right, np.uint64(k * columns), columns)
            k += 4
        while k < rank:
            _plus(out, at, left[first + np.uint64(k)], right, np.uint64(k * columns), columns)
            k += 1
        for j in range(columns):
            out[at + np.uint64(j)] *= factor


def thin_product(left: _Matrix, right: _Matrix, factor: float) -> _Matrix:
    """factor · (left @ right), float64 [rows, columns], of [rows, rank] and [rank, columns].

    Each product of numbers and each sum is rounded on its own, in the order of the rank: the bits do not
    depend on how many rows are asked for at once.
    """
    rows, rank = left.shape
    columns = right.shape[1]
    if not rank:
        return np.zeros((rows, columns))
    out = np.empty(rows * columns)
    flat = np.ascontiguousarray(left).reshape(-1), np.ascontiguousarray(right).reshape(-1)
    _thin_product(*flat, rank, np.float64(factor), out)
    return out.reshape(rows, columns)
