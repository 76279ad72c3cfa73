"""Deltas between two models on one device, encoded there: `exact` values are grouped and packed, and only what is compressed crosses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from . import codec
from .dtypes import DType
from .fingerprint import Fingerprint
from .kernels import pack, unpack
from .kernels.rows import Masks, Row, Rows
from .kernels.staging import to_host
from .segments import Packed
from .stats import Magnitudes

_AT_ONCE = 1 << 20
"""Kept elements that are encoded by one round of operations: enough to keep a device busy, in little memory."""
_ALIGNED = 16
"""Elements at whose multiples copies of runs begin."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Both:
    """The words that some runs keep of the base and of tuned weights, one run's after another's, where they lie."""

    kernels: ModuleType
    base: Rows
    """The runs themselves."""
    masks: Masks
    offsets: Tensor
    sizes: Sequence[int]
    """How many words each run keeps."""
    own: Tensor
    new: Tensor

    @property
    def dtype(self) -> DType:
        return self.base.dtype


def prints_of(kernels: ModuleType, rows: Rows) -> list[Fingerprint]:
    """Each row's share of a fingerprint. Waits for the device."""
    return [Fingerprint(first % 2**64, second % 2**64) for first, second in kernels.fingerprint(rows).cpu().tolist()]


def packed(both: Both, factors: Sequence[float]) -> list[Packed]:
    """Encode the runs, about a million kept elements at a time; `factors` are their rescales. `both.new` becomes the result's words."""
    shares = [_share(both, factors, begin, end) for begin, end in _shares(both.sizes)]
    made = [one for share in shares for one in share]
    prints = zip(prints_of(both.kernels, both.base), _results(both), strict=True)
    return [replace(one, base=base, result=result) for one, (base, result) in zip(made, prints, strict=True)]


def _shares(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of runs that are encoded together."""
    begin, elements = 0, 0
    for end, size in enumerate(sizes):
        if end > begin and elements + size > _AT_ONCE:
            yield begin, end
            begin, elements = end, 0
        elements += size
    if begin < len(sizes):
        yield begin, len(sizes)


def _share(both: Both, factors: Sequence[float], begin: int, end: int) -> list[Packed]:
    """Some of the runs, without their fingerprints."""
    first, sizes, dtype = sum(both.sizes[:begin]), both.sizes[begin:end], both.dtype
    own, new = (words[first : first + sum(sizes)] for words in (both.own, both.new))
    made, sizes_of_deltas = pack.exact(own, new, sizes, dtype), pack.magnitudes(own, new, sizes, dtype)
    new.copy_(unpack.law(own, new, sizes, factors[begin:end], dtype))
    contents = to_host(made.contents).data
    table = zip(sizes, made.changed.tolist(), to_host(made.starts), to_host(made.before), _hosted(sizes_of_deltas), strict=True)
    found, done = list[Packed](), 0
    for kept, changed, starts, before, (magnitudes, strange) in table:
        data = contents[done : done + codec.content_size("exact", dtype, kept, changed, 0)]
        content = codec.packed_exact(data, kept, starts, before, dtype)
        found.append(Packed(content=content, kept=kept, changed=changed, magnitudes=magnitudes, strange=strange))
        done += len(data)
    return found


def _hosted(made: pack.Sizes) -> Iterator[tuple[Magnitudes, int]]:
    """Of each run: |δ|, and how many deltas are not finite."""
    for counts, largest, strange in zip(to_host(made.counts), made.largest.tolist(), made.strange.tolist(), strict=True):
        yield Magnitudes(counts, largest), strange


def _results(both: Both) -> list[Fingerprint]:
    """Fingerprints of the runs with `both.new` in place: in copies of them, one after another, so that whole blocks stay aligned."""
    places = [0, *accumulate(-(-row.count // _ALIGNED) * _ALIGNED for row in both.base.rows)]
    scratch = torch.empty(places.pop(), dtype=both.base.word, device=both.base.device)
    rows = tuple(Row(flat=scratch, start=row.start, count=row.count, offset=at) for row, at in zip(both.base.rows, places, strict=True))
    for copy, row in zip(rows, both.base.rows, strict=True):
        copy.words.copy_(row.words)
    result = Rows(dtype=both.dtype, rows=rows)
    both.kernels.put(result, both.masks, both.offsets, both.new)
    return prints_of(both.kernels, result)
