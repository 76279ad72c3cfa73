"""`apply_`, `applied` and their way back: packages on a live model, in place, whoever holds its parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np

from ..dtypes import Words
from ..errors import BaseMismatch
from ..package.manifest import TensorRecord
from ..package.reader import DeltaPackage, checking
from ..parallel.ranks import Ranks
from ..parallel.threads import ordered_map
from ..weights.fingerprint import Fingerprint, fingerprints, total
from ..weights.live.live import Change, LiveWeights, check_same_tensors
from ..weights.live.live_lock import alone_on, last_change, note_as_before, note_change
from ..weights.live.named_tensors import Live
from ..weights.live.ownership import Span, Spans
from ..weights.protocol import TensorInfo
from . import device_packages as device
from .chain import Packages, listed, open_chain
from .resolver import Resolver


@dataclass
class Undo:
    """What `apply_` overwrote. `revert()` puts it back, exactly; the log holds changed elements only."""

    _live: LiveWeights
    _log: list[Change | device.Overwritten]
    _applied: dict[str, Fingerprint]
    _before: int
    """Number of the last change to the model before this one."""
    reverted: bool = False

    @property
    def nbytes(self) -> int:
        """Memory that the log takes in this process."""
        return sum(change.nbytes for change in self._log)

    def revert(self) -> None:
        """Restore the weights as they were before `apply_`. Ranks that share the model call it together.

        Raises:
            BaseMismatch: they have changed since, and what is on record would not fit. Nothing is touched.
        """
        with alone_on(self._live.places()):
            if not self.reverted:
                self._live.ranks.together(self._check_untouched)
                self._restore()

    def _check_untouched(self) -> None:
        prints = _prints(self._live, {name: self._live.held[name] for name in self._applied})
        for name, applied_print in self._applied.items():
            if prints[name] != applied_print:
                expected = "the weights that apply_ left"
                remedy = "revert before training on, or load the base again"
                raise BaseMismatch(name, expected=expected, found="others", remedy=remedy)

    def _restore(self) -> None:
        while self._log:
            self._log.pop().undo()
        self._live.settle()
        self.reverted = True
        note_as_before(self._live.places(), self._before)


def apply_(
    model: Live,
    packages: Packages | str | os.PathLike[str] | DeltaPackage,
    *,
    weights: Sequence[float] | None = None,
    kernels: str | None = None,
) -> Undo:
    """Apply packages to a live model (or state dict of torch tensors) in place.

    The weights are compared with the packages' base before the first of them is touched, and with the
    recorded result after the last. Before an error in between is raised, what was changed is put back.

    A model that FSDP or ZeRO-3 spreads over ranks is applied to by all of them together, each its own part.
    One thread at a time works on a model; others wait. What the first has left is not their packages' base
    then.

    Where an engine keeps fp32 masters, those of changed elements take the new values, so that training can go
    on from there.

    Args:
        model: a module, or a state dict of tensors.
        packages: one or several; their deltas add up, or they continue one another.
        weights: w of each, by default 1.
        kernels: "cpu", "cuda" (Triton, or an error) or "torch"; by default what DARE_TRAIN_KERNELS names,
            or those of the device that each tensor lies on. The bits are the same.

    Returns:
        An `Undo` whose `revert()` restores the exact bits, those of masters too.

    Raises:
        PackageError, ChainError, TensorMismatch, DtypeMismatch, BaseMismatch, ResultMismatch, ConfigError.
    """
    live = LiveWeights(model, kernels=kernels)
    if not live.whole:
        live.ranks = Ranks.joined()
    base, resolver = live.ranks.each(lambda: _opened(live, packages, weights))
    with alone_on(live.places()):
        return _applied_to(live, base, resolver)


def _applied_to(live: LiveWeights, base: _Base, resolver: Resolver) -> Undo:
    undo = Undo(live, [], {}, last_change(live.places()))
    with checking([package for link in resolver.links for package in link.packages]) as checked:
        base_spans = {
            name: _clipped(live.owned[name], resolver.base_numel(name))
            for name in resolver.source
            if name in live.tensors
        }
        _compare(live, base_spans, resolver.check_base_print)
        try:
            note_change(live.places())
            done = live.ranks.each(lambda: _apply_on_devices(live, resolver, undo, checked))
            for name in resolver.tensors:
                _apply_tensor(name, live, base, resolver, undo, done.get(name, ()))
            live.settle()
            changed = {name: live.held[name] for name in resolver.tensors if resolver.windows(name)}
            undo._applied = _prints(live, changed)
            result_spans = {name: live.owned[name] for name in resolver.tensors if name in live.tensors}
            _compare(live, result_spans, resolver.check_result_print, undo._applied)
        except BaseException:
            undo._restore()
            raise
    return undo


@contextmanager
def applied(
    model: Live,
    packages: Packages | str | os.PathLike[str] | DeltaPackage,
    *,
    weights: Sequence[float] | None = None,
    kernels: str | None = None,
) -> Iterator[Live]:
    """`apply_`, with its arguments, for the length of a `with` block: then the weights are as before.

    Raises:
        As `apply_`.
    """
    undo = apply_(model, packages, weights=weights, kernels=kernels)
    try:
        yield model
    finally:
        undo.revert()


class _Base:
    """A live model as the base of packages: built for the result, so that of tensors that grew only the
    leading rows are the base's.
    """

    def __init__(self, live: LiveWeights, package: DeltaPackage) -> None:
        self.label = live.label
        self.whole = live.whole
        self._live = live
        self.tensors = {
            name: _base_part(info, package.records.get(name)) for name, info in live.tensors.items()
        }
        self._borrowed: tuple[str, int, Words] | None = None

    def read(self, name: str, start: int, count: int) -> Words:
        if self._borrowed is not None:
            borrowed, begin, words = self._borrowed
            if borrowed == name and begin <= start and start + count <= begin + words.size:
                return words[start - begin : start - begin + count]
        return self._live.read(name, start, count)

    @contextmanager
    def borrowing(self, name: str, start: int, stop: int) -> Iterator[None]:
        """While the block lasts, every rank can read [start, stop) of a tensor, whichever of them hold it."""
        words = np.zeros(stop - start, self.tensors[name].dtype.word)
        for begin, end in _clipped(self._live.owned[name], stop):
            if begin < end and end > start:
                begin = max(begin, start)
                words[begin - start : end - start] = self._live.read(name, begin, end - begin)
        self._borrowed = name, start, self._live.ranks.sum_of(words)
        try:
            yield
        finally:
            self._borrowed = None


def _opened(
    live: LiveWeights,
    packages: Packages | str | os.PathLike[str] | DeltaPackage,
    weights: Sequence[float] | None,
) -> tuple[_Base, Resolver]:
    """A live model as a base, and packages that fit it."""
    links = open_chain(listed(packages), weights, check=False)
    base = _Base(live, links[0].packages[0])
    resolver = Resolver(base, links, live=True)
    check_fits(live, resolver)
    return base, resolver


def _base_part(info: TensorInfo, record: TensorRecord | None) -> TensorInfo:
    if record is None or record.base_rows is None or info.shape != record.info.shape:
        return info
    return TensorInfo(info.dtype, record.base_info.shape)


def check_fits(live: LiveWeights, resolver: Resolver) -> None:
    """Every tensor of the result has a place of its shape and dtype in the model."""
    expected = {name: record.info for name, record in resolver.tensors.items()}
    tensors = {name: info for name, info in live.tensors.items() if name in expected}
    remedy = "build the model as for the fine-tuned checkpoint (same head, same vocabulary), then apply"
    check_same_tensors(tensors, expected, what="the model", remedy=remedy)


def _clipped(spans: tuple[Span, ...], numel: int) -> tuple[Span, ...]:
    return tuple((start, min(stop, numel)) for start, stop in spans if start < numel)


def _prints(live: LiveWeights, spans: Spans) -> dict[str, Fingerprint]:
    """The fingerprint of spans of each tensor, worked out where they lie if there are kernels."""
    on_devices = device.fingerprints(live, spans)
    rest = [name for name in spans if name not in on_devices]
    return on_devices | fingerprints(live, {name: spans[name] for name in rest})


def _compare(
    live: LiveWeights,
    spans: Spans,
    check: Callable[[str, Fingerprint], None],
    known: Mapping[str, Fingerprint] | None = None,
) -> None:
    """Check the fingerprint of each tensor, to which every rank adds that of its spans.

    `known` are fingerprints of all that lies here of a tensor.
    """
    usable = {name: share for name, share in (known or {}).items() if spans[name] == live.held[name]}

    def shares_here() -> list[Fingerprint]:
        rest = {name: tensor_spans for name, tensor_spans in spans.items() if name not in usable}
        prints = usable | _prints(live, rest)
        return [prints[name] for name in spans]

    shares_by_rank = live.ranks.together(shares_here)
    for name, shares in zip(spans, zip(*shares_by_rank, strict=True), strict=True):
        check(name, total((first, second) for first, second in shares))


def _apply_on_devices(
    live: LiveWeights, resolver: Resolver, undo: Undo, checked: Callable[[], None]
) -> dict[str, set[Span]]:
    """Apply what kernels can apply where it lies. Returns which windows of which tensors that is.

    Nothing changes before `checked` returns.
    """
    names = [
        name
        for name in resolver.tensors
        if live.alone(name) and all(device.decodable(link, name) for link in resolver.links)
    ]
    spans = {
        name: tuple((start, stop) for start, stop, cut in _windows(live, resolver, name) if not cut)
        for name in names
    }
    groups = device.groups(live, spans)
    for link in resolver.links:
        residents = [resident for group in groups for resident in device.residents(group, link)]
        checked()
        for resident in residents:
            undo._log.append(resident.before)
            resident.apply()
    done: dict[str, set[Span]] = {}
    for group in groups:
        for name, rows in group.rows.items():
            done.setdefault(name, set()).update((row.start, row.start + row.count) for row in rows)
    return done


def _windows(live: LiveWeights, resolver: Resolver, name: str) -> list[tuple[int, int, bool]]:
    """[start, stop) of each place that packages change, and whether a border between ranks cuts it."""
    edges = {edge for spans in live.shares[name] for span in spans for edge in span}
    return [
        (start, stop, any(start < edge < stop for edge in edges)) for start, stop in resolver.windows(name)
    ]


def _apply_tensor(
    name: str, live: LiveWeights, base: _Base, resolver: Resolver, undo: Undo, done: Collection[Span]
) -> None:
    """Resolve what packages change of a tensor into it, but for windows that are done. A segment that lies on
    several ranks needs the base of all of them."""
    windows = _windows(live, resolver, name)

    def put(start: int, stop: int) -> None:
        live.put(name, start, resolver.resolve(name, start, stop - start), undo._log.append)

    for start, stop, cut in windows:
        if cut:
            with base.borrowing(name, start, stop):
                live.ranks.together(lambda start=start, stop=stop: put(start, stop))  # type: ignore[misc]
    here = [
        (start, stop)
        for start, stop, cut in windows
        if not cut and any(begin <= start and stop <= end for begin, end in live.held[name])
    ]
    left = [window for window in here if window not in done]
    with closing(ordered_map(lambda window: put(*window), left)) as finished:
        for _ in finished:
            pass
