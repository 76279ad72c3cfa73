"""The k largest of a tensor, found run by run, against a plain sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dare_train.merging.methods.top_k import EVERY, NONE, Largest, Sizes, largest

Bools = NDArray[np.bool_]
Cut = list[tuple[int, Sizes]]
"""Where each run of a tensor begins, and its elements' sizes."""

FEW = st.sampled_from([0.0, 1.0, 2.0, 1e-45, 1e-38, 3e38, float("inf")])
"""Sizes of which many are equal."""
CLOSE = st.integers(0, 40).map(lambda step: float(np.float32(1) + np.float32(step * 2.0**-23)))
"""Sizes whose leading bits are the same."""
ANY = st.floats(0, width=32)
LISTS = st.lists(FEW, max_size=60) | st.lists(CLOSE, max_size=60) | st.lists(ANY, max_size=60)
CUTS = st.lists(st.integers(0, 60), max_size=5)


def by_sort(sizes: Sizes, k: int, *, last: bool) -> Bools:
    """Which elements are the k largest; NaN is larger than infinity, since it must not be lost."""
    place = np.arange(sizes.size)
    order = np.lexsort((-place if last else place, -sizes.view(np.uint32).astype(np.int64)))
    keep = np.zeros(sizes.size, np.bool_)
    keep[order[: max(k, 0)]] = True
    return keep


def cut(sizes: Sizes, places: Sequence[int] = ()) -> Cut:
    edges = [0, *sorted(min(place, sizes.size) for place in places), sizes.size]
    return [(start, sizes[start:stop]) for start, stop in pairwise(edges)]


def each(runs: Cut) -> Callable[[Callable[[int, Sizes], object]], list[object]]:
    return lambda function: [function(start, sizes) for start, sizes in runs]


def found(runs: Cut, k: int, *, last: bool) -> Bools:
    chosen = largest(each(runs), k, last=last)
    return np.concatenate([np.zeros(0, np.bool_), *(chosen.among(sizes, start) for start, sizes in runs)])


def array(numbers: Sequence[float]) -> Sizes:
    return np.array(numbers, np.float32)


@given(numbers=LISTS, places=CUTS, k=st.integers(-1, 70), last=st.booleans())
def test_the_k_largest_are_those_of_a_sort(
    numbers: list[float], places: list[int], k: int, last: bool
) -> None:
    sizes = array(numbers)
    keep = found(cut(sizes, places), k, last=last)
    assert np.array_equal(keep, by_sort(sizes, k, last=last))
    assert np.count_nonzero(keep) == min(max(k, 0), sizes.size)


@given(numbers=LISTS, places=CUTS, k=st.integers(0, 60), last=st.booleans())
def test_a_tensor_may_be_cut_anywhere(numbers: list[float], places: list[int], k: int, last: bool) -> None:
    sizes = array(numbers)
    assert np.array_equal(found(cut(sizes, places), k, last=last), found(cut(sizes), k, last=last))


@given(numbers=LISTS, places=CUTS, k=st.integers(-1, 70), last=st.booleans())
def test_where_equal_ones_share_a_fate_a_bound_tells_it(
    numbers: list[float], places: list[int], k: int, last: bool
) -> None:
    """In all runs but one at most."""
    runs = cut(array(numbers), places)
    chosen = largest(each(runs), k, last=last)
    split = [sizes for start, sizes in runs if chosen.least(start) is None]
    assert len(split) <= 1
    for start, sizes in runs:
        least, equal = chosen.least(start), chosen.among(sizes, start)[sizes.view(np.uint32) == chosen.bound]
        if least is not None:
            assert np.array_equal(chosen.among(sizes, start), sizes.view(np.uint32) >= least)
        else:
            assert equal.any()
            assert not equal.all()


@given(numbers=LISTS, places=CUTS, k=st.integers(0, 60), last=st.booleans(), seed=st.integers(0, 99))
def test_zeros_may_be_left_out(
    numbers: list[float], places: list[int], k: int, last: bool, seed: int
) -> None:
    """As runs of packages leave out what was dropped: of the rest, those are chosen that would have been."""
    sizes = array(numbers)
    given_ = (sizes > 0) | (np.random.default_rng(seed).random(sizes.size) < 0.5)
    runs = [(start, part[given_[start : start + part.size]]) for start, part in cut(sizes, places)]
    keep, expected = found(runs, k, last=last), by_sort(sizes, k, last=last)[given_]
    positive = sizes[given_] > 0
    assert np.array_equal(keep[positive], expected[positive])
    assert np.count_nonzero(keep) == min(k, int(given_.sum()))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("k", [0, 1, 5, 4095, 4096, 4097, 9_999, 10_000, 10_001])
def test_all_equal(k: int, last: bool) -> None:
    sizes = np.full(10_000, 0.5, np.float32)
    keep = found(cut(sizes, [4096, 8192]), k, last=last)
    place = np.arange(sizes.size)
    assert np.array_equal(keep, place >= sizes.size - k if last else place < k)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.999])
def test_many_elements(share: float, last: bool) -> None:
    """Magnitudes as of bfloat16 deltas: many are equal."""
    rng = np.random.default_rng(0)
    sizes = (np.abs(rng.normal(0, 0.01, 100_003)).astype(np.float32).view(np.uint32) >> 16 << 16).view(
        np.float32
    )
    k = int(share * sizes.size)
    keep = found(cut(sizes, range(0, sizes.size, 1 << 13)), k, last=last)
    assert np.count_nonzero(keep) == k
    assert np.array_equal(keep, by_sort(sizes, k, last=last))


@pytest.mark.parametrize("k", range(7))
def test_nan_is_larger_than_anything(k: int) -> None:
    """Otherwise a model that diverged would look as if it had not."""
    sizes = array([1, np.inf, np.nan, 0.5, np.nan, 3e38])
    keep = found(cut(sizes, [3]), k, last=False)
    assert np.array_equal(keep, by_sort(sizes, k, last=False))
    assert keep.tolist() == [place in [2, 4, 1, 5, 0, 3][:k] for place in range(6)]


def test_every_and_none() -> None:
    sizes = array([0, 1, np.inf, np.nan])
    assert largest(each(cut(sizes)), 4) is EVERY
    assert largest(each(cut(sizes)), 0) is NONE
    assert largest(each([]), 3) is EVERY
    assert EVERY.among(sizes, 0).all()
    assert not NONE.among(sizes, 0).any()
    assert EVERY.among(sizes[:0], 0).size == 0


def test_runs_come_in_any_order_on_threads_but_results_do_not() -> None:
    """Two walks, each of all runs; nothing else is asked of the tensor."""
    sizes, calls = array([3, 1, 3, 2, 3, 1]), list[int]()

    def walk(function: Callable[[int, Sizes], object]) -> list[object]:
        results = {}
        for start, run in reversed(cut(sizes, [2, 4])):
            calls.append(start)
            results[start] = function(start, run)
        return [results[start] for start in sorted(results)]

    chosen: Largest = largest(walk, 2, last=True)
    assert [chosen.among(run, start).tolist() for start, run in cut(sizes, [2, 4])] == [
        [False, False],
        [True, False],
        [True, False],
    ]
    assert calls == [4, 2, 0] * 2
