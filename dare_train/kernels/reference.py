"""What the kernels compute, in plain torch: slow, short, and the definition. The other kernel sets are tested
against it.

Words and draws are int64 tensors here, because torch computes little with unsigned types. 64-bit words wrap
around, as they would in unsigned arithmetic; only shifts to the right need a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNTERS = 1024
BLOCK = 8 * COUNTERS
UNITS = 1024
_LOW = 0xFFFFFFFF


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four uint32 words
    per counter.
    """
    k0 = key & _LOW
    k1 = key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0 = _right(p1, 32) ^ c1 ^ k0
        c1 = p1 & _LOW
        c2 = _right(p0, 32) ^ c3 ^ k1
        c3 = p0 & _LOW
        k0 = (k0 + 0x9E3779B9) & _LOW
        k1 = (k1 + 0xBB67AE85) & _LOW
    return [c0, c1, c2, c3]


def draws(key: int, start: int, count: int, domain: int, device: torch.device | None = None) -> Tensor:
    """The 16-bit draws of flat indices [start, start + count), int64 in [0, 65536).

    Index i lies in block i // 8192 at r = i % 8192. It takes half (r // 1024) % 2, low first, of word r //
    2048 of counter 1024 · block + r % 1024.
    """
    blocks = torch.arange(start // BLOCK, -(-(start + count) // BLOCK), device=device)
    counter = COUNTERS * blocks[:, None] + torch.arange(COUNTERS, device=device)
    zero = torch.zeros_like(counter)
    words = torch.stack(philox(key, (counter & _LOW, _right(counter, 32), zero + domain, zero)), dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [blocks, 4, 2, 1024]
    return halves.flatten()[start % BLOCK :][:count]


def keep_mask(key: int, start: int, count: int, threshold: int, device: torch.device | None = None) -> Tensor:
    """Boolean, True where the element is kept: draw ≥ threshold."""
    return draws(key, start, count, 0, device) >= threshold


def kept_positions(key: int, start: int, count: int, threshold: int) -> Tensor:
    """Ascending positions, relative to `start`, of the kept elements."""
    return keep_mask(key, start, count, threshold).nonzero().reshape(-1)


def take(words: Tensor, positions: Tensor) -> Tensor:
    """The kept words."""
    return words[positions]


def put(words: Tensor, positions: Tensor, values: Tensor) -> None:
    """Replace the kept words, in place."""
    words[positions] = values


def fingerprint(words: Tensor, start: int, width: int) -> tuple[int, int]:
    """Two lanes in [0, 2**64) of elements of `width` bytes whose flat indices begin at `start`
    (docs/format.md §3).
    """
    first, second = lanes(words, torch.arange(words.numel(), device=words.device), start, width).tolist()
    return first % 2**64, second % 2**64


def fingerprint_change(
    old: Tensor, new: Tensor, positions: Tensor, start: int, width: int
) -> tuple[int, int]:
    """What is added to a fingerprint when the elements at flat indices `start + positions` become `new` where
    they were `old`.
    """
    first, second = (lanes(new, positions, start, width) - lanes(old, positions, start, width)).tolist()
    return first % 2**64, second % 2**64


def lanes(words: Tensor, positions: Tensor, start: int, width: int) -> Tensor:
    """The share that elements at `start + positions` have in a fingerprint, as the bits of two uint64, int64
    [2].

    A tensor's bytes are read as units of 32 bits, little-endian. Elements have their bytes there, and zeros
    for those of others; and each element counts as one more.
    """
    byte = (start + positions) * width
    sums = positions.numel() + _of_units((words << 8 * (byte % 4)) & _LOW, byte // 4)
    return sums + _of_units(_right(words, 32), byte // 4 + 1) if width == 8 else sums


def _of_units(units: Tensor, number: Tensor) -> Tensor:
    factors = unit_factors(number)
    shared = split_mix(number // UNITS)
    first = factors[0] * (shared | 1)
    second = factors[1] * ((shared << 32) | _right(shared, 32) | 1)
    return torch.stack([(first * units).sum(), (second * units).sum()])


def unit_factors(number: Tensor) -> tuple[Tensor, Tensor]:
    """What units of these numbers are multiplied by in either lane, beside the multiplier that 1,024 of them
    share; odd, below 2**32.
    """
    mixed = split_mix(number % UNITS + _signed(1 << 63))
    return (mixed & _LOW) | 1, _right(mixed, 32) | 1


def split_mix(number: Tensor) -> Tensor:
    """Outputs of SplitMix64 seeded with 0 (Steele et al. 2014, "Fast splittable pseudorandom number
    generators"), the first for 0.
    """
    v = (number + 1) * _signed(0x9E3779B97F4A7C15)
    v = (v ^ _right(v, 30)) * _signed(0xBF58476D1CE4E5B9)
    v = (v ^ _right(v, 27)) * _signed(0x94D049BB133111EB)
    return v ^ _right(v, 31)


def ordered(words: Tensor, bits: int) -> Tensor:
    """Bit patterns of `bits`-wide floats as integers in the order of the numbers: a bijection."""
    sign = _signed(1 << (bits - 1))
    return torch.where(words & sign != 0, ~words, words | sign) & ones(bits)


def distances_by_exponent(
    base: Tensor, tuned: Tensor, bits: int, exponent_bits: int, segment: Tensor | None = None
) -> Tensor:
    """Zigzag distances ordered(tuned) - ordered(base) modulo 2**bits, stably sorted by the base's exponent
    field.

    Of several segments, one after another, `segment` has each element's number.
    """
    distance = (ordered(tuned, bits) - ordered(base, bits)) & ones(bits)
    zigzag = ((distance << 1) ^ -(_right(distance, bits - 1) & 1)) & ones(bits)
    return zigzag[_by_exponent(base, bits, exponent_bits, segment)]


def from_distances(
    base: Tensor, symbols: Tensor, bits: int, exponent_bits: int, segment: Tensor | None = None
) -> Tensor:
    """Undo `distances_by_exponent`: the tuned words."""
    zigzag = torch.empty_like(symbols)
    zigzag[_by_exponent(base, bits, exponent_bits, segment)] = symbols
    order = (ordered(base, bits) + (_right(zigzag, 1) ^ -(zigzag & 1))) & ones(bits)
    sign = _signed(1 << (bits - 1))
    return torch.where(order & sign != 0, order ^ sign, ~order) & ones(bits)


def law(base: Tensor, tuned: Tensor, factor: float) -> Tensor:
    """The arithmetic law on tensors of one floating-point dtype, one package, every element kept.

    round_to_dtype(f32(base) + f32(factor) · (f32(tuned) - f32(base))), each operation rounded; bits that are
    equal stay.
    """
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    rounded = torch.tensor(factor, dtype=wide)
    if rounded == 1:
        return tuned.clone()
    moved = base.to(wide) + rounded * (tuned.to(wide) - base.to(wide))
    moved = moved.to(base.dtype)
    moved = torch.where(moved.isnan(), torch.full_like(moved, torch.nan), moved)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[base.element_size()]
    return torch.where(base.view(integers) == tuned.view(integers), base, moved)


def exponents(words: Tensor, bits: int, exponent_bits: int) -> Tensor:
    """The exponent fields of floats of `bits` bits."""
    return _right(words, bits - 1 - exponent_bits) & ones(exponent_bits)


def _by_exponent(base: Tensor, bits: int, exponent_bits: int, segment: Tensor | None = None) -> Tensor:
    exponent = exponents(base, bits, exponent_bits)
    return torch.argsort(exponent if segment is None else exponent + (segment << exponent_bits), stable=True)


def _right(x: Tensor, shift: int) -> Tensor:
    """Logical shift to the right of 64-bit patterns."""
    return (x >> shift) & ((1 << (64 - shift)) - 1) if shift else x


def ones(bits: int) -> int:
    """So many set bits, as an int64 has them."""
    return _signed((1 << bits) - 1)


def _signed(value: int) -> int:
    """The int64 that has the bits of a uint64."""
    return value - (1 << 64) if value >> 63 else value
