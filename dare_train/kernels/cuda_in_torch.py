"""The operations of `cuda` in plain torch, on any device: what they are tested against, and what runs where
Triton is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .launch_tables import BLOCK, PLANES, Masks, Rows, Term
from .law_in_torch import FLOATS, Dense, combined


def fingerprint(rows: Rows) -> Tensor:
    """int64 [rows, 2]: both lanes of each row's share of its tensor's fingerprint, as bits of uint64."""
    width = rows.dtype.itemsize
    ones = reference.ones(8 * width)
    shares = [
        reference.lanes(
            row.words.long() & ones, torch.arange(row.count, device=rows.device), row.start, width
        )
        for row in rows.rows
    ]
    return torch.stack(shares)


def counts(rows: Rows, masks: Masks) -> Tensor:
    """int64 [blocks, 8]: how many elements each plane of 1,024 keeps."""
    parts = [torch.zeros((0, PLANES), dtype=torch.int64, device=rows.device)]
    for number, row in enumerate(rows.rows):
        blocks = rows.first_blocks[number + 1] - rows.first_blocks[number]
        padded = torch.zeros(blocks * BLOCK, dtype=torch.int64, device=rows.device)
        padded[row.start % BLOCK : row.start % BLOCK + row.count] = _kept(rows, masks, number).long()
        parts.append(padded.reshape(blocks, PLANES, BLOCK // PLANES).sum(dim=2))
    return torch.cat(parts)


def take(rows: Rows, masks: Masks, offsets: Tensor, out: Tensor) -> None:
    """Write kept words into `out`, each plane's from its offset on, in their order."""
    for number, row in enumerate(rows.rows):
        if row.count:
            words = row.words[_kept(rows, masks, number)]
            _values(rows, offsets, out, number, words.numel()).copy_(words)


def take_both(
    base: Rows, tuned: Rows, masks: Masks, offsets: Tensor, base_out: Tensor, tuned_out: Tensor
) -> Tensor:
    """`take` of two models at once: of `base` into `base_out`, of `tuned`, rows of the same elements, into
    `tuned_out`.

    Returns:
        int32 [rows]: 1 where `tuned` holds NaN or infinity, also among elements that are dropped.
    """
    take(base, masks, offsets, base_out)
    take(tuned, masks, offsets, tuned_out)
    finite = [row.words.view(FLOATS[tuned.dtype.code]).isfinite().all() for row in tuned.rows]
    return 1 - torch.stack(finite).int()


def put(rows: Rows, masks: Masks, offsets: Tensor, values: Tensor) -> None:
    """Make `values` the kept words, in place: the inverse of `take`."""
    for number, row in enumerate(rows.rows):
        if row.count:
            kept = _kept(rows, masks, number)
            row.words[kept] = _values(rows, offsets, values, number, int(kept.sum()))


def add(rows: Rows, terms: Sequence[Term]) -> None:
    """What packages together make of the rows, in place (docs/format.md §5)."""
    for number, row in enumerate(rows.rows):
        if row.count and terms:
            row.words.copy_(
                combined(row.words, [_dense(rows, term, number) for term in terms], rows.dtype, rows.dtype)
            )


def _dense(rows: Rows, term: Term, number: int) -> Dense:
    """A package's part in one row: where it keeps nothing, words stay and deltas are zero."""
    words = rows.rows[number].words
    kept = _kept(rows, term.masks, number)
    every = torch.zeros_like(words, dtype=term.values.dtype) if term.deltas else words.clone()
    every[kept] = _values(rows, term.offsets, term.values, number, int(kept.sum()))
    return Dense(factor=term.factors[number], **{"delta" if term.deltas else "tuned": every})


def _kept(rows: Rows, masks: Masks, number: int) -> Tensor:
    row = rows.rows[number]
    bitmap = masks.bitmap(number)
    if bitmap is None:
        return reference.keep_mask(
            masks.keys[number], row.start, row.count, masks.thresholds[number], rows.device
        )
    bits = (bitmap[:, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device)) & 1
    return bits.reshape(-1)[: row.count].bool()


def _values(rows: Rows, offsets: Tensor, values: Tensor, number: int, count: int) -> Tensor:
    """Those of one row: its planes' lie one after another."""
    first = int(offsets[rows.first_blocks[number], 0])
    return values[first : first + count]
