"""What one program of `cuda` does with its block of 8,192 elements, in Triton: where it lies, what is kept,
how kept ones are ranked.

Each of 128 threads has eight neighbouring elements of each plane, which it reads and writes at once: tensors
are [128, 8].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_tables import BLOCK, PLANES

THREADS = 128
_THREADS = tl.constexpr(THREADS)
_EACH = tl.constexpr(BLOCK // PLANES // THREADS)
_BLOCK = tl.constexpr(BLOCK)
_PLANES = tl.constexpr(PLANES)
_COUNTERS = tl.constexpr(BLOCK // PLANES)


def numbers(device: torch.device) -> Tensor:
    """int16 [1024]: 0, 1, 2 ... What is computed from numbers that were loaded is laid out as the load is,
    eight to a thread.
    """
    if device not in _numbers:
        _numbers[device] = torch.arange(BLOCK // PLANES, dtype=torch.int16, device=device)
    return _numbers[device]


_numbers: dict[torch.device, Tensor] = {}


@triton.jit
def place(table, row_of_block, WORD: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's row, its block, elements of the row before that, where the block's words begin, or would
    begin if the row had all of them, and which of them it has: [low, high)."""
    program = tl.program_id(0)
    row = tl.load(row_of_block + program).to(tl.int64)
    address = tl.load(table + 4 * row)
    start = tl.load(table + 4 * row + 1)
    count = tl.load(table + 4 * row + 2)
    first = tl.load(table + 4 * row + 3)
    block = start // _BLOCK + (program - first)
    before = block * _BLOCK - start
    words = at_address(address, before, WORD, ALIGNED)
    low = tl.maximum(-before, 0).to(tl.int32)
    high = tl.minimum(count - before, _BLOCK).to(tl.int32)
    return row, block, before, words, low, high


@triton.jit
def at_address(address, before, WORD: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a block's words begin, of a row that begins there."""
    words = address.to(tl.pointer_type(WORD)) + before
    return tl.multiple_of(words, 16) if ALIGNED else words


@triton.jit
def zeros(DTYPE: tl.constexpr):
    """For a plane's elements."""
    return tl.zeros((_THREADS, _EACH), DTYPE)


@triton.jit
def places(PLANE: tl.constexpr):
    """The places in a block of a plane's elements."""
    return PLANE * _COUNTERS + tl.arange(0, _THREADS)[:, None] * _EACH + tl.arange(0, _EACH)[None, :]


@triton.jit
def inside(low, high, PLANE: tl.constexpr):
    """Which of a plane's elements the row has."""
    at = places(PLANE)
    return (at >= low) & (at < high)


@triton.jit
def read(words, low, high, WHOLE: tl.constexpr):
    """The words of every plane; zeros where the row has none. A program asks for all of them at once."""
    planes = ()
    for plane in tl.static_range(_PLANES):
        if WHOLE:
            planes = planes + (tl.load(words + places(plane)),)  # type: ignore[assignment]
        else:
            planes = planes + (tl.load(words + places(plane), mask=inside(low, high, plane), other=0),)  # type: ignore[assignment]
    return planes


@triton.jit
def write(words, planes, low, high, WHOLE: tl.constexpr):
    """Make them the words of every plane. A program writes last of all: no read waits for it."""
    for plane in tl.static_range(_PLANES):
        if WHOLE:
            tl.store(words + places(plane), planes[plane])
        else:
            tl.store(words + places(plane), planes[plane], mask=inside(low, high, plane))


@triton.jit
def draws(key, block, counted):
    """The four words of Philox4x32-10 for each of the block's counters. A product of 64 bits is one
    instruction, its halves are two.
    """
    first = block * _COUNTERS
    c0 = tl.load(counted + places(0)).to(tl.uint32) + first.to(tl.uint32)
    c1 = tl.zeros_like(c0) + (first >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def kept(
    drawn, masks, threshold, before, low, high, PLANE: tl.constexpr, STORED: tl.constexpr, WHOLE: tl.constexpr
):
    """Which of a plane's elements are kept: their draws, half PLANE % 2 (low first) of word PLANE // 2, are
    not below the threshold.
    """
    word = drawn[PLANE // 2]
    draw = word >> 16 if PLANE % 2 else word & 0xFFFF
    keeps = draw >= threshold.to(tl.uint32)
    if STORED:
        at = before + places(PLANE)
        bitmap = tl.load(masks + 2)
        has_one = tl.zeros_like(at) + bitmap != 0  # as a tensor: the interpreter has no scalar truths
        bytes_ = tl.load(
            bitmap.to(tl.pointer_type(tl.uint8)) + (at >> 3), mask=inside(low, high, PLANE) & has_one, other=0
        )
        keeps = tl.where(has_one, ((bytes_ >> (at & 7).to(tl.uint8)) & 1) != 0, keeps)
    if not WHOLE:
        keeps = keeps & inside(low, high, PLANE)
    return keeps


@triton.jit
def totals(drawn, masks, before, low, high, PAIR: tl.constexpr, STORED: tl.constexpr, WHOLE: tl.constexpr):
    """[128]: how many elements of planes 2·PAIR (lower half) and 2·PAIR + 1 (upper half) each thread
    keeps.
    """
    threshold = tl.load(masks + 1)
    lower = kept(drawn, masks, threshold, before, low, high, 2 * PAIR, STORED, WHOLE)
    upper = kept(drawn, masks, threshold, before, low, high, 2 * PAIR + 1, STORED, WHOLE)
    return tl.sum(lower.to(tl.int32) + (upper.to(tl.int32) << 16), axis=1)


@triton.jit
def earlier(drawn, masks, before, low, high, STORED: tl.constexpr, WHOLE: tl.constexpr):
    """[128] for each pair of planes, as in `totals`: how many elements earlier threads keep."""
    sums = ()
    for pair in tl.static_range(_PLANES // 2):
        kept_here = totals(drawn, masks, before, low, high, pair, STORED, WHOLE)
        sums = sums + (tl.cumsum(kept_here, axis=0) - kept_here,)  # type: ignore[assignment]
    return sums


@triton.jit
def of_plane(pairs, PLANE: tl.constexpr):
    """[128, 1]: a plane's half of what `earlier` gives."""
    pair = pairs[PLANE // 2]
    half = pair >> 16 if PLANE % 2 else pair & 0xFFFF
    return half[:, None]


@triton.jit
def ranks(keeps):
    """1, 2, 3 ... for the elements that each thread keeps of a plane."""
    return tl.cumsum(keeps.to(tl.int32), axis=1)


@triton.jit
def threshold_again(masks):
    """A row's threshold, read anew: so comparisons are made again where they are needed again, which takes
    one instruction, and not kept, for which there are too few registers of one bit."""
    return tl.load(masks + 1, volatile=True)
