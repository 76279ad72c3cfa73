"""One model's delta of one tensor, with what is dropped from it before it is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, FloatArray, Words
from ..kernels import cpu, sums
from ..kernels.ties_of_two import Cut
from ..package.arithmetic import Term
from ..weights.protocol import TensorInfo
from .methods import dropping as drops
from .methods.dropping import DropRate
from .methods.registry import Dropping
from .methods.top_k import EVERY, NONE, Largest, Sizes, largest, sizes_of
from .models.inputs import CheckpointInput, Input
from .statistics.statistics_file import Floats
from .walk import Walk

Terms = Callable[[int, Words], Sequence[Term]]


class ModelStatistics(Protocol):
    """What a model's data say of its tensors, by the result's names; see `statistics_file.StatisticsFile`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    def read(self, name: str, start: int, count: int) -> Floats: ...
    def whole(self, name: str) -> Floats: ...
    def transposed(self, name: str) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model that takes part in a tensor, and what the recipe says of it there."""

    input: Input
    seed: int
    settings: Mapping[str, Any]
    """Of the parameters of which each model has its own."""
    fisher: ModelStatistics | None = None
    gram: ModelStatistics | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelDelta:
    """A model's delta, run by run, as terms of the arithmetic law with weight 1.

    DARE comes first (`p`), then what the method itself drops. What was dropped already in a package is not
    dropped at random again. By default nothing is dropped.
    """

    member: Member
    walk: Walk
    rescale: str
    rate: DropRate | None = None
    """At which DARE drops elements, if it does."""
    rate_factor: float = 1.0
    """Of the elements that DARE leaves."""
    keep: Largest = EVERY
    """Elements that the method keeps by their magnitude."""
    outliers: Largest = NONE
    """Those among them that it drops again."""
    magprune: bool = False
    """Whether it drops at random, by ranks within rows."""
    trimmed_factor: float = 1.0
    """Of the elements that the method leaves."""

    @classmethod
    def of(cls, member: Member, walk: Walk, *, drops: Dropping, rescale: str) -> ModelDelta:
        """With what a recipe has dropped. Walks over the tensor where thresholds or norms are wanted."""
        dropped = cls(member=member, walk=walk, rescale=rescale, rate=rate_of(member, walk.name))
        dared = replace(dropped, rate_factor=dropped._factor_of_rate())
        density = member.settings.get("density", 1.0)
        if drops == "none" or density >= 1 or not member.input.moves(walk.name):
            return dared
        trimmed = dared._trimmed_by(drops)
        if rescale != "norm":
            return trimmed
        return replace(trimmed, trimmed_factor=trimmed._norm_factor(dared.terms, trimmed.terms))

    def raw(self, start: int, words: Words) -> Sequence[Term]:
        """The delta of a run whose base words are `words`, before anything is dropped."""
        return (
            self.member.input.terms(self.walk.name, start, words)
            if self.member.input.moves(self.walk.name)
            else []
        )

    def terms(self, start: int, words: Words) -> Sequence[Term]:
        """The delta after dropping."""
        return self._trimmed(self._dared(start, words), start, words)

    @property
    def plain(self) -> bool:
        """Whether each element of a delta is known by itself, once the borders are: then `fill` is the fast
        way.
        """
        model = self.member.input
        dtype = self.walk.info.dtype
        by_ranks = self.magprune or self.trimmed_factor != 1
        return (
            isinstance(model, CheckpointInput)
            and dtype.code == "BF16"
            and model.tensors[self.walk.name].dtype == dtype
            and not by_ranks
        )

    def fill(self, start: int, words: Words, row: FloatArray) -> None:
        """The delta after dropping of a run whose base words are `words`, where it is `plain`, into a row."""
        tuned = self.member.input.words(self.walk.name, start, words.size)
        if self.rate is None:
            sums.masked_deltas_bf16(words, tuned, words, 0, 1.0, row)
        else:
            draws = self.rate.draws(start, words.size)
            sums.masked_deltas_bf16(words, tuned, draws, self.rate.threshold, self.rate_factor, row)
        if self._trims:
            self._trim_row(start, row)

    def cut(self, start: int) -> Cut | None:
        """What `fill` drops of a run, where it is `plain`; None where the border of what is trimmed lies in
        it.
        """
        least, most = self.keep.least(start), self.outliers.least(start)
        if least is None or most is None:
            return None
        key, threshold = (self.rate.key, self.rate.threshold) if self.rate is not None else (0, 0)
        return Cut(key, threshold, self.rate_factor, least, most)

    # DARE

    def _factor_of_rate(self) -> float:
        """What the rule of rescaling makes of a delta of which DARE dropped elements and no more."""
        if self.rate is None or self.rescale == "none":
            return 1.0
        if self.rescale == "q":
            return self._q_factor(self.rate)
        if self.rescale == "norm":
            return self._norm_factor(self.raw, self._dared)
        return self.rate.factor

    def _q_factor(self, rate: DropRate) -> float:
        member = self.member
        name = self.walk.name
        if member.settings["q"] > 0:
            return float(1 / member.settings["q"])
        if member.gram is None or name not in member.gram.tensors:
            return rate.factor
        info = self.walk.info
        words = self.walk.words(0, info.numel)
        delta = dense(self.raw(0, words), words, info.dtype).reshape(info.shape)
        return drops.rescale_q(
            member.gram.whole(name), delta, rate.p, transposed=member.gram.transposed(name)
        )

    def _norm_factor(self, before: Terms, after: Terms) -> float:
        """What gives the rest the L1 norm of the whole, as mergekit does it."""

        def norms(start: int, words: Words) -> NDArray[np.float64]:
            return np.array([self._norm(terms(start, words), words) for terms in (before, after)])

        whole, rest = self.walk.total(norms) if self.walk.runs else (0.0, 0.0)
        return float(whole / rest) if whole >= 1e-7 and rest >= 1e-7 else 1.0

    def _norm(self, terms: Sequence[Term], words: Words) -> float:
        return sum(
            float(np.abs(delta_of(term, words, self.walk.info.dtype)).sum(dtype=np.float64)) for term in terms
        )

    def _dared(self, start: int, words: Words) -> Sequence[Term]:
        terms = self.raw(start, words)
        if self.rate is None:
            return terms
        kept = self.rate.positions(start, words.size)
        return [drops.restricted(term, kept, words.size, self.rate_factor) for term in terms]

    # What the method drops

    def _trimmed_by(self, rule: Dropping) -> ModelDelta:
        """The same, with what the method drops."""
        if rule == "magprune":
            return replace(self, magprune=not self.member.input.dropped(self.walk.name))
        keep, outliers = borders(rule, self.member, self.walk.name, self.walk.info.numel, self._largest)
        return replace(self, keep=keep, outliers=outliers)

    def _largest(self, k: int, last: bool) -> Largest:
        return largest(self._each_sizes, k, last=last)

    def _each_sizes(self, function: Callable[[int, Sizes], object]) -> Iterator[object]:
        return self.walk.each(lambda start, words: function(start, self._sizes(start, words)))

    def _sizes(self, start: int, words: Words) -> Sizes:
        parts = self._all_sizes(self._dared(start, words), words)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])

    def _all_sizes(self, terms: Sequence[Term], words: Words) -> list[Sizes]:
        dtype = self.walk.info.dtype
        return [
            sums.sizes_bf16(term.own(words), term.tuned, term.factor)
            if term.tuned is not None and dtype.code == "BF16"
            else sizes_of(delta_of(term, words, dtype))
            for term in terms
        ]

    def _trimmed(self, terms: Sequence[Term], start: int, words: Words) -> Sequence[Term]:
        """What is left of the terms of a run, which are trimmed together: a rank is one among all its
        elements.
        """
        if terms and self.magprune:
            return [self._pruned(terms, start, words)]
        if not terms or not self._trims:
            return terms
        parts = self._all_sizes(terms, words)
        kept = self._kept(np.concatenate(parts), start)
        kept_of_each = np.split(kept, np.cumsum([part.size for part in parts])[:-1])
        return [
            drops.chosen(term, np.flatnonzero(of_term), self.trimmed_factor)
            for term, of_term in zip(terms, kept_of_each, strict=True)
        ]

    @property
    def _trims(self) -> bool:
        return self.keep is not EVERY or self.outliers is not NONE

    def _kept(self, sizes: Sizes, start: int) -> NDArray[np.bool_]:
        kept = self.keep.among(sizes, start)
        if self.outliers is not NONE:
            kept &= ~self.outliers.among(sizes, start) | np.isnan(sizes)
        return kept

    def _trim_row(self, start: int, row: FloatArray) -> None:
        """Make zero what is not kept of a run's deltas, in place."""
        least = self.keep.least(start)
        most = self.outliers.least(start)
        if least is None or most is None:  # the run in which the border lies
            sums.keep(row, self._kept(sizes_of(row), start))
        else:
            sums.keep_sizes(row, least, most)

    def _pruned(self, terms: Sequence[Term], start: int, words: Words) -> Term:
        settings = self.member.settings
        delta = dense(terms, words, self.walk.info.dtype)
        key = DropRate.of(0.0, self.member.seed, self.walk.name).key
        kept, factors = drops.magprune(
            delta, self.walk.row, key, start, density=settings["density"], epsilon=settings["epsilon"]
        )
        positions = np.flatnonzero(kept)
        rest = delta[positions] * factors[positions] if self.rescale == "paper" else delta[positions]
        return Term(positions=positions, factor=self.trimmed_factor, delta=rest)


def rate_of(member: Member, name: str) -> DropRate | None:
    """At which DARE drops elements of a tensor of a model, if it does: not where some were dropped
    already.
    """
    p = member.settings.get("p", 0.0)
    return None if p == 0 or member.input.dropped(name) else DropRate.of(p, member.seed, name)


def borders(
    rule: Dropping, member: Member, name: str, numel: int, find: Callable[[int, bool], Largest]
) -> tuple[Largest, Largest]:
    """What `magnitude` and `outliers` keep of a model's delta of a tensor, and what of that they drop as
    outliers.

    Args:
        find: the k largest of the delta's elements; with True the last of equal ones.
    """
    density = member.settings["density"]
    if rule == "magnitude":
        rank = drops.trim_rank(numel, density)
        return find(rank, False) if rank < member.input.kept(name) else EVERY, NONE
    looked_at, dropped = drops.outlier_ranks(numel, density, member.settings["gamma"])
    return find(looked_at, True), find(dropped, True)


def delta_of(term: Term, words: Words, dtype: DType) -> FloatArray:
    """f32(factor)·δ at the term's positions."""
    base_words = term.own(words)
    if term.tuned is not None and dtype.code == "BF16":
        return sums.deltas_bf16(base_words, term.tuned, term.factor)
    added, moved = term.addend(base_words, dtype)
    return np.where(moved, added, added.dtype.type(0))


def dense(terms: Sequence[Term], words: Words, dtype: DType, out: FloatArray | None = None) -> FloatArray:
    """The deltas of a run, zero where no term is, [words.size]; added to nothing that `out` held but
    zeros.
    """
    row = np.zeros(words.size, dtype.compute) if out is None else out
    for term in terms:
        delta = delta_of(term, words, dtype)
        if term.positions is None:
            row[:] = delta
        else:
            cpu.put(row, term.positions, delta)  # type: ignore[arg-type]
    return row
