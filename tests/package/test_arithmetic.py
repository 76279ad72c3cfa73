"""The arithmetic law (docs/format.md §5): against the reference kernel for one package, against its formula
for several.
"""

from __future__ import annotations

import numpy as np
import pytest
from bit_patterns import FLOATS, random_words, special_words, tuned_from, weights_like
from hypothesis import given
from hypothesis import strategies as st

from dare_train.dtypes import DTYPES, from_float, to_float
from dare_train.package.arithmetic import Term, combine

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 3, 1000])
FACTORS = st.sampled_from([1.0, 0.0, -1.0, 0.5, 65536 / 6554, 0.3 * 65536 / 6554, 1e-30]) | st.floats(-20, 20)
by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.code)


def every(size: int) -> np.ndarray:
    return np.arange(size)


@pytest.fixture(scope="module")
def law():
    """`law(base, tuned, factor, dtype)`: the words that the reference gives."""
    pytest.importorskip("torch", reason="the law's definition, kernels/reference.py, is in torch")
    from torch_words import as_tensor, words_of

    from dare_train.kernels import reference

    return lambda base, tuned, factor, dtype: words_of(
        reference.law(as_tensor(base, dtype), as_tensor(tuned, dtype), factor)
    )


def special_pairs(dtype):
    special = special_words(dtype)
    return np.repeat(special, special.size), np.tile(special, special.size)


@by_dtype
@given(seed=SEEDS, size=SIZES, factor=FACTORS)
def test_one_package_obeys_the_reference(law, dtype, seed, size, factor):
    base, tuned = random_words(dtype, size, seed), random_words(dtype, size, seed + 1)
    expected = law(base, tuned, factor, dtype)
    assert np.array_equal(
        Term(positions=every(size), factor=factor, tuned=tuned).result(base, dtype), expected
    )
    combine(base, [Term(positions=every(size), factor=factor, tuned=tuned)], dtype)
    assert np.array_equal(base, expected)


@by_dtype
@pytest.mark.parametrize("factor", [10.0, -1.0, 0.3])
def test_one_package_obeys_the_reference_on_special_patterns(law, dtype, factor):
    base, tuned = special_pairs(dtype)
    expected = law(base, tuned, factor, dtype)
    assert np.array_equal(
        Term(positions=every(base.size), factor=factor, tuned=tuned).result(base, dtype), expected
    )


@by_dtype
@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("factor", [1.0, 1 + 2**-40, 1 + 2**-20])
def test_factor_one_gives_the_tuned_words_whatever_they_are(dtype, factor, others):
    """One as it is multiplied with, in float32; also beside packages that move nothing."""
    base, tuned = special_pairs(dtype)
    result = base.copy()
    unmoved = [Term(positions=every(base.size), factor=1.0, tuned=base)] * others
    combine(result, [*unmoved, Term(positions=every(base.size), factor=factor, tuned=tuned)], dtype)
    assert np.array_equal(result, tuned) == (dtype.compute.type(factor) == 1)


@by_dtype
@pytest.mark.parametrize("factor", [10.0, 0.3])
def test_nan_results_are_the_positive_quiet_nan(dtype, factor):
    """§5.1: hardware disagrees on the payloads of NaNs that it makes."""
    canonical = dtype.exponent_mask | 1 << (dtype.mantissa_bits - 1)
    base, tuned = special_pairs(dtype)
    result = Term(positions=every(base.size), factor=factor, tuned=tuned).result(base, dtype)
    moved = base != tuned
    assert set(result[moved & np.isnan(to_float(result, dtype))].tolist()) == {canonical}


@by_dtype
@pytest.mark.parametrize("others", [0, 1])
def test_an_element_whose_delta_is_zero_keeps_the_base_word(dtype, others):
    """§5.3, §5.4: minus zero stays minus zero and a NaN its payload, with one package and beside another."""
    base = special_words(dtype)
    words = base.copy()
    same = Term(positions=every(base.size), factor=10.0, tuned=base)
    combine(
        words,
        [same] + others * [Term(positions=every(base.size), factor=3.0, delta=np.zeros(base.size))],
        dtype,
    )
    assert np.array_equal(words, base)


@by_dtype
def test_elements_outside_the_positions_stay(dtype):
    base = random_words(dtype, 100, 5)
    for count in (1, 2):
        words = base.copy()
        combine(words, [Term(positions=np.array([3, 50]), factor=2.0, delta=np.ones(2))] * count, dtype)
        outside = np.setdiff1d(np.arange(100), [3, 50])
        assert np.array_equal(words[outside], base[outside])


@pytest.fixture(scope="module")
def summed():
    """`summed(base, deltas, factors, dtype)`: §5.4 in three lines of torch, in order, every operation
    rounded, to the dtype once.
    """
    torch = pytest.importorskip("torch", reason="sums are compared with torch's")
    from torch_words import as_tensor, words_of

    def words(base, deltas, factors, dtype):
        tensor = as_tensor(base, dtype)
        total = tensor.to(torch.float64 if dtype.bits == 64 else torch.float32)
        for delta, factor in zip(deltas, factors, strict=True):
            total = total + torch.tensor(factor, dtype=total.dtype) * torch.from_numpy(delta)
        return words_of(total.to(tensor.dtype))

    return words


@by_dtype
@given(seed=SEEDS, size=SIZES, factors=st.lists(st.floats(-3, 12), min_size=2, max_size=4))
def test_several_packages_add_up_in_order_and_are_rounded_once(summed, dtype, seed, size, factors):
    base = weights_like(dtype, size, seed)
    tuned = [tuned_from(base, seed + i) | dtype.word.type(1) for i in range(len(factors))]
    deltas = [to_float(words, dtype) - to_float(base, dtype) for words in tuned]
    expected = summed(base, deltas, factors, dtype)
    somewhere = np.any([delta != 0 for delta in deltas], axis=0)

    as_words, as_deltas = base.copy(), base.copy()
    combine(
        as_words,
        [Term(positions=every(size), factor=f, tuned=t) for f, t in zip(factors, tuned, strict=True)],
        dtype,
    )
    combine(
        as_deltas,
        [Term(positions=every(size), factor=f, delta=d) for f, d in zip(factors, deltas, strict=True)],
        dtype,
    )
    assert np.array_equal(as_words, np.where(somewhere, expected, base))
    assert np.array_equal(as_deltas, as_words)


def test_order_and_single_rounding_can_be_seen():
    """The property above would be empty if sums came out the same in any order, or rounded after each
    package.
    """
    bf16 = DTYPES["BF16"]
    base = from_float(np.ones(1, np.float32), bf16)
    terms = [
        Term(positions=every(1), factor=1.0, delta=np.array([value], np.float32))
        for value in (0.003, 0.003, 1e8, -1e8)
    ]

    def result(*chosen: Term) -> float:
        words = base.copy()
        combine(words, chosen, bf16)
        return float(to_float(words, bf16)[0])

    assert result(terms[0], terms[1]) == 1.0078125  # each alone would be rounded away
    assert result(terms[0]) == 1.0
    assert result(*terms) == 0.0
    assert result(terms[2], terms[3], terms[0], terms[1]) == pytest.approx(0.006, rel=2**-8)
