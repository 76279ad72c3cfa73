"""Merge methods that look at a whole matrix at once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FloatArray
from ...errors import ConfigError


def one_thread() -> AbstractContextManager[Any]:
    """Within it, LAPACK and BLAS use one thread for each call, since their sums depend on how many there
    are.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")  # type: ignore[no-any-return]


def regmean(
    deltas: FloatArray,
    weights: FloatArray,
    *,
    grams: NDArray[np.floating],
    shrink: float,
    ridge: float,
    transposed: bool,
) -> FloatArray:
    """RegMean: the linear layer whose outputs are nearest to those of every model on that model's own inputs.

        W = (Σᵢ wᵢGᵢ)⁻¹ Σᵢ wᵢGᵢWᵢ        Gᵢ = XᵢᵀXᵢ, its elements off the diagonal times `shrink`

    Jin et al., https://arxiv.org/abs/2212.09849, eq. 2 and §3.3 (α), here for deltas, which is the same. For
    torch's layout [out, in], the transpose; `transposed` tells of a layer [in, out] (GPT-2's Conv1D).

    Args:
        deltas: [n, out, in].
        grams: [n, in, in], means over tokens.
        ridge: added to each diagonal, as a share of its mean, so that inputs that never occurred give the
            plain mean.

    Returns:
        The merged delta in the dtype of `deltas`; float64 in between.

    Raises:
        ConfigError: the sum of the Gram matrices has no inverse.
    """
    size = grams.shape[-1]
    scale = np.full((size, size), shrink)
    np.fill_diagonal(scale, 1.0)
    numerator = np.zeros(deltas.shape[:0:-1] if not transposed else deltas.shape[1:])
    denominator = np.zeros((size, size))
    for delta, weight, gram in zip(deltas, weights, grams, strict=True):
        shrunk = gram.astype(np.float64) * scale
        shrunk[np.diag_indices(size)] += ridge * _positive(float(np.trace(shrunk)) / size)
        shrunk *= float(weight)
        matrix = delta.astype(np.float64)
        numerator += shrunk @ (matrix if transposed else matrix.T)
        denominator += shrunk
    try:
        merged = np.linalg.solve(denominator, numerator)
    except np.linalg.LinAlgError as error:
        remedy = "give a ridge above 0, and weights that do not cancel"
        raise ConfigError(
            "ridge",
            expected="Gram matrices that add up to one with an inverse",
            found=repr(ridge),
            remedy=remedy,
        ) from error
    return np.ascontiguousarray(merged if transposed else merged.T, deltas.dtype)


def _positive(mean: float) -> float:
    return mean if mean > 0 else 1.0
