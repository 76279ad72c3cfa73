"""Merge methods whose result is Σᵢ cᵢvᵢ: from the vectors' Gram matrix to the coefficients c.

The n vectors v are the models' deltas, or their weights, flattened; `gram`, float64 [..., n, n], holds their
dot products, and everything that these methods ask of a tensor of any size is in it. `weights`, float64 [n],
are the weights w.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError

Coefficients = NDArray[np.float64]


def average(gram: Coefficients | None, weights: Coefficients, *, normalize: bool) -> Coefficients:
    """The weighted mean of the models' weights.

        θ = Σᵢ wᵢθᵢ / Σᵢ wᵢ

    Wortsman et al., "Model soups", https://arxiv.org/abs/2203.05482. Without `normalize` it is the sum.
    """
    return weights / _nonzero(float(weights.sum())) if normalize else weights


def task_arithmetic(gram: Coefficients | None, weights: Coefficients, *, normalize: bool) -> Coefficients:
    """The weighted sum of the deltas ("task vectors").

        δ = Σᵢ wᵢδᵢ

    Ilharco et al., "Editing models with task arithmetic", https://arxiv.org/abs/2212.04089, §2. `normalize`
    divides by Σᵢ wᵢ.
    """
    return weights / _nonzero(float(weights.sum())) if normalize else weights


def slerp(gram: Coefficients, weights: Coefficients, *, t: float) -> Coefficients:
    """Spherical interpolation of two models' weights, on the arc between their directions.

        θ = sin((1 - t)Ω)/sin Ω · θ₀ + sin(tΩ)/sin Ω · θ₁        cos Ω = θ₀·θ₁ / (‖θ₀‖‖θ₁‖)

    Shoemake, "Animating rotation with quaternion curves", 1985, https://doi.org/10.1145/325334.325242.
    Straight where |cos Ω| > 0.9995.
    """
    norms = np.sqrt(np.diagonal(gram))
    cosine = float(np.clip(gram[0, 1] / np.prod(np.where(norms > 1e-8, norms, 1.0)), -1, 1))
    if abs(cosine) > 0.9995:
        return np.array([1 - t, t])
    angle = np.arccos(cosine)
    return np.array([np.sin((1 - t) * angle), np.sin(t * angle)]) / float(np.sin(angle))


def nuslerp(gram: Coefficients, weights: Coefficients) -> Coefficients:
    """Spherical interpolation of two models by their weights; `gram` may hold one matrix for each row or
    column.

    The formula of `slerp` with t = w₁ / (w₀ + w₁). https://github.com/arcee-ai/mergekit, method nuslerp.
    Straight where the vectors lie on one line.
    """
    total = float(weights.sum())
    t = 0.5 if abs(total) < 1e-6 else float(weights[1]) / total
    norms = np.maximum(np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)), 1e-7)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1, 1)
    straight = 1 - cosine**2 <= 1e-16
    angle = np.arccos(np.where(straight, 0.0, cosine))
    first = np.where(straight, 1 - t, np.sin((1 - t) * angle) / np.sin(angle))
    second = np.where(straight, t, np.sin(t * angle) / np.sin(angle))
    return np.stack([first, second], axis=-1)


def multislerp(
    gram: Coefficients, weights: Coefficients, *, normalize_weights: bool, eps: float
) -> Coefficients:
    """Spherical interpolation of any number of models: the mean of their directions, as long as they are on
    average.

        θ = Σᵢ wᵢ‖θᵢ‖ · m/‖m‖        m = Σᵢ wᵢθᵢ/(‖θᵢ‖ + ε)

    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea, and mergekit's method of that name, whose
    further step in the space tangent at m has length zero: Σᵢ wᵢ(uᵢ - (uᵢ·m)m/‖m‖²) = 0. Where two models'
    directions cancel, the sum Σᵢ wᵢθᵢ. `normalize_weights` divides the weights by their sum.

    Raises:
        ConfigError: the directions of more than two models cancel.
    """
    if weights.size == 1:
        return np.ones(1)
    shares = weights / _nonzero(float(weights.sum())) if normalize_weights else weights
    norms = np.sqrt(np.diagonal(gram))
    if not norms.any():
        return np.zeros_like(weights)
    directed = shares / np.maximum(norms + eps, np.finfo(np.float64).tiny)
    length = _length(directed, gram)
    # Below it, what is left of a sum of float64 products that cancel is noise.
    if length < max(eps, 1e-7):
        if weights.size == 2:
            return shares
        raise ConfigError(
            "weights",
            expected="directions of the models whose weighted sum is not zero, for multislerp",
            found=", ".join(f"{weight:g}" for weight in weights),
            remedy="give other weights",
        )
    return float((shares * norms).sum()) * directed / length


def karcher(gram: Coefficients, weights: Coefficients, *, max_iter: int, tol: float) -> Coefficients:
    """The Karcher mean of the models' directions on the unit sphere, as long as the models are on average.

        m ← exp_m( Σᵢ αᵢ log_m(uᵢ) )        uᵢ = θᵢ/‖θᵢ‖,  αᵢ = wᵢ / Σⱼ wⱼ        θ = Σᵢ αᵢ‖θᵢ‖ · m

    Karcher, "Riemannian center of mass and mollifier smoothing", 1977,
    https://doi.org/10.1002/cpa.3160300502. Every m is a combination of the uᵢ, so that their cosines are
    enough. It ends after `max_iter` steps, or when one is shorter than `tol`.
    """
    norms = np.sqrt(np.diagonal(gram))
    valid = norms > tol
    shares = weights / _nonzero(float(weights.sum()))
    if not valid.any():
        return np.zeros_like(weights)
    alpha = np.where(valid, shares, 0) / _nonzero(float(shares[valid].sum()))
    safe = np.where(valid, norms, 1.0)
    cosines = np.where(np.outer(valid, valid), gram / np.outer(safe, safe), 0)
    mean = _mean_direction(alpha, cosines, valid, max_iter, tol)
    return float((shares * norms).sum()) * mean / safe


def _mean_direction(
    alpha: Coefficients, cosines: Coefficients, valid: NDArray[np.bool_], max_iter: int, tol: float
) -> Coefficients:
    """Coefficients on the unit vectors, such that the combination is their mean on the sphere, of length
    1.
    """
    length = _length(alpha, cosines)
    mean = alpha / length if length >= tol else np.eye(alpha.size)[int(np.argmax(valid))]
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        pulls = np.where(valid & (angles >= tol), alpha * angles / _nonzeros(np.sin(angles)), 0)
        tangent = pulls - float(pulls @ dots) * mean
        step = _length(tangent, cosines)
        if step < tol:
            break
        mean = np.cos(step) * mean + np.sin(step) / step * tangent
        length = _length(mean, cosines)
        mean = mean / length if length > tol else mean
    return mean


def model_stock(gram: Coefficients, weights: Coefficients) -> Coefficients:
    """Model Stock: the mean of the fine-tuned weights, drawn towards the base as far as they disagree.

        θ = t·mean(θᵢ) + (1 - t)·θ_PRE        t = N cos θ / (1 + (N - 1) cos θ)

    Jang et al., https://arxiv.org/abs/2403.19522, eq. 7; cos θ is the mean cosine between two models' deltas.
    The base where the denominator vanishes. `gram`, of the deltas, may hold one matrix for each row (filter);
    the user's weights do not count.
    """
    count = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    products = np.maximum(norms[..., :, None] * norms[..., None, :], 1e-6)
    above = np.triu_indices(count, 1)
    cosine = np.clip(gram / products, -1, 1)[..., above[0], above[1]].mean(axis=-1)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, denominator))
    return np.repeat((t / count)[..., None], count, axis=-1)


def _length(coefficients: Coefficients, cosines: Coefficients) -> float:
    return float(np.sqrt(np.maximum(coefficients @ cosines @ coefficients, 0.0)))


def _nonzero(value: float) -> float:
    return value if abs(value) >= 1e-8 else 1.0


def _nonzeros(values: Coefficients) -> Coefficients:
    return np.where(values != 0, values, 1.0)
