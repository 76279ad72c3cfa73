"""Products of thin matrices, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from dare_train.kernels.products import thin_product


def one_after_another(left: np.ndarray, right: np.ndarray, factor: float) -> np.ndarray:
    """Each product and each sum rounded on its own, in the order of the rank."""
    total = left[:, :1] * right[:1]
    for k in range(1, left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return factor * total


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6, 9, 16, 33])
def test_sums_are_taken_in_the_order_of_the_rank(rank: int) -> None:
    random = np.random.default_rng(rank)
    left, right = random.standard_normal((7, rank)), random.standard_normal((rank, 13))
    found = thin_product(left, right, 0.3)
    assert np.array_equal(found, one_after_another(left, right, 0.3))
    assert np.array_equal(thin_product(left[2:5], right, 0.3), found[2:5])
    assert np.array_equal(thin_product(left.T.copy().T, np.asfortranarray(right), 0.3), found)


def test_of_no_rank_and_no_rows() -> None:
    assert np.array_equal(thin_product(np.empty((3, 0)), np.empty((0, 4)), 2.0), np.zeros((3, 4)))
    assert thin_product(np.empty((0, 2)), np.ones((2, 4)), 2.0).shape == (0, 4)
