"""One tensor of a merge worked out in a device's memory, many millions of elements at a time: the bits of
`tensors` and `deltas`.

That is so for methods whose arithmetic has one order everywhere: sums, elections and consensus, with DARE and
trimming by magnitude before them. The others, which want dot products or ranks within rows, are the CPU's,
wherever tensors lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..applying.device_decoding import Place
from ..applying.device_packages import decoded
from ..dtypes import DTYPES, DType, Words
from ..kernels.launch_tables import INTEGERS, Masks, Row, Rows, offsets_of
from ..kernels.law_in_torch import Dense, combined, compute, narrowed, widened
from ..kernels.sums import NAN_SIZE
from ..kernels.transfers import sent, to_device, to_host
from ..weights.protocol import SEGMENT, TensorInfo, Weights, runs
from .deltas import Member, borders, rate_of
from .devices import Device, lying
from .methods import elementwise as elements
from .methods.parameters import Scalar
from .methods.registry import Dropping, Method
from .methods.top_k import EVERY, NONE, Bits, Largest, largest
from .models.inputs import CheckpointInput, PackageInput
from .tensor_on_cpu import averaged_coefficients, lacks, own_coefficients

_AT_ONCE = 8 * SEGMENT
"""Elements of a run: enough to hide what it takes to ask a device for something, in memory that any has."""

Result = TypeVar("Result")


def works(
    method: Method, info: TensorInfo, out: DType, name: str, members: Sequence[Member], rescale: str
) -> bool:
    """Whether a device can merge a tensor to the same bits."""
    if out != info.dtype and "F64" in (
        out.code,
        info.dtype.code,
    ):  # what is narrowed from float64 is rounded once, and torch does it twice
        return False
    combines = (
        not method.needs_gram if method.reach == "coefficients" else method.function in elements.ANYWHERE
    )
    drops = method.drops != "magprune" and rescale in ("paper", "none")
    return (
        combines
        and drops
        and info.dtype.can_be_delta
        and out.can_be_delta
        and all(_fits(one.input, name, info) for one in members)
    )


def _fits(one: Any, name: str, info: TensorInfo) -> bool:
    """Whether a model's delta can be read for one run after another."""
    if isinstance(one, CheckpointInput):
        return one.tensors[name].dtype.can_be_delta
    record = one.package.records[one.names[name]]
    spans = [span for _, span in _places(one, name, 0, info.numel)]
    whole = all(stop <= info.numel and start // _AT_ONCE == (stop - 1) // _AT_ONCE for start, stop in spans)
    return whole and bool(record.info.dtype == info.dtype)


def _places(one: PackageInput, name: str, start: int, count: int) -> list[Place]:
    own = one.names[name]
    return [
        (own, (segment.start, segment.stop)) for segment, _ in one.package.frames(own, start, start + count)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tensor:
    """A tensor of the base, and runs of it in a device's memory."""

    base: Weights
    name: str
    models: int
    device: Device

    @property
    def info(self) -> TensorInfo:
        return self.base.tensors[self.name]

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        return list(runs(self.info.numel, _AT_ONCE))

    def words(self, weights: Weights, start: int, count: int) -> Tensor:
        """Words of weights that have this tensor: not to be written to."""
        found = lying(weights, self.name, start, count)
        if found is not None and found.device == self.device.place:
            return found
        words = weights.read(self.name, start, count)
        return sent(words, self.device.place).view(INTEGERS[words.itemsize])

    def on(self, function: Callable[[int, Tensor], Result], start: int, count: int) -> Result:
        """Call a function with the start and the base's words of a run."""
        each = (
            self.info.dtype.itemsize + 6 * self.info.dtype.compute.itemsize
        )  # what elections take, which take most
        with self.device.turn(self.name, (self.models + 1) * each * count):
            return function(start, self.words(self.base, start, count))

    def each(self, function: Callable[[int, Tensor], Result]) -> Iterator[Result]:
        for start, count in self.runs:
            yield self.on(function, start, count)

    def kept(self, rows: Rows, masks: Masks, count: int, start: int) -> Tensor:
        """bool [count]: which elements of a run masks of rows of it keep."""
        flags = torch.zeros(count, dtype=torch.uint8, device=self.device.place)
        own = Rows(
            dtype=DTYPES["U8"],
            rows=tuple(replace(row, flat=flags, offset=row.start - start) for row in rows.rows),
        )
        self.device.kernels.put(
            own, masks, offsets_of(self.device.kernels.counts(own, masks)), torch.ones_like(flags)
        )
        return flags.bool()


class DeviceDelta:
    """`deltas.ModelDelta` for runs in a device's memory."""

    def __init__(self, member: Member, tensor: _Tensor, *, drops: Dropping, rescale: str) -> None:
        self.member, self._tensor = member, tensor
        self._rate = rate_of(member, tensor.name)
        self._factor = self._rate.factor if self._rate is not None and rescale == "paper" else 1.0
        self._keep, self._outliers = EVERY, NONE
        if drops != "none" and member.settings.get("density", 1.0) < 1 and member.input.moves(tensor.name):
            self._keep, self._outliers = borders(drops, member, tensor.name, tensor.info.numel, self._largest)

    def raw(self, start: int, words: Tensor) -> Dense | None:
        """The delta of a run whose base words are `words`, before anything is dropped; None where the model
        does not move it.
        """
        one = self.member.input
        if not one.moves(self._tensor.name):
            return None
        if isinstance(one, PackageInput):
            return self._of_package(one, start, words)
        return self._of_checkpoint(one, start, words)  # type: ignore[arg-type]

    def after(self, start: int, words: Tensor) -> Dense | None:
        """The delta after dropping."""
        term = self._dared(start, words)
        if term is None or (self._keep is EVERY and self._outliers is NONE):
            return term
        sizes = self._sizes(term, words)
        kept = _among(self._keep, sizes, start)
        if self._outliers is not NONE:
            kept &= ~_among(self._outliers, sizes, start) | (sizes == int(NAN_SIZE))
        return replace(term, present=kept)

    def _of_checkpoint(self, one: CheckpointInput, start: int, words: Tensor) -> Dense:
        tensor = self._tensor
        own, base = one.tensors[tensor.name].dtype, tensor.info.dtype
        tuned = tensor.words(one.weights, start, words.numel())
        if own == base:
            return Dense(factor=1.0, tuned=tuned)
        return Dense(factor=1.0, delta=widened(tuned, own).to(compute(base)) - widened(words, base))

    def _of_package(self, one: PackageInput, start: int, words: Tensor) -> Dense | None:
        """Kept values put into a copy of the base, or deltas into zeros."""
        tensor, kernels = self._tensor, self._tensor.device.kernels
        places = _places(one, tensor.name, start, words.numel())
        if not places:
            return None
        flat = tuple(
            Row(flat=words, start=first, count=stop - first, offset=first - start)
            for _, (first, stop) in places
        )
        rows = Rows(dtype=tensor.info.dtype, rows=flat)
        kept, values = decoded(kernels, rows, places, one.package, 1.0, alone=False)
        made = torch.zeros_like(words, dtype=values.tensor.dtype) if values.deltas else words.clone()
        target = made.view(INTEGERS[made.itemsize])
        whole = Rows(dtype=_WORDS[made.itemsize], rows=tuple(replace(row, flat=target) for row in flat))
        kernels.put(whole, kept.masks, kept.offsets, values.tensor.view(target.dtype))
        present = tensor.kept(rows, kept.masks, words.numel(), start)
        return Dense(
            factor=values.factors[0], present=present, **{"delta" if values.deltas else "tuned": made}
        )

    def _dared(self, start: int, words: Tensor) -> Dense | None:
        term, rate = self.raw(start, words), self._rate
        if term is None or rate is None:
            return term
        rows = Rows(dtype=self._tensor.info.dtype, rows=(Row(flat=words, start=start, count=words.numel()),))
        kept = self._tensor.kept(
            rows, Masks(keys=[rate.key], thresholds=[rate.threshold]), words.numel(), start
        )
        return replace(
            term,
            factor=term.factor * self._factor,
            present=kept if term.present is None else kept & term.present,
        )

    # What the method drops

    def _largest(self, k: int, last: bool) -> Largest:
        def each(function: Callable[[int, Tensor], object]) -> Iterator[object]:
            return self._tensor.each(
                lambda start, words: function(start, self._sizes(self._dared(start, words), words))
            )

        return largest(each, k, last=last, counted=_counted, within=_within)  # type: ignore[arg-type]

    def _sizes(self, term: Dense | None, words: Tensor) -> Tensor:
        """int32: bits of the magnitudes, -1 where there is no delta."""
        if term is None:
            return torch.full_like(words, -1, dtype=torch.int32)
        sizes = (
            delta_of(term, words, self._tensor.info.dtype)
            .abs()
            .float()
            .view(torch.int32)
            .clamp(max=int(NAN_SIZE))
        )
        return sizes if term.present is None else torch.where(term.present, sizes, -1)


_WORDS = {2: DTYPES["I16"], 4: DTYPES["I32"], 8: DTYPES["I64"]}


def delta_of(term: Dense, words: Tensor, dtype: DType) -> Tensor:
    """f32(factor)·δ, zero where there is none."""
    added, moves = term.addend(words, dtype)
    return torch.where(moves, added, torch.zeros_like(added))


def _counted(sizes: Tensor) -> Any:
    return to_host(torch.bincount((sizes >> 16) + 1, minlength=(1 << 15) + 1)[1:])


def _within(sizes: Tensor, border: int) -> Bits:
    return to_host(sizes[sizes >> 16 == border]).view(np.uint32)


def _among(border: Largest, sizes: Tensor, start: int) -> Tensor:
    """`Largest.among`."""
    if border is NONE:
        return torch.zeros_like(sizes, dtype=torch.bool)
    equal = sizes == int(border.bound)
    (begin, end), (before, _) = border.chosen, border.equals.get(start, (0, 0))
    place = equal.cumsum(0) + (before - 1)
    return (sizes > int(border.bound)) | (equal & (place >= begin) & (place < end))


class DeviceTensor:
    """`tensors.MergedTensor` for what `works`."""

    def __init__(
        self,
        method: Method,
        base: Weights,
        name: str,
        out: DType,
        members: Sequence[Member],
        settings: Mapping[str, Scalar],
        *,
        rescale: str,
        device: Device,
    ) -> None:
        self._method, self._settings, self._out = method, settings, out
        self._tensor = _Tensor(base=base, name=name, models=len(members), device=device)
        self._weights = np.array([member.settings.get("weight", 1.0) for member in members], np.float64)
        self._deltas = [
            DeviceDelta(member, self._tensor, drops=method.drops, rescale=rescale) for member in members
        ]
        self._coefficients = None
        if lacks(method, members, name) is not None:
            self._coefficients = averaged_coefficients(self._weights, settings)
        elif method.reach == "coefficients":
            self._coefficients = own_coefficients(method, None, self._weights, settings)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(start, count) of the runs that `merged` gives."""
        return self._tensor.runs

    def merged(self, start: int, count: int) -> Words:
        """Words of the result of one of the runs."""
        work = self._of_elements if self._coefficients is None else self._combined
        return self._tensor.on(
            lambda start, words: to_host(work(start, words)).view(self._out.word), start, count
        )

    def _combined(self, start: int, words: Tensor) -> Tensor:
        assert self._coefficients is not None
        dtype = self._tensor.info.dtype
        pairs = [
            (delta.after(start, words), float(c))
            for delta, c in zip(self._deltas, self._coefficients, strict=True)
        ]
        terms = [replace(term, factor=term.factor * factor) for term, factor in pairs if term is not None]
        rest = float(self._coefficients.sum()) - 1
        if self._method.space == "weights" and abs(rest) > 1e-12:
            terms.append(Dense(factor=rest, delta=widened(words, dtype)))
        return combined(words, terms, dtype, self._out)

    def _of_elements(self, start: int, words: Tensor) -> Tensor:
        dtype = self._tensor.info.dtype
        given: dict[str, Any] = {name: self._settings[name] for name in self._method.arguments}
        if self._method.needs == "undropped":
            given["undropped"] = self._rows([delta.raw(start, words) for delta in self._deltas], words)
        weights = to_device(torch.from_numpy(self._weights).to(compute(dtype)), words.device)
        made = self._method.function(
            self._rows([delta.after(start, words) for delta in self._deltas], words), weights, **given
        )
        made = made * float(self._settings.get("lambda", 1.0))
        own = widened(words, dtype)
        as_base = words if self._out == dtype else narrowed(own, self._out)
        return torch.where(made == 0, as_base, narrowed(own + made, self._out))

    def _rows(self, terms: Sequence[Dense | None], words: Tensor) -> Tensor:
        """Every model's delta, [n, words.numel()]."""
        dtype = self._tensor.info.dtype
        rows = torch.zeros((len(terms), words.numel()), dtype=compute(dtype), device=words.device)
        for row, term in zip(rows, terms, strict=True):
            if term is not None:
                row.copy_(delta_of(term, words, dtype))
        return rows
