"""From a base and packages to the result's words, run by run: the part that all ways of applying share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..dtypes import Words
from ..errors import BaseMismatch, CheckpointError, DtypeMismatch, ResultMismatch, TensorMismatch
from ..package.arithmetic import Term, combine
from ..package.manifest import TensorRecord
from ..package.quantised_records import quantised_in
from ..package.reader import DeltaPackage
from ..package.segments import Segment, decode_delta, decode_whole
from ..weights.alignment import cast_to, with_prefix, without_prefix
from ..weights.derived_buffers import is_derived
from ..weights.files.config_file import config_beside
from ..weights.files.full_precision import quantised_error
from ..weights.files.quantised import Quantised
from ..weights.fingerprint import Fingerprint, fingerprints
from ..weights.protocol import SEGMENT, TensorInfo, Weights, runs
from .chain import Link

_WRONG_BASE = "this is not the base the package was made from"


class Resolver:
    """Computes any run of the result from a base that may lie anywhere.

    A `live` base has the result's names already, and is never rounded: a model's dtypes are its own.

    Raises:
        TensorMismatch: the base lacks a tensor, has one too many, or has one of another shape.
        DtypeMismatch: the base has another dtype than the one the packages were made from, and is not to be
            rounded (`cast_base` is false), or cannot be.
    """

    def __init__(
        self, base: Weights, links: Sequence[Link], *, cast_base: bool | None = None, live: bool = False
    ) -> None:
        self.links = links
        self.live = live
        first = links[0].packages[0].manifest
        last_packages = links[-1].packages
        self.source = {record.name: record for record in first.tensors}
        self.base = base if live else with_prefix(base, first.prefix)
        self.rounded: dict[str, str] = {}
        """Of each tensor that was rounded first, from which dtype to which."""
        if not live and cast_base is not False:
            self._round_base()
        self.tensors = {
            record.name: record for package in last_packages for record in package.manifest.tensors
        }
        self._leave_derived()
        self._check_quantised(base)
        self._check_base({*first.base_only, *self._beside(base, first.prefix)})
        for package in links[0].packages[1:]:
            _check_beside(links[0].packages[0], package)
        alone = all(link.weights == (1.0,) for link in links)
        self.expected = {name: record.result for name, record in self.tensors.items()} if alone else {}
        """Fingerprint of each tensor of the result; empty for a weighted sum, which has none on record."""

    def _round_base(self) -> None:
        before = self.base.tensors
        self.base = cast_to(self.base, {name: record.base_info for name, record in self.source.items()})
        self.rounded = {
            name: f"from {before[name].dtype.code} to {info.dtype.code}"
            for name, info in self.base.tensors.items()
            if info.dtype != before[name].dtype and self.source[name].base is not None
        }

    def _leave_derived(self) -> None:
        """Buffers that a model works out for itself, and that packages took from their base: where this one
        has none, neither has the result.
        """
        for name, record in [*self.source.items()]:
            lacking = name not in self.base.tensors and (self.live or record.base is not None)
            if lacking and is_derived(name, record.info.shape):
                del self.source[name]
                if name in self.tensors and (self.live or self.tensors[name].kind == "base"):
                    del self.tensors[name]

    def _check_quantised(self, base: Weights) -> None:
        """Parts of a quantised weight are not added up, nor the base of a package in full precision."""
        for link in self.links:
            for package in link.packages if link.weights != (1.0,) else ():
                _check_moves_no_part(package)
        for package in self.links[0].packages:
            self._check_same_parts(package)
        quantised = Quantised(self.base.tensors, config_beside(base))
        for unit in quantised.units:
            record = self.source.get(unit.packed)
            if record is None or not _may_be_of(record, self.base.tensors[unit.packed]):
                raise quantised_error(base, quantised, expected="full precision, as the package has its base")

    def _check_same_parts(self, package: DeltaPackage) -> None:
        of_package = quantised_in(package)
        for unit in of_package.units:
            record = self.source.get(unit.packed)
            held = self.base.tensors.get(unit.packed)
            if record is None or (held is None and record.base is None):
                continue
            if held is None or not _may_be_of(record, held):
                remedy = "apply it to the quantised checkpoint that it was made from"
                expected = f"a base quantised as the package is: {of_package}"
                found = f"{unit.packed} as {held}" if held is not None else f"no {unit.packed}"
                raise CheckpointError(self.base.label, expected=expected, found=found, remedy=remedy)

    def _beside(self, base: Weights, prefix: str) -> set[str]:
        """Tensors of the base's later modules, which a package made from the first alone does not know."""
        beside = getattr(base, "beside", ())
        return {name for name in self.base.tensors if without_prefix(name, prefix) in beside}

    def _check_base(self, base_only: set[str]) -> None:
        held = self.base.tensors
        needed = {name: record.base_info for name, record in self.source.items() if record.base is not None}
        for name, info in needed.items():
            if name not in held:
                expected = f"in {self.base.label}"
                raise TensorMismatch(name, expected=expected, found="missing", remedy=_WRONG_BASE)
            if held[name].shape != info.shape:
                expected = f"shape {list(info.shape)}"
                found = f"{list(held[name].shape)} in {self.base.label}"
                raise TensorMismatch(name, expected=expected, found=found, remedy=_WRONG_BASE)
        derived = {name for name, info in held.items() if is_derived(name, info.shape)}
        extra = sorted(held.keys() - self.source.keys() - base_only - derived)
        if extra:
            expected = "a tensor that the package knows"
            found = f"extra in {self.base.label}"
            raise TensorMismatch(extra[0], expected=expected, found=found, remedy=_WRONG_BASE)
        of_other_dtype = [name for name, info in needed.items() if held[name].dtype != info.dtype]
        if of_other_dtype:
            self._refuse_dtype(of_other_dtype[0])

    def _refuse_dtype(self, name: str) -> None:
        """Say whether it is at least the same base: rounded, does the tensor have its fingerprint?"""
        record = self.source[name]
        code = record.info.dtype.code
        rounded = cast_to(self.base, {name: record.base_info})
        elements = (0, record.base_info.numel)
        whole = getattr(self.base, "whole", True)  # of a model on several ranks this one cannot tell
        if not whole or fingerprints(rounded, {name: (elements,)})[name] == record.base:
            cast = "cast_base=True (--cast-base) rounds it first"
            how = f"load it with dtype {code}" if self.live else cast
            remedy = f"it {'is' if whole else 'may be'} the same base in another dtype: {how}"
        else:
            remedy = f"rounded to {code} it differs too: {_WRONG_BASE}"
        found = f"{self.base.tensors[name].dtype.code} in {self.base.label}"
        raise DtypeMismatch(name, expected=code, found=found, remedy=remedy)

    def check_base_print(self, name: str, fingerprint: Fingerprint) -> None:
        """The base's tensor is the one the packages were made from.

        Raises:
            BaseMismatch: it is not.
        """
        record = self.source.get(name)
        if record is not None and record.base is not None and record.base != fingerprint:
            where = f"{self.base.label}: {name}"
            expected = f"fingerprint {record.base.hex[:12]}…"
            after = f" after rounding it {self.rounded[name]}" if name in self.rounded else ""
            found = f"{fingerprint.hex[:12]}…{after}"
            raise BaseMismatch(where, expected=expected, found=found, remedy=_WRONG_BASE)

    def check_result_print(self, name: str, fingerprint: Fingerprint) -> None:
        """The result is what the package recorded.

        Raises:
            ResultMismatch: it is not.
        """
        recorded = self.expected.get(name)
        if recorded is not None and recorded != fingerprint:
            expected = f"fingerprint {recorded.hex[:12]}…"
            found = f"{fingerprint.hex[:12]}…"
            remedy = "please report this: the same package and base must give the same bits"
            raise ResultMismatch(name, expected=expected, found=found, remedy=remedy)

    def base_numel(self, name: str) -> int:
        """Leading elements of a result's tensor that the base has."""
        record = self.source.get(name)
        return record.base_info.numel if record is not None and record.base is not None else 0

    def runs(self, name: str) -> list[tuple[int, int]]:
        """(start, count) of the runs that tile a tensor, none of them across the end of the base's rows."""
        numel = self.tensors[name].info.numel
        split = min(self.base_numel(name), numel)
        added = [(split + start, count) for start, count in runs(numel - split, SEGMENT)]
        return [*runs(split, SEGMENT), *added]

    def windows(self, name: str) -> list[tuple[int, int]]:
        """[start, stop) of the places that packages change: no package's segment lies across a border."""
        numel = self.tensors[name].info.numel
        packages = [package for link in self.links for package in link.packages]
        spans = sorted(
            (segment.start, segment.stop)
            for package in packages
            for segment in package.segments(name, 0, numel)
        )
        windows: list[tuple[int, int]] = []
        for start, stop in spans:
            if windows and start < windows[-1][1]:
                begin, end = windows[-1]
                windows[-1] = (begin, max(stop, end))
            else:
                windows.append((start, stop))
        return windows

    def base_run(self, name: str, start: int, count: int) -> Words:
        """The base's words; zeros where it has none, since those are carried whole. See `Weights.read`."""
        if start < self.base_numel(name):
            return self.base.read(name, start, count)
        return np.zeros(count, self.tensors[name].info.dtype.word)

    def resolve(
        self, name: str, start: int, count: int, words: Words | None = None, *, upto: int | None = None
    ) -> Words:
        """Words of the result after the first `upto` links, by default all.

        `words`, a copy of the base's, are overwritten.
        """
        if words is None:
            base_words = self.base_run(name, start, count)
            words = base_words if base_words.flags.owndata else np.array(base_words)
        for depth, link in enumerate(self.links[:upto]):
            self._apply_link(depth, link, name, start, words)
        return words

    def _apply_link(self, depth: int, link: Link, name: str, start: int, words: Words) -> None:
        terms: list[Term] = []
        whole: list[tuple[slice, Words]] = []
        for package, weight in zip(link.packages, link.weights, strict=True):
            record = package.records.get(name)
            if record is None:
                continue
            for segment, frame in package.frames(name, start, start + words.size):
                if record.kind == "whole" or segment.start >= record.base_info.numel:
                    carried = decode_whole(record, segment, frame)
                    whole.append(_clip_whole(carried, segment, start, words.size))
                else:
                    base_words = self._segment_base(depth, name, segment, start, words)
                    term = decode_delta(package.manifest, record, segment, frame, base_words, weight)
                    terms.append(clip(term, segment, start, words.size))
        if terms:
            combine(words, terms, self.tensors[name].info.dtype)
        for where, carried in whole:
            words[where] = carried

    def _segment_base(self, depth: int, name: str, segment: Segment, start: int, words: Words) -> Words:
        """What a link finds in the place of a segment: a part of `words`, or resolved anew where they end."""
        if start <= segment.start and segment.stop <= start + words.size:
            return words[segment.start - start : segment.stop - start]
        return self.resolve(name, segment.start, segment.length, upto=depth)


def clip(term: Term, segment: Segment, start: int, count: int) -> Term:
    """The part of a segment's term that lies in the run [start, start + count), with positions in the run."""
    assert term.positions is not None
    if start == segment.start and segment.length <= count:
        return term
    positions = term.positions + (segment.start - start)
    inside = (positions >= 0) & (positions < count)
    tuned = term.tuned[inside] if term.tuned is not None else None
    delta = term.delta[inside] if term.delta is not None else None
    base = term.base[inside] if term.base is not None else None
    return Term(positions=positions[inside], factor=term.factor, tuned=tuned, delta=delta, base=base)


def _clip_whole(words: Words, segment: Segment, start: int, count: int) -> tuple[slice, Words]:
    begin = max(start, segment.start)
    end = min(start + count, segment.stop)
    return slice(begin - start, end - start), words[begin - segment.start : end - segment.start]


def _may_be_of(record: TensorRecord, held: TensorInfo) -> bool:
    """Whether a base's tensor may be the one that a package was made from."""
    return record.info.dtype == held.dtype and (record.base is None or record.base_info == held)


def _check_moves_no_part(package: DeltaPackage) -> None:
    """
    Raises:
        TensorMismatch: it changes weights that are quantised, of which nothing can be multiplied or added up.
    """
    quantised = quantised_in(package)
    moved = [part for part in quantised.unit_of if package.records[part].kind != "base"]
    if moved:
        expected = "weight 1 and no package beside it"
        remedy = "apply it alone, or make packages of models in full precision"
        found = f"quantised weights: {quantised}"
        raise TensorMismatch(package.name, expected=expected, found=found, remedy=remedy)


def _check_beside(first: DeltaPackage, second: DeltaPackage) -> None:
    """Packages that are added up agree on shapes, and on whatever both carry whole."""
    for name, record in second.records.items():
        first_record = first.records.get(name)
        if first_record is None:
            continue
        if first_record.info != record.info:
            expected = f"{first_record.info}, as in {first.name}"
            found = f"{record.info} in {second.name}"
            remedy = "merge decides how to join them"
            raise TensorMismatch(name, expected=expected, found=found, remedy=remedy)
        if "whole" in (first_record.kind, record.kind) and first_record.result != record.result:
            expected = f"the same content as in {first.name}"
            found = f"other content in {second.name}"
            remedy = (
                "weights that are not deltas cannot be added up; apply one package, or "
                "exclude the tensor from the other"
            )
            raise TensorMismatch(name, expected=expected, found=found, remedy=remedy)
