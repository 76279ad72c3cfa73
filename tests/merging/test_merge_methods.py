"""Merge methods against float64 definitions, a few lines each, written from their papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations as pairs
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dare_train import apply, merge, save_statistics
from dare_train.errors import ConfigError
from dare_train.kernels import philox
from dare_train.merging.methods import combinations
from dare_train.merging.methods import dropping as drops
from dare_train.merging.methods import elementwise as elements
from dare_train.merging.methods.matrices import regmean
from dare_train.package.masks import MASK_DOMAIN

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(1, 5)
WEIGHTS = [1.0, 0.5, 0.25, 2.0, 3.0]
TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def like(dtype: Any) -> float:
    """How close arithmetic of that type comes."""
    return 1e-12 if dtype == np.float64 else 2e-6


def drawn(count: int, size: int, seed: int) -> Floats:
    """Deltas on a coarse grid, exact in float32, so that signs and comparisons are the same in every
    precision; some are zero.
    """
    return np.random.default_rng(seed).integers(-6, 7, (count, size)) / 8


def weights_of(count: int, seed: int) -> Floats:
    return np.random.default_rng(seed).choice(WEIGHTS, count)


def close(found: Any, expected: Any, dtype: Any = np.float64) -> None:
    np.testing.assert_allclose(found, expected, rtol=like(dtype), atol=like(dtype))


# Element by element.


def ties(deltas: Floats, weights: Floats, normalize: bool) -> Floats:
    """Yadav et al., algorithm 1: elect γ = sgn(Σ wδ), then the mean, or the sum, of those that agree with
    it.
    """
    merged = np.zeros(deltas.shape[1])
    for place, column in enumerate(deltas.T):
        votes = weights * column
        sign = 1 if votes.sum() >= 0 else -1
        agree = np.sign(votes) == sign
        if agree.any():
            merged[place] = votes[agree].sum() / (weights[agree].sum() if normalize else 1)
    return merged


@TYPES
@given(count=COUNTS, seed=SEEDS, normalize=st.booleans())
def test_ties(dtype: Any, count: int, seed: int, normalize: bool) -> None:
    deltas, weights = drawn(count, 60, seed), weights_of(count, seed)
    close(
        elements.ties(deltas.astype(dtype), weights.astype(dtype), normalize=normalize),
        ties(deltas, weights, normalize),
        dtype,
    )


def test_ties_of_a_draw_elects_plus() -> None:
    deltas = np.array([[1.0, -2.0, 0.0], [-1.0, 2.0, 0.0]])
    assert elements.ties(deltas, np.ones(2), normalize=True).tolist() == [1, 2, 0]


@TYPES
@given(count=COUNTS, seed=SEEDS)
def test_fisher(dtype: Any, count: int, seed: int) -> None:
    """Matena and Raffel, eq. 6: Σ wFδ / Σ wF, and no F is less than the floor."""
    deltas, weights = drawn(count, 60, seed), weights_of(count, seed)
    fisher = (10 ** np.random.default_rng(seed).uniform(-9, 1, deltas.shape)).astype(np.float32)
    floored = np.maximum(fisher, 1e-6)[:, :].astype(np.float64)
    expected = (weights[:, None] * floored * deltas).sum(axis=0) / (weights[:, None] * floored).sum(axis=0)
    # The floor itself is a float32.
    np.testing.assert_allclose(
        elements.fisher(deltas.astype(dtype), weights.astype(dtype), fisher=fisher, floor=1e-6),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )


def test_fisher_without_any_information_is_the_mean() -> None:
    merged = elements.fisher(
        np.array([[1.0, 5], [3, 5]]), np.ones(2), fisher=np.zeros((2, 2), np.float32), floor=1e-6
    )
    close(merged, [2, 5])


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_fisher_of_models_without_weight_is_zero(floor: float) -> None:
    assert elements.fisher(
        np.ones((2, 3)), np.zeros(2), fisher=np.ones((2, 3), np.float32), floor=floor
    ).tolist() == [0, 0, 0]


def needed(merged: Floats, undropped: Floats, threshold: float, agree: int) -> Floats:
    """Wang et al., eq. 5-6: the merged delta where at least `agree` of the masks |δᵢ| ≥ λ|δ - δᵢ| are one."""
    masks = [np.abs(own) >= threshold * np.abs(merged - own) for own in undropped]
    return np.where(np.sum(masks, axis=0) >= agree, merged, 0)


@TYPES
@given(count=COUNTS, seed=SEEDS, threshold=st.sampled_from([0.0, 0.4, 0.5, 2.0]), agree=st.integers(0, 3))
def test_consensus_ta(dtype: Any, count: int, seed: int, threshold: float, agree: int) -> None:
    deltas, undropped = drawn(count, 60, seed), drawn(count, 60, seed + 1)
    weights = weights_of(count, seed)
    merged = elements.consensus_ta(
        deltas.astype(dtype),
        weights.astype(dtype),
        undropped=undropped.astype(dtype),
        mask_threshold=threshold,
        agree=agree,
    )
    close(merged, needed((weights[:, None] * deltas).sum(axis=0), undropped, threshold, agree), dtype)


@TYPES
@given(
    count=COUNTS,
    seed=SEEDS,
    threshold=st.sampled_from([0.0, 0.5, 2.0]),
    agree=st.integers(0, 3),
    normalize=st.booleans(),
)
def test_consensus_ties(
    dtype: Any, count: int, seed: int, threshold: float, agree: int, normalize: bool
) -> None:
    deltas, undropped = drawn(count, 60, seed), drawn(count, 60, seed + 1)
    weights = np.ones(count)
    settings: dict[str, Any] = dict(mask_threshold=threshold, agree=agree, normalize=normalize)
    merged = elements.consensus_ties(
        deltas.astype(dtype), weights.astype(dtype), undropped=undropped.astype(dtype), **settings
    )
    expected = ties(deltas, weights, normalize).astype(
        dtype
    )  # thirds are not on the grid: the masks compare what was rounded
    close(merged, needed(expected, undropped.astype(dtype), threshold, agree), dtype)


@pytest.mark.parametrize(
    "consensus",
    [elements.consensus_ta, lambda *given, **told: elements.consensus_ties(*given, normalize=True, **told)],
)
def test_a_nan_is_no_disagreement(consensus: Callable[..., Any]) -> None:
    deltas = np.array([[np.nan, 1.0], [1.0, 1.0]])
    merged = consensus(deltas, np.ones(2), undropped=deltas, mask_threshold=0.4, agree=2)
    assert np.isnan(merged[0])
    assert merged[1] > 0


def sce(deltas: Floats, selected: NDArray[np.bool_]) -> Floats:
    """Wan et al., §3.3: select, calculate w ∝ Σδ² of what is selected, erase what goes against the sum."""
    chosen = np.where(selected, deltas, 0)
    energies = np.square(chosen).sum(axis=1)
    weights = energies / energies.sum() if energies.sum() else np.full(len(deltas), 1 / len(deltas))
    merged = np.zeros(deltas.shape[1])
    for place, column in enumerate(chosen.T):
        agree = column * (1 if column.sum() >= 0 else -1) > 0
        if agree.any():
            merged[place] = (weights * column)[agree].sum() / weights[agree].sum()
    return merged


@TYPES
@given(count=COUNTS, seed=SEEDS, share=st.floats(0, 1))
def test_sce(dtype: Any, count: int, seed: int, share: float) -> None:
    deltas = drawn(count, 60, seed)
    selected = np.random.default_rng(seed).random(60) < share
    energies = np.square(deltas * selected).mean(axis=1)
    merged = elements.sce(deltas.astype(dtype), np.ones(count, dtype), selected=selected, energies=energies)
    close(merged, sce(deltas, selected), dtype)


def test_sce_of_models_that_did_not_move() -> None:
    found = elements.sce(np.zeros((3, 4)), np.ones(3), selected=np.ones(4, np.bool_), energies=np.zeros(3))
    assert found.tolist() == [0, 0, 0, 0]


@TYPES
@given(seed=SEEDS, t=st.sampled_from([0.0, 1e-4, 0.25, 0.3, 5.0]))
def test_nearswap(dtype: Any, seed: int, t: float) -> None:
    """Of the weights a and b: w·b + (1 - w)·a with w = t/|a - b| within [0, 1]."""
    base, delta = drawn(1, 60, seed + 1)[0], drawn(1, 60, seed)
    share = np.clip(t / np.maximum(np.abs(delta[0]), 1e-6), 0, 1)
    expected = share * (base + delta[0]) + (1 - share) * base
    close(base + elements.nearswap(delta.astype(dtype), np.ones(1, dtype), t=t), expected, dtype)


def ram(deltas: Floats, epsilon: float, factors: Floats) -> Floats:
    """Of each element the mean of the models that move it, times a model's factor where it is the only
    one.
    """
    merged = np.zeros(deltas.shape[1])
    for place, column in enumerate(deltas.T):
        (movers,) = np.nonzero(np.abs(column) > epsilon)
        if movers.size:
            merged[place] = column[movers].mean() * (factors[movers[0]] if movers.size == 1 else 1)
    return merged


@TYPES
@given(count=COUNTS, seed=SEEDS, epsilon=st.sampled_from([0.0, 1e-5, 0.3]))
def test_ram(dtype: Any, count: int, seed: int, epsilon: float) -> None:
    deltas = drawn(count, 60, seed)
    found = elements.ram(deltas.astype(dtype), np.ones(count, dtype), epsilon=epsilon)
    close(found, ram(deltas, epsilon, np.ones(count)), dtype)


@TYPES
@given(
    count=COUNTS,
    seed=SEEDS,
    epsilon=st.sampled_from([0.0, 1e-5, 0.3]),
    r=st.floats(0, 2),
    alpha=st.floats(0, 2),
)
def test_ramplus_tl(dtype: Any, count: int, seed: int, epsilon: float, r: float, alpha: float) -> None:
    """λᵢ = 1 + r·min(shared/unique, α), counted over the tensor."""
    deltas = drawn(count, 60, seed) * (np.random.default_rng(seed).random((count, 60)) < 0.4)
    moves = np.abs(deltas) > epsilon
    unique = np.array([np.sum(own & (moves.sum(axis=0) == 1)) for own in moves])
    shared = np.array([np.sum(own & (moves.sum(axis=0) > 1)) for own in moves])
    factors = np.array(
        [
            1 + r * (min(s / u, alpha) if u else min(s / epsilon, alpha) if epsilon else alpha * (s > 0))
            for s, u in zip(shared, unique, strict=True)
        ]
    )
    found = elements.ram_factors(
        elements.ram_overlaps(deltas, epsilon=epsilon), r=r, alpha=alpha, epsilon=epsilon
    )
    close(found, factors)
    merged = elements.ramplus_tl(deltas.astype(dtype), np.ones(count, dtype), epsilon=epsilon, factors=found)
    close(merged, ram(deltas, epsilon, factors), dtype)


@TYPES
@given(count=COUNTS, seed=SEEDS)
def test_emr(dtype: Any, count: int, seed: int) -> None:
    """Huang et al., §3.2: the sign of the sum, and the largest magnitude that has it."""
    deltas = drawn(count, 60, seed)
    merged = np.zeros(60)
    for place, column in enumerate(deltas.T):
        sign = 1 if column.sum() >= 0 else -1
        merged[place] = sign * max([0.0, *np.abs(column[np.sign(column) == sign])])
    found = elements.emr(deltas.astype(dtype), np.ones(count, dtype), task=0, factor=1.0)
    close(found, merged, dtype)
    for task, own in enumerate(deltas, 1):
        masked = np.where(own * merged > 0, merged, 0)
        found = elements.emr(deltas.astype(dtype), np.ones(count, dtype), task=task, factor=0.5)
        close(found, 0.5 * masked, dtype)
        close(elements.emr_norms(deltas, task=task), [np.abs(own).sum(), np.abs(masked).sum()])


def test_emr_has_a_package_for_each_task(tmp_path: Path) -> None:
    """λₜ is one for the model: Σ|δₜ| / Σ|Mₜτ| over all tensors; what a task's model lacks stays."""
    rng = np.random.default_rng(5)
    base = {name: rng.normal(size=size).astype(np.float32) for name, size in {"a": 4000, "b": 700}.items()}
    models: list[dict[str, Any]] = [
        {
            name: value + rng.normal(size=value.size).astype(np.float32) * (n + 1)
            for name, value in base.items()
        }
        for n in range(3)
    ]
    del models[2]["b"]
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(base, folder / "model.safetensors")
    deltas = {name: [np.float64(own[name] - base[name]) for own in models if name in own] for name in base}
    unified = {}
    for name, own in deltas.items():
        sign = np.where(np.sum(own, axis=0) >= 0, 1, -1)
        unified[name] = sign * np.maximum(np.stack(own) * sign, 0).max(axis=0)
    for task in (1, 2, 3):
        merge(folder, models, tmp_path / f"{task}", method="emr", task=task, package=True)
        apply(folder, tmp_path / f"{task}", tmp_path / f"applied {task}")
        found = load_file(tmp_path / f"applied {task}/model.safetensors")
        own = {name: each[task - 1] for name, each in deltas.items() if task <= len(each)}
        masked = {name: np.where(own[name] * unified[name] > 0, unified[name], 0) for name in own}
        factor = sum(np.abs(x).sum() for x in own.values()) / sum(np.abs(x).sum() for x in masked.values())
        for name, value in base.items():
            expected = value + factor * masked[name] if name in masked else value
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)


def test_emr_knows_as_many_tasks_as_models(tmp_path: Path) -> None:
    base = {"a": np.zeros(4, np.float32)}
    with pytest.raises(ConfigError, match="task: expected 0 to 2, a model's number, found 3"):
        merge(base, [base, {"a": np.ones(4, np.float32)}], tmp_path / "out", method="emr", task=3)


@TYPES
@given(seed=SEEDS, rows=st.integers(1, 4), row=st.integers(1, 20))
def test_arcee_fusion(dtype: Any, seed: int, rows: int, row: int) -> None:
    """s = |δ|·KL(softmax(θ) ‖ softmax(θ_PRE)) by rows; what reaches the median plus 1.5 times the distance
    of the quartiles is taken over.
    """
    base, delta = (drawn(rows, row, one).astype(dtype) for one in (seed, seed + 1))
    p, q = (
        np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) + 1e-8
        for one in ((base + delta).astype(np.float64), base.astype(np.float64))
    )
    divergence = (p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(elements.divergence(delta, base), divergence, rtol=1e-9, atol=1e-15)
    expected = np.abs(delta) * divergence[:, None]
    np.testing.assert_allclose(elements.importance(delta, divergence), expected, rtol=1e-6)


@pytest.mark.parametrize("numel", [1, 2, 3, 4, 5, 6, 1301, 5000])
def test_arcee_fusion_takes_over_what_is_beyond_the_quartiles(numel: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(numel)
    base = {"w": rng.normal(size=numel).astype(np.float32)}
    tuned = {"w": (base["w"] + rng.normal(size=numel) * 0.1).astype(np.float32)}
    merge(base, [tuned], tmp_path / "out", method="arcee_fusion", allow_unchanged=True)
    # In a vector the divergence is one factor for all.
    sizes = np.abs(tuned["w"] - base["w"])
    one, two, three = (np.sort(sizes)[quarter * (numel - 1) // 4] for quarter in (1, 2, 3))
    chosen = sizes >= two + 1.5 * (float(three) - one) if numel > 1 else np.array([True])
    found = load_file(tmp_path / "out/model.safetensors")["w"]
    assert np.array_equal(found != base["w"], chosen)
    np.testing.assert_allclose(found, np.where(chosen, tuned["w"], base["w"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "method", ["ties", "fisher", "consensus_ta", "consensus_ties", "sce", "ram", "ramplus_tl", "emr"]
)
def test_arguments_stay_as_they_were(method: str) -> None:
    deltas, weights = drawn(3, 50, 1), np.array([1.0, 0.5, 2.0])
    told: dict[str, dict[str, Any]] = {
        "ties": dict(normalize=True), "fisher": dict(fisher=np.abs(deltas), floor=1e-6),
        "consensus_ta": dict(undropped=deltas, mask_threshold=0.4, agree=2),
        "consensus_ties": dict(undropped=deltas, mask_threshold=0.4, agree=2, normalize=True),
        "sce": dict(selected=np.ones(50, np.bool_), energies=np.ones(3)),
        "emr": dict(task=1, factor=0.5), "ram": dict(epsilon=0.1),
        "ramplus_tl": dict(epsilon=0.1, factors=np.ones(3)),
    }  # fmt: skip
    before = deltas.copy(), weights.copy()
    getattr(elements, method)(deltas, weights, **told[method])
    assert np.array_equal(deltas, before[0])
    assert np.array_equal(weights, before[1])


# Combinations of vectors.


def vectors(count: int, size: int, seed: int, *, common: float = 0.0) -> Floats:
    """Random ones; the more they have in `common`, the closer their directions."""
    rng = np.random.default_rng(seed)
    return common * rng.normal(size=size) + rng.normal(size=(count, size))


def gram_of(vectors: Floats) -> Floats:
    return vectors @ vectors.T


def combined(coefficients: Floats, vectors: Floats) -> Floats:
    return np.asarray((coefficients[:, None] * vectors).sum(axis=0))


@pytest.mark.parametrize("method", [combinations.average, combinations.task_arithmetic])
@given(count=COUNTS, seed=SEEDS)
def test_sums_and_means(method: Callable[..., Floats], count: int, seed: int) -> None:
    weights, models = weights_of(count, seed), vectors(count, 9, seed)
    total = np.sum([weight * model for weight, model in zip(weights, models, strict=True)], axis=0)
    close(combined(method(None, weights, normalize=False), models), total)
    close(combined(method(None, weights, normalize=True), models), total / weights.sum())


@pytest.mark.parametrize("method", [combinations.average, combinations.task_arithmetic])
def test_weights_that_cancel_are_not_divided_by_their_sum(method: Callable[..., Floats]) -> None:
    assert method(None, np.array([1.0, -1.0]), normalize=True).tolist() == [1, -1]


def unit(vector: Floats) -> Floats:
    return vector / np.linalg.norm(vector)


@given(seed=SEEDS, t=st.floats(0, 1), common=st.sampled_from([0.0, 0.5, 5.0]))
def test_slerp_goes_along_the_arc(seed: int, t: float, common: float) -> None:
    """Shoemake: the combination of unit vectors is one, at t of the way from the first to the second."""
    first, second = (unit(vector) for vector in vectors(2, 30, seed, common=common))
    models = np.stack([first, second])
    omega = np.arccos(first @ second)
    found = combined(combinations.slerp(gram_of(models), np.ones(2), t=t), models)
    close(np.linalg.norm(found), 1)
    np.testing.assert_allclose(
        [first @ found, found @ second], np.cos([t * omega, (1 - t) * omega]), atol=1e-12
    )


@given(seed=SEEDS, t=st.floats(0, 1))
def test_slerp_of_weights_of_any_length(seed: int, t: float) -> None:
    models = vectors(2, 30, seed) * np.array([[3.0], [0.2]])
    omega = np.arccos(unit(models[0]) @ unit(models[1]))
    expected = (np.sin((1 - t) * omega) * models[0] + np.sin(t * omega) * models[1]) / np.sin(omega)
    close(combined(combinations.slerp(gram_of(models), np.ones(2), t=t), models), expected)


@pytest.mark.parametrize("second", [[1, 0], [2, 0], [-1, 0], [1, 0.01]])
def test_slerp_is_straight_where_vectors_lie_almost_on_one_line(second: list[float]) -> None:
    models = np.array([[1, 0], second], np.float64)
    close(
        combined(combinations.slerp(gram_of(models), np.ones(2), t=0.25), models),
        0.75 * models[0] + 0.25 * models[1],
    )


def test_slerp_with_a_vector_of_zeros() -> None:
    """It has no direction; mergekit takes it to be at a right angle."""
    models = np.array([[0.0, 0], [3, 4]])
    close(
        combined(combinations.slerp(gram_of(models), np.ones(2), t=0.5), models),
        np.sin(np.pi / 4) * models[1],
    )


@given(seed=SEEDS, weights=st.tuples(st.floats(0.01, 5), st.floats(0.01, 5)))
def test_nuslerp_is_slerp_by_weights(seed: int, weights: tuple[float, float]) -> None:
    models = vectors(2, 30, seed)
    t = weights[1] / sum(weights)
    close(
        combinations.nuslerp(gram_of(models), np.array(weights)),
        combinations.slerp(gram_of(models), np.ones(2), t=t),
    )


def test_nuslerp_of_weights_that_cancel_goes_half_way() -> None:
    models = vectors(2, 30, 1)
    close(
        combinations.nuslerp(gram_of(models), np.array([1.0, -1.0])),
        combinations.nuslerp(gram_of(models), np.ones(2)),
    )


def test_nuslerp_has_an_angle_for_each_row() -> None:
    rows = vectors(2 * 5, 8, 3).reshape(2, 5, 8)
    rows[1, 2], rows[1, 3], rows[1, 4] = rows[0, 2], -rows[0, 3], 0
    grams = np.stack([gram_of(rows[:, row]) for row in range(5)])
    found = combinations.nuslerp(grams, np.array([3.0, 1.0]))
    assert found.shape == (5, 2)
    for row in range(5):
        close(found[row], combinations.nuslerp(grams[row], np.array([3.0, 1.0])))
    close(found[2:4], [[0.75, 0.25]] * 2)


def logarithm(mean: Floats, other: Floats) -> Floats:
    """The tangent at `mean` that leads to `other`, along the sphere."""
    cosine = np.clip(mean @ other, -1, 1)
    away = other - cosine * mean
    length = np.linalg.norm(away)
    return np.asarray(np.arccos(cosine) * away / length if length > 1e-12 else 0 * away)


@given(count=COUNTS, seed=SEEDS)
def test_karcher_is_where_the_pulls_cancel(count: int, seed: int) -> None:
    """Karcher: Σ αᵢ log_m(uᵢ) = 0; and the result is as long as the models are on average."""
    models, weights = vectors(count, 20, seed, common=2.0), weights_of(count, seed)
    found = combined(combinations.karcher(gram_of(models), weights, max_iter=200, tol=1e-10), models)
    shares = weights / weights.sum()
    pull = sum(
        share * logarithm(unit(found), unit(model)) for share, model in zip(shares, models, strict=True)
    )
    np.testing.assert_allclose(pull, 0, atol=1e-7)
    close(np.linalg.norm(found), (shares * np.linalg.norm(models, axis=1)).sum())


def test_karcher_of_two_is_half_way_along_the_arc() -> None:
    models = np.stack([unit(vector) for vector in vectors(2, 20, 5)])
    found = combined(combinations.karcher(gram_of(models), np.ones(2), max_iter=100, tol=1e-10), models)
    np.testing.assert_allclose(
        found, combined(combinations.slerp(gram_of(models), np.ones(2), t=0.5), models), atol=1e-8
    )


def test_karcher_stops_after_so_many_steps() -> None:
    models = vectors(3, 20, 6)
    begun = combined(combinations.karcher(gram_of(models), np.ones(3), max_iter=0, tol=1e-12), models)
    directions = np.stack([unit(model) for model in models])
    np.testing.assert_allclose(unit(begun), unit(directions.mean(axis=0)), atol=1e-12)
    assert (
        np.abs(
            begun - combined(combinations.karcher(gram_of(models), np.ones(3), max_iter=9, tol=1e-12), models)
        ).max()
        > 1e-4
    )


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e3])
def test_karcher_of_equal_models_is_that_model(scale: float) -> None:
    models = np.repeat(vectors(1, 20, 7) * scale, 3, axis=0)
    np.testing.assert_allclose(
        combined(combinations.karcher(gram_of(models), np.ones(3), max_iter=10, tol=1e-5), models), models[0]
    )


def test_karcher_of_opposites_is_finite() -> None:
    """Every direction at a right angle would do; it stays with the first."""
    model = vectors(1, 20, 8)[0]
    models = np.stack([model, -model])
    close(combined(combinations.karcher(gram_of(models), np.ones(2), max_iter=10, tol=1e-5), models), model)


def test_karcher_leaves_out_models_of_zeros_but_not_from_the_length() -> None:
    model = vectors(1, 20, 9)[0]
    models = np.stack([np.zeros(20), model])
    close(
        combined(combinations.karcher(gram_of(models), np.ones(2), max_iter=10, tol=1e-5), models), model / 2
    )
    assert combinations.karcher(np.zeros((2, 2)), np.ones(2), max_iter=10, tol=1e-5).tolist() == [0, 0]


@given(count=COUNTS, seed=SEEDS, normalize=st.booleans())
def test_multislerp(count: int, seed: int, normalize: bool) -> None:
    """The directions' weighted mean, made as long as the models are on average; one model is itself."""
    models, weights = vectors(count, 20, seed, common=1.0), weights_of(count, seed)
    found = combinations.multislerp(gram_of(models), weights, normalize_weights=normalize, eps=0.0)
    shares = weights / weights.sum() if normalize else weights
    lengths = np.linalg.norm(models, axis=1)
    direction = unit((shares[:, None] * models / lengths[:, None]).sum(axis=0))
    close(combined(found, models), shares @ lengths * direction if count > 1 else models[0])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 1.0, 2.0]])
def test_multislerp_of_opposites(weights: list[float]) -> None:
    """Of two the sum; mergekit, too, refuses more."""
    model = vectors(1, 20, 1)[0]
    models = np.stack([model, -2 * model] if len(weights) == 2 else [model, model, -model])
    if len(weights) == 2:
        found = combinations.multislerp(gram_of(models), np.array(weights), normalize_weights=True, eps=1e-8)
        close(combined(found, models), -model / 2)
        return
    with pytest.raises(ConfigError, match=r"weights: expected directions .* not zero.*, found 1, 1, 2"):
        combinations.multislerp(gram_of(models), np.array(weights), normalize_weights=True, eps=1e-8)


def test_multislerp_of_models_that_did_not_move_is_the_base() -> None:
    found = combinations.multislerp(np.zeros((3, 3)), np.ones(3), normalize_weights=True, eps=1e-8)
    assert found.tolist() == [0, 0, 0]


@given(count=st.integers(2, 5), seed=SEEDS)
def test_model_stock(count: int, seed: int) -> None:
    """Jang et al., eq. 7, with the mean of the cosines between all pairs."""
    deltas = vectors(count, 30, seed, common=0.7)
    cosine = np.mean([unit(one) @ unit(other) for one, other in pairs(deltas, 2)])
    t = count * cosine / (1 + (count - 1) * cosine)
    close(
        combined(combinations.model_stock(gram_of(deltas), np.ones(count)), deltas), t * deltas.mean(axis=0)
    )


def test_model_stock_of_opposites_is_the_base() -> None:
    delta = vectors(1, 30, 1)[0]
    assert combinations.model_stock(gram_of(np.stack([delta, -delta])), np.ones(2)).tolist() == [0, 0]


def test_model_stock_of_models_that_agree_is_their_mean() -> None:
    deltas = np.repeat(vectors(1, 30, 2), 4, axis=0)
    close(combinations.model_stock(gram_of(deltas), np.ones(4)), [0.25] * 4)


def test_model_stock_has_a_ratio_for_each_filter() -> None:
    rows = vectors(3 * 4, 8, 3, common=1).reshape(3, 4, 8)
    rows[:, 3] = 0
    grams = np.stack([gram_of(rows[:, row]) for row in range(4)])
    found = combinations.model_stock(grams, np.ones(3))
    close(found, [combinations.model_stock(gram, np.ones(3)) for gram in grams])
    assert found[3].tolist() == [0, 0, 0]


# Whole matrices.


def inputs_of(count: int, width: int, seed: int) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(50, width)) @ rng.normal(size=(width, width)) for _ in range(count)]


def grams_of(inputs: Sequence[Floats]) -> Floats:
    return np.stack([x.T @ x / len(x) for x in inputs])


def disagreement(merged: Floats, layers: Floats, inputs: Sequence[Floats], weights: Floats) -> float:
    """Σ wᵢ E‖(W - Wᵢ)x‖² over model i's own inputs."""
    terms = [
        w * np.square(x @ (merged - own).T).sum(axis=1).mean()
        for own, x, w in zip(layers, inputs, weights, strict=True)
    ]
    return float(sum(terms))


def test_regmean_disagrees_least_with_the_models() -> None:
    layers, inputs, weights = (
        vectors(3 * 4, 6, 1).reshape(3, 4, 6),
        inputs_of(3, 6, 2),
        np.array([1.0, 0.5, 2.0]),
    )
    merged = regmean(layers, weights, grams=grams_of(inputs), shrink=1.0, ridge=0.0, transposed=False)
    least = disagreement(merged, layers, inputs, weights)
    rng = np.random.default_rng(3)
    for _ in range(30):
        assert disagreement(merged + 0.01 * rng.normal(size=merged.shape), layers, inputs, weights) > least


@TYPES
@given(
    count=COUNTS, seed=SEEDS, shrink=st.sampled_from([1.0, 0.9, 0.0]), ridge=st.sampled_from([0.0, 1e-6, 0.1])
)
def test_regmean_solves_the_normal_equations(
    dtype: Any, count: int, seed: int, shrink: float, ridge: float
) -> None:
    """Jin et al., eq. 2 and §3.3: Σ wᵢ (W - Wᵢ) Gᵢ = 0, where Gᵢ is shrunk off its diagonal."""
    layers, weights = vectors(count * 3, 5, seed).reshape(count, 3, 5), weights_of(count, seed)
    grams = grams_of(inputs_of(count, 5, seed))
    merged = regmean(
        layers.astype(dtype), weights.astype(dtype), grams=grams, shrink=shrink, ridge=ridge, transposed=False
    )
    assert merged.dtype == dtype
    balance, size = np.zeros((3, 5)), 0.0
    for layer, weight, gram in zip(layers, weights, grams, strict=True):
        own = np.where(
            np.eye(5, dtype=bool), gram * (1 + ridge * np.trace(gram) / 5 / np.diagonal(gram)), shrink * gram
        )
        balance += weight * (merged - layer) @ own
        size += weight * float(np.abs(layer @ own).max())
    np.testing.assert_allclose(balance / size, 0, atol=10 * like(dtype) * max(1, np.abs(merged).max()))


def test_regmean_of_a_transposed_layer_is_the_transpose() -> None:
    layers, grams = vectors(2 * 3, 5, 1).reshape(2, 3, 5), grams_of(inputs_of(2, 5, 2))
    settings: dict[str, Any] = dict(grams=grams, shrink=0.9, ridge=1e-6)
    merged = regmean(layers, np.ones(2), transposed=False, **settings)
    other = regmean(np.ascontiguousarray(layers.transpose(0, 2, 1)), np.ones(2), transposed=True, **settings)
    close(other.T, merged)


def test_regmean_of_inputs_that_never_occurred_is_the_mean() -> None:
    layers, grams = vectors(2 * 3, 5, 1).reshape(2, 3, 5), grams_of(inputs_of(2, 5, 2))
    grams[:, 4], grams[:, :, 4] = 0, 0
    scaled = regmean(
        layers,
        np.ones(2),
        grams=grams / np.trace(grams, axis1=1, axis2=2)[:, None, None],
        shrink=0.9,
        ridge=1e-6,
        transposed=False,
    )
    np.testing.assert_allclose(scaled[:, 4], layers.mean(axis=0)[:, 4], rtol=1e-6)
    nothing = regmean(layers, np.array([3.0, 1.0]), grams=0 * grams, shrink=0.9, ridge=1e-6, transposed=False)
    np.testing.assert_allclose(nothing, 0.75 * layers[0] + 0.25 * layers[1], rtol=1e-9)


# What is dropped.


@given(
    seed=SEEDS,
    rows=st.integers(1, 5),
    row=st.integers(1, 40),
    density=st.sampled_from([0.3, 0.5, 0.8]),
    epsilon=st.floats(0, 0.19),
)
def test_magprune(seed: int, rows: int, row: int, density: float, epsilon: float) -> None:
    """Deep et al., §3.1: rates fall evenly from p + ε, of a row's smallest, to p - ε; of equals the first is
    the smaller.
    """
    delta = drawn(1, rows * row, seed)[0]
    kept, factors = drops.magprune(delta, row, seed, 3 * row, density=density, epsilon=epsilon)
    draws = philox.draws(seed, 3 * row, delta.size, MASK_DOMAIN)
    for place in range(delta.size):
        begin = place // row * row
        smaller = [
            abs(delta[i]) < abs(delta[place]) or (abs(delta[i]) == abs(delta[place]) and i < place)
            for i in range(begin, begin + row)
        ]
        rate = (1 - density) + epsilon - (2 * epsilon * sum(smaller) / (row - 1) if row > 1 else 0)
        threshold = round(rate * 65536)
        assert kept[place] == (draws[place] >= threshold)
        np.testing.assert_allclose(factors[place], 65536 / (65536 - threshold), rtol=1e-12)


def test_magprune_keeps_the_mean_of_each_element() -> None:
    delta = np.linspace(-1, 1, 64)
    total = np.zeros(64)
    for key in range(4000):
        kept, factors = drops.magprune(delta, 64, key, 0, density=0.5, epsilon=0.3)
        total += delta * kept * factors
    np.testing.assert_allclose(total / 4000, delta, atol=6 / np.sqrt(4000))


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.1, 0.1), (0.1, 0.2), (0.9, 0.1), (0.5, -0.1), (0.5, 0.5)]
)
def test_magprune_refuses_rates_that_are_none(density: float, epsilon: float) -> None:
    with pytest.raises(
        ConfigError, match=rf"epsilon: expected density ± epsilon within \(0, 1\), with density {density}"
    ):
        drops.magprune(np.ones(4), 4, 0, 0, density=density, epsilon=epsilon)


@pytest.mark.parametrize("density", [1e-7, 1e-5])
def test_magprune_at_rates_that_draws_cannot_tell_from_one(density: float) -> None:
    """The largest draw keeps an element at any rate, so that its factor is finite."""
    kept, factors = drops.magprune(np.ones(1 << 18), 1 << 18, 7, 0, density=density, epsilon=0.0)
    assert set(factors) == {65536}
    assert np.array_equal(kept, philox.draws(7, 0, 1 << 18, MASK_DOMAIN) == 65535)
    assert kept.any()


@given(numel=st.integers(0, 2000), density=st.floats(0, 1), gamma=st.floats(0, 1))
def test_breadcrumbs_keep_the_middle(numel: int, density: float, gamma: float) -> None:
    """Davari and Belilovsky, §3: of the sorted elements a share `density`, without the largest γ where that
    leaves enough.
    """
    target = int(density * numel)
    dropped = min(int(gamma * numel), numel - target)
    assert drops.outlier_ranks(numel, density, gamma) == (target + dropped, dropped)


@pytest.mark.parametrize(
    ("numel", "density", "rank"),
    [(10, 0.2, 2), (10, 0.01, 1), (10, 0.0, 0), (0, 0.5, 0), (7, 0.999, 6), (3, 1.0, 3)],
)
def test_trimming_leaves_at_least_one(numel: int, density: float, rank: int) -> None:
    assert drops.trim_rank(numel, density) == rank


# The factor that least changes a layer's outputs.


def layer(seed: int) -> tuple[Floats, Floats]:
    """A delta and inputs whose features go together, so that the outputs of what is dropped do not just
    cancel.
    """
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 12)) + 0.5, 1 + 0.7 * rng.normal(size=(400, 12))


def expected_error(delta: Floats, x: Floats, p: float, factor: float) -> float:
    """E‖δx - factor·(m ∘ δ)x‖² over inputs and masks m ~ Bernoulli(1 - p): bias squared plus variance."""
    bias = (1 - factor * (1 - p)) ** 2 * np.square(x @ delta.T).sum(axis=1).mean()
    variance = factor**2 * p * (1 - p) * (np.square(x) @ np.square(delta).T).sum(axis=1).mean()
    return float(bias + variance)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [1, 2])
def test_rescale_q_is_the_minimum(p: float, seed: int) -> None:
    delta, x = layer(seed)
    gram = x.T @ x / len(x)
    found = drops.rescale_q(gram, delta, p, transposed=False)
    grid = np.linspace(1, 1 / (1 - p), 2001)
    best = grid[np.argmin([expected_error(delta, x, p, factor) for factor in grid])]
    assert abs(found - best) <= grid[1] - grid[0]
    assert 1 < found < 1 / (1 - p)
    close(drops.rescale_q(gram, np.ascontiguousarray(delta.T), p, transposed=True), found)


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
def test_the_expected_error_is_that_of_masks(factor: float) -> None:
    """What the minimum above is of, by simulation."""
    (delta, x), p, rng = layer(3), 0.75, np.random.default_rng(4)
    errors = [
        np.square(x @ (delta - factor * (rng.random(delta.shape) >= p) * delta).T).sum(axis=1).mean()
        for _ in range(4000)
    ]
    assert np.mean(errors) == pytest.approx(
        expected_error(delta, x, p, factor), abs=5 * np.std(errors) / np.sqrt(4000)
    )


def test_rescale_q_stays_between_dropping_only_and_dare() -> None:
    delta = np.array([[1.0, -1.0]])
    cancels = np.array(
        [[1.0, 1.0], [1.0, 1.0]]
    )  # inputs that are always equal: δx is 0, and any noise is too much
    assert drops.rescale_q(cancels, delta, 0.9, transposed=False) == 1.0
    assert drops.rescale_q(np.zeros((2, 2)), delta, 0.9, transposed=False) == pytest.approx(10)
    assert drops.rescale_q(cancels, 0 * delta, 0.9, transposed=False) == pytest.approx(10)
    assert drops.rescale_q(cancels, np.abs(delta), 0.0, transposed=False) == 1.0


# From files of statistics to a merged model.

Arrays = dict[str, NDArray[Any]]


def models(count: int, seed: int) -> list[Arrays]:
    """A base and models of it: a layer, another whose tensor is [in, out], and a bias."""
    rng = np.random.default_rng(seed)
    base = {
        "up.weight": rng.normal(size=(6, 5)),
        "conv.weight": rng.normal(size=(5, 4)),
        "up.bias": rng.normal(size=6),
    }
    tuned = [
        {name: array + 0.1 * rng.normal(size=array.shape) for name, array in base.items()}
        for _ in range(count)
    ]
    return [{name: array.astype(np.float32) for name, array in one.items()} for one in [base, *tuned]]


class Grams(dict[str, Any]):
    transposed = frozenset({"conv.weight"})


def merged_by(
    method: str, base: Arrays, tuned: Sequence[Arrays], files: Sequence[Path], out: Path, **options: Any
) -> Arrays:
    statistics: dict[str, Any] = {"fisher" if method == "fisher" else "gram": files}
    merge(base, list(tuned), out, method=method, **statistics, **options)
    result: Arrays = load_file(out / "model.safetensors")
    return result


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fisher_from_files(tmp_path: Path, scale: float) -> None:
    base, *tuned = models(3, 1)
    rng, weights = np.random.default_rng(2), [1.0, 0.5, 2.0]
    fishers = [{name: rng.random(array.shape, np.float32) for name, array in base.items()} for _ in tuned]
    files = [
        save_statistics(tmp_path / f"{number}.safetensors", "fisher", one, examples=9)
        for number, one in enumerate(fishers)
    ]
    found = merged_by("fisher", base, tuned, files, tmp_path / "out", weights=weights, lambda_=scale)
    assert found.keys() == base.keys()
    for name, array in base.items():
        wide = [one[name].astype(np.float64) - array for one in tuned]
        counts = [
            weight * np.maximum(one[name].astype(np.float64), 1e-6)
            for weight, one in zip(weights, fishers, strict=True)
        ]
        delta = sum(count * delta for count, delta in zip(counts, wide, strict=True)) / sum(counts)
        np.testing.assert_allclose(found[name], array + scale * delta, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_regmean_from_files(tmp_path: Path, scale: float) -> None:
    """Layers by the normal equations in float64; what is no layer by the plain mean, as in the paper."""
    base, *tuned = models(2, 3)
    weights = [1.0, 3.0]
    grams = [
        Grams({"up.weight": a.astype(np.float32), "conv.weight": b.astype(np.float32)})
        for a, b in zip(*(grams_of(inputs_of(2, 5, s)) for s in (4, 5)), strict=True)
    ]
    files = [
        save_statistics(tmp_path / f"{number}.safetensors", "gram", one, examples=9)
        for number, one in enumerate(grams)
    ]
    found = merged_by(
        "regmean", base, tuned, files, tmp_path / "out", weights=weights, shrink=0.8, ridge=0.0, lambda_=scale
    )
    for name, array in base.items():
        wide = [one[name].astype(np.float64) for one in tuned]
        if name == "up.bias":
            merged = (wide[0] + 3 * wide[1]) / 4
        else:
            shrunk = [
                np.where(np.eye(5, dtype=bool), one[name], 0.8 * one[name].astype(np.float64))
                for one in grams
            ]
            layers = wide if name == "conv.weight" else [layer.T for layer in wide]
            numerator = sum(
                weight * gram @ layer for weight, gram, layer in zip(weights, shrunk, layers, strict=True)
            )
            merged = np.linalg.inv(weights[0] * shrunk[0] + weights[1] * shrunk[1]) @ numerator
            merged = merged if name == "conv.weight" else merged.T
        np.testing.assert_allclose(found[name], array + scale * (merged - array), rtol=1e-6, atol=1e-6)
