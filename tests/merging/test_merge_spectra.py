"""Methods that take matrices apart, against float64 definitions written from their papers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dare_train import merge
from dare_train.merging.methods import spectra
from dare_train.merging.methods.interference import wudi
from dare_train.merging.methods.spectra import iso_c, iso_cts, tsv

Floats = NDArray[np.float64]
SHAPES = pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9), (1, 7), (2, 5)])
COUNTS = pytest.mark.parametrize("count", [1, 2, 3])


def drawn(count: int, shape: tuple[int, int], seed: int = 1) -> Floats:
    return np.random.default_rng(seed).normal(size=(count, *shape)) * 0.02


def nearest_orthogonal(matrix: Floats) -> Floats:
    """(MMᵀ)^(-1/2) M, by eigenvectors."""
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    inverse = np.where(values > 1e-12, 1 / np.sqrt(np.maximum(values, 1e-12)), 0)
    return np.asarray(vectors * inverse @ vectors.T @ matrix)


def leading(matrix: Floats, rank: int) -> tuple[Floats, Floats, Floats]:
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], values[:rank], v[:rank].T


def defined_tsv(deltas: Floats) -> Floats:
    """Gargiulo et al., algorithm 1."""
    rank = min(deltas.shape[1:]) // len(deltas)
    if not rank:
        return np.asarray(deltas.mean(axis=0))
    us, values, vs = zip(*(leading(delta, rank) for delta in deltas), strict=True)
    left, right = nearest_orthogonal(np.hstack(us)), nearest_orthogonal(np.hstack(vs))
    return np.asarray(left @ np.diag(np.concatenate(values)) @ right.T)


def defined_iso_c(deltas: Floats) -> Floats:
    """Marczak et al., §4.1: the nearest orthogonal matrix, times the mean singular value."""
    total = deltas.sum(axis=0)
    if total.shape[0] > total.shape[1]:
        return defined_iso_c(deltas.transpose(0, 2, 1)).T
    return np.asarray(nearest_orthogonal(total) * np.linalg.svd(total, compute_uv=False).mean())


def defined_iso_cts(deltas: Floats, fraction: float) -> Floats:
    """Marczak et al., algorithm 2."""
    size, count = min(deltas.shape[1:]), len(deltas)
    own = min(size // count, round((size - int(size * fraction)) / count))
    u, values, v = leading(deltas.sum(axis=0), size - own * count)
    found = [(u, values, v)] + [leading((np.eye(len(u)) - u @ u.T) @ delta, own) for delta in deltas]
    us, every, vs = zip(*found, strict=True)
    left, right = nearest_orthogonal(np.hstack(us)), nearest_orthogonal(np.hstack(vs))
    return np.asarray(left @ right.T * np.concatenate(every).mean())


def defined_wudi(deltas: Floats, steps: int, rate: float) -> Floats:
    """Cheng et al., algorithm 1, with Kingma and Ba's Adam."""
    merged, m, v = deltas.sum(axis=0), 0.0, 0.0
    for step in range(1, steps + 1):
        gradient = sum(2 * (merged - own) @ own.T @ own / np.square(own).sum() for own in deltas)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2  # type: ignore[assignment]
        merged = merged - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return np.asarray(merged)


def within_a_bf16_step(found: NDArray[np.floating], expected: Floats) -> None:
    """Of the largest element: a step of bf16 is 2⁻⁸ of a number."""
    np.testing.assert_allclose(found, expected, atol=float(np.abs(expected).max()) * 2e-6)


def given(method: Callable[..., Any], deltas: Floats, **told: Any) -> NDArray[np.floating]:
    """In float32."""
    merged: NDArray[np.floating] = method(deltas.astype(np.float32), np.ones(len(deltas), np.float32), **told)
    assert merged.dtype == np.float32
    return merged


@SHAPES
@COUNTS
def test_tsv(shape: tuple[int, int], count: int) -> None:
    deltas = drawn(count, shape)
    within_a_bf16_step(given(tsv, deltas), defined_tsv(deltas.astype(np.float32).astype(np.float64)))


@SHAPES
@COUNTS
def test_iso_c(shape: tuple[int, int], count: int) -> None:
    deltas = drawn(count, shape)
    within_a_bf16_step(given(iso_c, deltas), defined_iso_c(deltas.astype(np.float32).astype(np.float64)))


@SHAPES
@COUNTS
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts(shape: tuple[int, int], count: int, fraction: float) -> None:
    deltas = drawn(count, shape)
    wide = deltas.astype(np.float32).astype(np.float64)
    found = given(iso_cts, deltas, common_space_fraction=fraction)
    within_a_bf16_step(found, defined_iso_cts(wide, fraction))


@SHAPES
@COUNTS
@pytest.mark.parametrize("told", [{"steps": 0, "learning_rate": 1e-5}, {"steps": 40, "learning_rate": 1e-4}])
def test_wudi(shape: tuple[int, int], count: int, told: dict[str, Any]) -> None:
    deltas = drawn(count, shape)
    wide = deltas.astype(np.float32).astype(np.float64)
    within_a_bf16_step(given(wudi, deltas, **told), defined_wudi(wide, told["steps"], told["learning_rate"]))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50), (1, 7), (7, 1)])
@pytest.mark.parametrize("smallest", [0.5, 1e-3, 3e-5, 3e-6, 1e-9, 0.0])
@pytest.mark.parametrize("least", [0.0, 1e-7, 1.3e-4])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_short_way_leads_to_singular_vectors(
    shape: tuple[int, int], smallest: float, least: float, share: float
) -> None:
    """Or is not taken. Compared are what is left of the matrix, and its nearest orthogonal one."""
    rng = np.random.default_rng(5)
    size = min(shape)
    p, q = (np.linalg.qr(rng.normal(size=(length, size)))[0] for length in shape)
    values = (
        np.geomspace(1, smallest, size) if smallest else np.r_[np.ones(size - size // 2), np.zeros(size // 2)]
    )
    matrix = p * values @ q.T
    rank = max(int(size * share), 1)
    u, expected, v = np.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, int(np.count_nonzero(expected > least)))
    found = spectra._leading(matrix, rank, least)
    close = 1e-12 if expected[kept - 1] > 1e-3 else 3e-6
    if smallest or least:
        assert len(found[1]) == kept
        np.testing.assert_allclose(
            found[0] * found[1] @ found[2], u[:, :kept] * expected[:kept] @ v[:kept], atol=1e-11
        )
        np.testing.assert_allclose(found[0] @ found[2], u[:, :kept] @ v[:kept], atol=close)
    short = spectra._by_squares(matrix, rank, least)
    assert (short is None) == bool(least < expected[kept - 1] < 1e-5)


def test_wudi_lessens_the_interference() -> None:
    deltas = drawn(3, (12, 8))

    def interference(merged: Any) -> float:
        return float(sum(np.square((merged - own) @ own.T).sum() / np.square(own).sum() for own in deltas))

    merged = given(wudi, deltas, steps=300, learning_rate=1e-4)
    assert interference(merged) < 0.5 * interference(deltas.sum(axis=0))


METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "tsv": (tsv, {}),
    "iso_c": (iso_c, {}),
    "iso_cts": (iso_cts, {"common_space_fraction": 0.8}),
    "wudi": (wudi, {"steps": 20, "learning_rate": 1e-4}),
}
EVERY = pytest.mark.parametrize("name", METHODS)


@EVERY
def test_models_that_did_not_move_change_nothing(name: str) -> None:
    method, told = METHODS[name]
    assert not given(method, np.zeros((2, 6, 4)), **told).any()
    deltas = drawn(1, (6, 4))
    still = np.concatenate([deltas, 0 * deltas])
    assert np.isfinite(given(method, still, **told)).all()


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts"])
def test_a_low_rank_stays_one(name: str) -> None:
    """Rounding errors of adapters' products are no directions."""
    rng = np.random.default_rng(2)
    deltas = np.stack([rng.normal(size=(24, 2)) @ rng.normal(size=(2, 16)) for _ in range(2)])
    method, told = METHODS[name]
    values = np.linalg.svd(given(method, deltas, **told).astype(np.float64), compute_uv=False)
    assert np.count_nonzero(values > 1e-5 * values[0]) == 4


@EVERY
def test_no_argument_is_changed(name: str) -> None:
    method, told = METHODS[name]
    deltas = drawn(2, (6, 4))
    before = deltas.copy()
    method(deltas, np.ones(2), **told)
    assert np.array_equal(before, deltas)


@EVERY
def test_what_is_no_matrix_is_averaged_and_the_report_says_so(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    base = {"w": rng.normal(size=(6, 4)).astype(np.float32), "b": np.zeros(4, np.float32)}
    models = [{"w": base["w"] + np.float32(0.1) * n, "b": np.full(4, n, np.float32)} for n in (1, 2)]
    report = merge(base, models, tmp_path / "out", method=name, lambda_=0.5)
    assert load_file(tmp_path / "out/model.safetensors")["b"].tolist() == [0.75] * 4
    assert report.notes == ("averaged, since they are no matrices: b",)


@EVERY
def test_the_same_bytes_each_time_with_any_number_of_threads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    base = {f"w{n}": rng.normal(size=(40, 30)).astype(np.float32) for n in range(4)}
    models = [
        {key: value + rng.normal(size=value.shape).astype(np.float32) for key, value in base.items()}
        for _ in "ab"
    ]
    for threads in (1, 4):
        monkeypatch.setattr("dare_train.parallel.threads.thread_count", lambda count=threads: count)
        merge(base, models, tmp_path / str(threads), method=name, p=0.5)
    one, four = ((tmp_path / str(threads) / "model.safetensors").read_bytes() for threads in (1, 4))
    assert one == four
