"""Words to test with: random bits mixed with the patterns that break arithmetic, and words as torch sees
them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dare_train.dtypes import DTYPES, DType, Words

FLOATS = [DTYPES[code] for code in ("F64", "F32", "F16", "BF16")]
"""The dtypes that may be a delta."""

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    return words_of(torch.from_numpy(rng.normal(0, 0.05, size)).to(TORCH[dtype.code]))


def tuned_from(base: Words, seed: int, reach: int = 40) -> Words:
    """`base` with about half of the words moved by a few units in the last place, as fine-tuning does."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(-reach, reach + 1, base.size) * (rng.random(base.size) < 0.5)
    return (base.astype(np.int64) + steps).astype(base.dtype)


def as_int64(words: Words) -> torch.Tensor:
    """Words as the reference kernels take them."""
    return torch.from_numpy(words.astype(np.uint64).view(np.int64))


def as_words(integers: torch.Tensor, dtype: DType) -> Words:
    return integers.numpy().view(np.uint64).astype(dtype.word)


def as_tensor(words: Words, dtype: DType) -> torch.Tensor:
    """The torch tensor that has these bits, shape (size,)."""
    signed = np.ascontiguousarray(words).view(np.dtype(f"i{dtype.itemsize}"))
    return torch.from_numpy(signed.copy()).view(TORCH[dtype.code])


def words_of(tensor: torch.Tensor) -> NDArray[np.unsignedinteger]:
    """A tensor's bits, flat."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().reshape(-1).view(integers).numpy()
    return flat.view(np.dtype(f"u{flat.itemsize}"))
