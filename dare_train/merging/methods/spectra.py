"""Merge methods that take matrices apart into singular vectors.

`deltas` are [n, out, in]; arithmetic is float64. Singular values that rounding alone may have made, those
below ε‖δ‖ with the ε of the deltas' type, are none, so that a matrix of low rank, such as an adapter's, has
the directions that are its own. The user's weights do not count. NaN or infinity in any model makes all of
the matrix NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FloatArray

Matrix = NDArray[np.float64]

Parts = tuple[Matrix, Matrix, Matrix]
"""U [out, k], σ [k] and Vᵀ [k, in]."""

Function = Callable[..., FloatArray]

_SEEN_IN_SQUARES = 1e-5
"""Of the largest singular value: what is left of the digits of float64 is 1e-6, a thousandth of a step of
bf16."""


def finite_only(function: Function) -> Function:
    """A function of matrices that are finite, for those that may not be."""

    @wraps(function)
    def merged(deltas: FloatArray, weights: FloatArray, **given: Any) -> FloatArray:
        if not np.isfinite(deltas).all():
            return np.full(deltas.shape[1:], np.nan, deltas.dtype)
        return function(deltas, weights, **given).astype(deltas.dtype)

    return merged


@finite_only
def tsv(deltas: FloatArray, weights: FloatArray) -> FloatArray:
    """TSV-Merge: of each delta the leading singular vectors, those of all models made orthogonal.

        δᵢ ≈ Uᵢ Σᵢ Vᵢᵀ, of rank r/n        U = [U₁ … Uₙ],  V = [V₁ … Vₙ],  Σ = diag(Σ₁ … Σₙ)
        δ = U⊥ Σ V⊥ᵀ        U⊥ = PQᵀ where U = PDQᵀ, and so V⊥

    Gargiulo et al., "Task Singular Vectors", https://arxiv.org/abs/2412.00081, algorithm 1; r = min(out, in).
    Matrices with r < n have the mean.
    """
    rank = min(deltas.shape[1:]) // len(deltas)
    if rank == 0:
        return np.asarray(deltas.mean(axis=0, dtype=np.float64))
    return _joined([_leading(_wide(delta), rank, _least(delta)) for delta in deltas], lambda values: values)


@finite_only
def iso_c(deltas: FloatArray, weights: FloatArray) -> FloatArray:
    """Iso-C: the sum of the deltas, with all of its singular values made their mean.

        Σᵢ δᵢ = U Σ Vᵀ        δ = σ̄ U Vᵀ,  σ̄ = tr(Σ)/r

    Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    https://arxiv.org/abs/2502.04959, §4.1; r is the rank of the sum.
    """
    total = deltas.sum(axis=0, dtype=np.float64)
    u, values, v = _leading(total, min(total.shape), _least(deltas))
    return u @ v * _mean(values)


@finite_only
def iso_cts(deltas: FloatArray, weights: FloatArray, *, common_space_fraction: float) -> FloatArray:
    """Iso-CTS: the leading directions of the sum, and for each model those that the sum's lack, all with the
    same singular value.

        Σᵢ δᵢ = U Σ Vᵀ, its k leading ones        δᵢ - UUᵀδᵢ = Uᵢ Σᵢ Vᵢᵀ, their s = (r - k)/n leading ones
        δ = σ̄ U⊥ V⊥ᵀ        of [U U₁ … Uₙ] and [V V₁ … Vₙ] as in `tsv`; σ̄: the mean of all σ

    Same paper as `iso_c`, §4.2 and algorithm 2; k is the share `common_space_fraction` of r = min(out, in),
    up to rounding.
    """
    size, count = min(deltas.shape[1:]), len(deltas)
    own = min(size // count, round((size - int(size * common_space_fraction)) / count))
    total = deltas.sum(axis=0, dtype=np.float64)
    common = _leading(total, size - own * count, _least(deltas))
    shared = common[0]
    parts = [common]
    for delta in map(_wide, deltas):
        parts.append(_leading(delta - shared @ (shared.T @ delta), own, _least(deltas)))
    return _joined(parts, lambda values: np.full_like(values, _mean(values)))


def _wide(delta: FloatArray) -> Matrix:
    return delta.astype(np.float64)


def _least(deltas: FloatArray) -> float:
    """What singular values of rounding errors of these stay below."""
    return float(np.finfo(deltas.dtype).eps * np.sqrt(np.square(deltas.astype(np.float64)).sum()))


def _leading(matrix: Matrix, rank: int, least: float) -> Parts:
    """The largest `rank` singular values above `least`, and their vectors."""
    found = _by_squares(matrix, rank, least)
    if found is not None:
        return found
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, int(np.count_nonzero(values > least)))
    return u[:, :kept], values[:kept], v[:kept]


def _by_squares(matrix: Matrix, rank: int, least: float) -> Parts | None:
    """The same from the eigenvectors of MMᵀ or MᵀM, the smaller: a third of the time.

    The vectors of σ are known to about ε(σ₁/σ)². None where one of the `rank` is above `least` and so small
    that this would be seen.
    """
    turned = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if turned else matrix
    squares, vectors = np.linalg.eigh(wide @ wide.T)
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0))
    kept = int(np.count_nonzero(values > least))
    if kept and values[kept - 1] < _SEEN_IN_SQUARES * values[0]:
        return None
    values = values[:kept]
    u = np.ascontiguousarray(vectors[:, ::-1][:, :kept])
    v = u.T @ wide
    v /= values[:, None]
    return (v.T, values, u.T) if turned else (u, values, v)


def _joined(parts: Sequence[Parts], weighted: Callable[[Matrix], Matrix]) -> FloatArray:
    """U⊥ Σ V⊥ᵀ of singular vectors of several matrices, whose values `weighted` makes Σ of."""
    left = _orthogonal(np.concatenate([u for u, _, _ in parts], axis=1))
    right = _orthogonal(np.concatenate([v for _, _, v in parts], axis=0).T)
    return left * weighted(np.concatenate([values for _, values, _ in parts])) @ right.T


def _orthogonal(columns: Matrix) -> Matrix:
    """PQᵀ where PDQᵀ is the singular value decomposition: the orthonormal vectors nearest to these, which
    span the same space.
    """
    if not columns.size:
        return columns
    p, _, q = _leading(columns, min(columns.shape), 1e-6)
    return p @ q


def _mean(values: Matrix) -> float:
    return float(values.mean()) if values.size else 0.0
