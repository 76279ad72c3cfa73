"""The kernels of sums and counts against definitions of a few lines in numpy and torch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bit_patterns import random_words, special_words, tuned_from
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch_words import as_tensor, words_of

from dare_train.dtypes import DTYPES, FloatArray, Words
from dare_train.kernels import cpu, philox, sums
from dare_train.kernels.numba_cache import Part
from dare_train.kernels.ties_of_two import Cut, ties_of_two_bf16
from dare_train.merging.methods import elementwise as elements
from dare_train.merging.methods.registry import MERGE_METHODS

BF16, F32 = DTYPES["BF16"], DTYPES["F32"]
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 2, 77, 2047, 2048, 2049, 3 * 2048 + 5, 65536 + 3])
FACTORS = st.sampled_from([1.0, 0.0, -0.0, -1.0, 0.5, 65536 / 6554, 3e38, 1e-40]) | st.floats(-20, 20)
BITS = st.sampled_from([0, 1, 0x7F800000, 0x7F800001, 0x7F800002, 0xFFFFFFFF]) | st.integers(0, 0x7FFFFFFF)
THRESHOLDS = st.sampled_from([0, 1, 32768, 58982, 65535]) | st.integers(0, 65535)


def test_every_public_function_is_tested_here() -> None:
    public = {
        name
        for name, thing in vars(sums).items()
        if getattr(thing, "__module__", "") == sums.__name__
        and not name.startswith("_")
        and not isinstance(thing, Part)
    }
    assert public == {
        "add_at_bf16", "count_movers", "round_moved_bf16", "put_alone", "deltas_bf16", "masked_deltas_bf16",
        "ties", "moved_bf16",
        "count_leading", "widened_bf16", "sizes_bf16", "keep_sizes", "keep",
    }  # fmt: skip


# Definitions.


def wide(words: Words) -> NDArray[np.float32]:
    """bfloat16 words as float32."""
    return as_tensor(words, BF16).float().numpy()


def narrow(values: FloatArray) -> Words:
    """float32 as bfloat16 words, every NaN the same."""
    return np.where(np.isnan(values), np.uint16(0x7FC0), words_of(torch.from_numpy(values).bfloat16()))


def canonical(values: FloatArray) -> FloatArray:
    return np.where(np.isnan(values), values.dtype.type(np.nan), values)


def same(left: FloatArray, right: FloatArray) -> bool:
    """To the bit; of NaNs, which hardware makes with payloads of its own, only that they are."""
    return left.dtype == right.dtype and canonical(left).tobytes() == canonical(right).tobytes()


def delta(own: Words, tuned: Words, factor: float) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        moved = np.float32(factor) * (wide(tuned) - wide(own))
    return np.where(own != tuned, moved, np.float32(0))


# What they are called with.


def pair(size: int, seed: int) -> tuple[Words, Words]:
    """Base and tuned words: anything at all, and some that are equal or close."""
    base = random_words(BF16, size, seed)
    near = np.random.default_rng(seed + 1).random(size) < 0.6
    return base, np.where(near, tuned_from(base, seed + 2), random_words(BF16, size, seed + 3))


def special_pair() -> tuple[Words, Words]:
    special = special_words(BF16)
    return np.repeat(special, special.size), np.tile(special, special.size)


def floats(size: int, seed: int) -> NDArray[np.float32]:
    """Any bits at all."""
    return random_words(F32, size, seed).view(np.float32)


def some_of(size: int, seed: int, share: float = 0.3) -> NDArray[np.int64]:
    return np.flatnonzero(np.random.default_rng(seed).random(size) < share)


# One delta after another.


def check_add(
    own: Words, tuned: Words, positions: NDArray[np.int64] | None, factor: float, total: NDArray[np.float32]
) -> None:
    where = slice(None) if positions is None else positions
    expected = total.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        added = canonical(expected[where] + delta(own, tuned, factor))
    expected[where] = np.where(own != tuned, added, expected[where])
    sums.add_at_bf16(own, tuned, positions, factor, total)
    assert total.tobytes() == expected.tobytes()


@given(seed=SEEDS, size=SIZES, factor=FACTORS)
def test_a_delta_is_added_where_words_differ(seed: int, size: int, factor: float) -> None:
    """What stays keeps every bit; a NaN that is made has the one pattern."""
    own, tuned = pair(size, seed)
    check_add(own, tuned, None, factor, floats(size, seed + 4))
    positions = some_of(size, seed)
    check_add(own[positions], tuned[positions], positions, factor, floats(size, seed + 5))


@pytest.mark.parametrize("factor", [1.0, -1.0, 10.0, 0.0])
def test_special_deltas_are_added_to_special_sums(factor: float) -> None:
    own, tuned = special_pair()
    for start in special_words(F32).view(np.float32):
        check_add(own, tuned, None, factor, np.full(own.size, start))


@given(seed=SEEDS, size=SIZES)
def test_words_are_widened(seed: int, size: int) -> None:
    words = random_words(BF16, size, seed)
    assert sums.widened_bf16(words).tobytes() == wide(words).tobytes()


@given(seed=SEEDS, size=SIZES)
def test_movers_are_counted(seed: int, size: int) -> None:
    own, tuned = pair(size, seed)
    positions = some_of(size, seed)
    movers = np.random.default_rng(seed).integers(0, 5, size).astype(np.uint16)
    expected = movers + np.isin(np.arange(size), positions[own[positions] != tuned[positions]])
    sums.count_movers(own[positions], tuned[positions], positions, movers)
    assert np.array_equal(movers, expected)


@given(seed=SEEDS, size=SIZES)
def test_sums_that_moved_are_rounded_once(seed: int, size: int) -> None:
    words = random_words(BF16, size, seed)
    still = np.random.default_rng(seed).random(size) < 0.5
    total = np.where(still, wide(words).view(np.uint32), floats(size, seed + 1).view(np.uint32)).view(
        np.float32
    )
    expected = np.where(total.view(np.uint32) == wide(words).view(np.uint32), words, narrow(total))
    sums.round_moved_bf16(words, total)
    assert np.array_equal(words, expected)


def test_halves_are_rounded_to_even() -> None:
    words = np.array([0x3F80, 0x3F81, 0xBF80, 0x7F7F, 0x0000, 0x8000], np.uint16)
    total = (words.astype(np.uint32) << np.uint32(16) | np.uint32(0x8000)).view(np.float32)
    sums.round_moved_bf16(words, total)
    assert words.tolist() == [0x3F80, 0x3F82, 0xBF80, 0x7F80, 0x0000, 0x8000]


@given(seed=SEEDS, size=SIZES)
def test_a_word_is_put_where_it_moved_alone(seed: int, size: int) -> None:
    own, tuned = pair(size, seed)
    positions = some_of(size, seed)
    movers = np.random.default_rng(seed).integers(0, 3, size).astype(np.uint16)
    words = random_words(BF16, size, seed + 9)
    expected = words.copy()
    for place in positions:
        if movers[place] == 1 and own[place] != tuned[place]:
            expected[place] = tuned[place]
    sums.put_alone(words, positions, own[positions], tuned[positions], movers)
    assert np.array_equal(words, expected)


# Deltas as numbers.


@given(seed=SEEDS, size=SIZES, factor=FACTORS)
def test_deltas(seed: int, size: int, factor: float) -> None:
    own, tuned = pair(size, seed)
    assert same(sums.deltas_bf16(own, tuned, factor), delta(own, tuned, factor))


@pytest.mark.parametrize("factor", [1.0, -1.0, 10.0, 0.0])
def test_deltas_of_all_special_pairs(factor: float) -> None:
    own, tuned = special_pair()
    assert same(sums.deltas_bf16(own, tuned, factor), delta(own, tuned, factor))


def sizes(own: Words, tuned: Words, factor: float) -> NDArray[np.uint32]:
    """Bits of magnitudes, every NaN the smallest there is."""
    magnitudes = np.abs(delta(own, tuned, factor))
    return np.where(np.isnan(magnitudes), np.uint32(0x7F800001), magnitudes.view(np.uint32))


@given(seed=SEEDS, size=SIZES, factor=FACTORS)
def test_sizes_of_deltas(seed: int, size: int, factor: float) -> None:
    own, tuned = pair(size, seed)
    assert np.array_equal(sums.sizes_bf16(own, tuned, factor).view(np.uint32), sizes(own, tuned, factor))


@pytest.mark.parametrize("factor", [1.0, -1.0, 10.0, 0.0])
def test_sizes_of_all_special_pairs(factor: float) -> None:
    own, tuned = special_pair()
    assert np.array_equal(sums.sizes_bf16(own, tuned, factor).view(np.uint32), sizes(own, tuned, factor))


def test_equal_words_have_no_delta_whatever_they_are() -> None:
    """Infinity less infinity would be NaN; a mask of -inf that no model touched stays as it is."""
    special, out = special_words(BF16), np.empty(special_words(BF16).size, np.float32)
    sums.masked_deltas_bf16(special, special, special, 0, 10.0, out)
    assert not sums.deltas_bf16(special, special, 10.0).any()
    assert not out.any()


@given(seed=SEEDS, size=SIZES, factor=FACTORS, threshold=THRESHOLDS)
def test_masked_deltas(seed: int, size: int, factor: float, threshold: int) -> None:
    own, tuned = pair(size, seed)
    draws = cpu.draws(seed, 0, size, 0)
    out = floats(size, seed + 4)
    sums.masked_deltas_bf16(own, tuned, draws, threshold, factor, out)
    assert same(out, np.where(draws >= threshold, delta(own, tuned, factor), np.float32(0)))


@given(seed=SEEDS, size=SIZES, bounds=st.tuples(BITS, BITS))
def test_what_is_smaller_or_larger_becomes_zero(seed: int, size: int, bounds: tuple[int, int]) -> None:
    """NaN stays, but where nothing does."""
    least, most = map(np.uint32, bounds)
    row, bits = floats(size, seed), np.abs(floats(size, seed)).view(np.uint32)
    nan = np.isnan(row)
    keeps = np.where(nan, np.uint32(0x7F800001) >= least, (bits >= least) & (bits < most))
    expected = np.where(keeps, row, np.float32(0))
    sums.keep_sizes(row, least, most)
    assert row.tobytes() == expected.tobytes()


@given(seed=SEEDS, size=SIZES)
def test_what_is_not_kept_becomes_zero(seed: int, size: int) -> None:
    row, kept = floats(size, seed), np.random.default_rng(seed).random(size) < 0.5
    expected = np.where(kept, row, np.float32(0))
    sums.keep(row, kept)
    assert row.tobytes() == expected.tobytes()


@given(seed=SEEDS, size=SIZES)
def test_a_merged_delta_moves_the_base(seed: int, size: int) -> None:
    base, added = random_words(BF16, size, seed), floats(size, seed + 1)
    added[some_of(size, seed)] = 0
    with np.errstate(over="ignore", invalid="ignore"):
        moved = narrow(wide(base) + added)
    assert np.array_equal(sums.moved_bf16(base, added), np.where(added == 0, base, moved))


def test_every_special_word_stays_where_the_merged_delta_is_zero() -> None:
    special = special_words(BF16)
    for zero in (0.0, -0.0):
        assert np.array_equal(sums.moved_bf16(special, np.full(special.size, zero, np.float32)), special)


# Counts.


@given(seed=SEEDS, size=SIZES)
def test_magnitudes_are_counted_by_their_leading_bits(seed: int, size: int) -> None:
    """A sign is none of them: NaNs that hardware makes may have one, and must not be counted beyond the
    end.
    """
    sizes = floats(size, seed)
    counts = np.random.default_rng(seed).integers(0, 9, 1 << 15)
    expected = counts + np.bincount(np.abs(sizes).view(np.uint32) >> 16, minlength=1 << 15)
    sums.count_leading(sizes, counts)
    assert np.array_equal(counts, expected)


# TIES.


def deltas_with_zeros(count: int, size: int, seed: int, *, special: bool) -> NDArray[np.float32]:
    """Numbers of like size, so that sums cancel; a third are zeros of both signs, and in some everything else
    there is.
    """
    rng = np.random.default_rng(seed)
    deltas = rng.integers(-4, 5, (count, size)).astype(np.float32) * np.float32(0.25)
    deltas = np.where(
        rng.random(deltas.shape) < 0.3, rng.choice(np.array([0.0, -0.0], np.float32), deltas.shape), deltas
    )
    strange = floats(count * size, seed).reshape(count, size)
    return np.where(rng.random(deltas.shape) < 0.1, strange, deltas) if special else deltas


def check_ties(deltas: NDArray[np.float32], weights: NDArray[np.float32], normalize: bool) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        expected = elements.ties(deltas.copy(), weights, normalize=normalize)
    assert same(sums.ties(deltas, weights, normalize=normalize), expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("special", [False, True])
@given(seed=SEEDS, size=SIZES.filter(lambda size: size < 10_000), count=st.integers(1, 5))
def test_compiled_ties_is_ties(normalize: bool, special: bool, seed: int, size: int, count: int) -> None:
    weights = np.random.default_rng(seed).choice(np.array([1.0, 0.3, 0.5, 2.0, 0.0, -1.0], np.float32), count)
    check_ties(deltas_with_zeros(count, size, seed, special=special), weights, normalize)


@pytest.mark.parametrize("normalize", [False, True])
def test_compiled_ties_is_ties_on_a_long_run(normalize: bool) -> None:
    check_ties(
        deltas_with_zeros(3, 65536 + 3, 5, special=True), np.array([1.0, 0.3, 0.7], np.float32), normalize
    )


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [0.0, -0.0, np.nan, np.inf, -np.inf])
def test_compiled_ties_is_ties_of_one_value(normalize: bool, value: float) -> None:
    for count in range(1, 6):
        check_ties(np.full((count, 7), value, np.float32), np.ones(count, np.float32), normalize)


def step_by_step(
    base: Words, models: list[Words], start: int, cuts: list[Cut], weights: NDArray[np.float32],
    *, normalize: bool, scale: float,
) -> Words:  # fmt: skip
    rows = np.empty((2, base.size), np.float32)
    for row, tuned, cut in zip(rows, models, cuts, strict=True):
        draws = philox.draws(cut.key, start, base.size, 0)
        sums.masked_deltas_bf16(base, tuned, draws, cut.threshold, cut.factor, row)
        sums.keep_sizes(row, cut.least, cut.most)
    with np.errstate(over="ignore", invalid="ignore"):
        return sums.moved_bf16(base, sums.ties(rows, weights, normalize=normalize) * np.float32(scale))


CUTS = st.builds(
    Cut,
    key=st.integers(0, 2**64 - 1),
    threshold=THRESHOLDS,
    factor=FACTORS,
    least=st.just(np.uint32(0)) | BITS.map(np.uint32),
    most=st.just(np.uint32(0xFFFFFFFF)) | BITS.map(np.uint32),
)


@pytest.mark.parametrize("normalize", [False, True])
@given(
    seed=SEEDS,
    size=SIZES,
    start=st.sampled_from([0, 1, 8191, 8192, 3 * 8192 + 5, 2**40 + 7]),
    cuts=st.lists(CUTS, min_size=2, max_size=2),
    scale=st.sampled_from([1.0, 0.3, 0.0, -2.0]),
)
def test_ties_of_two_is_what_its_steps_give(
    normalize: bool, seed: int, size: int, start: int, cuts: list[Cut], scale: float
) -> None:
    rng = np.random.default_rng(seed)
    base = random_words(BF16, size, seed)
    models = [tuned_from(base, seed + number) for number in range(2)]
    weights = rng.choice(np.array([1.0, 0.3, 0.5, 2.0, 0.0, -1.0], np.float32), 2)
    found, expected = (
        function(base, models, start, cuts, weights, normalize=normalize, scale=scale)
        for function in (ties_of_two_bf16, step_by_step)
    )
    assert np.array_equal(found, expected)


def test_only_functions_of_the_table_have_compiled_twins() -> None:
    assert {elements.ties: sums.ties} == elements.COMPILED
    assert elements.ties in {method.function for method in MERGE_METHODS.values()}
