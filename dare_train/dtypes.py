"""The element types a checkpoint can hold, by their safetensors code.

A *word* is the raw bit pattern of one element, as an unsigned integer of the element's width.
Everything below the merge methods works on words, so bfloat16 and fp8 need no library that knows them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import CheckpointError

Words = NDArray[np.unsignedinteger]
"""Flat array of raw bit patterns, dtype uint8, uint16, uint32 or uint64."""

FloatArray = NDArray[np.floating]

CANONICAL_NAN = np.uint32(0x7FC00000)


@dataclass(frozen=True, kw_only=True)
class DType:
    code: str
    """Name in a safetensors header, such as "BF16"."""
    bits: int
    """Width of one element."""
    exponent_bits: int = 0
    """Width of the exponent field; 0 for types that are not floating point."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.bits // 8

    @property
    def word(self) -> np.dtype[np.unsignedinteger]:
        """The numpy type of one word, little-endian as in a file."""
        return np.dtype(f"<u{self.itemsize}")

    @property
    def is_float(self) -> bool:
        return self.exponent_bits > 0

    @property
    def can_be_delta(self) -> bool:
        """Whether differences of such elements are meaningful: floats of 16 bits and more. Others travel
        whole.
        """
        return self.is_float and self.bits >= 16

    @property
    def mantissa_bits(self) -> int:
        return self.bits - 1 - self.exponent_bits

    @property
    def exponent_mask(self) -> int:
        """The exponent field's bits; all of them set means NaN or infinity in every IEEE-like type."""
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def compute(self) -> np.dtype[np.floating]:
        """The type the arithmetic law is evaluated in: float64 for float64, float32 for everything
        narrower.
        """
        return np.dtype(np.float64 if self.bits == 64 else np.float32)


_ALL = [
    DType(code="F64", bits=64, exponent_bits=11),
    DType(code="F32", bits=32, exponent_bits=8),
    DType(code="F16", bits=16, exponent_bits=5),
    DType(code="BF16", bits=16, exponent_bits=8),
    DType(code="F8_E4M3", bits=8, exponent_bits=4),
    DType(code="F8_E5M2", bits=8, exponent_bits=5),
    DType(code="F8_E8M0", bits=8),
    *(DType(code=f"{kind}{bits}", bits=bits) for kind in "IU" for bits in (8, 16, 32, 64)),
    DType(code="BOOL", bits=8),
]
DTYPES = {dtype.code: dtype for dtype in _ALL}


DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""By code, the name in a model's configuration of those in which models are computed."""
_CODES = {name: code for code, name in DTYPE_NAMES.items()}
_SHORT = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def full_name(name: str) -> str:
    """Of a type that goes by several."""
    plain = name.removeprefix("torch.")
    return _SHORT.get(plain, plain)


def code_named(name: object) -> str | None:
    """The code of a type's name in a configuration; None where it is none of these."""
    return _CODES.get(full_name(name)) if isinstance(name, str) else None


def dtype_of(code: str, *, tensor: str = "dtype") -> DType:
    """The `DType` named `code`.

    Raises:
        CheckpointError: no such type is supported (sub-byte and complex types are not).
    """
    if code not in DTYPES:
        raise CheckpointError(tensor, expected=f"one of {', '.join(DTYPES)}", found=f"dtype {code!r}")
    return DTYPES[code]


def to_float(words: Words, dtype: DType) -> FloatArray:
    """Words as numbers in `dtype.compute`, exactly. Shape is kept."""
    if dtype.code == "BF16":
        return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype.code == "F16":
        return words.view(np.float16).astype(np.float32)
    return words.view(dtype.compute)


def from_float(values: FloatArray, dtype: DType) -> Words:
    """Numbers rounded once, to nearest-even, into `dtype`; every NaN becomes the type's canonical quiet
    NaN.
    """
    if dtype.code == "BF16":
        return _narrow_to_bf16(values)
    with np.errstate(over="ignore"):  # beyond the largest float16 lies infinity, as IEEE 754 rounds
        typed = values.astype(np.float16) if dtype.code == "F16" else values.astype(dtype.compute)
    typed[np.isnan(typed)] = np.nan
    return typed.view(dtype.word)


def _narrow_to_bf16(values: FloatArray) -> Words:
    single = (
        _to_odd_float32(values) if values.dtype == np.float64 else np.ascontiguousarray(values, np.float32)
    )
    bits = single.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = np.uint16(CANONICAL_NAN >> np.uint32(16))
    return rounded


def _to_odd_float32(values: FloatArray) -> NDArray[np.float32]:
    """float64 cut to float32, the last bit set where anything was cut off.

    Rounded on to a narrower type, that gives what rounding once would have: nearest-even twice would mistake
    a value just beside the middle of two neighbours for the middle itself (Boldo and Melquiond, "When double
    rounding is odd", 2004).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = np.ascontiguousarray(values.astype(np.float32))
        inexact = nearest != values
        bits = nearest.view(np.uint32)
        bits -= np.abs(nearest) > np.abs(values)
    bits |= inexact
    return nearest


def cast(words: Words, source: DType, target: DType) -> Words:
    """Convert between floating-point types as torch's `Tensor.to` does (round to nearest even).

    float64 to a 16-bit type passes through float32 first; NaNs become canonical.
    """
    if source == target:
        return words
    return from_float(to_float(words, source).astype(target.compute, copy=False), target)
