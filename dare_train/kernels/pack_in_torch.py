"""`exact` values of many segments grouped and packed where the models lie, in torch's operations: the inverse
of `unpack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import DType
from . import reference
from .law_in_torch import FLOATS
from .transfers import to_device

_SHIFT = 20
_BINS = 2048


class Packed(NamedTuple):
    """What the frames of segments hold, and where the statistics of their bytes change."""

    contents: Tensor
    """uint8: of each segment a bitmap of changed symbols, and these in planes (docs/format.md §4.4); one
    after another."""
    changed: Tensor
    """int64 [segments]."""
    starts: Tensor
    """int64 [segments, groups]: which of a segment's symbols is the first of those whose base words have one
    exponent."""
    before: Tensor
    """int64 [segments, groups]: how many changed symbols come before it."""


def exact(base_words: Tensor, tuned_words: Tensor, kept: Sequence[int], dtype: DType) -> Packed:
    """Encode the tuned words of the elements that segments keep, relative to those of the base.

    Args:
        base_words, tuned_words: of one segment after another.
        kept: how many elements each segment keeps.
    """
    device = base_words.device
    count = base_words.numel()
    sizes = to_device(torch.tensor(list(kept), dtype=torch.int64), device)
    firsts = _before(sizes)
    bitmaps = (sizes + 7) // 8
    segment = torch.repeat_interleave(torch.arange(len(kept), device=device), sizes, output_size=count)
    base, new = (words.long() & reference.ones(dtype.bits) for words in (base_words, tuned_words))
    symbols = reference.distances_by_exponent(base, new, dtype.bits, dtype.exponent_bits, segment)
    flags = symbols != 0
    through = torch.cat([firsts.new_zeros(1), flags.cumsum(0)])
    changed = through[firsts + sizes] - through[firsts]
    values = symbols[flags] - 1
    segment_of_value = segment[flags]
    begins = _before(bitmaps + dtype.itemsize * changed)
    contents = torch.empty(
        sum(-(-size // 8) for size in kept) + dtype.itemsize * values.numel(),
        dtype=torch.uint8,
        device=device,
    )
    _put_bitmaps(contents, flags, segment, firsts, bitmaps, begins)
    place = (
        (begins + bitmaps)[segment_of_value]
        + torch.arange(values.numel(), device=device)
        - _before(changed)[segment_of_value]
    )
    for plane in range(dtype.itemsize):
        contents[place + plane * changed[segment_of_value]] = (values >> 8 * plane & 0xFF).to(torch.uint8)
    starts = _starts(base, segment, len(kept), dtype)
    return Packed(
        contents=contents,
        changed=changed,
        starts=starts,
        before=through[firsts[:, None] + starts] - through[firsts][:, None],
    )


class Sizes(NamedTuple):
    """How large deltas are."""

    counts: Tensor
    """int64 [segments, 2048]: of float32 |δ| by the leading 11 bits after the sign."""
    largest: Tensor
    """float32 [segments]."""
    strange: Tensor
    """int64 [segments]: how many are not finite between words that differ; none that is not finite is
    counted.
    """


def magnitudes(base_words: Tensor, tuned_words: Tensor, kept: Sequence[int], dtype: DType) -> Sizes:
    """Of the deltas between words as in `exact`. Of float64's what float32 cannot hold is not counted
    either.
    """
    device = base_words.device
    compute = torch.float64 if dtype.code == "F64" else torch.float32
    sizes = to_device(torch.tensor(list(kept), dtype=torch.int64), device)
    segment = torch.repeat_interleave(
        torch.arange(len(kept), device=device), sizes, output_size=base_words.numel()
    )
    delta = tuned_words.view(FLOATS[dtype.code]).to(compute) - base_words.view(FLOATS[dtype.code]).to(compute)
    size = delta.abs().float()
    counted = size.isfinite()
    place = segment * _BINS + (size.view(torch.int32) >> _SHIFT)
    return Sizes(
        counts=place[counted].bincount(minlength=len(kept) * _BINS).reshape(-1, _BINS),
        largest=size.new_zeros(len(kept)).scatter_reduce(0, segment, torch.where(counted, size, 0), "amax"),
        strange=segment[~delta.isfinite() & (base_words != tuned_words)].bincount(minlength=len(kept)),
    )


def not_finite(base_words: Tensor, words: Tensor, kept: Sequence[int], dtype: DType) -> Tensor:
    """int64 [segments]: how many words of a result are NaN or infinite, and others than those of the base."""
    sizes = to_device(torch.tensor(list(kept), dtype=torch.int64), words.device)
    strange = ~words.view(FLOATS[dtype.code]).isfinite() & (words != base_words)
    segment = torch.arange(len(kept), device=words.device)
    of_words = torch.repeat_interleave(segment, sizes, output_size=words.numel())
    return of_words[strange].bincount(minlength=len(kept))


def _put_bitmaps(
    contents: Tensor, flags: Tensor, segment: Tensor, firsts: Tensor, bitmaps: Tensor, begins: Tensor
) -> None:
    """Bits of each segment's elements, eight to a byte, least significant first; those of the last byte that
    are left are zero.
    """
    bytes_before = _before(bitmaps)
    number = int(bitmaps.sum())
    bits = torch.zeros(8 * number, dtype=torch.uint8, device=flags.device)
    bits[8 * bytes_before[segment] + torch.arange(flags.numel(), device=flags.device) - firsts[segment]] = (
        flags.to(torch.uint8)
    )
    packed = (bits.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8, device=flags.device)).sum(
        dim=1, dtype=torch.uint8
    )
    segment_of_byte = torch.repeat_interleave(
        torch.arange(len(bitmaps), device=flags.device), bitmaps, output_size=number
    )
    contents[(begins - bytes_before)[segment_of_byte] + torch.arange(number, device=flags.device)] = packed


def _starts(base: Tensor, segment: Tensor, segments: int, dtype: DType) -> Tensor:
    groups = 1 << dtype.exponent_bits
    group = reference.exponents(base, dtype.bits, dtype.exponent_bits) + segment * groups
    return _before(torch.bincount(group, minlength=segments * groups).reshape(segments, groups))


def _before(counts: Tensor) -> Tensor:
    return counts.cumsum(-1) - counts
