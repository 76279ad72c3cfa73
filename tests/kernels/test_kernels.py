"""The compiled kernels against their definition in torch, bit for bit."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from bit_patterns import FLOATS, random_words, special_words, tuned_from
from hypothesis import given
from hypothesis import strategies as st
from torch_words import as_int64, as_tensor, as_words, words_of

from dare_train.dtypes import DTYPES, to_float
from dare_train.kernels import cpu, philox, reference
from dare_train.kernels.numba_cache import kernel
from dare_train.package.magnitudes import Magnitudes
from dare_train.weights.fingerprint import Fingerprint

BLOCK = cpu.BLOCK
BF16 = DTYPES["BF16"]
KEYS = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 2, 77, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
STARTS = st.sampled_from(
    [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 17, 2**32 + 5, 2**35 - 5, 2**42 + 7, 2**62 + 1]
) | st.integers(0, 2**50)
"""Philox's counter is the index / 8: its second word becomes 1 inside a run that begins at 2**35 - 5."""
PRINT_STARTS = st.sampled_from(
    [0, 1, 2, 511, 2047, BLOCK, 3 * BLOCK + 17, 2**42 + 7, 2**58 + 1]
) | st.integers(0, 2**50)
THRESHOLDS = st.sampled_from([0, 1, 32768, 58982, 65535]) | st.integers(0, 65535)
WORD_TYPES = [DTYPES[code] for code in ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL")]
FACTORS = st.sampled_from([0.0, -0.0, 0.5, 1.5, -1.0, 65536 / 6554, 3e38, 1e-40]) | st.floats(
    -100, 100
).filter(lambda x: x != 1)


def by_code(dtypes):
    return pytest.mark.parametrize("dtype", dtypes, ids=lambda dtype: dtype.code)


RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


_philox = philox._philox


@kernel
def philox_of_words(words, out):
    out[0], out[1], out[2], out[3] = _philox(words[0], words[1], words[2], words[3], words[4], words[5])


def compiled_philox(words):
    out = np.empty(4, np.uint64)
    philox_of_words(np.array(words, np.uint64), out)
    return out.tolist()


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_cpu_philox_gives_the_published_answers(counter, key, expected):
    """docs/format.md §6; https://github.com/DEShawResearch/random123, tests/kat_vectors."""
    words = [int(word, 16) for word in f"{counter} {key}".split()]
    assert " ".join(f"{word:08x}" for word in compiled_philox(words)) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), RANDOM123)
def test_reference_philox_gives_the_published_answers(counter, key, expected):
    low, high = (int(word, 16) for word in key.split())
    words = tuple(torch.tensor([int(word, 16)]) for word in counter.split())
    assert " ".join(f"{int(word):08x}" for word in reference.philox(low + (high << 32), words)) == expected


@given(key=KEYS, counters=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=8))
def test_philox_is_the_same_in_both(key, counters):
    expected = torch.stack(
        reference.philox(key, tuple(torch.tensor(counters, dtype=torch.int64).T))
    ).T.tolist()
    assert [compiled_philox([*counter, key % 2**32, key >> 32]) for counter in counters] == expected


@given(key=KEYS, start=STARTS, count=SIZES, domain=st.sampled_from([0, 1]))
def test_draws(key, start, count, domain):
    found = cpu.draws(key, start, count, domain)
    assert found.dtype == np.uint16
    assert np.array_equal(found, reference.draws(key, start, count, domain).numpy())


@given(key=KEYS, start=STARTS, count=SIZES, threshold=THRESHOLDS)
def test_keep_mask_and_kept_positions(key, start, count, threshold):
    assert np.array_equal(
        cpu.keep_mask(key, start, count, threshold), reference.keep_mask(key, start, count, threshold).numpy()
    )
    positions = cpu.kept_positions(key, start, count, threshold)
    assert np.array_equal(positions, reference.kept_positions(key, start, count, threshold).numpy())


@given(key=KEYS, count=st.integers(1, 3 * BLOCK), cut=st.floats(0, 1), start=STARTS)
def test_draws_do_not_depend_on_where_a_run_begins(key, count, cut, start):
    split = int(cut * count)
    halves = [cpu.draws(key, start, split, 0), cpu.draws(key, start + split, count - split, 0)]
    assert np.array_equal(np.concatenate(halves), cpu.draws(key, start, count, 0))


def test_kept_positions_of_an_earlier_call_stay_as_they_were():
    first = cpu.kept_positions(1, 0, BLOCK, 40000)
    copy = first.copy()
    cpu.kept_positions(2, 0, BLOCK, 30000)
    assert np.array_equal(first, copy)


@by_code(WORD_TYPES)
@given(seed=SEEDS, size=SIZES, start=PRINT_STARTS)
def test_fingerprint(dtype, seed, size, start):
    words = np.random.default_rng(seed).integers(0, 1 << dtype.bits, size, dtype=np.uint64).astype(dtype.word)
    assert cpu.fingerprint(words, start) == reference.fingerprint(as_int64(words), start, words.itemsize)


@by_code(WORD_TYPES)
@given(seed=SEEDS, size=SIZES, start=PRINT_STARTS, threshold=THRESHOLDS)
def test_fingerprint_change(dtype, seed, size, start, threshold):
    positions = cpu.kept_positions(seed, start, size, threshold)
    own, new = (
        np.random.default_rng(seed)
        .integers(0, 1 << dtype.bits, (2, positions.size), dtype=np.uint64)
        .astype(dtype.word)
    )
    expected = reference.fingerprint_change(
        as_int64(own), as_int64(new), torch.from_numpy(positions), start, own.itemsize
    )
    assert cpu.fingerprint_change(own, new, positions, start) == expected


@by_code(WORD_TYPES)
@given(seed=SEEDS, size=SIZES, start=PRINT_STARTS, threshold=THRESHOLDS)
def test_a_change_leads_from_one_fingerprint_to_the_other(dtype, seed, size, start, threshold):
    positions = cpu.kept_positions(seed, start, size, threshold)
    own, new = (
        np.random.default_rng(seed)
        .integers(0, 1 << dtype.bits, (2, size), dtype=np.uint64)
        .astype(dtype.word)
    )
    after = own.copy()
    cpu.put(after, positions, cpu.take(new, positions))
    change = cpu.fingerprint_change(cpu.take(own, positions), cpu.take(new, positions), positions, start)
    found = Fingerprint(*cpu.fingerprint(own, start)).plus(change)
    assert found == cpu.fingerprint(after, start)


@by_code(WORD_TYPES)
@given(seed=SEEDS, cuts=st.lists(st.integers(0, BLOCK + 9), max_size=5))
def test_shares_of_a_split_tensor_add_up(dtype, seed, cuts):
    words = (
        np.random.default_rng(seed)
        .integers(0, 1 << dtype.bits, BLOCK + 9, dtype=np.uint64)
        .astype(dtype.word)
    )
    edges = [0, *sorted(cuts), words.size]
    shares = [cpu.fingerprint(words[a:b], a) for a, b in pairwise(edges)]
    assert tuple(sum(lane) % 2**64 for lane in zip(*shares, strict=True)) == cpu.fingerprint(words, 0)


@by_code(WORD_TYPES)
def test_every_flipped_bit_and_every_swap_changes_both_lanes(dtype):
    words = np.arange(5, dtype=dtype.word)
    seen = [cpu.fingerprint(words, 0)]
    for place in range(words.size):
        for bit in range(dtype.bits):
            changed = words.copy()
            changed[place] ^= dtype.word.type(1 << bit)
            seen.append(cpu.fingerprint(changed, 0))
        for other in range(place):
            changed = words.copy()
            changed[[place, other]] = changed[[other, place]]
            seen.append(cpu.fingerprint(changed, 0))
    original, changed = seen[0], seen[1:]
    assert len(changed) == words.size * dtype.bits + 10
    for lane in (0, 1):
        assert original[lane] not in [lanes[lane] for lanes in changed]


def test_zeros_count():
    """So a tensor of zeros is not nothing, and of another length it is another."""
    assert cpu.fingerprint(np.zeros(5, np.uint16), 3) == (5, 5)
    assert cpu.fingerprint(np.zeros(0, np.uint16), 3) == (0, 0)


def test_split_mix_gives_the_published_numbers():
    """Steele, Lea and Flood's SplitMix64 seeded with 0; so https://prng.di.unimi.it/splitmix64.c."""
    found = [value % 2**64 for value in reference.split_mix(torch.arange(4)).tolist()]
    assert [f"{value:016x}" for value in found] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "06c45d188009454f",
        "f88bb8a8724c81ec",
    ]


def test_no_two_units_that_share_a_multiplier_have_one_factor():
    """So two flipped bits among them cannot cancel, nor can a swap: factors are odd and below 2**32
    (docs/format.md §3.2).
    """
    for lane in reference.unit_factors(torch.arange(5 * 1024, 6 * 1024)):
        assert lane.unique().numel() == 1024
        assert (lane % 2 == 1).all()
        assert lane.max() < 2**32


def pair(dtype, size, seed):
    """Base and tuned words: anything at all, and some that are equal or close."""
    base = random_words(dtype, size, seed)
    near = np.random.default_rng(seed + 1).random(size) < 0.5
    return base, np.where(near, tuned_from(base, seed + 2), random_words(dtype, size, seed + 3))


@by_code(FLOATS)
@given(seed=SEEDS, size=SIZES)
def test_distances_by_exponent_and_back(dtype, seed, size):
    base, tuned = pair(dtype, size, seed)
    symbols, starts = cpu.distances_by_exponent(base, tuned, dtype.exponent_bits)
    expected = reference.distances_by_exponent(
        as_int64(base), as_int64(tuned), dtype.bits, dtype.exponent_bits
    )
    assert np.array_equal(symbols, as_words(expected, dtype))
    exponents = np.sort((base & dtype.word.type(dtype.exponent_mask)) >> dtype.word.type(dtype.mantissa_bits))
    assert np.array_equal(starts, np.searchsorted(exponents, np.arange(2**dtype.exponent_bits + 1)))

    assert np.array_equal(cpu.from_distances(base, symbols, dtype.exponent_bits), tuned)
    back = reference.from_distances(as_int64(base), expected, dtype.bits, dtype.exponent_bits)
    assert np.array_equal(as_words(back, dtype), tuned)


@by_code(FLOATS)
def test_distances_between_all_special_patterns(dtype):
    special = special_words(dtype)
    base, tuned = np.repeat(special, special.size), np.tile(special, special.size)
    symbols, _ = cpu.distances_by_exponent(base, tuned, dtype.exponent_bits)
    expected = reference.distances_by_exponent(
        as_int64(base), as_int64(tuned), dtype.bits, dtype.exponent_bits
    )
    assert np.array_equal(symbols, as_words(expected, dtype))
    assert np.array_equal(cpu.from_distances(base, symbols, dtype.exponent_bits), tuned)


def test_ordered_bits_are_in_the_order_of_the_numbers():
    numbers = torch.tensor([-torch.inf, -2.0, -1e-3, -0.0, 0.0, 1e-40, 1.0, torch.inf])
    keys = reference.ordered(as_int64(words_of(numbers)), 32)
    assert keys.tolist() == sorted(set(keys.tolist()))


@given(seed=SEEDS, size=SIZES, factor=FACTORS)
def test_law_bf16(seed, size, factor):
    base, tuned = pair(BF16, size, seed)
    expected = reference.law(as_tensor(base, BF16), as_tensor(tuned, BF16), factor)
    assert np.array_equal(cpu.law_bf16(base, tuned, factor), words_of(expected))


def test_law_bf16_on_all_special_pairs():
    special = special_words(BF16)
    base, tuned = np.repeat(special, special.size), np.tile(special, special.size)
    for factor in (10.0, -1.0, 0.0, 0.3):
        expected = reference.law(as_tensor(base, BF16), as_tensor(tuned, BF16), factor)
        assert np.array_equal(cpu.law_bf16(base, tuned, factor), words_of(expected)), factor


@by_code([dtype for dtype in DTYPES.values() if dtype.is_float])
def test_has_nonfinite_finds_one_among_many(dtype):
    largest = dtype.exponent_mask - (1 << dtype.mantissa_bits) | ((1 << dtype.mantissa_bits) - 1)
    words = np.full(BLOCK + 3, largest, dtype.word)
    assert not cpu.has_nonfinite(words, dtype.exponent_mask)
    assert not cpu.has_nonfinite(words[:0], dtype.exponent_mask)
    for place in (0, BLOCK, BLOCK + 2):
        for pattern in (
            dtype.exponent_mask,
            dtype.exponent_mask | 1,
            dtype.exponent_mask | 1 << (dtype.bits - 1),
        ):
            bad = words.copy()
            bad[place] = pattern
            assert cpu.has_nonfinite(bad, dtype.exponent_mask)


@given(seed=SEEDS, kept=st.integers(0, 300), bits=st.sampled_from([16, 32, 64]))
def test_expand_puts_values_where_bits_are_set(seed, kept, bits):
    rng = np.random.default_rng(seed)
    word = np.dtype(f"u{bits // 8}")
    symbols = (rng.integers(0, 2**bits, kept, dtype=np.uint64) * (rng.random(kept) < 0.3)).astype(word)
    bitmap = np.packbits(symbols != 0, bitorder="little")
    out, found = cpu.expand(bitmap, symbols[symbols != 0] - word.type(1), kept)
    assert np.array_equal(out, symbols)
    assert found == np.count_nonzero(symbols)


@by_code([dtype for dtype in WORD_TYPES if dtype.is_float])
@pytest.mark.parametrize("positions_type", [np.int32, np.int64])
def test_take_and_put(dtype, positions_type):
    words = random_words(dtype, BLOCK + 3, seed=1)
    positions = cpu.kept_positions(5, 0, words.size, 50000)
    kept = cpu.take(words, positions.astype(positions_type))
    assert np.array_equal(as_int64(kept), reference.take(as_int64(words), torch.from_numpy(positions)))
    target, expected = np.zeros_like(words), torch.zeros(words.size, dtype=torch.int64)
    cpu.put(target, positions.astype(positions_type), kept)
    reference.put(expected, torch.from_numpy(positions), as_int64(kept))
    assert np.array_equal(as_int64(target), expected)


@by_code([dtype for dtype in WORD_TYPES if dtype.is_float])
@pytest.mark.parametrize("size", [0, 1, BLOCK + 1])
def test_copy_with_fingerprint(dtype, size):
    words = random_words(dtype, size, seed=2)
    out = np.zeros_like(words)
    assert cpu.copy_with_fingerprint(words, 77, out) == cpu.fingerprint(words, 77)
    assert np.array_equal(as_int64(out), as_int64(words))


@given(seed=SEEDS, size=SIZES)
def test_magnitudes_of_bf16(seed, size):
    base, tuned = pair(BF16, size, seed)
    check_magnitudes(base, tuned)


def test_magnitudes_of_bf16_on_all_special_pairs():
    special = special_words(BF16)
    check_magnitudes(np.repeat(special, special.size), np.tile(special, special.size))


def check_magnitudes(base, tuned):
    found, strange = Magnitudes.between(base, tuned, BF16)
    with np.errstate(over="ignore", invalid="ignore"):
        delta = to_float(tuned, BF16) - to_float(base, BF16)
    expected = Magnitudes.of(delta)
    assert np.array_equal(found.counts, expected.counts)
    assert (found.largest, strange) == (
        expected.largest,
        np.count_nonzero(~np.isfinite(delta) & (base != tuned)),
    )
