"""The operations of `reference` on whole models in a GPU's memory, in Triton: one launch for all tensors of a dtype.

Bytes that each must move, per element of n bytes at drop rate p:

    fingerprint   n                      read
    counts        0                      nothing but the draws, computed
    take          n + (1 - p)·n          read, kept words written
    put           2n + (1 - p)·n         read, values read, written
    add           2n + k·(1 - p)·n       the same with the values of k packages

Products and sums are rounded one by one: kernels are launched with fusion of floating-point operations off. On CPU tensors
these run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import BLOCK, PLANES, Masks, Rows, Term, to_device

_WORDS = {torch.uint8: tl.uint8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64}
_LAUNCH: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}

_BLOCK = tl.constexpr(BLOCK)
_COUNTERS = tl.constexpr(BLOCK // 8)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _place(table, row_of_block, WORD: tl.constexpr, ALIGNED: tl.constexpr):
    """This program's row, its block, elements of the row before that, where the block's words begin, or would begin if the row
    had all of them, and which of them it has: [low, high)."""
    program = tl.program_id(0)
    row = tl.load(row_of_block + program).to(tl.int64)
    address, start = tl.load(table + 4 * row), tl.load(table + 4 * row + 1)
    count, first = tl.load(table + 4 * row + 2), tl.load(table + 4 * row + 3)
    block = start // _BLOCK + (program - first)
    before = block * _BLOCK - start
    pointer = address.to(tl.pointer_type(WORD))
    if ALIGNED:
        pointer, before = tl.multiple_of(pointer, 16), tl.multiple_of(before, 8)
    low, high = tl.maximum(-before, 0).to(tl.int32), tl.minimum(count - before, _BLOCK).to(tl.int32)
    return row, block, before, pointer + before, low, high


@triton.jit
def _philox(key, block):
    """[1024] each: the four words of the block's counters."""
    counter = block * _COUNTERS + tl.arange(0, _COUNTERS).to(tl.int64)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(high)
    return tl.philox(key, counter.to(tl.uint32), high, zero, zero)


@triton.jit
def _draws(w0, w1, w2, w3, PLANE: tl.constexpr):
    """[1024]: the draws of a block's elements from 1024·PLANE on: half PLANE % 2, low first, of word PLANE // 2."""
    if PLANE < 2:
        word = w0
    elif PLANE < 4:
        word = w1
    elif PLANE < 6:
        word = w2
    else:
        word = w3
    word = word >> 16 if PLANE % 2 else word & 0xFFFF
    return word.to(tl.int32)


@triton.jit
def _places(PLANE: tl.constexpr):
    """[1024]: the places in a block of a plane's elements."""
    return PLANE * _COUNTERS + tl.arange(0, _COUNTERS)


@triton.jit
def _kept(w0, w1, w2, w3, masks, before, low, high, PLANE: tl.constexpr, STORED: tl.constexpr, WHOLE: tl.constexpr):
    """[1024]: which elements of a plane are kept."""
    places = _places(PLANE)
    kept = _draws(w0, w1, w2, w3, PLANE) >= tl.load(masks + 1).to(tl.int32)
    inside = (places >= low) & (places < high)
    if STORED:
        at = before + places
        bitmap = tl.load(masks + 2)
        has_one = tl.zeros_like(at) + bitmap != 0  # as a tensor: the interpreter has no scalar truths
        bytes_ = tl.load(bitmap.to(tl.pointer_type(tl.uint8)) + (at >> 3), mask=inside & has_one, other=0)
        kept = tl.where(has_one, ((bytes_ >> (at & 7).to(tl.uint8)) & 1) != 0, kept)
    if not WHOLE:
        kept = kept & inside
    return kept


@triton.jit
def _ranks(kept, others):
    """[1024] each, for two planes: how many kept elements come before each. One prefix sum counts both, in halves of its words."""
    ones = kept.to(tl.int32) + (others.to(tl.int32) << 16)
    before = tl.cumsum(ones, axis=0) - ones
    return before & 0xFFFF, before >> 16


@triton.jit
def _read(words, low, high, PLANE: tl.constexpr, WHOLE: tl.constexpr):
    places = _places(PLANE)
    if WHOLE:
        return tl.load(words + places)
    else:
        return tl.load(words + places, mask=(places >= low) & (places < high), other=0)


@triton.jit
def _write(words, values, low, high, PLANE: tl.constexpr, WHOLE: tl.constexpr):
    places = _places(PLANE)
    if WHOLE:
        tl.store(words + places, values)
    else:
        tl.store(words + places, values, mask=(places >= low) & (places < high))


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
def _print_of(words, block, low, high, UNSIGNED: tl.constexpr, WHOLE: tl.constexpr):
    """Both lanes of a block, [1024] each, still to be added up."""
    first, second = tl.zeros((_COUNTERS,), tl.uint64), tl.zeros((_COUNTERS,), tl.uint64)
    for plane in tl.static_range(8):
        places = _places(plane)
        word = _read(words, low, high, plane, WHOLE)
        v = word.to(UNSIGNED, bitcast=True).to(tl.uint64) + (block * _BLOCK + places).to(tl.uint64) * _GOLDEN
        v = (v ^ (v >> 30)) * _MIX1
        v = (v ^ (v >> 27)) * _MIX2
        v = v ^ (v >> 31)
        if not WHOLE:
            v = tl.where((places >= low) & (places < high), v, 0)
        first += v
        second += (v & 0xFFFFFFFF) * (v >> 32)
    return first, second


@triton.jit
def _fingerprint(table, row_of_block, lanes, WORD: tl.constexpr, UNSIGNED: tl.constexpr, ALIGNED: tl.constexpr):
    row, block, _, words, low, high = _place(table, row_of_block, WORD, ALIGNED)
    if high - low == _BLOCK:
        first, second = _print_of(words, block, low, high, UNSIGNED, True)
    else:
        first, second = _print_of(words, block, low, high, UNSIGNED, False)
    tl.atomic_add(lanes + 2 * row, tl.sum(first, axis=0).to(tl.int64, bitcast=True))
    tl.atomic_add(lanes + 2 * row + 1, tl.sum(second, axis=0).to(tl.int64, bitcast=True))


@triton.jit
def _count(table, row_of_block, masks, counts, STORED: tl.constexpr):
    row, block, before, _, low, high = _place(table, row_of_block, tl.int8, False)
    masks += 3 * row
    w0, w1, w2, w3 = _philox(tl.load(masks), block)
    for plane in tl.static_range(8):
        kept = _kept(w0, w1, w2, w3, masks, before, low, high, plane, STORED, False)
        tl.store(counts + 8 * tl.program_id(0) + plane, tl.sum(kept.to(tl.int32), axis=0).to(tl.int64))


@triton.jit
def _move_plane(words, values, at, kept, low, high, PLANE: tl.constexpr, WHOLE: tl.constexpr, PUT: tl.constexpr):
    word = _read(words, low, high, PLANE, WHOLE)
    if PUT:
        _write(words, tl.where(kept, tl.load(values + at, mask=kept, other=0), word), low, high, PLANE, WHOLE)
    else:
        tl.store(values + at, word, mask=kept)


@triton.jit
def _move_block(
    words, offsets, values, masks, block, before, low, high, STORED: tl.constexpr, WHOLE: tl.constexpr, PUT: tl.constexpr
):  # fmt: skip
    w0, w1, w2, w3 = _philox(tl.load(masks), block)
    for pair in tl.static_range(4):
        kept = _kept(w0, w1, w2, w3, masks, before, low, high, 2 * pair, STORED, WHOLE)
        others = _kept(w0, w1, w2, w3, masks, before, low, high, 2 * pair + 1, STORED, WHOLE)
        at, others_at = _ranks(kept, others)
        _move_plane(words, values + tl.load(offsets + 2 * pair), at, kept, low, high, 2 * pair, WHOLE, PUT)
        _move_plane(words, values + tl.load(offsets + 2 * pair + 1), others_at, others, low, high, 2 * pair + 1, WHOLE, PUT)


@triton.jit
def _move(
    table, row_of_block, masks, offsets, values, WORD: tl.constexpr, STORED: tl.constexpr, ALIGNED: tl.constexpr, PUT: tl.constexpr
):  # fmt: skip
    """Kept words from the rows to `values`, or with PUT from there to the rows."""
    row, block, before, words, low, high = _place(table, row_of_block, WORD, ALIGNED)
    masks, offsets = masks + 3 * row, offsets + 8 * tl.program_id(0)
    if high - low == _BLOCK:
        _move_block(words, offsets, values, masks, block, before, low, high, STORED, True, PUT)
    else:
        _move_block(words, offsets, values, masks, block, before, low, high, STORED, False, PUT)


@triton.jit
def _add_plane(
    words, offsets, values, factors, kept, ranks, low, high, rows, blocks,
    PLANE: tl.constexpr, TERMS: tl.constexpr, DELTAS: tl.constexpr, WORD: tl.constexpr, CODE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`kept` and `ranks` are tuples, of each term."""
    word = _read(words, low, high, PLANE, WHOLE)
    own = _widen(word, CODE)
    total, alone = own, word
    movers = tl.zeros((_COUNTERS,), tl.int32)  # how many, and in the upper half how many of them are exact
    for t in tl.static_range(TERMS):
        at = tl.load(offsets + 8 * t * blocks + PLANE) + ranks[t]
        factor = tl.load(factors + t * rows)
        if (DELTAS >> t) & 1:
            delta = tl.load(tl.load(values + t).to(tl.pointer_type(own.dtype)) + at, mask=kept[t], other=0)
            moves = kept[t] & (delta != 0)
        else:
            tuned = tl.load(tl.load(values + t).to(tl.pointer_type(WORD)) + at, mask=kept[t], other=0)
            delta = _widen(tuned, CODE) - own
            moves = kept[t] & (tuned != word)
            as_it_is = moves & (tl.zeros_like(own) + factor == 1)
            alone = tl.where(as_it_is, tuned, alone)
            movers += as_it_is.to(tl.int32) << 16
        total = tl.where(moves, total + factor * delta, total)
        movers += moves.to(tl.int32)
    moved = tl.where(movers == 0x10001, alone, _narrow(total, CODE))
    _write(words, tl.where(movers > 0, moved, word), low, high, PLANE, WHOLE)


@triton.jit
def _add_block(
    words, offsets, values, factors, masks, block, before, low, high, rows, blocks,
    TERMS: tl.constexpr, DELTAS: tl.constexpr, STORED: tl.constexpr, WORD: tl.constexpr, CODE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    keys = ()
    for t in tl.static_range(TERMS):  # loaded once, so that draws are computed once for all planes
        keys = keys + (tl.load(masks + 3 * t * rows),)  # type: ignore[assignment]
    for pair in tl.static_range(4):
        kept, others, ranks, others_ranks = (), (), (), ()
        for t in tl.static_range(TERMS):
            w0, w1, w2, w3 = _philox(keys[t], block)
            own_masks, stored = masks + 3 * t * rows, tl.constexpr(((STORED >> t) & 1) != 0)
            kept = kept + (_kept(w0, w1, w2, w3, own_masks, before, low, high, 2 * pair, stored, WHOLE),)  # type: ignore[assignment]
            others = others + (_kept(w0, w1, w2, w3, own_masks, before, low, high, 2 * pair + 1, stored, WHOLE),)  # type: ignore[assignment]
            both = _ranks(kept[t], others[t])
            ranks, others_ranks = ranks + (both[0],), others_ranks + (both[1],)  # type: ignore[assignment]
        _add_plane(words, offsets, values, factors, kept, ranks, low, high, rows, blocks, 2 * pair, TERMS, DELTAS, WORD, CODE, WHOLE)
        _add_plane(
            words, offsets, values, factors, others, others_ranks, low, high, rows, blocks, 2 * pair + 1, TERMS, DELTAS, WORD, CODE, WHOLE
        )


@triton.jit
def _add(
    table, row_of_block, masks, factors, offsets, values, rows, blocks,
    TERMS: tl.constexpr, DELTAS: tl.constexpr, STORED: tl.constexpr, WORD: tl.constexpr, CODE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The arithmetic law (docs/format.md §5) for TERMS packages. Bit t of DELTAS and STORED says whether term t has deltas, bitmaps."""
    row, block, before, words, low, high = _place(table, row_of_block, WORD, ALIGNED)
    masks, offsets, factors = masks + 3 * row, offsets + 8 * tl.program_id(0), factors + row
    if high - low == _BLOCK:
        _add_block(words, offsets, values, factors, masks, block, before, low, high, rows, blocks, TERMS, DELTAS, STORED, WORD, CODE, True)
    else:
        _add_block(words, offsets, values, factors, masks, block, before, low, high, rows, blocks, TERMS, DELTAS, STORED, WORD, CODE, False)


def fingerprint(rows: Rows) -> Tensor:
    """int64 [rows, 2]: both lanes of each row's share of its tensor's fingerprint, as bits of uint64."""
    lanes = torch.zeros((len(rows.rows), 2), dtype=torch.int64, device=rows.device)
    unsigned = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}[rows.dtype.itemsize]
    _launch(_fingerprint, rows, lanes, _WORDS[rows.word], unsigned, rows.aligned)
    return lanes


def counts(rows: Rows, masks: Masks) -> Tensor:
    """int64 [blocks, 8]: how many elements each plane of 1,024 keeps."""
    found = torch.empty((rows.blocks, PLANES), dtype=torch.int64, device=rows.device)
    _launch(_count, rows, masks.table(rows.device), found, masks.stored)
    return found


def take(rows: Rows, masks: Masks, offsets: Tensor, out: Tensor) -> None:
    """Write kept words into `out`, each plane's from its offset on, in their order."""
    _launch(_move, rows, masks.table(rows.device), offsets, out, _WORDS[rows.word], masks.stored, rows.aligned, False)


def put(rows: Rows, masks: Masks, offsets: Tensor, values: Tensor) -> None:
    """Make `values` the kept words, in place: the inverse of `take`."""
    _launch(_move, rows, masks.table(rows.device), offsets, values, _WORDS[rows.word], masks.stored, rows.aligned, True)


def _launch(kernel: Any, rows: Rows, *arguments: Any) -> None:
    """A program for each block, on the rows' own device, whichever is the current one."""
    if rows.blocks:
        with torch.cuda.device_of(rows.rows[0].flat):
            kernel[(rows.blocks,)](rows.table, rows.row_of_block, *arguments, **_LAUNCH)


def add(rows: Rows, terms: Sequence[Term]) -> None:
    """What packages together make of the rows, in place."""
    if not terms:
        return
    device, compute = rows.device, torch.float64 if rows.dtype.code == "F64" else torch.float32
    masks = torch.cat([term.masks.table(device) for term in terms])
    factors = to_device(torch.tensor([list(term.factors) for term in terms], dtype=compute), device)
    offsets = torch.cat([term.offsets for term in terms])
    values = to_device(torch.tensor([term.values.data_ptr() for term in terms], dtype=torch.int64), device)
    _launch(
        _add, rows, masks, factors, offsets, values, len(rows.rows), rows.blocks,
        len(terms), _bits(term.deltas for term in terms), _bits(term.masks.stored for term in terms),
        _WORDS[rows.word], rows.dtype.code, rows.aligned,
    )  # fmt: skip


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << place for place, flag in enumerate(flags) if flag)
