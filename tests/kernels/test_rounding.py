"""Where numbers land on the grid of a narrower type: against exact fractions."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from dare_train.dtypes import DTYPES, DType, from_float, to_float
from dare_train.kernels.rounding import land

TYPES = [DTYPES[code] for code in ("F32", "F16", "BF16")]
SPECIAL = [0.0, -0.0, 5e-324, 1e-45, 7e-46, 2.98e-8, 2**-25, 65504.0, 65519.99, 65520.0, 3.3895e38, 3.4e38]


def numbers(count: int) -> np.ndarray:
    random = np.random.default_rng(3)
    spread = random.standard_normal(count) * 10.0 ** random.uniform(-48, 40, count)
    special = np.array(SPECIAL + [-value for value in SPECIAL])
    return np.concatenate([spread, special])


def neighbours(value: float, dtype: DType) -> tuple[int, int]:
    """Words of the largest magnitude not above, and of the next one."""
    word = int(land(np.array([abs(value)]), dtype)[0])
    if Fraction(number(word, dtype)) > Fraction(abs(value)):
        word -= 1
    return word, word + 1


def number(word: int, dtype: DType) -> float:
    return float(to_float(np.array([word], dtype.word), dtype)[0])


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.code)
def test_to_the_nearest_as_ieee_754_rounds(dtype: DType) -> None:
    values = np.append(numbers(20_000), [np.inf, -np.inf, np.nan])
    assert np.array_equal(land(values, dtype), from_float(values, dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.code)
def test_a_draw_decides_by_the_exact_distance(dtype: DType) -> None:
    limit = Fraction(number((1 << (dtype.bits - 1)) - (1 << dtype.mantissa_bits) - 1, dtype))
    values = [value for value in numbers(2000).tolist() if Fraction(abs(value)) < limit]
    for value in values:
        lower, upper = neighbours(value, dtype)
        low, high = Fraction(number(lower, dtype)), Fraction(number(upper, dtype))
        share = (Fraction(abs(value)) - low) / (high - low)
        border = int(share * 2**32 + Fraction(1, 2))
        sign = (1 << (dtype.bits - 1)) if np.signbit(value) else 0
        for draw in {max(border - 1, 0), min(border, 2**32 - 1), 0, 2**32 - 1}:
            halves = np.array([draw >> 16], np.uint16), np.array([draw & 0xFFFF], np.uint16)
            found = int(land(np.array([value]), dtype, halves)[0])
            assert found == sign | (upper if draw < border else lower), (value, draw)


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.code)
def test_what_is_on_the_grid_stays_there(dtype: DType) -> None:
    words = np.arange(1 << 16, dtype=dtype.word)
    if dtype.bits == 32:
        words = words << 16 | 0x2B3
    with np.errstate(invalid="ignore"):  # NaNs that signal
        values = to_float(words, dtype).astype(np.float64)
    finite = np.isfinite(values)
    draws = np.zeros(words.size, np.uint16), np.zeros(words.size, np.uint16)
    assert np.array_equal(land(values, dtype, draws)[finite], words[finite])


def test_nothing_lands_nowhere() -> None:
    assert land(np.empty(0), DTYPES["BF16"]).size == 0


NARROW = """
import sys
import numpy as np
from dare_train.kernels import numba_compile
numba_compile._features = lambda: "+sse4.2,-avx,-avx2,-fma,-avx512f"
from dare_train.dtypes import DTYPES
from dare_train.kernels.products import thin_product
from dare_train.kernels.rounding import land
random = np.random.default_rng(5)
values, high, low = random.standard_normal(5000), *random.integers(0, 1 << 16, (2, 5000), dtype=np.uint16)
np.savez(
    sys.argv[1],
    landed=land(values, DTYPES["BF16"], (high, low)),
    product=thin_product(random.standard_normal((50, 9)), random.standard_normal((9, 77)), 0.3),
)
"""


def test_the_bits_are_those_of_a_processor_without_wide_vectors(tmp_path: Path) -> None:
    """Nor do they depend on whether products and sums can be fused there."""
    wide = NARROW.replace("numba_compile._features", "unused")
    for name, program in (("narrow", NARROW), ("wide", wide)):
        environment = {**os.environ, "DARE_TRAIN_CACHE": str(tmp_path / name)}
        command = [sys.executable, "-c", program, str(tmp_path / f"{name}.npz")]
        subprocess.run(command, check=True, env=environment)
    narrow, own = np.load(tmp_path / "narrow.npz"), np.load(tmp_path / "wide.npz")
    assert np.array_equal(narrow["landed"], own["landed"])
    assert np.array_equal(narrow["product"], own["product"])
