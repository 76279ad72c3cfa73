"""WUDI-Merging: the merged matrix that interferes least with each model's, found by gradient descent."""

from __future__ import annotations

import numpy as np

from ...dtypes import FloatArray
from .spectra import finite_only


@finite_only
def wudi(deltas: FloatArray, weights: FloatArray, *, steps: int, learning_rate: float) -> FloatArray:
    """WUDI-Merging: from the sum of the deltas some steps of Adam towards the least interference.

        δ ← Adam on L(δ) = Σᵢ ‖(δ - δᵢ)δᵢᵀ‖² / ‖δᵢ‖²,  from δ = Σᵢ δᵢ

    Cheng et al., "Whoever Started the Interference Should End It", https://arxiv.org/abs/2503.08099, eq. 14
    and algorithm 1: a layer's delta spans nearly the space of its inputs. Adam with β = (0.9, 0.999) and
    ε = 10⁻⁸. `deltas` are [n, out, in], of linear layers; the user's weights do not count.
    """
    matrices = deltas.astype(np.float64)
    # ∇L(δ) = δH - C
    curvature = np.zeros((deltas.shape[-1],) * 2)
    pull = np.zeros(deltas.shape[1:])
    for matrix in matrices:
        square = float(np.square(matrix).sum())
        if square > 0:
            own = matrix.T @ matrix * (2 / square)
            curvature += own
            pull += matrix @ own
    merged = matrices.sum(axis=0)
    first, second = np.zeros_like(merged), np.zeros_like(merged)
    for step in range(1, steps + 1):
        gradient = merged @ curvature - pull
        first += 0.1 * (gradient - first)
        second += 0.001 * (np.square(gradient) - second)
        size = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        merged -= learning_rate / (1 - 0.9**step) * first / size
    return np.asarray(merged)
