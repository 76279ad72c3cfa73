"""`exact` values of many segments decoded where the base's words lie, in torch's operations: as `reference`
says, for all at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import DType
from . import reference
from .law_in_torch import FLOATS
from .transfers import to_device


def exact(
    base_words: Tensor, contents: Tensor, kept: Sequence[int], changed: Sequence[int], dtype: DType
) -> tuple[Tensor, Tensor]:
    """The tuned words of the elements that segments keep (docs/format.md §4.4).

    Args:
        base_words: the base's words of these elements, of one segment after another.
        contents: uint8, what the segments' frames hold, one after another: a bitmap of changed symbols, and
            these in planes.
        kept, changed: of each segment, how many elements it keeps, and how many of them its table says
            changed.

    Returns:
        Words like `base_words`, and int64 [segments]: how many symbols each bitmap has. Where that is not
        `changed`, words mean nothing.
    """
    device = base_words.device
    count = base_words.numel()
    table = to_device(torch.tensor([kept, changed], dtype=torch.int64), device)
    segment = torch.repeat_interleave(torch.arange(len(kept), device=device), table[0], output_size=count)
    bitmaps = (table[0] + 7) // 8
    begins = _before(bitmaps + dtype.itemsize * table[1])
    place = torch.arange(count, device=device) - _before(table[0])[segment]
    flags = (contents[begins[segment] + (place >> 3)] >> (place & 7).to(torch.uint8)) & 1
    through = flags.cumsum(0)
    ends = through[table[0].cumsum(0) - 1]
    rank = (through - 1 - _before(table[1])[segment]).clamp(min=0)
    first = (begins + bitmaps)[segment] + rank
    planes = table[1][segment]
    symbols = torch.ones_like(place)
    for plane in range(dtype.itemsize):
        symbols += contents[(first + plane * planes).clamp(max=contents.numel() - 1)].long() << 8 * plane
    symbols = torch.where(flags != 0, symbols, 0) & reference.ones(dtype.bits)
    base = base_words.long() & reference.ones(dtype.bits)
    words = reference.from_distances(base, symbols, dtype.bits, dtype.exponent_bits, segment)
    return words.to(base_words.dtype), ends.diff(prepend=ends.new_zeros(1))


def law(
    base_words: Tensor, tuned_words: Tensor, kept: Sequence[int], factors: Sequence[float], dtype: DType
) -> Tensor:
    """`reference.law` of words, with a factor for each segment."""
    result = tuned_words
    for factor in sorted(set(factors) - {1.0}):
        floats = FLOATS[dtype.code]
        moved = reference.law(base_words.view(floats), tuned_words.view(floats), factor).view(
            base_words.dtype
        )
        if len(set(factors)) == 1:
            return moved
        of_it = to_device(
            torch.tensor([segment_factor == factor for segment_factor in factors]), base_words.device
        )
        counts = to_device(torch.tensor(kept), base_words.device)
        result = torch.where(
            torch.repeat_interleave(of_it, counts, output_size=base_words.numel()), moved, result
        )
    return result


def _before(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts
