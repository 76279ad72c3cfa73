"""Every encoding there and back, the sizes that are known beforehand, and frames that lie."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from bit_patterns import FLOATS, random_words, special_words, tuned_from, weights_like
from hypothesis import given
from hypothesis import strategies as st

from dare_train import extract
from dare_train.dtypes import DTYPES, to_float
from dare_train.errors import NonFiniteDelta, PackageError
from dare_train.package import codec
from dare_train.package.codec import Content, compress, content_size, decompress

BF16, F32 = DTYPES["BF16"], DTYPES["F32"]
QUANTIZED = ("int8", "int4", "sign")
SIZES = st.sampled_from([0, 1, 2, 7, 8, 9, 255, 4097, 20_000])
SEEDS = st.integers(0, 2**32 - 1)

by_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.code)
by_encoding = pytest.mark.parametrize("encoding", QUANTIZED)


def stored(content: Content, size: int) -> memoryview:
    """Through a frame and back: what a reader finds, when it expects `size` bytes."""
    return memoryview(decompress(memoryview(compress(content)), size, name="w"))


def exact_round_trip(base, tuned, dtype):
    changed = int(np.count_nonzero(base != tuned))
    data = stored(codec.encode_exact(base, tuned, dtype), content_size("exact", dtype, base.size, changed, 0))
    return codec.decode_exact(data, base, changed, dtype, name="w")


@by_dtype
@given(size=SIZES, seed=SEEDS, moved=st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_exact_brings_back_any_words(dtype, size, seed, moved):
    base, other = random_words(dtype, size, seed), random_words(dtype, size, seed + 1)
    tuned = np.where(np.random.default_rng(seed).random(size) < moved, other, base)
    assert np.array_equal(exact_round_trip(base, tuned, dtype), tuned)


@by_dtype
def test_exact_brings_back_every_pair_of_special_patterns(dtype):
    special = special_words(dtype)
    base, tuned = np.repeat(special, special.size), np.tile(special, special.size)
    assert np.array_equal(exact_round_trip(base, tuned, dtype), tuned)


def test_exact_takes_one_bit_for_a_word_that_stayed_and_less_than_the_word_for_one_that_moved():
    """docs/format.md §4.4: that is what the sorted distances are for. 5 bits of 16 here, where the delta
    takes any of 81 values.
    """
    base = weights_like(BF16, 100_000, 0)
    tuned = tuned_from(base, 1)
    assert len(compress(codec.encode_exact(base, base, BF16))) < 50
    assert 8 * len(compress(codec.encode_exact(base, tuned, BF16))) < 5.2 * base.size


@given(size=SIZES, seed=SEEDS)
def test_rounded_brings_back_the_bfloat16_of_each_delta(size, seed):
    delta = to_float(random_words(F32, size, seed), F32)
    symbols = codec.rounded_symbols(delta)
    changed = int(np.count_nonzero(symbols))
    data = stored(codec.encode_rounded(delta), content_size("rounded", F32, size, changed, 0))
    found = codec.decode_rounded(data, size, changed, name="w")
    assert np.array_equal(found.view(np.uint32), codec.round_delta(delta).view(np.uint32))
    usual = np.isfinite(delta) & (np.abs(delta) > 1e-37) & (np.abs(delta) < 1e38)
    assert np.all(np.abs(found[usual] - delta[usual]) <= np.abs(delta[usual]) / 256)


def quantized(size, seed, threshold, start, encoding, density=1.0):
    """Deltas of a segment of which `density` is kept, with their scales and codes."""
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(rng.random(size) < density)
    delta = (rng.normal(0, 1e-3, positions.size) * (rng.random(positions.size) < 0.8)).astype(np.float32)
    group, groups = codec.groups_of(positions, start, size, codec.group_length(threshold))
    scales, codes = codec.quantize(delta, group, groups, positions, start, seed, encoding)
    return delta, group, groups, scales, codes


@by_encoding
@given(
    size=SIZES,
    seed=SEEDS,
    start=st.sampled_from([0, 1, 127, 128, 2**20, 2**33 + 5]),
    threshold=st.sampled_from([0, 58982, 65535]),
)
def test_codes_and_scales_come_back(encoding, size, seed, start, threshold):
    delta, _, groups, scales, codes = quantized(size, seed, threshold, start, encoding, 0.3)
    assert np.abs(codes).max(initial=0) <= codec._LEVELS[encoding]
    data = stored(
        codec.encode_codes(scales, codes, encoding),
        content_size(encoding, F32, delta.size, delta.size, groups),
    )
    found_scales, found_codes = codec.decode_codes(data, delta.size, groups, encoding, name="t")
    assert np.array_equal(found_scales, scales)
    assert np.array_equal(found_codes, codes)


@by_encoding
@given(size=SIZES, seed=SEEDS, threshold=st.sampled_from([0, 58982]))
def test_quantized_deltas_are_within_one_step(encoding, size, seed, threshold):
    delta, group, groups, scales, codes = quantized(size, seed, threshold, 100, encoding)
    error = np.abs(codec.dequantize(scales, codes, group, encoding) - delta)
    largest = np.zeros(groups)
    np.maximum.at(largest, group, np.abs(delta))
    step = largest * 1.01 / codec._LEVELS[encoding] * (2 if encoding == "sign" else 1)
    assert np.all(error <= step[group])
    assert np.all(to_float(scales, BF16) >= largest)


def test_groups_of_a_scale_hold_about_128_kept_elements():
    """Powers of two, so that 91 to 181 are kept on average."""
    assert [codec.group_length(round(p * 65536)) for p in (0, 0.29, 0.5, 0.9, 0.99)] == [
        128,
        128,
        256,
        1024,
        16384,
    ]


@by_dtype
@given(size=SIZES, seed=SEEDS)
def test_planes_bring_back_whole_words(dtype, size, seed):
    words = random_words(dtype, size, seed)
    data = stored(
        Content(data=codec.to_planes(words).tobytes(), cuts=[size]),
        content_size("whole", dtype, size, size, 0),
    )
    assert np.array_equal(codec.from_planes(data, size, dtype.word), words)


@given(
    data=st.binary(max_size=200),
    repeat=st.sampled_from([1, 100]),
    cuts=st.lists(st.integers(0, 20_000), max_size=6),
)
def test_cuts_change_no_byte_of_the_content(data, repeat, cuts):
    content = Content(data=data * repeat, cuts=sorted(min(cut, len(data) * repeat) for cut in cuts))
    frame = compress(content)
    assert zstandard.frame_content_size(frame) == len(content.data)
    assert decompress(memoryview(frame), len(content.data), name="w") == content.data


CONTENT = bytes(range(256)) * 40
FRAME = compress(Content(data=CONTENT))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"not a frame",
        FRAME + b"\0",
        FRAME + FRAME,
        compress(Content(data=CONTENT[1:])),
        zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT),
        FRAME[:4] + b"\xff" * 12 + FRAME[16:],
    ],
    ids=[
        "empty",
        "other bytes",
        "a byte more",
        "a frame more",
        "another size",
        "no size",
        "header overwritten",
    ],
)
def test_a_frame_that_is_not_the_one_announced_is_refused(frame):
    with pytest.raises(PackageError, match=r"^w: expected .* found .*fetch the package again"):
        decompress(memoryview(frame), len(CONTENT), name="w")


def test_every_truncated_frame_is_refused():
    for size in range(len(FRAME)):
        with pytest.raises(PackageError):
            decompress(memoryview(FRAME[:size]), len(CONTENT), name="w")


def test_a_flipped_bit_gives_an_error_or_content_of_the_right_size_and_nothing_else():
    """The SHA-256 of the part finds every flip (§2.3); a decoder that meets one all the same must not crash
    or overrun.
    """
    refused = 0
    for bit in range(8 * len(FRAME)):
        damaged = bytearray(FRAME)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert len(decompress(memoryview(damaged), len(CONTENT), name="w")) == len(CONTENT)
        except PackageError:
            refused += 1
    assert refused > 0


def test_a_bitmap_with_another_count_than_the_table_is_refused():
    symbols = np.array([0, 3, 0, 9, 1], np.uint16)
    data = memoryview(codec.pack_symbols(symbols, np.empty(0, np.int64)).data)
    assert codec.unpack_symbols(data, 5, 3, np.dtype("u2"), name="w").tolist() == symbols.tolist()
    for changed in (0, 1, 2):
        with pytest.raises(PackageError, match=f"^w: expected {changed} changed elements, found 3"):
            codec.unpack_symbols(data, 5, changed, np.dtype("u2"), name="w")


@pytest.mark.parametrize(("dtype", "large"), [(np.float64, 1e300), (np.float32, 3.4e38)])
@pytest.mark.parametrize("values", ["rounded", *QUANTIZED])
def test_a_finite_delta_that_bfloat16_cannot_hold_is_refused(tmp_path, values, dtype, large):
    """Its scale would be infinite, and the result infinite or NaN."""
    base, tuned = np.zeros(300, dtype), np.full(300, large, dtype)
    with pytest.raises(NonFiniteDelta, match=r"^w: expected finite deltas"):
        extract({"w": base}, {"w": tuned}, tmp_path / "package", values=values, p=0.0)
