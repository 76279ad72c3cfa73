"""The fingerprint of `reference` (docs/format.md §3) in Triton: what a program of `cuda` makes of its block.

Each lane is a sum of units of four bytes, each times a factor of its place among 1,024 and a multiplier that
those share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cuda_blocks import place, places, read, zeros
from .launch_tables import BLOCK, PLANES
from .reference import UNITS, unit_factors

_BLOCK = tl.constexpr(BLOCK)
_PLANES = tl.constexpr(PLANES)
_UNITS = tl.constexpr(UNITS)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


def unit_factors_on(device: torch.device) -> Tensor:
    """int32 [2048]: what 1,024 units are multiplied by in the first lane of a fingerprint, then in the second
    (docs/format.md §3).
    """
    if device not in _unit_factors:
        _unit_factors[device] = torch.cat(unit_factors(torch.arange(UNITS))).int().to(device)
    return _unit_factors[device]


_unit_factors: dict[torch.device, Tensor] = {}


@triton.jit
def _split_mix(number):
    v = (number.to(tl.uint64) + 1) * _GOLDEN
    v = (v ^ (v >> 30)) * _MIX1
    v = (v ^ (v >> 27)) * _MIX2
    return v ^ (v >> 31)


@triton.jit
def _multipliers(group):
    """What 1,024 units share, in either lane."""
    mixed = _split_mix(group)
    return mixed | 1, (mixed << 32) | (mixed >> 32) | 1


@triton.jit
def _factors(factors, at):
    """What units are multiplied by themselves, in either lane."""
    first = tl.load(factors + at)
    second = tl.load(factors + _UNITS + at)
    return first.to(tl.uint32, bitcast=True).to(tl.uint64), second.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def print_of_whole(words, block, factors, WIDTH: tl.constexpr):
    """Both lanes of a whole block whose elements have WIDTH bytes. It is read as units, 1,024 at a time."""
    at = tl.arange(0, _UNITS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    planes = ()
    units = tl.multiple_of(words.to(tl.pointer_type(tl.int32)), 16)
    for group in tl.static_range(2 * WIDTH):
        planes = planes + (tl.load(units + group * _UNITS + at),)  # type: ignore[assignment]
    first_factors, second_factors = _factors(factors, at)
    first = tl.zeros((_UNITS // 4,), tl.uint64)
    second = tl.zeros((_UNITS // 4,), tl.uint64)
    for group in tl.static_range(2 * WIDTH):
        unit = planes[group].to(tl.uint32, bitcast=True).to(tl.uint64)  # type: ignore[var-annotated]
        multipliers = _multipliers(block * (2 * WIDTH) + group)
        first += tl.sum(unit * first_factors, axis=1) * multipliers[0]
        second += tl.sum(unit * second_factors, axis=1) * multipliers[1]
    return tl.sum(first), tl.sum(second)


@triton.jit
def print_of_some(words, block, low, high, factors, WIDTH: tl.constexpr, UNSIGNED: tl.constexpr):
    """The same of some of a block's elements, wherever they lie: one by one."""
    first = zeros(tl.uint64)
    second = zeros(tl.uint64)
    planes = read(words, low, high, False)
    for plane in tl.static_range(_PLANES):
        byte = places(plane) * WIDTH
        word = planes[plane].to(UNSIGNED, bitcast=True).to(tl.uint64) << (8 * (byte & 3)).to(tl.uint64)
        for half in tl.static_range(2 if WIDTH == 8 else 1):
            number = (byte >> 2) + half
            unit = word >> (32 * half) & 0xFFFFFFFF
            first_factors, second_factors = _factors(factors, number & (_UNITS - 1))
            multipliers = _multipliers(block * (2 * WIDTH) + number // _UNITS)
            first += unit * first_factors * multipliers[0]
            second += unit * second_factors * multipliers[1]
    return tl.sum(first), tl.sum(second)


@triton.jit
def fingerprint_kernel(
    table,
    row_of_block,
    factors,
    lanes,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    UNSIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row, block, _, words, low, high = place(table, row_of_block, WORD, ALIGNED)
    if ALIGNED and high - low == _BLOCK:
        first, second = print_of_whole(words, block, factors, WIDTH)
    else:
        first, second = print_of_some(words, block, low, high, factors, WIDTH, UNSIGNED)
    tl.atomic_add(lanes + 2 * row, first.to(tl.int64, bitcast=True) + (high - low), sem="relaxed")
    tl.atomic_add(lanes + 2 * row + 1, second.to(tl.int64, bitcast=True) + (high - low), sem="relaxed")
