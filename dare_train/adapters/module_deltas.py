"""The tensors of a model's modules in its base's files and in those of what was made of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..dtypes import FloatArray, Words, cast, to_float
from ..errors import NonFiniteDelta, TensorMismatch
from ..weights.alignment import align
from ..weights.live.layouts import Place
from ..weights.live.named_tensors import tied
from ..weights.lora.adapted_modules import of_model
from ..weights.protocol import SEGMENT, TensorInfo, Weights, runs


class ModuleDeltas:
    """What was tuned against its base, by the modules' own names of tensors, however files cut them.

    Args:
        base, tuned: the weights.
        model: of the tuned model's class; it needs no weights.

    Attributes:
        shapes: of the tensors that the tuned weights have.
        aliases: names of tensors that are others' under another name, and whose.

    Raises:
        TensorMismatch: a tuned tensor belongs to no module, has another shape than it, or only a part of one
            is there.
    """

    def __init__(self, base: Weights, tuned: Weights, model: Any) -> None:
        modules = of_model(base, model, tuned.label)
        self.aliases = dict(tied(model))
        self._base = modules.base
        self._tuned, _ = align(tuned, modules.places.keys(), model=tuned.label)
        self._places: dict[str, dict[str, Place]] = defaultdict(dict)
        for file, place in modules.places.items():
            for source in place.sources:
                self._places[source][file] = place
        self._check_known(modules.places, type(model).__name__)
        self._check_shapes(modules.places)
        self.shapes = {
            source: modules.shapes[source] for source in self._places if self._has(self._tuned, source)
        }

    def _check_known(self, places: Mapping[str, Place], kind: str) -> None:
        for name, info in self._tuned.tensors.items():
            source = self.aliases.get(name)
            copied = source is not None and _same(self._tuned, name, self._tuned, source)
            if name not in places and not copied and not _same(self._tuned, name, self._base, name):
                expected = f"a tensor of {kind}, as config.json says"
                found = f"{info} in {self._tuned.label}"
                raise TensorMismatch(name, expected=expected, found=found, remedy="ship it as a package")

    def _check_shapes(self, places: Mapping[str, Place]) -> None:
        for name, place in places.items():
            info = self._tuned.tensors.get(name)
            if info is not None and info.shape != place.shape:
                expected = f"shape {list(place.shape)}, as config.json says"
                found = f"{list(info.shape)} in {self._tuned.label}"
                remedy = "write into config.json what the weights are"
                raise TensorMismatch(name, expected=expected, found=found, remedy=remedy)

    def _has(self, weights: Weights, source: str) -> bool:
        """
        Raises:
            TensorMismatch: only some of the files' tensors that it is made of are there.
        """
        files = self._places[source]
        missing = sorted(file for file in files if file not in weights.tensors)
        if missing and len(missing) < len(files):
            expected = f"in {weights.label}, as a part of {source}"
            raise TensorMismatch(missing[0], expected=expected, found="missing", remedy="fetch it again")
        return not missing

    def added(self, source: str) -> bool:
        """Whether the base has no such tensor, as of a new head."""
        return not self._has(self._base, source)

    def resized(self, source: str) -> bool:
        """Whether the base has the tensor in another shape, as an embedding that grew."""
        files = () if self.added(source) else self._places[source]
        return any(self._tuned.tensors[file].shape != self._base.tensors[file].shape for file in files)

    def changed(self, source: str) -> bool:
        """Whether the tensor is another than the base's.

        Raises:
            TensorMismatch: it has another shape.
        """
        files = self._places[source]
        for file in files:
            here, there = self._tuned.tensors[file].shape, self._base.tensors[file].shape
            if here != there:
                expected = f"shape {list(there)}, as in {self._base.label}"
                remedy = "an adapter cannot add rows: ship it as a package, or leave it out (exclude)"
                raise TensorMismatch(file, expected=expected, found=f"{list(here)}", remedy=remedy)
        return not all(_same(self._tuned, file, self._base, file) for file in files)

    def words(self, source: str) -> tuple[TensorInfo, Words]:
        """A tensor as it was tuned, in the dtype of the files."""
        return self._assembled(self._tuned, source)

    def squares(self, source: str) -> float:
        """The squared norm of its delta; 0 of integers, and of what the base does not have in this shape.

        Raises:
            NonFiniteDelta: it has infinities or NaN.
        """
        files = self._places[source]
        infos = {file: self._tuned.tensors[file] for file in files}
        if (
            self.added(source)
            or self.resized(source)
            or not all(info.dtype.can_be_delta for info in infos.values())
        ):
            return 0.0
        if any(len(place.sources) > 1 for place in files.values()):
            return float(np.square(self.delta(source), dtype=np.float64).sum())
        parts = [
            float(np.square(self._run(file, start, count), dtype=np.float64).sum())
            for file, info in infos.items()
            for start, count in runs(info.numel, SEGMENT)
        ]
        return _finite(source, sum(parts))

    def _run(self, file: str, start: int, count: int) -> FloatArray:
        ends = [(weights.tensors[file].dtype, weights) for weights in (self._tuned, self._base)]
        compute = max(dtype.compute for dtype, _ in ends)
        tuned, base = (
            to_float(weights.read(file, start, count), dtype).astype(compute) for dtype, weights in ends
        )
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(tuned - base)

    def delta(self, source: str) -> FloatArray:
        """Tuned minus base, in the tensor's shape; float32, or float64 where one of them is.

        Raises:
            NonFiniteDelta: it has infinities or NaN.
        """
        ends = [self._assembled(weights, source) for weights in (self._tuned, self._base)]
        compute = max(info.dtype.compute for info, _ in ends)
        tuned, base = (to_float(words, info.dtype).astype(compute) for info, words in ends)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = np.asarray(tuned - base)
        _finite(source, float(np.abs(delta).max(initial=0)))
        return delta.reshape(self.shapes[source])

    def _assembled(self, weights: Weights, source: str) -> tuple[TensorInfo, Words]:
        files = self._places[source]
        shape = self.shapes[source]
        dtype = max((weights.tensors[file].dtype for file in files), key=lambda one: one.mantissa_bits)
        info = TensorInfo(dtype, shape)
        first, *others = files.items()
        if not others and first[1].is_whole(shape):
            return info, weights.read(first[0], 0, info.numel)
        found = np.zeros(info.numel, dtype.word)
        for file, place in files.items():
            of_file = weights.tensors[file]
            words = cast(weights.read(file, 0, of_file.numel), of_file.dtype, dtype)
            for block in place.blocks:
                if block.source == source:
                    part = words[block.start : block.start + block.length]
                    found[block.places(0, block.length)] = part
        return info, found


def _finite(source: str, size: float) -> float:
    if not np.isfinite(size):
        raise NonFiniteDelta(source, expected="a finite delta", found="NaN or infinities")
    return size


def _same(one: Weights, name: str, other: Weights, other_name: str) -> bool:
    """Whether two tensors have the same values."""
    info, other_info = one.tensors.get(name), other.tensors.get(other_name)
    if info is None or other_info is None or info.shape != other_info.shape:
        return False
    for start, count in runs(info.numel, SEGMENT):
        here, there = one.read(name, start, count), other.read(other_name, start, count)
        if info.dtype == other_info.dtype:
            equal = np.array_equal(here, there)
        elif info.dtype.can_be_delta and other_info.dtype.can_be_delta:
            values = to_float(here, info.dtype), to_float(there, other_info.dtype)
            equal = np.array_equal(*values, equal_nan=True)
        else:
            return False
        if not equal:
            return False
    return True
