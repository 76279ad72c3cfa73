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


def nearswap(deltas: FloatArray, weights: FloatArray, *, t: float) -> FloatArray:
    """NearSwap: one model's weights take the place of the base's where the two are near.

        δ = min(1, t / max(|δ₁|, 10⁻⁶)) · δ₁

    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, and mergekit's method of that name. What
    moved by less than `t` is swapped, what moved further moves by `t`. The user's weights do not count.
    """
    (delta,) = deltas
    ones = _library(delta).ones_like(delta)
    near: FloatArray = (ones * t / abs(delta).clip(1e-6)).clip(0, 1) * delta
    return near


def ram(deltas: FloatArray, weights: FloatArray, *, epsilon: float) -> FloatArray:
    """Reinforced Agent Merging: the mean of the models that move an element.

        mᵢ = 1{|δᵢ| > ε}        δ = Σᵢ mᵢδᵢ / max(Σᵢ mᵢ, 1)

    https://arxiv.org/abs/2601.13572, as mergekit's method of that name. The user's weights do not count.
    """
    moved, counts = _movers(deltas, epsilon)
    mean: FloatArray = summed(moved) / counts.clip(1)
    return mean


def ramplus_tl(
    deltas: FloatArray, weights: FloatArray, *, epsilon: float, factors: NDArray[np.float64]
) -> FloatArray:
    """RAM+ ("tensor-local"): as `ram`, and what only one model moves counts more, the more of that model's
    other elements are shared.

        δ = λᵢδᵢ where only mᵢ is 1, else Σᵢ mᵢδᵢ / max(Σᵢ mᵢ, 1)

    https://arxiv.org/abs/2601.13572, as mergekit's method of that name. `factors`, shape (n,), are the
    `ram_factors` of the tensor.
    """
    moved, counts = _movers(deltas, epsilon)
    alone = summed(moved * factors.astype(deltas.dtype)[:, None])
    merged: FloatArray = np.where(counts == 1, alone, summed(moved) / counts.clip(1))
    return merged


def ram_overlaps(deltas: FloatArray, *, epsilon: float) -> NDArray[np.int64]:
    """How many of the elements that each model moves others move, too, and how many none does: shape
    (n, 2).
    """
    moves = np.abs(deltas) > epsilon
    counts = moves.sum(axis=0)
    return np.stack([(moves & (counts > 1)).sum(axis=1), (moves & (counts == 1)).sum(axis=1)], axis=1)


def ram_factors(
    overlaps: NDArray[np.int64], *, r: float, alpha: float, epsilon: float
) -> NDArray[np.float64]:
    """Of what only one model moves, from the `ram_overlaps` of the whole tensor.

    λᵢ = 1 + r · min(sharedᵢ / max(uniqueᵢ, ε), α)
    """
    shared, unique = overlaps.astype(np.float64).T
    ratios = shared / np.maximum(unique, max(epsilon, np.finfo(np.float64).tiny))
    return np.asarray(1 + r * np.clip(ratios, 0, alpha))


def emr(deltas: FloatArray, weights: FloatArray, *, task: int, factor: float) -> FloatArray:
    """EMR-Merging: elect a sign, take the largest of those that agree with it; for one task mask that, and
    rescale.

        γ = sgn(Σᵢ δᵢ)        τ = γ · max over the i with sgn(δᵢ) = γ of |δᵢ|
        Mₜ = 1{δₜτ > 0}        δ = τ, or for task t λₜ·Mₜτ        λₜ = ‖δₜ‖₁/‖Mₜτ‖₁ over the model

    Huang et al., https://arxiv.org/abs/2405.17461, §3.2. A sum of zero elects plus. The user's weights do not
    count.

    Args:
        task: place of the task's model among the deltas, from 1; 0 for the unified delta τ, and -1 where
            that model has none.
        factor: λₜ.
    """
    unified = _unified(deltas)
    if task < 0:
        none: FloatArray = _library(unified).zeros_like(unified)
        return none
    if task > 0:
        unified = _masked(unified, deltas[task - 1]) * float(factor)
    return unified


def emr_norms(deltas: FloatArray, *, task: int) -> NDArray[np.float64]:
    """‖δₜ‖₁ and ‖Mₜτ‖₁ of a run, whose quotient over the model is λₜ."""
    own = deltas[task - 1]
    pair = (own, _masked(_unified(deltas), own))
    return np.array([np.abs(each).sum(dtype=np.float64) for each in pair])


def _unified(deltas: FloatArray) -> FloatArray:
    sign = _elected(deltas)
    agreeing = (deltas * sign).clip(0)
    greatest = agreeing[0]
    for other in agreeing[1:]:
        greatest = _library(deltas).maximum(greatest, other)
    unified: FloatArray = greatest * sign
    return unified


def _masked(unified: FloatArray, own: FloatArray) -> FloatArray:
    library = _library(unified)
    product = own * unified
    kept: FloatArray = library.where(
        (product > 0) | library.isnan(product), unified, library.zeros_like(unified)
    )
    return kept


def arcee_fusion(deltas: FloatArray, weights: FloatArray, *, important: NDArray[np.bool_]) -> FloatArray:
    """Arcee Fusion: one model's delta, where it is important.

        δ = δ₁ where s ≥ median(s) + 1.5·(Q₃(s) - Q₁(s)), else 0

    mergekit's method of that name. `important`, shape (k,): where that is so of the `importance` s, whose
    quartiles are those of the tensor. The user's weights do not count.
    """
    (delta,) = deltas
    chosen: FloatArray = delta * important
    return chosen


def importance(delta: FloatArray, divergence: NDArray[np.float64]) -> NDArray[np.float32]:
    """s = |δ|·D of whole rows, [rows, row], of which `divergence` has D, [rows]."""
    return (np.abs(delta) * divergence[:, None]).astype(np.float32)


def divergence(delta: FloatArray, base: FloatArray) -> NDArray[np.float64]:
    """How far each row's distribution moved, [rows] of [rows, row].

    D = Σⱼ pⱼ log(pⱼ/qⱼ)        p = softmax(θ_PRE + δ) + 10⁻⁸,  q = softmax(θ_PRE) + 10⁻⁸
    """
    before = base.astype(np.float64)
    moved, stayed = (_softmax(row) + 1e-8 for row in (before + delta, before))
    return np.asarray(np.maximum((moved * np.log(moved / stayed)).sum(axis=-1), 0.0))


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


def _movers(deltas: FloatArray, epsilon: float) -> tuple[FloatArray, FloatArray]:
    """The deltas of those models that move an element, zero for the others, and how many these are."""
    library = _library(deltas)
    moving = library.where(abs(deltas) > epsilon, library.ones_like(deltas), library.zeros_like(deltas))
    return deltas * moving, summed(moving)


def _softmax(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    grown = np.exp(rows - rows.max(axis=-1, keepdims=True))
    return np.asarray(grown / grown.sum(axis=-1, keepdims=True))


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


ANYWHERE = (ties, consensus_ta, consensus_ties, nearswap, ram, emr)
"""Those that take torch's tensors as well, on any device."""

COMPILED: dict[Callable[..., FloatArray], Callable[..., FloatArray]] = {ties: sums.ties}
"""The same functions of float32 deltas as machine code."""
