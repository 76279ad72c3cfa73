"""The operations of `reference` on whole models in a GPU's memory, in Triton: one launch for all tensors of a
dtype.

Bytes that each must move, per element of n bytes at drop rate p:

    fingerprint   n                      read
    counts        0                      nothing but the draws, computed
    take          n + (1 - p)·n          read, kept words written
    take_both     2n + 2(1 - p)·n        base and tuned read, kept words of both written
    put           2n + (1 - p)·n         read, values read, written
    add           2n + k·(1 - p)·n       the same with the values of k packages

Products and sums are rounded one by one: kernels are launched with fusion of floating-point operations off.
On CPU tensors these run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested where
there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cuda_blocks as blocks
from .cuda_blocks import (
    at_address,
    draws,
    earlier,
    kept,
    of_plane,
    place,
    ranks,
    read,
    threshold_again,
    totals,
    write,
    zeros,
)
from .cuda_fingerprints import fingerprint_kernel, unit_factors_on
from .launch_tables import BLOCK, PLANES, Masks, Rows, Term
from .transfers import to_device

_WORDS = {torch.uint8: tl.uint8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64}
# Kernels are compiled once for any number of rows, and wherever values lie.
_LAUNCH: dict[str, Any] = {"num_warps": blocks.THREADS // 32, "enable_fp_fusion": False}

_BLOCK = tl.constexpr(BLOCK)
_PLANES = tl.constexpr(PLANES)


@triton.jit
def _widen(word, CODE: tl.constexpr):
    """Words as numbers, exactly."""
    if CODE == "BF16":
        return (word.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif CODE == "F16":
        return word.to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == "F32":
        return word.to(tl.float32, bitcast=True)
    else:
        return word.to(tl.float64, bitcast=True)


@triton.jit
def _narrow(value, CODE: tl.constexpr):
    """Numbers rounded once, to nearest-even; every NaN the same."""
    if CODE == "BF16":
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FC0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)
    elif CODE == "F16":
        return tl.where(value != value, 0x7E00, value.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    elif CODE == "F32":
        return tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True)).to(tl.int32)
    else:
        return tl.where(value != value, 0x7FF8000000000000, value.to(tl.int64, bitcast=True)).to(tl.int64)


@triton.jit
def _count_block(counts, masks, numbers, block, before, low, high, STORED: tl.constexpr, WHOLE: tl.constexpr):
    drawn = draws(tl.load(masks), block, numbers)
    for pair in tl.static_range(_PLANES // 2):
        pair_counts = tl.sum(totals(drawn, masks, before, low, high, pair, STORED, WHOLE), axis=0)
        tl.store(counts + 2 * pair, (pair_counts & 0xFFFF).to(tl.int64))
        tl.store(counts + 2 * pair + 1, (pair_counts >> 16).to(tl.int64))


@triton.jit
def _count(table, row_of_block, masks, numbers, counts, STORED: tl.constexpr):
    row, block, before, _, low, high = place(table, row_of_block, tl.int8, False)
    masks = masks + 3 * row
    counts = counts + _PLANES * tl.program_id(0)
    if high - low == _BLOCK:
        _count_block(counts, masks, numbers, block, before, low, high, STORED, True)
    else:
        _count_block(counts, masks, numbers, block, before, low, high, STORED, False)


@triton.jit
def _scatter(first, at, word):
    """Write words to their places after `first`, those at 0 nowhere. Stores are laid out otherwise than
    loads, one element to a thread: as 16 bits, places move between threads, and neither pointers nor
        masks."""
    tl.store(first + at.to(tl.int64), word, mask=at.to(tl.int32) > 0)


@triton.jit
def _move_block(
    words,
    offsets,
    values,
    masks,
    numbers,
    block,
    before,
    low,
    high,
    STORED: tl.constexpr,
    WHOLE: tl.constexpr,
    PUT: tl.constexpr,
):
    planes = read(words, low, high, WHOLE)
    results = ()
    drawn = draws(tl.load(masks), block, numbers)
    firsts = earlier(drawn, masks, before, low, high, STORED, WHOLE)
    threshold = threshold_again(masks)
    for plane in tl.static_range(_PLANES):
        keeps = kept(drawn, masks, threshold, before, low, high, plane, STORED, WHOLE)
        first = values + (tl.load(offsets + plane) - 1)
        rank = of_plane(firsts, plane) + ranks(keeps)
        if PUT:
            results = results + (tl.load(first + rank, mask=keeps, other=planes[plane]),)  # type: ignore[assignment]
        else:
            _scatter(first, tl.where(keeps, rank, 0).to(tl.int16), planes[plane])
    if PUT:
        write(words, results, low, high, WHOLE)


@triton.jit(do_not_specialize_on_alignment=["values"])
def _move(
    table, row_of_block, masks, numbers, offsets, values,
    WORD: tl.constexpr, STORED: tl.constexpr, ALIGNED: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """Kept words from the rows to `values`, or with PUT from there to the rows."""
    row, block, before, words, low, high = place(table, row_of_block, WORD, ALIGNED)
    masks = masks + 3 * row
    offsets = offsets + _PLANES * tl.program_id(0)
    if high - low == _BLOCK:
        _move_block(words, offsets, values, masks, numbers, block, before, low, high, STORED, True, PUT)
    else:
        _move_block(words, offsets, values, masks, numbers, block, before, low, high, STORED, False, PUT)


@triton.jit
def _take_both_block(
    base, tuned, offsets, base_out, tuned_out, masks, numbers, block, before, low, high,
    WORD: tl.constexpr, EXPONENT: tl.constexpr, STORED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Returns the largest exponent among the tuned words, in its place."""
    base_planes = read(base, low, high, WHOLE)
    tuned_planes = read(tuned, low, high, WHOLE)
    largest = zeros(WORD)
    drawn = draws(tl.load(masks), block, numbers)
    firsts = earlier(drawn, masks, before, low, high, STORED, WHOLE)
    threshold = threshold_again(masks)
    for plane in tl.static_range(_PLANES):
        keeps = kept(drawn, masks, threshold, before, low, high, plane, STORED, WHOLE)
        at = tl.where(keeps, of_plane(firsts, plane) + ranks(keeps), 0).to(tl.int16)
        first = tl.load(offsets + plane) - 1
        _scatter(base_out + first, at, base_planes[plane])
        _scatter(
            tuned_out + first, at.to(tl.uint16), tuned_planes[plane]
        )  # unsigned: places widened for both would move as 64 bits
        largest = tl.maximum(largest, tuned_planes[plane] & EXPONENT)
    return tl.max(largest)


@triton.jit(do_not_specialize_on_alignment=["base_out", "tuned_out"])
def _take_both(
    table, row_of_block, masks, numbers, addresses, offsets, base_out, tuned_out, strange,
    WORD: tl.constexpr, EXPONENT: tl.constexpr, STORED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Kept words of rows and of others like them, which lie at `addresses`; and in `strange` which of these
    hold NaN or infinity.
    """
    row, block, before, base, low, high = place(table, row_of_block, WORD, ALIGNED)
    tuned = at_address(tl.load(addresses + row), before, WORD, ALIGNED)
    masks = masks + 3 * row
    offsets = offsets + _PLANES * tl.program_id(0)
    if high - low == _BLOCK:
        largest = _take_both_block(
            base,
            tuned,
            offsets,
            base_out,
            tuned_out,
            masks,
            numbers,
            block,
            before,
            low,
            high,
            WORD,
            EXPONENT,
            STORED,
            True,
        )
    else:
        largest = _take_both_block(
            base,
            tuned,
            offsets,
            base_out,
            tuned_out,
            masks,
            numbers,
            block,
            before,
            low,
            high,
            WORD,
            EXPONENT,
            STORED,
            False,
        )
    tl.atomic_max(strange + row, 1, mask=largest == EXPONENT, sem="relaxed")


@triton.jit
def _add_block(
    words, offsets, values, factors, masks, numbers, block, before, low, high, rows, blocks,
    TERMS: tl.constexpr, DELTAS: tl.constexpr, STORED: tl.constexpr, WORD: tl.constexpr, CODE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    planes = read(words, low, high, WHOLE)
    results = ()
    drawn = ()
    firsts = ()
    thresholds = ()
    for t in tl.static_range(TERMS):
        own_masks = masks + 3 * t * rows
        stored = tl.constexpr(((STORED >> t) & 1) != 0)
        drawn = drawn + (draws(tl.load(own_masks), block, numbers),)  # type: ignore[assignment]
        firsts = firsts + (earlier(drawn[t], own_masks, before, low, high, stored, WHOLE),)  # type: ignore[assignment]
        thresholds = thresholds + (threshold_again(own_masks),)  # type: ignore[assignment]
    for plane in tl.static_range(_PLANES):
        word = planes[plane]
        number = _widen(word, CODE)
        total = number
        alone = word
        movers = zeros(tl.int32)  # one for each that gives its own word where it is alone, two for each other
        for t in tl.static_range(TERMS):
            own_masks = masks + 3 * t * rows
            stored = tl.constexpr(((STORED >> t) & 1) != 0)
            keeps = kept(drawn[t], own_masks, thresholds[t], before, low, high, plane, stored, WHOLE)
            first = (tl.load(offsets + _PLANES * t * blocks + plane) - 1) + of_plane(firsts[t], plane)
            factor = tl.load(factors + t * rows)
            if (DELTAS >> t) & 1:
                at = tl.load(values + t).to(tl.pointer_type(number.dtype)) + first + ranks(keeps)
                delta = tl.load(at, mask=keeps, other=0)
                moves = delta != 0
                ones = 2
            else:
                at = tl.load(values + t).to(tl.pointer_type(WORD)) + first + ranks(keeps)
                tuned = tl.load(at, mask=keeps, other=word)
                delta = _widen(tuned, CODE) - number
                moves = tuned != word
                ones = tl.where(tl.zeros_like(number) + factor == 1, 1, 2)
                alone = tl.where(moves, tuned, alone)
            total = tl.where(moves, total + factor * delta, total)
            movers += tl.where(moves, ones, 0)
        results = results + (tl.where(movers < 2, alone, _narrow(total, CODE)),)  # type: ignore[assignment]
    write(words, results, low, high, WHOLE)


@triton.jit(do_not_specialize=["rows", "blocks"])
def _add(
    table, row_of_block, masks, numbers, factors, offsets, values, rows, blocks,
    TERMS: tl.constexpr, DELTAS: tl.constexpr, STORED: tl.constexpr, WORD: tl.constexpr, CODE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The arithmetic law (docs/format.md §5) for TERMS packages. Bit t of DELTAS and STORED says whether term
    t has deltas, bitmaps.
    """
    row, block, before, words, low, high = place(table, row_of_block, WORD, ALIGNED)
    masks = masks + 3 * row
    offsets = offsets + _PLANES * tl.program_id(0)
    factors = factors + row
    if high - low == _BLOCK:
        _add_block(
            words, offsets, values, factors, masks, numbers, block, before, low, high, rows, blocks,
            TERMS, DELTAS, STORED, WORD, CODE, True,
        )  # fmt: skip
    else:
        _add_block(
            words, offsets, values, factors, masks, numbers, block, before, low, high, rows, blocks,
            TERMS, DELTAS, STORED, WORD, CODE, False,
        )  # fmt: skip


def fingerprint(rows: Rows) -> Tensor:
    """int64 [rows, 2]: both lanes of each row's share of its tensor's fingerprint, as bits of uint64."""
    lanes = torch.zeros((len(rows.rows), 2), dtype=torch.int64, device=rows.device)
    width = rows.dtype.itemsize
    unsigned = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}[width]
    _launch(
        fingerprint_kernel,
        rows,
        unit_factors_on(rows.device),
        lanes,
        _WORDS[rows.word],
        width,
        unsigned,
        rows.aligned,
    )
    return lanes


def counts(rows: Rows, masks: Masks) -> Tensor:
    """int64 [blocks, 8]: how many elements each plane of 1,024 keeps."""
    kept_counts = torch.empty((rows.blocks, PLANES), dtype=torch.int64, device=rows.device)
    _launch(_count, rows, *_of(rows, masks), kept_counts, masks.stored)
    return kept_counts


def take(rows: Rows, masks: Masks, offsets: Tensor, out: Tensor) -> None:
    """Write kept words into `out`, each plane's from its offset on, in their order."""
    _launch(
        _move, rows, *_of(rows, masks), offsets, out, _WORDS[rows.word], masks.stored, rows.aligned, False
    )


def take_both(
    base: Rows, tuned: Rows, masks: Masks, offsets: Tensor, base_out: Tensor, tuned_out: Tensor
) -> Tensor:
    """`take` of two models at once: of `base` into `base_out`, of `tuned`, rows of the same elements, into
    `tuned_out`.

    Returns:
        int32 [rows]: 1 where `tuned` holds NaN or infinity, also among elements that are dropped.
    """
    strange = torch.zeros(len(base.rows), dtype=torch.int32, device=base.device)
    addresses = to_device(torch.tensor([row.address for row in tuned.rows], dtype=torch.int64), base.device)
    _launch(
        _take_both, base, *_of(base, masks), addresses, offsets, base_out, tuned_out, strange,
        _WORDS[base.word], base.dtype.exponent_mask, masks.stored, base.aligned and tuned.aligned,
    )  # fmt: skip
    return strange


def put(rows: Rows, masks: Masks, offsets: Tensor, values: Tensor) -> None:
    """Make `values` the kept words, in place: the inverse of `take`."""
    _launch(
        _move, rows, *_of(rows, masks), offsets, values, _WORDS[rows.word], masks.stored, rows.aligned, True
    )


def add(rows: Rows, terms: Sequence[Term]) -> None:
    """What packages together make of the rows, in place."""
    if not terms:
        return
    device = rows.device
    compute = torch.float64 if rows.dtype.code == "F64" else torch.float32
    masks = torch.cat([term.masks.table(device) for term in terms])
    factors = to_device(torch.tensor([list(term.factors) for term in terms], dtype=compute), device)
    offsets = torch.cat([term.offsets for term in terms])
    values = to_device(torch.tensor([term.values.data_ptr() for term in terms], dtype=torch.int64), device)
    _launch(
        _add, rows, masks, blocks.numbers(device), factors, offsets, values, len(rows.rows), rows.blocks,
        len(terms), _bits(term.deltas for term in terms), _bits(term.masks.stored for term in terms),
        _WORDS[rows.word], rows.dtype.code, rows.aligned,
    )  # fmt: skip


def _of(rows: Rows, masks: Masks) -> tuple[Tensor, Tensor]:
    """What kernels need to work out masks."""
    return masks.table(rows.device), blocks.numbers(rows.device)


def _launch(kernel: Any, rows: Rows, *arguments: Any) -> None:
    """A program for each block, on the rows' own device, whichever is the current one."""
    if rows.blocks:
        with torch.cuda.device_of(rows.rows[0].flat):
            kernel[(rows.blocks,)](rows.table, rows.row_of_block, *arguments, **_LAUNCH)


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << place for place, flag in enumerate(flags) if flag)
