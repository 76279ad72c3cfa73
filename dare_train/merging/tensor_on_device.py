"""One tensor of a merge worked out in a device's memory, many millions of elements at a time: the bits of
`tensor_on_cpu` and `deltas`.

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
from .methods.dropping import DropRate
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
    # What is narrowed from float64 is rounded once, and torch does it twice.
    if out != info.dtype and "F64" in (out.code, info.dtype.code):
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
        and all(_fits(member.input, name, info) for member in members)
    )


def _fits(model: Any, name: str, info: TensorInfo) -> bool:
    """Whether a model's delta can be read for one run after another."""
    if isinstance(model, CheckpointInput):
        return model.tensors[name].dtype.can_be_delta
    record = model.package.records[model.names[name]]
    spans = [span for _, span in _places(model, name, 0, info.numel)]
    whole = all(stop <= info.numel and start // _AT_ONCE == (stop - 1) // _AT_ONCE for start, stop in spans)
    return whole and bool(record.info.dtype == info.dtype)


def _places(model: PackageInput, name: str, start: int, count: int) -> list[Place]:
    packed_name = model.names[name]
    return [
        (packed_name, (segment.start, segment.stop))
        for segment in model.package.segments(packed_name, start, start + count)
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
        words_there = lying(weights, self.name, start, count)
        if words_there is not None and words_there.device == self.device.place:
            return words_there
        words = weights.read(self.name, start, count)
        return sent(words, self.device.place).view(INTEGERS[words.itemsize])

    def on(self, function: Callable[[int, Tensor], Result], start: int, count: int) -> Result:
        """Call a function with the start and the base's words of a run."""
        # What elections take, which take most.
        each = self.info.dtype.itemsize + 6 * self.info.dtype.compute.itemsize
        with self.device.turn(self.name, (self.models + 1) * each * count):
            return function(start, self.words(self.base, start, count))

    def each(self, function: Callable[[int, Tensor], Result]) -> Iterator[Result]:
        for start, count in self.runs:
            yield self.on(function, start, count)

    def kept(self, rows: Rows, masks: Masks, count: int, start: int) -> Tensor:
        """bool [count]: which elements of a run masks of rows of it keep."""
        flags = torch.zeros(count, dtype=torch.uint8, device=self.device.place)
        flag_rows = Rows(
            dtype=DTYPES["U8"],
            rows=tuple(replace(row, flat=flags, offset=row.start - start) for row in rows.rows),
        )
        offsets = offsets_of(self.device.kernels.counts(flag_rows, masks))
        self.device.kernels.put(flag_rows, masks, offsets, torch.ones_like(flags))
        return flags.bool()


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceDelta:
    """`deltas.ModelDelta` for runs in a device's memory."""

    member: Member
    tensor: _Tensor
    rate: DropRate | None
    """At which DARE drops elements, if it does."""
    rate_factor: float
    """Of the elements that DARE leaves."""
    keep: Largest = EVERY
    """Elements that the method keeps by their magnitude."""
    outliers: Largest = NONE
    """Those among them that it drops again."""

    @classmethod
    def of(cls, member: Member, tensor: _Tensor, *, drops: Dropping, rescale: str) -> DeviceDelta:
        """With what a recipe has dropped. Walks over the tensor where thresholds are wanted."""
        rate = rate_of(member, tensor.name)
        factor = rate.factor if rate is not None and rescale == "paper" else 1.0
        dared = cls(member=member, tensor=tensor, rate=rate, rate_factor=factor)
        density = member.settings.get("density", 1.0)
        if drops == "none" or density >= 1 or not member.input.moves(tensor.name):
            return dared
        keep, outliers = borders(drops, member, tensor.name, tensor.info.numel, dared._largest)
        return replace(dared, keep=keep, outliers=outliers)

    def raw(self, start: int, words: Tensor) -> Dense | None:
        """The delta of a run whose base words are `words`, before anything is dropped; None where the model
        does not move it.
        """
        model = self.member.input
        if not model.moves(self.tensor.name):
            return None
        if isinstance(model, PackageInput):
            return self._of_package(model, start, words)
        return self._of_checkpoint(model, start, words)  # type: ignore[arg-type]

    def after(self, start: int, words: Tensor) -> Dense | None:
        """The delta after dropping."""
        term = self._dared(start, words)
        if term is None or (self.keep is EVERY and self.outliers is NONE):
            return term
        sizes = self._sizes(term, words)
        kept = _among(self.keep, sizes, start)
        if self.outliers is not NONE:
            kept &= ~_among(self.outliers, sizes, start) | (sizes == int(NAN_SIZE))
        return replace(term, present=kept)

    def _of_checkpoint(self, model: CheckpointInput, start: int, words: Tensor) -> Dense:
        name = self.tensor.name
        dtype = model.tensors[name].dtype
        base_dtype = self.tensor.info.dtype
        tuned = self.tensor.words(model.weights, start, words.numel())
        if dtype == base_dtype:
            return Dense(factor=1.0, tuned=tuned)
        delta = widened(tuned, dtype).to(compute(base_dtype)) - widened(words, base_dtype)
        return Dense(factor=1.0, delta=delta)

    def _of_package(self, model: PackageInput, start: int, words: Tensor) -> Dense | None:
        """Kept values put into a copy of the base, or deltas into zeros."""
        tensor = self.tensor
        kernels = tensor.device.kernels
        places = _places(model, tensor.name, start, words.numel())
        if not places:
            return None
        flat = tuple(
            Row(flat=words, start=first, count=stop - first, offset=first - start)
            for _, (first, stop) in places
        )
        rows = Rows(dtype=tensor.info.dtype, rows=flat)
        kept, values = decoded(kernels, rows, places, model.package, 1.0, alone=False)
        run = torch.zeros_like(words, dtype=values.tensor.dtype) if values.deltas else words.clone()
        target = run.view(INTEGERS[run.itemsize])
        whole = Rows(dtype=_WORDS[run.itemsize], rows=tuple(replace(row, flat=target) for row in flat))
        kernels.put(whole, kept.masks, kept.offsets, values.tensor.view(target.dtype))
        present = tensor.kept(rows, kept.masks, words.numel(), start)
        return Dense(
            factor=values.factors[0], present=present, **{"delta" if values.deltas else "tuned": run}
        )

    def _dared(self, start: int, words: Tensor) -> Dense | None:
        term = self.raw(start, words)
        rate = self.rate
        if term is None or rate is None:
            return term
        rows = Rows(dtype=self.tensor.info.dtype, rows=(Row(flat=words, start=start, count=words.numel()),))
        kept = self.tensor.kept(
            rows, Masks(keys=[rate.key], thresholds=[rate.threshold]), words.numel(), start
        )
        return replace(
            term,
            factor=term.factor * self.rate_factor,
            present=kept if term.present is None else kept & term.present,
        )

    # What the method drops

    def _largest(self, k: int, last: bool) -> Largest:
        def each(function: Callable[[int, Tensor], object]) -> Iterator[object]:
            return self.tensor.each(
                lambda start, words: function(start, self._sizes(self._dared(start, words), words))
            )

        return largest(each, k, last=last, counted=_counted, within=_within)  # type: ignore[arg-type]

    def _sizes(self, term: Dense | None, words: Tensor) -> Tensor:
        """int32: bits of the magnitudes, -1 where there is no delta."""
        if term is None:
            return torch.full_like(words, -1, dtype=torch.int32)
        sizes = (
            delta_of(term, words, self.tensor.info.dtype)
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
    begin, end = border.chosen
    before, _ = border.equals.get(start, (0, 0))
    place = equal.cumsum(0) + (before - 1)
    return (sizes > int(border.bound)) | (equal & (place >= begin) & (place < end))


class DeviceTensor:
    """`tensor_on_cpu.MergedTensor` for what `works`."""

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
        self._method = method
        self._settings = settings
        self._out = out
        self._tensor = _Tensor(base=base, name=name, models=len(members), device=device)
        self._weights = np.array([member.settings.get("weight", 1.0) for member in members], np.float64)
        self._deltas = [
            DeviceDelta.of(member, self._tensor, drops=method.drops, rescale=rescale) for member in members
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
        delta = self._method.function(
            self._rows([delta.after(start, words) for delta in self._deltas], words), weights, **given
        )
        delta = delta * float(self._settings.get("lambda", 1.0))
        base = widened(words, dtype)
        as_base = words if self._out == dtype else narrowed(base, self._out)
        return torch.where(delta == 0, as_base, narrowed(base + delta, self._out))

    def _rows(self, terms: Sequence[Dense | None], words: Tensor) -> Tensor:
        """Every model's delta, [n, words.numel()]."""
        dtype = self._tensor.info.dtype
        rows = torch.zeros((len(terms), words.numel()), dtype=compute(dtype), device=words.device)
        for row, term in zip(rows, terms, strict=True):
            if term is not None:
                row.copy_(delta_of(term, words, dtype))
        return rows
