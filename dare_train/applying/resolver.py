"""From a base and packages to the words of the result, run by run: the part that every way of applying
shares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..dtypes import Words
from ..errors import BaseMismatch, DtypeMismatch, ResultMismatch, TensorMismatch
from ..package.arithmetic import Term, combine
from ..package.reader import DeltaPackage
from ..package.segments import Segment, decode_delta, decode_whole
from ..weights.alignment import cast_to, with_prefix
from ..weights.fingerprint import Fingerprint, fingerprints
from ..weights.protocol import SEGMENT, Weights, runs
from .chain import Link

_WRONG_BASE = "this is not the base the package was made from"


class Resolver:
    """Computes any run of the result from a base that may lie anywhere. A `live` base has the result's names
    already.

    Raises:
        TensorMismatch: the base lacks a tensor, has one too many, or has one of another shape.
        DtypeMismatch: the base has another dtype than the one the packages were made from.
    """

    def __init__(
        self, base: Weights, links: Sequence[Link], *, cast_base: bool = False, live: bool = False
    ) -> None:
        self.links, self.live = links, live
        first, last = links[0].packages[0].manifest, links[-1].packages
        self.base = base if live else with_prefix(base, first.prefix)
        if cast_base:
            self.base = cast_to(self.base, {record.name: record.base_info for record in first.tensors})
        self.source = {record.name: record for record in first.tensors}
        self.tensors = {record.name: record for package in last for record in package.manifest.tensors}
        self._check_base(first.base_only)
        for package in links[0].packages[1:]:
            _check_beside(links[0].packages[0], package)
        alone = all(link.weights == (1.0,) for link in links)
        self.expected = {name: record.result for name, record in self.tensors.items()} if alone else {}
        """Fingerprint of each tensor of the result, where the packages say it: a weighted sum has none on
        record."""

    def _check_base(self, base_only: Iterable[str]) -> None:
        held = self.base.tensors
        needed = {name: record.base_info for name, record in self.source.items() if record.base is not None}
        for name, info in needed.items():
            if name not in held:
                raise TensorMismatch(
                    name, expected=f"in {self.base.label}", found="missing", remedy=_WRONG_BASE
                )
            if held[name].shape != info.shape:
                found = f"{list(held[name].shape)} in {self.base.label}"
                raise TensorMismatch(
                    name, expected=f"shape {list(info.shape)}", found=found, remedy=_WRONG_BASE
                )
        extra = sorted(held.keys() - self.source.keys() - set(base_only))
        if extra:
            raise TensorMismatch(
                extra[0],
                expected="a tensor that the package knows",
                found=f"extra in {self.base.label}",
                remedy=_WRONG_BASE,
            )
        other = [name for name, info in needed.items() if held[name].dtype != info.dtype]
        if other:
            self._refuse_dtype(other[0])

    def _refuse_dtype(self, name: str) -> None:
        """Say whether it is at least the same base: rounded to the package's dtype, does the tensor have its
        fingerprint?
        """
        record = self.source[name]
        rounded = cast_to(self.base, {name: record.base_info})
        whole = getattr(self.base, "whole", True)  # of a model on several ranks this one cannot tell
        same = not whole or fingerprints(rounded, {name: ((0, record.base_info.numel),)})[name] == record.base
        found = f"{self.base.tensors[name].dtype.code} in {self.base.label}"
        if same:
            how = (
                f"load it with dtype {record.info.dtype.code}"
                if self.live
                else "cast_base=True (--cast-base) rounds it first"
            )
            remedy = f"it {'is' if whole else 'may be'} the same base in another dtype: {how}"
        else:
            remedy = f"rounded to {record.info.dtype.code} it differs too: {_WRONG_BASE}"
        raise DtypeMismatch(name, expected=record.info.dtype.code, found=found, remedy=remedy)

    def check_base_print(self, name: str, found: Fingerprint) -> None:
        """The base's tensor is the one the packages were made from.

        Raises:
            BaseMismatch: it is not.
        """
        record = self.source.get(name)
        if record is not None and record.base is not None and record.base != found:
            raise BaseMismatch(
                f"{self.base.label}: {name}",
                expected=f"fingerprint {record.base.hex[:12]}…",
                found=f"{found.hex[:12]}…",
                remedy=_WRONG_BASE,
            )

    def check_result_print(self, name: str, found: Fingerprint) -> None:
        """The result is what the package recorded.

        Raises:
            ResultMismatch: it is not.
        """
        expected = self.expected.get(name)
        if expected is not None and expected != found:
            remedy = "please report this: the same package and base must give the same bits"
            raise ResultMismatch(
                name, expected=f"fingerprint {expected.hex[:12]}…", found=f"{found.hex[:12]}…", remedy=remedy
            )

    def base_numel(self, name: str) -> int:
        """Leading elements of a result's tensor that the base has."""
        record = self.source.get(name)
        return record.base_info.numel if record is not None and record.base is not None else 0

    def runs(self, name: str) -> list[tuple[int, int]]:
        """(start, count) of the runs that tile a tensor, none of them across the end of the base's rows."""
        split, numel = self.base_numel(name), self.tensors[name].info.numel
        split = min(split, numel)
        return [
            *runs(split, SEGMENT),
            *((split + start, count) for start, count in runs(numel - split, SEGMENT)),
        ]

    def windows(self, name: str) -> list[tuple[int, int]]:
        """[start, stop) of the places that packages change, such that no segment of any of them lies across a
        border.
        """
        packages = [package for link in self.links for package in link.packages]
        spans = sorted(
            (s.start, s.stop)
            for package in packages
            for s, _ in package.frames(name, 0, self.tensors[name].info.numel)
        )
        merged: list[tuple[int, int]] = []
        for start, stop in spans:
            if merged and start < merged[-1][1]:
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            else:
                merged.append((start, stop))
        return merged

    def base_run(self, name: str, start: int, count: int) -> Words:
        """The base's words, not to be written to; zeros where the base has none, since those are carried
        whole.
        """
        if start < self.base_numel(name):
            return self.base.read(name, start, count)
        return np.zeros(count, self.tensors[name].info.dtype.word)

    def resolve(
        self, name: str, start: int, count: int, words: Words | None = None, *, upto: int | None = None
    ) -> Words:
        """Words of the result after the first `upto` links (all by default). `words`, a copy of the base's,
        are overwritten.
        """
        words = np.array(self.base_run(name, start, count)) if words is None else words
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
                    whole.append(
                        _clip_whole(decode_whole(record, segment, frame), segment, start, words.size)
                    )
                else:
                    own = self._own_base(depth, name, segment, start, words)
                    terms.append(
                        clip(
                            decode_delta(package.manifest, record, segment, frame, own, weight),
                            segment,
                            start,
                            words.size,
                        )
                    )
        if terms:
            combine(words, terms, self.tensors[name].info.dtype)
        for where, content in whole:
            words[where] = content

    def _own_base(self, depth: int, name: str, segment: Segment, start: int, words: Words) -> Words:
        if start <= segment.start and segment.stop <= start + words.size:
            return words[segment.start - start : segment.stop - start]
        return self.resolve(name, segment.start, segment.length, upto=depth)


def clip(term: Term, segment: Segment, start: int, count: int) -> Term:
    """The part of a segment's term that lies in the run [start, start + count), with positions relative to
    the run.
    """
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
    first, last = max(start, segment.start), min(start + count, segment.stop)
    return slice(first - start, last - start), words[first - segment.start : last - segment.start]


def _check_beside(one: DeltaPackage, other: DeltaPackage) -> None:
    """Packages that are added up agree on shapes, and on whatever both carry whole."""
    for name, record in other.records.items():
        mine = one.records.get(name)
        if mine is None:
            continue
        if mine.info != record.info:
            raise TensorMismatch(
                name,
                expected=f"{mine.info}, as in {one.name}",
                found=f"{record.info} in {other.name}",
                remedy="merge decides how to join them",
            )
        if "whole" in (mine.kind, record.kind) and mine.result != record.result:
            remedy = (
                "weights that are not deltas cannot be added up; apply one package, or "
                "exclude the tensor from the other"
            )
            raise TensorMismatch(
                name,
                expected=f"the same content as in {one.name}",
                found=f"other content in {other.name}",
                remedy=remedy,
            )
