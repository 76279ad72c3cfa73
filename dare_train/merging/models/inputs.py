"""What is merged: packages and checkpoints, each seen as deltas on one base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from ...applying.chain import Link
from ...applying.resolver import Resolver, clip
from ...dtypes import Words, to_float
from ...package.arithmetic import Term
from ...package.reader import DeltaPackage
from ...package.segments import decode_delta, decode_whole
from ...weights.protocol import TensorInfo, Weights, under


class Input(Protocol):
    """One model of a merge. Tensors go by the result's names."""

    @property
    def label(self) -> str: ...

    @property
    def folder(self) -> Path | None:
        """Where its files lie, if it has any."""

    @property
    def names(self) -> Mapping[str, str]:
        """The model's own name of each of the result's tensors that it has."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def dropped(self, name: str) -> bool:
        """Whether elements of this tensor's delta have been dropped already."""

    def moves(self, name: str) -> bool:
        """Whether the tensor may differ from the base's."""

    def kept(self, name: str) -> int:
        """At most so many elements of the tensor differ from the base's."""

    def whole(self, name: str) -> bool:
        """Whether the tensor is carried as it is, so that its difference from the base means nothing."""

    def terms(self, name: str, start: int, words: Words) -> list[Term]:
        """The delta of a run whose base words are `words`, with weight 1; terms do not overlap."""

    def words(self, name: str, start: int, count: int) -> Words:
        """The model's own words, in its own dtype."""


class CheckpointInput:
    """A fine-tuned model's weights, and the base's under the result's names."""

    def __init__(
        self, weights: Weights, base: Weights, names: Mapping[str, str], *, folder: Path | None
    ) -> None:
        self.weights = under(weights, names)
        self.label = weights.label
        self.folder = folder
        self.names = names
        self.tensors = self.weights.tensors
        self._base = base

    def dropped(self, name: str) -> bool:
        return False

    def moves(self, name: str) -> bool:
        return True

    def kept(self, name: str) -> int:
        return self.tensors[name].numel

    def whole(self, name: str) -> bool:
        return name not in self._base.tensors

    def terms(self, name: str, start: int, words: Words) -> list[Term]:
        dtype = self.tensors[name].dtype
        base_dtype = self._base.tensors[name].dtype
        tuned = self.weights.read(name, start, words.size)
        if dtype == base_dtype:
            return [Term(positions=None, factor=1.0, tuned=tuned)]
        with np.errstate(over="ignore", invalid="ignore"):
            delta = to_float(tuned, dtype).astype(base_dtype.compute) - to_float(words, base_dtype)
        return [Term(positions=None, factor=1.0, delta=delta)]

    def words(self, name: str, start: int, count: int) -> Words:
        return self.weights.read(name, start, count)


class PackageInput:
    """A delta package. Its kept values are read; what it dropped costs nothing.

    Args:
        base: the base's weights under the base's own names.
        names: the package's name of each of the result's tensors that it has.

    Raises:
        PackageError, TensorMismatch, DtypeMismatch: it is damaged, or was not made from this base.
    """

    def __init__(
        self, package: DeltaPackage, base: Weights, names: Mapping[str, str], *, cast_base: bool
    ) -> None:
        self.label = package.name
        self.folder = package.path
        self.package = package
        self._resolver = Resolver(base, [Link(packages=(package,), weights=(1.0,))], cast_base=cast_base)
        self.names = names
        self.tensors = {name: package.records[packed].info for name, packed in names.items()}

    def dropped(self, name: str) -> bool:
        record = self.package.records[self.names[name]]
        return record.kind == "delta" and record.mask != "all"

    def moves(self, name: str) -> bool:
        return self.package.records[self.names[name]].kind != "base"

    def kept(self, name: str) -> int:
        record = self.package.records[self.names[name]]
        return record.kept if record.kind == "delta" else record.info.numel

    def whole(self, name: str) -> bool:
        return self.package.records[self.names[name]].kind == "whole"

    def terms(self, name: str, start: int, words: Words) -> list[Term]:
        packed_name = self.names[name]
        record = self.package.records[packed_name]
        terms = []
        for segment, frame in self.package.frames(packed_name, start, start + words.size):
            if segment.start < record.base_info.numel:
                inside = start <= segment.start and segment.stop <= start + words.size
                first = segment.start - start
                base_words = (
                    words[first : first + segment.length]
                    if inside
                    else self._resolver.base_run(packed_name, segment.start, segment.length)
                )
                term = decode_delta(self.package.manifest, record, segment, frame, base_words, 1.0)
                terms.append(clip(term, segment, start, words.size))
        return terms

    def words(self, name: str, start: int, count: int) -> Words:
        packed_name = self.names[name]
        record = self.package.records[packed_name]
        if record.kind != "whole":
            return self._resolver.resolve(packed_name, start, count)
        words = np.empty(count, record.info.dtype.word)
        for segment, frame in self.package.frames(packed_name, start, start + count):
            content = decode_whole(record, segment, frame)
            first = max(start, segment.start)
            last = min(start + count, segment.stop)
            words[first - start : last - start] = content[first - segment.start : last - segment.start]
        return words
