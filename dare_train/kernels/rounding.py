"""Where numbers land on the grid of a narrower type, compiled by Numba for the CPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, Words
from .numba_cache import inlined, kernel

_NEAREST = np.uint64(0)
_STOCHASTIC = np.uint64(1)
_MANTISSA = np.uint64(52)
_HIDDEN = np.uint64(1 << 52)
_ONE = np.uint64(1)
_SIGN = np.uint64(63)
_DRAWN = np.uint64(32)
_HALF = np.uint64(33)


@inlined
def _share_above(rest, shift):
    """rest / 2**shift in units of 2**-32, rounded to nearest; `rest` is below 2**53."""
    if shift >= np.uint64(97):
        return np.uint64(0)
    if shift >= _HALF:
        return ((rest >> (shift - _HALF)) + _ONE) >> _ONE
    return rest << (_DRAWN - shift)


@inlined
def _nearest_is_above(rest, shift, whole):
    """Whether rest / 2**shift rounds up, half to even."""
    if shift == np.uint64(0) or shift >= np.uint64(55):
        return np.uint64(0)
    half = _ONE << (shift - _ONE)
    return np.uint64((rest > half) or (rest == half and (whole & _ONE) == _ONE))


@kernel
def _land(bits, high, low, stochastic, mantissa, exponents, sign_at, out):
    """Words of the float64 numbers whose bits these are, in a type with so many bits of mantissa and so many
    exponents; `high` and `low` are halves of 32 random bits.
    """
    bias = (exponents >> _ONE) - _ONE
    infinite = (exponents - _ONE) << mantissa
    for i in range(bits.size):
        sign = (bits[i] >> _SIGN) << sign_at
        field = (bits[i] >> _MANTISSA) & np.uint64(0x7FF)
        digits = bits[i] & (_HIDDEN - _ONE)
        if field == np.uint64(0x7FF):
            word = infinite if digits == np.uint64(0) else infinite | (_ONE << (mantissa - _ONE))
            sign = sign if digits == np.uint64(0) else np.uint64(0)
        elif field + bias >= np.uint64(1023) + exponents - _ONE:
            word = infinite
        else:
            digits = digits | _HIDDEN if field > np.uint64(0) else digits
            exponent = field + bias  # 1023 more than the type's own field
            shift = _MANTISSA - mantissa
            before = np.uint64(0)
            if exponent <= np.uint64(1023):  # below the type's least normal number
                shift += np.uint64(1024) - exponent - np.uint64(field == np.uint64(0))
            else:
                before = (exponent - np.uint64(1024)) << mantissa
            whole = digits >> shift if shift < np.uint64(64) else np.uint64(0)
            rest = digits - (whole << shift) if shift < np.uint64(64) else digits
            word = before + whole
            if stochastic == _STOCHASTIC:
                drawn = (np.uint64(high[i]) << np.uint64(16)) | np.uint64(low[i])
                word += np.uint64(drawn < _share_above(rest, shift))
            else:
                word += _nearest_is_above(rest, shift, whole)
        out[i] = sign | word


def land(
    values: NDArray[np.float64],
    dtype: DType,
    draws: tuple[NDArray[np.uint16], NDArray[np.uint16]] | None = None,
) -> Words:
    """Words of float64 numbers in a floating-point `dtype` of 16 bits or more.

    Args:
        values: any; what is larger than the type's numbers becomes infinity, NaN its positive quiet NaN.
        dtype: F64, F32, F16 or BF16.
        draws: of each value the upper and the lower half of 32 random bits: a value between two neighbours
            of the grid goes to the upper one with a probability of its distance from the lower one, in
            steps of 2⁻³². Without draws it goes to the nearest, half to even.
    """
    bits = np.ascontiguousarray(values).view(np.uint64)
    out: Words = np.empty(bits.size, dtype.word)
    nothing = np.empty(0, np.uint16)
    high, low = (nothing, nothing) if draws is None else draws
    rounding = _NEAREST if draws is None else _STOCHASTIC
    mantissa, exponents = np.uint64(dtype.mantissa_bits), np.uint64(1 << dtype.exponent_bits)
    _land(bits, high, low, rounding, mantissa, exponents, np.uint64(dtype.bits - 1), out)
    return out
