"""What is dropped from a delta before it is merged, and what the rest is multiplied by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...config import DRAW_RANGE, check_drop_rate, threshold_of
from ...dtypes import FloatArray
from ...errors import ConfigError
from ...kernels import cpu, philox
from ...package.arithmetic import Term
from ...package.masks import MASK_DOMAIN, Mask, key_of

Kept = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class DropRate:
    """DARE's rate for one tensor of one model: the mask of `DareConfig(p, seed)`, the same as in a package of
    it.
    """

    p: float
    key: int

    @classmethod
    def of(cls, p: float, seed: int, tensor: str) -> DropRate:
        return cls(p=check_drop_rate(p), key=key_of(seed, tensor))

    @property
    def threshold(self) -> int:
        return threshold_of(self.p)

    @property
    def factor(self) -> float:
        """1/(1 - p) for the rate that 16-bit draws make of it (arXiv 2311.03099, eq. 2)."""
        return DRAW_RANGE / (DRAW_RANGE - self.threshold)

    def positions(self, start: int, count: int) -> NDArray[np.int64]:
        """Kept elements of a run."""
        return Mask(kind="seeded", key=self.key, threshold=self.threshold).positions(start, count)

    def draws(self, start: int, count: int) -> NDArray[np.uint16]:
        """The draws of a run: those that reach the threshold are kept."""
        return philox.draws(self.key, start, count, MASK_DOMAIN)


def restricted(term: Term, positions: NDArray[np.int64], count: int, factor: float) -> Term:
    """The term at some of a run's positions only, ascending, times a factor."""
    if term.positions is None:
        return chosen(term, positions, factor)
    inside = np.zeros(count, np.bool_)
    inside[positions] = True
    return chosen(term, np.flatnonzero(inside[term.positions]), factor)


def chosen(term: Term, places: NDArray[np.int64], factor: float) -> Term:
    """The term at some of its own positions, by their places among these, times a factor."""
    return Term(
        positions=places if term.positions is None else term.positions[places],
        factor=term.factor * factor,
        tuned=cpu.take(term.tuned, places) if term.tuned is not None else None,
        delta=term.delta[places] if term.delta is not None else None,
        base=cpu.take(term.base, places) if term.base is not None else None,
    )


def rescale_q(gram: NDArray[np.floating], delta: FloatArray, p: float, *, transposed: bool) -> float:
    """The factor 1/q of one linear layer that least changes its outputs, in the mean over masks and inputs.

        1/q = A / ((1 - p)·A + p·B)        A = tr(δ G δᵀ) = E‖δx‖²        B = Σᵢⱼ δᵢⱼ² Gⱼⱼ

    The minimum of E‖δx - (m ∘ δ)x/q‖² = ((1 - p)/q - 1)² A + p(1 - p)/q² B over the mask m ~ Bernoulli(1 -
    p). DAREx-q (Deng et al., https://arxiv.org/abs/2410.09344, §4) weighs the same two terms, the bias and
    the noise, by a bound; this is exact. Between 1, which drops only, and 1/(1 - p), DARE's own.

    Args:
        gram: G = E[xxᵀ], [in, in].
        delta: [out, in], or [in, out] if `transposed`.
    """
    matrix = delta.astype(np.float64)
    matrix = matrix.T if transposed else matrix
    second = gram.astype(np.float64)
    signal = float(((matrix @ second) * matrix).sum())
    noise = float((np.square(matrix) @ np.diagonal(second)).sum())
    bottom = (1 - p) * signal + p * noise
    return float(np.clip(signal / bottom, 1.0, 1 / (1 - p))) if bottom > 0 else 1 / (1 - p)


def magprune(
    delta: FloatArray, row: int, key: int, start: int, *, density: float, epsilon: float
) -> tuple[Kept, FloatArray]:
    """MAGPRUNE: what is kept of whole rows, and the factor 1/(1 - pᵢ) of each element.

        pᵢ = p + ε - 2ε·rᵢ/(n - 1)        rᵢ: the rank of |δᵢ| within its row, the smallest 0

    Deep et al., "DELLA-Merging", https://arxiv.org/abs/2406.11617, §3.1: small elements are dropped more
    often than large ones. Draws are those of DARE's masks.

    Args:
        delta: whole rows of `row` elements, flat.
        start: flat index of the first, from which with `key` the draws follow.

    Raises:
        ConfigError: density ± ε is not within (0, 1).
    """
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise ConfigError(
            "epsilon",
            expected=f"density ± epsilon within (0, 1), with density {density}",
            found=repr(epsilon),
        )
    order = np.argsort(np.abs(delta).reshape(-1, row), axis=1, kind="stable")
    ranks = np.empty(order.shape, np.float64)
    np.put_along_axis(ranks, order, np.arange(row, dtype=np.float64)[None, :], axis=1)
    rates = (1 - density + epsilon) - ranks * (2 * epsilon / max(row - 1, 1))
    thresholds = np.minimum(np.rint(rates.reshape(-1) * DRAW_RANGE), DRAW_RANGE - 1).astype(np.int64)
    kept = philox.draws(key, start, delta.size, MASK_DOMAIN) >= thresholds
    return kept, (DRAW_RANGE / (DRAW_RANGE - thresholds)).astype(delta.dtype)


def outlier_ranks(numel: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest elements Model Breadcrumbs looks at, and how many of those it drops as
    outliers.

    Davari and Belilovsky, https://arxiv.org/abs/2312.06795, §3: the largest γ and the smallest are dropped, a
    share `density` remains. Where the two leave too little, fewer of the largest are dropped.
    """
    target = int(density * numel)
    top = int(gamma * numel)
    smallest = max(0, numel - target - top)
    return numel - smallest, numel - smallest - target


def trim_rank(numel: int, density: float) -> int:
    """How many elements a share `density` of a tensor is: at least one, unless the share is none."""
    return max(1, int(density * numel)) if density > 0 and numel else 0
