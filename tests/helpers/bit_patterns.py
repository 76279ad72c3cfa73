"""Words to test with: random bits mixed with the patterns that break arithmetic. Needs no torch:
`torch_words` makes tensors of them.
"""

from __future__ import annotations

import numpy as np

from dare_train.dtypes import DTYPES, DType, Words, cast

FLOATS = [DTYPES[code] for code in ("F64", "F32", "F16", "BF16")]
"""The dtypes that may be a delta."""


def special_words(dtype: DType) -> Words:
    """Zeros, subnormals, the smallest and largest numbers, infinities, NaNs with payloads, one; each with
    both signs.
    """
    top, mantissa = dtype.exponent_mask, (1 << dtype.mantissa_bits) - 1
    one = ((1 << (dtype.exponent_bits - 1)) - 1) << dtype.mantissa_bits
    quiet = top | 1 << (dtype.mantissa_bits - 1)
    positive = [
        0,
        1,
        mantissa,
        mantissa + 1,
        one,
        one + 1,
        top - 1,
        top,
        top | 1,
        quiet,
        quiet | 1,
        top | mantissa,
    ]
    sign = 1 << (dtype.bits - 1)
    return np.array([word | flip for word in positive for flip in (0, sign)], dtype.word)


def random_words(dtype: DType, size: int, seed: int) -> Words:
    """Half random bits, half special patterns, shuffled."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << dtype.bits, size, dtype=np.uint64).astype(dtype.word)
    return np.where(rng.random(size) < 0.5, rng.choice(special_words(dtype), size), words)


def weights_like(dtype: DType, size: int, seed: int) -> Words:
    """Finite words of ordinary magnitude, as weights have."""
    rng = np.random.default_rng(seed)
    return cast(rng.normal(0, 0.05, size).view(np.uint64), DTYPES["F64"], dtype)


def tuned_from(base: Words, seed: int, reach: int = 40) -> Words:
    """`base` with about half of the words moved by a few units in the last place, as fine-tuning does."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-reach, reach + 1, base.size) * (rng.random(base.size) < 0.5)
    return (base.astype(np.int64) + steps).astype(base.dtype)
