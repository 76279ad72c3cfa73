"""Kept words of many runs, gathered where the model lies: only they cross to the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..dtypes import DType, Words
from ..kernels import pack_in_torch as pack
from ..kernels import unpack_in_torch as unpack
from ..kernels.backends import kernels_for
from ..kernels.launch_tables import Masks, Row, Rows, offsets_of
from ..kernels.transfers import to_device, to_host
from ..package import codec
from ..package.magnitudes import Magnitudes
from ..parallel.threads import ordered_map
from ..weights.fingerprint import Fingerprint, prints_of
from ..weights.live import LiveWeights
from .assembly import Work
from .encoding import Packed, Taken
from .plan import TensorPlan

_AT_ONCE = 1 << 20
"""Kept elements that are encoded by one round of operations: enough to keep a device busy, in little
memory."""
_ALIGNED = 16
"""Elements at whose multiples copies of runs begin."""


class Pair(NamedTuple):
    """What a run of a delta needs to be encoded: the kept words of base and tuned weights, and the base's
    fingerprint.
    """

    own: Words
    tuned: Words
    base: Fingerprint


class _Batch(NamedTuple):
    """Runs of one dtype on one device, by their places in a list of work. Their values are `exact`, or those
    of none are.
    """

    kernels: ModuleType
    dtype: DType
    exact: bool
    places: list[int]
    rows: list[Row]


def gathered(live: LiveWeights, work: Sequence[Work], later: Collection[str] = ()) -> list[Taken | None]:
    """Of each run of a delta what its package will need, copied; None where no kernels work on its words
    where they lie, and for tensors `later`.

    One launch for each dtype and device counts the kept words, and one gathers them.
    """
    taken: list[Taken | None] = [None] * len(work)
    for batch in _batches(live, work, lambda name: name not in later):
        words = _kept(batch, batch.rows, [work[place] for place in batch.places])
        for place, row, own in zip(batch.places, batch.rows, words, strict=True):
            taken[place] = Taken(work[place][0], row.start, row.count, own)
    return taken


def on_devices(live: LiveWeights) -> set[str]:
    """Tensors that kernels can work on where they lie, as far as they lie in this process."""

    def one(name: str, start: int, stop: int) -> bool:
        lying = live.lying(name, start, stop - start)
        return lying is not None and kernels_for(lying[0].device, live.kernels) is not None

    return {name for name, spans in live.held.items() if spans and all(one(name, *span) for span in spans)}


def pairs_ahead(
    base: LiveWeights, tuned: LiveWeights, batches: Sequence[Sequence[Work]]
) -> Generator[list[Pair | Packed | None], None, None]:
    """`pairs` of one batch after another, on a thread: the device works on the next ones while these are
    compressed.

    The thread has streams of its own, so what the device was asked to do before is waited for.
    """
    for device in {
        piece.tensor.device
        for live in (base, tuned)
        for name in live.tensors
        for piece in live.holding(name).pieces
    }:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return ordered_map(lambda batch: pairs(base, tuned, batch), batches, threads=1)


def pairs(base: LiveWeights, tuned: LiveWeights, work: Sequence[Work]) -> list[Pair | Packed | None]:
    """Of each run of a delta what encoding needs, or with `exact` values all but the frame; None where base
    and tuned do not lie on one device that has kernels, and where tuned weights are not finite and would have
    to be: there one has to look closer."""
    found: list[Pair | Packed | None] = [None] * len(work)
    for batch in _batches(base, work, lambda name: base.tensors[name] == tuned.tensors[name]):
        beside = [_row(tuned, *work[place]) for place in batch.places]
        both = [
            (n, row)
            for n, row in enumerate(beside)
            if row is not None and row.flat.device == batch.rows[0].flat.device
        ]
        if both:
            for place, made in _paired(batch, [n for n, _ in both], [row for _, row in both], work):
                found[place] = made
    return found


def _paired(
    batch: _Batch, numbers: list[int], tuned: list[Row], work: Sequence[Work]
) -> list[tuple[int, Pair | Packed]]:
    places = [batch.places[n] for n in numbers]
    runs = [work[place] for place in places]
    base = Rows(dtype=batch.dtype, rows=tuple(batch.rows[n] for n in numbers))
    masks, offsets, sizes = _counted(batch, base, runs)
    own, new = torch.empty((2, sum(sizes)), dtype=base.word, device=base.device)
    strange = batch.kernels.take_both(
        base, Rows(dtype=batch.dtype, rows=tuple(tuned)), masks, offsets, own, new
    )
    both = Both(kernels=batch.kernels, base=base, masks=masks, offsets=offsets, sizes=sizes, own=own, new=new)
    plans = [plan for plan, _, _ in runs]
    made: Sequence[Pair | Packed] = (
        packed(both, [plan.factor for plan in plans]) if batch.exact else _fetched(both)
    )
    found = zip(places, plans, made, strange.tolist(), strict=True)
    return [(place, one) for place, plan, one, not_finite in found if not not_finite or plan.allow_nonfinite]


def _fetched(both: Both) -> list[Pair]:
    own, new = (_split(to_host(words).view(both.dtype.word), both.sizes) for words in (both.own, both.new))
    return list(map(Pair, own, new, prints_of(both.kernels, both.base)))


def _batches(live: LiveWeights, work: Sequence[Work], wanted: Callable[[str], bool]) -> list[_Batch]:
    """Runs of deltas that kernels can work on where they lie."""
    found: dict[tuple[torch.device, DType, bool], _Batch] = {}
    for place, (plan, start, count) in enumerate(work):
        is_delta = plan.kind == "delta" and start < plan.base_numel and wanted(plan.name)
        row = _row(live, plan, start, count) if is_delta else None
        kernels = kernels_for(row.flat.device, live.kernels) if row is not None else None
        if row is not None and kernels is not None:
            dtype, exact = live.tensors[plan.name].dtype, plan.values == "exact"
            batch = found.setdefault((row.flat.device, dtype, exact), _Batch(kernels, dtype, exact, [], []))
            batch.places.append(place)
            batch.rows.append(row)
    return list(found.values())


def _row(live: LiveWeights, plan: TensorPlan, start: int, count: int) -> Row | None:
    lying = live.lying(plan.name, start, count)
    return None if lying is None else Row(flat=lying[0], start=start, count=count, offset=lying[1])


def _kept(batch: _Batch, rows: Sequence[Row], work: Sequence[Work]) -> list[Words]:
    """The kept words of each row."""
    table = Rows(dtype=batch.dtype, rows=tuple(rows))
    masks, offsets, sizes = _counted(batch, table, work)
    out = torch.empty(sum(sizes), dtype=table.word, device=table.device)
    batch.kernels.take(table, masks, offsets, out)
    return _split(to_host(out).view(batch.dtype.word), sizes)


def _counted(batch: _Batch, rows: Rows, work: Sequence[Work]) -> tuple[Masks, Tensor, list[int]]:
    """The masks of rows, where the kept words of their blocks will lie, and how many each row has."""
    bitmaps = [_bitmap(*one, rows.device) for one in work]
    masks = Masks(
        keys=[plan.mask.key for plan, _, _ in work],
        thresholds=[plan.mask.threshold if plan.mask.kind == "seeded" else 0 for plan, _, _ in work],
        bitmaps=bitmaps if any(bitmap is not None for bitmap in bitmaps) else (),
    )
    counts = batch.kernels.counts(rows, masks)
    return masks, offsets_of(counts), rows.per_row(counts)


def _split(words: Words, sizes: Sequence[int]) -> list[Words]:
    return np.split(words, np.cumsum(sizes)[:-1])


def _bitmap(plan: TensorPlan, start: int, count: int, device: torch.device) -> Tensor | None:
    if plan.stored is None:
        return None
    return to_device(
        torch.from_numpy(np.packbits(plan.stored[start : start + count], bitorder="little")), device
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Both:
    """The words that some runs keep of the base and of tuned weights, one run's after another's, where they
    lie.
    """

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


def packed(both: Both, factors: Sequence[float]) -> list[Packed]:
    """Encode the runs, about a million kept elements at a time; `factors` are their rescales. `both.new`
    becomes the result's words.
    """
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
    table = zip(
        sizes,
        made.changed.tolist(),
        to_host(made.starts),
        to_host(made.before),
        _hosted(sizes_of_deltas),
        strict=True,
    )
    found, done = list[Packed](), 0
    for kept, changed, starts, before, (magnitudes, strange) in table:
        data = contents[done : done + codec.content_size("exact", dtype, kept, changed, 0)]
        content = codec.packed_exact(data, kept, starts, before, dtype)
        found.append(
            Packed(content=content, kept=kept, changed=changed, magnitudes=magnitudes, strange=strange)
        )
        done += len(data)
    return found


def _hosted(made: pack.Sizes) -> Iterator[tuple[Magnitudes, int]]:
    """Of each run: |δ|, and how many deltas are not finite."""
    for counts, largest, strange in zip(
        to_host(made.counts), made.largest.tolist(), made.strange.tolist(), strict=True
    ):
        yield Magnitudes(counts, largest), strange


def _results(both: Both) -> list[Fingerprint]:
    """Fingerprints of the runs with `both.new` in place: in copies of them, one after another, so that whole
    blocks stay aligned.
    """
    places = [0, *accumulate(-(-row.count // _ALIGNED) * _ALIGNED for row in both.base.rows)]
    scratch = torch.empty(places.pop(), dtype=both.base.word, device=both.base.device)
    rows = tuple(
        Row(flat=scratch, start=row.start, count=row.count, offset=at)
        for row, at in zip(both.base.rows, places, strict=True)
    )
    for copy, row in zip(rows, both.base.rows, strict=True):
        copy.words.copy_(row.words)
    result = Rows(dtype=both.dtype, rows=rows)
    both.kernels.put(result, both.masks, both.offsets, both.new)
    return prints_of(both.kernels, result)
