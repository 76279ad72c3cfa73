"""Low-rank updates: the merged words against the formula in a few lines of float64, and the same however a
tensor is cut.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare_train.dtypes import DTYPES, from_float, to_float
from dare_train.weights.low_rank import BLOCK, LowRank, merged_words
from dare_train.weights.protocol import ArrayWeights, TensorInfo, Weights, runs

PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
"""Bits of the significand, the hidden one included."""


def rounded(values: np.ndarray, code: str) -> np.ndarray:
    """Rounded once to nearest-even, as float64; for numbers in the type's normal range."""
    fraction, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(fraction, PRECISION[code])), exponent - PRECISION[code])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


class Held:
    """One tensor of any floating-point type, named "w"."""

    label = "held"

    def __init__(self, values: np.ndarray, code: str) -> None:
        self.words = from_float(values.reshape(-1).astype(np.float64), DTYPES[code])
        self.tensors = {"w": TensorInfo(DTYPES[code], values.shape)}
        self.values = to_float(self.words, DTYPES[code]).astype(np.float64).reshape(values.shape)

    def read(self, name: str, start: int, count: int) -> np.ndarray:
        return self.words[start : start + count]


def update(
    out: int, width: int, *, rank: int = 3, dora: bool = False, transposed: bool = False, seed: int = 1
) -> LowRank:
    magnitude = 1 + random(out, seed=seed + 2) ** 2 if dora else None
    return LowRank(
        a=random(rank, width, seed=seed),
        b=random(out, rank, seed=seed + 1),
        scaling=0.75,
        transposed=transposed,
        magnitude=magnitude,
    )


def merged(base: Weights, updates: list[LowRank], length: int = 1 << 40) -> np.ndarray:
    info = base.tensors["w"]
    parts = [
        merged_words(base, updates, info, "w", start, count) for start, count in runs(info.numel, length)
    ]
    return np.concatenate(parts)


def product(b: np.ndarray, a: np.ndarray) -> np.ndarray:
    """b @ a, summed in the order of the rank."""
    return sum(b[:, k : k + 1] * a[k : k + 1] for k in range(a.shape[0]))


def values_of(words: np.ndarray, base: Weights) -> np.ndarray:
    info = base.tensors["w"]
    return to_float(words, info.dtype).astype(np.float64).reshape(info.shape)


@pytest.mark.parametrize("code", PRECISION)
@pytest.mark.parametrize("transposed", [False, True])
def test_lora_is_the_formula_rounded_once(code: str, transposed: bool) -> None:
    base, low = Held(random(40, 70), code), update(70, 40, transposed=True) if transposed else update(40, 70)
    added = 0.75 * product(low.b, low.a)
    expected = rounded(base.values + (added.T if transposed else added), code)
    np.testing.assert_array_equal(values_of(merged(base, [low]), base), expected)


@pytest.mark.parametrize("code", PRECISION)
def test_dora_is_the_formula_rounded_once(code: str) -> None:
    base, low = Held(random(40, 70), code), update(40, 70, dora=True)
    moved = base.values + 0.75 * product(low.b, low.a)
    assert low.magnitude is not None
    expected = rounded((low.magnitude / np.linalg.norm(moved, axis=1))[:, None] * moved, code)
    np.testing.assert_allclose(
        values_of(merged(base, [low]), base), expected, rtol=2.0 ** (1 - PRECISION[code]), atol=0
    )
    assert (values_of(merged(base, [low]), base) == expected).mean() > (0.5 if code == "F64" else 0.999)


def test_several_updates_add_up_and_are_rounded_once() -> None:
    base, lows = Held(random(30, 20), "BF16"), [update(30, 20, seed=seed) for seed in (1, 5, 9)]
    expected = rounded(base.values + sum(0.75 * (low.b @ low.a) for low in lows), "BF16")
    np.testing.assert_array_equal(values_of(merged(base, lows), base), expected)


@pytest.mark.parametrize(
    "shape", [(150, 1700), (3, BLOCK + 5), (70000, 2), (301,), (20, 3, 5, 7), (1, 1)], ids=str
)
@pytest.mark.parametrize("kind", ["lora", "dora", "transposed"])
def test_runs_give_the_same_words_wherever_they_are_cut(shape: tuple[int, ...], kind: str) -> None:
    base = Held(random(*shape), "F64")
    rows, columns = shape[0], int(np.prod(shape[1:]))
    low = (
        update(columns, rows, transposed=True)
        if kind == "transposed"
        else update(rows, columns, dora=kind == "dora")
    )
    whole = merged(base, [low])
    for length in (BLOCK - 1, 2 * BLOCK, 100003, whole.size - 1 or 1):
        np.testing.assert_array_equal(merged(base, [low], length), whole)
    for start, count in (
        (0, 1),
        (whole.size - 1, 1),
        (whole.size // 2, 0),
        (whole.size // 3, whole.size // 3),
    ):
        np.testing.assert_array_equal(
            merged_words(base, [low], base.tensors["w"], "w", start, count), whole[start : start + count]
        )


def test_what_merging_leaves_equal_keeps_its_bits() -> None:
    words = np.array([[0x8000, 0x0000, 0x7FC1, 0xFF81], [0x8000, 0x3F80, 0x7F80, 0xFF80]], np.uint16)
    base = Held(np.zeros((2, 4)), "BF16")
    base.words = words.reshape(-1)
    low = LowRank(a=np.ones((1, 4)), b=np.array([[0.0], [1.0]]), scaling=1.0)
    assert merged(base, [low]).tolist() == [*words[0].tolist(), 0x3F80, 0x4000, 0x7F80, 0xFF80]


def test_a_norm_of_zero_gives_nan_and_no_warning() -> None:
    base = ArrayWeights({"w": np.zeros((2, 2), np.float32)})
    low = LowRank(a=np.ones((1, 2)), b=np.array([[0.0], [1.0]]), scaling=1.0, magnitude=np.ones(2))
    assert np.isnan(merged(base, [low]).view(np.float32)[:2]).all()


def test_an_empty_weight_has_no_words() -> None:
    base = ArrayWeights({"w": np.zeros((0, 4), np.float32)})
    assert merged_words(base, [update(0, 4)], base.tensors["w"], "w", 0, 0).size == 0


BF16 = to_float(np.arange(0x7F80, dtype=np.uint16), DTYPES["BF16"]).astype(np.float64)
"""Every finite bfloat16 that is not negative, in order."""


def nearest_bf16(value: float) -> int:
    """The word of the nearest bfloat16, ties to even, by comparing float64 with exact midpoints."""
    below = int(np.searchsorted(BF16, abs(value), side="right")) - 1
    above = BF16[below + 1] if below + 1 < BF16.size else 2.0**128
    middle = (BF16[below] + above) / 2
    up = abs(value) > middle or (abs(value) == middle and below % 2 == 1)
    return (below + up) | (0x8000 if np.signbit(value) else 0)


def near_middles() -> st.SearchStrategy[float]:
    """Numbers a hair beside the middle of two bfloat16 numbers, where rounding to float32 first would land on
    it.
    """
    words = st.integers(0, 0x7F7E)
    hair = st.sampled_from([0.0, 2.0**-30, -(2.0**-30), 2.0**-40, -(2.0**-52), 2.0**-24, -(2.0**-25)])
    return st.builds(
        lambda word, part, sign: sign * (BF16[word] + BF16[word + 1]) / 2 * (1 + part),
        words,
        hair,
        st.sampled_from([1, -1]),
    )


@given(st.lists(near_middles() | st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_float64_becomes_bfloat16_in_one_rounding(values: list[float]) -> None:
    words = from_float(np.array(values), DTYPES["BF16"])
    assert words.tolist() == [nearest_bf16(value) for value in values]


def test_rounding_twice_would_be_noticed() -> None:
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    once, twice = (from_float(v, DTYPES["BF16"]).tolist() for v in (value, value.astype(np.float32)))
    assert (once, twice) == ([0x3F81], [0x3F80])


def test_float64_beyond_the_range_becomes_infinite_and_nan_stays_nan() -> None:
    values = np.array([1e300, -1e300, np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-300, -1e-300])
    words = from_float(values, DTYPES["BF16"])
    assert words.tolist() == [0x7F80, 0xFF80, 0x7F80, 0xFF80, 0x7FC0, 0, 0x8000, 0, 0x8000]
