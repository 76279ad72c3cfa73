"""Largest singular values against all of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from dare_train.weights.singular_vectors import EXACT, Singular, largest_singular, singular_within


def falling(rows: int, columns: int, *, power: float = 0.7) -> NDArray[np.float64]:
    """A matrix whose singular values fall slowly, as those of a full fine-tune's delta do."""
    random = np.random.Generator(np.random.Philox(key=1))
    shorter = min(rows, columns)
    left, _ = np.linalg.qr(random.standard_normal((rows, shorter)))
    right, _ = np.linalg.qr(random.standard_normal((columns, shorter)))
    return np.asarray(left * np.arange(1.0, shorter + 1) ** -power @ right.T)


def product(found: Singular, rank: int) -> NDArray[np.float64]:
    left, right = found.factors(rank)
    return np.asarray(left @ right)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (20, 30), (30, 20)])
def test_of_a_small_matrix_all_are_found(shape: tuple[int, int]) -> None:
    matrix = falling(*shape)
    found = largest_singular(matrix, 1, seed=0)
    assert found.rank == min(shape)
    np.testing.assert_allclose(product(found, found.rank), matrix, atol=1e-14)


def test_of_a_large_matrix_the_largest_are_as_good_as_the_best() -> None:
    matrix = falling(EXACT + 6, EXACT + 70).astype(np.float32)
    found = largest_singular(matrix, 16, seed=3)
    assert found.rank == 16
    assert found.left.dtype == np.float32
    sizes = np.arange(1.0, EXACT + 7) ** -0.7
    best = np.linalg.norm(sizes[16:])
    assert best <= np.linalg.norm(matrix - product(found, 16)) + 1e-4 < best * 1.002
    np.testing.assert_allclose(found.sizes, sizes[:16], rtol=0.02)
    again = largest_singular(matrix, 16, seed=3)
    assert np.array_equal(found.left, again.left)
    assert not np.array_equal(found.left, largest_singular(matrix, 16, seed=4).left)


def test_an_error_takes_as_many_as_it_needs() -> None:
    matrix = falling(EXACT + 1, EXACT + 1, power=1.0).astype(np.float32)
    squares = float(np.square(matrix, dtype=np.float64).sum())
    found = singular_within(matrix, 0.1, seed=0)
    rank = found.rank_for(0.1, squares)
    assert rank is not None
    sizes = np.arange(1.0, EXACT + 2) ** -1.0
    shares = [np.linalg.norm(sizes[kept:]) / np.linalg.norm(sizes) for kept in range(sizes.size)]
    smallest = next(kept for kept, share in enumerate(shares) if share <= 0.1)
    assert smallest <= rank <= smallest + 1
    assert np.linalg.norm(matrix - product(found, rank)) <= 0.1 * np.sqrt(squares) * (1 + 1e-5)


def test_the_rank_for_an_error_is_the_smallest() -> None:
    sizes = np.array([3.0, 2.0, 1.0])
    found = Singular(left=np.eye(3), sizes=sizes, right=np.eye(3))
    assert [found.rank_for(error, 14.0) for error in (0.99, 0.6, 0.5, 0.27, 0.26)] == [1, 1, 2, 2, 3]
    assert Singular(left=np.eye(2), sizes=sizes[:2], right=np.eye(2)).rank_for(0.1, 14.0) is None
