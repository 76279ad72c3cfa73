"""The nearest matrices of low rank: largest singular values, and their vectors.

    D ≈ U S Vᵀ        ‖D − U S Vᵀ‖² = Σ sᵢ² of the values left out        (Eckart and Young, 1936)

Of a large matrix they are found among random combinations of its columns, which D Dᵀ turns towards the
largest (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

EXACT = 1024
"""Shorter side up to which all singular values are worked out."""
_MORE = 10
"""Random combinations beyond the rank that is asked for."""
_TURNS = 6
"""How often D Dᵀ is applied."""
_FIRST = 32
"""The rank that is tried first where an error is asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Singular:
    """Some of a matrix's singular values, the largest first, and their vectors."""

    left: Floats
    """[rows, rank], orthonormal columns."""
    sizes: Floats
    """[rank], descending."""
    right: Floats
    """[rank, columns], orthonormal rows."""

    @property
    def rank(self) -> int:
        return self.sizes.size

    def factors(self, rank: int) -> tuple[Floats, Floats]:
        """U√S [rows, rank] and √S Vᵀ [rank, columns] of the largest."""
        roots = np.sqrt(self.sizes[:rank])
        return self.left[:, :rank] * roots, roots[:, None] * self.right[:rank]

    def rank_for(self, error: float, squares: float) -> int | None:
        """The smallest rank at which at most `error` of the matrix's Frobenius norm is left out, at least 1;
        None where all these values are too few.

        Args:
            squares: the matrix's squared norm.
        """
        left_out = squares - np.cumsum(np.square(self.sizes, dtype=np.float64))
        enough = np.flatnonzero(left_out <= error**2 * squares)
        return int(enough[0]) + 1 if enough.size else None


def largest_singular(matrix: Floats, rank: int, *, seed: int) -> Singular:
    """The largest singular values of a matrix, at least `rank` of them where it has so many; all of them,
    where it is small or nearly all are asked for. In the matrix's dtype.

    Args:
        matrix: float32 or float64 [rows, columns], finite.
        seed: of the random combinations.
    """
    shorter = min(matrix.shape)
    if shorter <= EXACT or 4 * (rank + _MORE) > shorter:
        left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
        return Singular(left=left, sizes=sizes, right=right)
    random = np.random.Generator(np.random.Philox(key=seed))
    drawn = random.standard_normal((matrix.shape[1], rank + _MORE)).astype(matrix.dtype)
    span, _ = np.linalg.qr(matrix @ drawn)
    for _ in range(_TURNS):
        across, _ = np.linalg.qr(matrix.T @ span)
        span, _ = np.linalg.qr(matrix @ across)
    within, sizes, right = np.linalg.svd(span.T @ matrix, full_matrices=False)
    return Singular(
        left=np.asarray((span @ within)[:, :rank]), sizes=sizes[:rank], right=np.asarray(right[:rank])
    )


def singular_within(matrix: Floats, error: float, *, seed: int) -> Singular:
    """As `largest_singular`, with so many that at most `error` of the matrix's Frobenius norm is left out."""
    squares = float(np.square(matrix, dtype=np.float64).sum())
    rank = _FIRST
    while True:
        found = largest_singular(matrix, rank, seed=seed)
        if found.rank == min(matrix.shape) or found.rank_for(error, squares) is not None:
            return found
        rank *= 2
