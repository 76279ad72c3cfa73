"""Merge methods that work element by element: deltas of n models in, the merged delta out.

`deltas` holds n rows of k elements, float32 (float64 for float64 tensors): a tensor's, or those of any part
of it, after dropping. `weights` holds the n weights w. Sums run over the models in their order, so that every
bit is determined.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...dtypes import FloatArray
from ...kernels import sums


def ties(deltas: FloatArray, weights: FloatArray, *, normalize: bool) -> FloatArray:
    """TIES-Merging, after trimming: elect a sign, then take the mean of those that agree with it.

        γ = sgn(Σᵢ wᵢδᵢ)        δ = Σ_{i: sgn(wᵢδᵢ) = γ} wᵢδᵢ / Σ_{i: sgn(wᵢδᵢ) = γ} wᵢ

    Yadav et al., https://arxiv.org/abs/2306.01708, §3.2 and algorithm 1. A sum of zero elects plus. Without
    `normalize` the agreeing ones are added up.
    """
    weighted = deltas * weights[:, None]
    return _of_the_elected(weighted, weights, normalize=normalize)


def fisher(deltas: FloatArray, weights: FloatArray, *, fisher: FloatArray, floor: float) -> FloatArray:
    """Fisher merging: each model counts by how sure its data made it of an element.

        δ = Σᵢ wᵢFᵢδᵢ / Σᵢ wᵢFᵢ

    Matena and Raffel, https://arxiv.org/abs/2111.09832, eq. 6. `fisher`, shape (n, k): the diagonals Fᵢ, none
    below `floor`.
    """
    counts = np.maximum(fisher, fisher.dtype.type(floor)).astype(deltas.dtype, copy=False) * weights[:, None]
    return _ratio(summed(counts * deltas), summed(counts))


def consensus_ta(
    deltas: FloatArray, weights: FloatArray, *, undropped: FloatArray, mask_threshold: float, agree: int
) -> FloatArray:
    """Consensus task arithmetic: the sum of the deltas, where at least `agree` models need it.

        mᵢ = 1{ |δᵢ| ≥ λ·|δ_MTL - δᵢ| }        δ = δ_MTL where Σᵢ mᵢ ≥ k, else 0

    Wang et al., "Localizing Task Information for Improved Model Merging and Compression",
    https://arxiv.org/abs/2405.07813, eq. 5-6. `undropped`, shape (n, k): the models' deltas as they were
    before anything was dropped. `mask_threshold` is λ.
    """
    return _consensus(summed(deltas * weights[:, None]), undropped, mask_threshold, agree)


def consensus_ties(
    deltas: FloatArray,
    weights: FloatArray,
    *,
    undropped: FloatArray,
    mask_threshold: float,
    agree: int,
    normalize: bool,
) -> FloatArray:
    """`consensus_ta` with the delta that TIES gives in place of the sum (same paper, §4.2)."""
    return _consensus(ties(deltas, weights, normalize=normalize), undropped, mask_threshold, agree)


def sce(
    deltas: FloatArray, weights: FloatArray, *, selected: NDArray[np.bool_], energies: NDArray[np.float64]
) -> FloatArray:
    """SCE: select the elements that vary most, calculate each model's weight from its energy, erase what goes
    against the sum.

        wᵢ ∝ mean(δᵢ²) over the tensor        δ = Σᵢ wᵢδᵢ / Σᵢ wᵢ over the i with sgn(δᵢ) = sgn(Σⱼ δⱼ)

    Wan et al., "FuseChat", https://arxiv.org/abs/2408.07990, §3.3. `selected`, shape (k,): where the variance
    over the models is among the largest; `energies`, shape (n,): means of the squares of the selected deltas.
    The user's weights do not count.
    """
    total = float(energies.sum())
    shares = (energies / total if total >= 1e-6 else np.full(energies.size, 1 / energies.size)).astype(
        deltas.dtype
    )
    chosen = deltas * selected
    counts = (chosen * _elected(chosen) > 0) * shares[:, None]
    return summed(chosen * counts) / np.maximum(summed(counts), deltas.dtype.type(1e-6))


def _consensus(merged: FloatArray, undropped: FloatArray, mask_threshold: float, agree: int) -> FloatArray:
    library = _library(merged)
    ones = library.ones_like(merged)
    zeros = library.zeros_like(merged)
    needing = summed(
        library.where(abs(delta) >= float(mask_threshold) * abs(merged - delta), ones, zeros)
        for delta in undropped
    )
    agreed: FloatArray = library.where((needing >= agree) | library.isnan(merged), merged, zeros)
    return agreed


def _of_the_elected(weighted: FloatArray, weights: FloatArray, *, normalize: bool) -> FloatArray:
    sign = _elected(weighted)
    agreeing = (weighted * sign).clip(0)
    total = summed(agreeing) * sign
    return _ratio(total, summed((agreeing > 0) * weights[:, None])) if normalize else total


def _elected(deltas: FloatArray) -> FloatArray:
    """The sign of their sum as 1 or -1, shape (k,); of zero, 1."""
    total = summed(deltas)
    ones = _library(total).ones_like(total)
    signs: FloatArray = _library(total).where(total >= 0, ones, -ones)
    return signs


def summed(rows: Iterable[NDArray[Any]]) -> FloatArray:
    """Their sum, one after the other: numpy would choose the order by the shape."""
    first, *others = rows
    total: FloatArray = 1 * first  # a copy
    for row in others:
        total += row
    return total


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Their quotient; the numerator where the denominator is zero."""
    denominator[denominator == 0] = 1
    return numerator / denominator


def _library(array: Any) -> Any:
    """Numpy or torch, whose functions have the same names."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


ANYWHERE = (ties, consensus_ta, consensus_ties)
"""Those that take torch's tensors as well, on any device."""

COMPILED: dict[Callable[..., FloatArray], Callable[..., FloatArray]] = {ties: sums.ties}
"""The same functions of float32 deltas as machine code."""
