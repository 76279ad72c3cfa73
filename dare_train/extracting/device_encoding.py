"""Kept words of many runs, gathered where the model lies: only they cross to the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
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
from ..weights.live.live import LiveWeights
from ..weights.protocol import InMemory
from .assembly import Work
from .encoding import KeptWords, PackedRun

_AT_ONCE = 1 << 20
"""Kept elements that are encoded by one round of operations: enough to keep a device busy, in little
memory."""
_ALIGNED = 16
"""Elements at whose multiples copies of runs begin."""


class _Batch(NamedTuple):
    """Runs of one dtype on one device, by their places in a list of work. All of their values are `exact`
    and at hand, or none are.
    """

    kernels: ModuleType
    dtype: DType
    exact: bool
    places: list[int]
    rows: list[Row]


def gathered(live: LiveWeights, work: Sequence[Work], later: Collection[str] = ()) -> list[Words | None]:
    """Of each run of a delta the kept words, copied; None where no kernels work on its words where they lie,
    and for tensors `later`.

    One launch for each dtype and device counts the kept words, and one gathers them.
    """
    kept: list[Words | None] = [None] * len(work)
    for batch in _batches(live, work, lambda name: name not in later):
        words = _kept(batch, batch.rows, [work[place] for place in batch.places])
        for place, kept_words in zip(batch.places, words, strict=True):
            kept[place] = kept_words
    return kept


def on_devices(live: LiveWeights) -> set[str]:
    """Tensors that kernels can work on where they lie, as far as they lie in this process."""

    def has_kernels(name: str, start: int, stop: int) -> bool:
        lying = live.lying(name, start, stop - start)
        return lying is not None and kernels_for(lying[0].device, live.kernels) is not None

    return {
        name for name, spans in live.held.items() if spans and all(has_kernels(name, *span) for span in spans)
    }


def gathered_ahead(
    base: InMemory, tuned: InMemory, batches: Sequence[Sequence[Work]]
) -> Generator[list[KeptWords | PackedRun | None], None, None]:
    """`gathered_pairs` of one batch after another, on a thread: the device works on the next ones while these
    are compressed.

    The thread has streams of its own, so what the device was asked to do before is waited for.
    """
    for device in base.devices() | tuned.devices():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return ordered_map(lambda batch: gathered_pairs(base, tuned, batch), batches, threads=1)


def gathered_pairs(
    base: InMemory, tuned: InMemory, work: Sequence[Work]
) -> list[KeptWords | PackedRun | None]:
    """Of each run of a delta what encoding needs, or with `exact` values all but the frame; None where base
    and tuned do not lie on one device that has kernels, and where tuned weights are not finite and would have
    to be: there one has to look closer."""
    gathered: list[KeptWords | PackedRun | None] = [None] * len(work)
    for batch in _batches(base, work, lambda name: base.tensors[name] == tuned.tensors[name]):
        device = batch.rows[0].flat.device
        tuned_rows = [_row(tuned, work[place]) for place in batch.places]
        beside = {n: row for n, row in enumerate(tuned_rows) if row is not None and row.flat.device == device}
        if beside:
            for place, run in _paired(batch, beside, work):
                gathered[place] = run
    return gathered


def _paired(
    batch: _Batch, tuned: Mapping[int, Row], work: Sequence[Work]
) -> list[tuple[int, KeptWords | PackedRun]]:
    """Those runs of a batch whose `tuned` rows, by their number in it, lie beside the base's."""
    places = [batch.places[n] for n in tuned]
    runs = [work[place] for place in places]
    base = Rows(dtype=batch.dtype, rows=tuple(batch.rows[n] for n in tuned))
    masks, offsets, sizes = _counted(batch, base, runs)
    base_words, tuned_words = torch.empty((2, sum(sizes)), dtype=base.word, device=base.device)
    rows = Rows(dtype=batch.dtype, rows=tuple(tuned.values()))
    not_finite = batch.kernels.take_both(base, rows, masks, offsets, base_words, tuned_words)
    both = Both(
        kernels=batch.kernels,
        base=base,
        masks=masks,
        offsets=offsets,
        sizes=sizes,
        base_words=base_words,
        tuned_words=tuned_words,
    )
    gathered: Sequence[KeptWords | PackedRun]
    gathered = packed(both, [run.plan.factor for run in runs]) if batch.exact else _fetched(both)
    usable: list[tuple[int, KeptWords | PackedRun]] = []
    for number, bad in enumerate(not_finite.tolist()):
        if runs[number].plan.allow_nonfinite or not bad:
            usable.append((places[number], gathered[number]))
    return usable


def _fetched(both: Both) -> list[KeptWords]:
    base_words = _split(to_host(both.base_words).view(both.dtype.word), both.sizes)
    tuned_words = _split(to_host(both.tuned_words).view(both.dtype.word), both.sizes)
    return list(map(KeptWords, base_words, tuned_words, prints_of(both.kernels, both.base)))


def _batches(live: InMemory, work: Sequence[Work], wanted: Callable[[str], bool]) -> list[_Batch]:
    """Runs of deltas that kernels can work on where they lie."""
    batches: dict[tuple[torch.device, DType, bool], _Batch] = {}
    for place, run in enumerate(work):
        row = _row(live, run) if run.is_delta and wanted(run.plan.name) else None
        kernels = kernels_for(row.flat.device, live.kernels) if row is not None else None
        if row is not None and kernels is not None:
            dtype = live.tensors[run.plan.name].dtype
            exact = run.plan.values == "exact" and run.plan.landing is None
            batch = _Batch(kernels, dtype, exact, [], [])
            batch = batches.setdefault((row.flat.device, dtype, exact), batch)
            batch.places.append(place)
            batch.rows.append(row)
    return list(batches.values())


def _row(live: InMemory, run: Work) -> Row | None:
    lying = live.lying(run.plan.name, run.start, run.length)
    return None if lying is None else Row(flat=lying[0], start=run.start, count=run.length, offset=lying[1])


def _kept(batch: _Batch, rows: Sequence[Row], work: Sequence[Work]) -> list[Words]:
    """The kept words of each row."""
    table = Rows(dtype=batch.dtype, rows=tuple(rows))
    masks, offsets, sizes = _counted(batch, table, work)
    out = torch.empty(sum(sizes), dtype=table.word, device=table.device)
    batch.kernels.take(table, masks, offsets, out)
    return _split(to_host(out).view(batch.dtype.word), sizes)


def _counted(batch: _Batch, rows: Rows, work: Sequence[Work]) -> tuple[Masks, Tensor, list[int]]:
    """The masks of rows, where the kept words of their blocks will lie, and how many each row has."""
    bitmaps = [_bitmap(run, rows.device) for run in work]
    drawn = [run.plan.mask for run in work]
    masks = Masks(
        keys=[mask.key for mask in drawn],
        thresholds=[mask.threshold if mask.kind == "seeded" else 0 for mask in drawn],
        bitmaps=bitmaps if any(bitmap is not None for bitmap in bitmaps) else (),
    )
    counts = batch.kernels.counts(rows, masks)
    return masks, offsets_of(counts), rows.per_row(counts)


def _split(words: Words, sizes: Sequence[int]) -> list[Words]:
    return np.split(words, np.cumsum(sizes)[:-1])


def _bitmap(run: Work, device: torch.device) -> Tensor | None:
    stored = run.plan.stored
    if stored is None:
        return None
    bitmap = np.packbits(stored[run.start : run.start + run.length], bitorder="little")
    return to_device(torch.from_numpy(bitmap), device)


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
    base_words: Tensor
    tuned_words: Tensor

    @property
    def dtype(self) -> DType:
        return self.base.dtype


def packed(both: Both, factors: Sequence[float]) -> list[PackedRun]:
    """Encode the runs, about a million kept elements at a time; `factors` are their rescales.
    `both.tuned_words` become the result's words.
    """
    shares = [_share(both, factors, begin, end) for begin, end in _shares(both.sizes)]
    runs = [run for share in shares for run in share]
    base_prints = prints_of(both.kernels, both.base)
    return [
        replace(run, base=base, result=result)
        for run, base, result in zip(runs, base_prints, _results(both), strict=True)
    ]


def _shares(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of runs that are encoded together."""
    begin = 0
    elements = 0
    for end, size in enumerate(sizes):
        if end > begin and elements + size > _AT_ONCE:
            yield begin, end
            begin = end
            elements = 0
        elements += size
    if begin < len(sizes):
        yield begin, len(sizes)


def _share(both: Both, factors: Sequence[float], begin: int, end: int) -> list[PackedRun]:
    """Some of the runs, without their fingerprints."""
    first = sum(both.sizes[:begin])
    sizes = both.sizes[begin:end]
    dtype = both.dtype
    base_words = both.base_words[first : first + sum(sizes)]
    tuned_words = both.tuned_words[first : first + sum(sizes)]
    exact = pack.exact(base_words, tuned_words, sizes, dtype)
    deltas = pack.magnitudes(base_words, tuned_words, sizes, dtype)
    tuned_words.copy_(unpack.law(base_words, tuned_words, sizes, factors[begin:end], dtype))
    too_large = pack.not_finite(base_words, tuned_words, sizes, dtype)
    contents = to_host(exact.contents).data
    table = zip(
        sizes,
        exact.changed.tolist(),
        to_host(exact.starts),
        to_host(exact.before),
        _hosted(deltas),
        too_large.tolist(),
        strict=True,
    )
    runs: list[PackedRun] = []
    done = 0
    for kept, changed, starts, before, (magnitudes, not_finite), overflown in table:
        data = contents[done : done + codec.content_size("exact", dtype, kept, changed, 0)]
        content = codec.packed_exact(data, kept, starts, before, dtype)
        runs.append(
            PackedRun(
                content=content,
                kept=kept,
                changed=changed,
                magnitudes=magnitudes,
                not_finite=not_finite,
                too_large=overflown,
            )
        )
        done += len(data)
    return runs


def _hosted(deltas: pack.Sizes) -> Iterator[tuple[Magnitudes, int]]:
    """Of each run: |δ|, and how many deltas are not finite."""
    table = zip(to_host(deltas.counts), deltas.largest.tolist(), deltas.strange.tolist(), strict=True)
    for counts, largest, not_finite in table:
        yield Magnitudes(counts, largest), not_finite


def _results(both: Both) -> list[Fingerprint]:
    """Fingerprints of the runs with `both.tuned_words` in place: in copies of them, one after another, so
    that whole blocks stay aligned.
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
    both.kernels.put(result, both.masks, both.offsets, both.tuned_words)
    return prints_of(both.kernels, result)
