"""Runs copied out of a live model, and what becomes of them: in a package on the base, or in the next link of
a chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words, to_float
from ..extracting.assembly import Work
from ..extracting.encoding import Encoded, encode, receiver_words
from ..extracting.plan import TensorPlan
from ..kernels import cpu
from ..package.codec import group_length
from ..package.masks import Mask
from ..weights.low_rank import Readable, Update, merged_words
from ..weights.protocol import TensorInfo, Weights


@dataclass(frozen=True)
class Taken:
    """Words of one run, copied out of the live model: of a delta the kept ones."""

    plan: TensorPlan
    start: int
    length: int
    words: Words
    """Empty where an adapter will be merged into the base when the run is encoded."""


def cut_groups(base: Weights, taken: Iterable[Taken]) -> list[tuple[int, int, float]]:
    """(plan, number, largest |δ| here) of each scale group at the border of what this rank holds."""
    groups: list[tuple[int, int, float]] = []
    for run in taken:
        plan = run.plan
        start = run.start
        if plan.kind != "delta" or plan.values in ("exact", "rounded") or start >= plan.base_numel:
            continue
        size = group_length(plan.mask.threshold)
        cut = {edge // size for edge in (start, start + run.length) if edge % size}
        if cut:
            dtype = plan.info.dtype
            positions = plan.positions(start, run.length)
            base_words = cpu.take(base.read(plan.name, start, run.length), positions)
            delta = np.abs(to_float(run.words, dtype) - to_float(base_words, dtype)).astype(np.float32)
            numbers = (start + positions) // size
            for number in sorted(cut):
                groups.append((plan.index, number, float(delta[numbers == number].max(initial=0.0))))
    return groups


def largest_of(groups: list[list[tuple[int, int, float]]]) -> dict[int, dict[int, float]]:
    """The largest |δ| by plan and number, of what all ranks found."""
    sizes: dict[int, dict[int, float]] = {}
    for index, number, size in (group for of_rank in groups for group in of_rank):
        largest = sizes.setdefault(index, {})
        largest[number] = max(size, largest.get(number, 0.0))
    return sizes


class LastRead:
    """Reads from weights, and has at hand what it read last."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._last: tuple[tuple[str, int, int], Words] | None = None

    def read(self, name: str, start: int, count: int) -> Words:
        if self._last is None or self._last[0] != (name, start, count):
            self._last = (name, start, count), self._weights.read(name, start, count)
        return self._last[1]


def take_run(
    live: Readable,
    run: Work,
    known: Mapping[tuple[str, int], NDArray[np.int32]],
    later: Collection[str] = (),
) -> Taken:
    """Copy of a run what its package will need. `known` are positions of kept elements that were worked out
    before; tensors in `later` have adapters merged into them when they are encoded."""
    plan, start, count = run
    if plan.kind == "base" or plan.name in later:
        return Taken(plan, start, count, np.empty(0, plan.at_hand.word))
    words = live.read(plan.name, start, count)
    if not run.is_delta:
        return Taken(plan, start, count, words.copy())
    positions = known.get((plan.name, start))
    if positions is None:
        return Taken(plan, start, count, cpu.take(words, plan.positions(start, count)))
    return Taken(plan, start, count, cpu.take(words, positions))


class Spread:
    """A run that was copied, as weights that are zero wherever they were not: enough for a sum that is taken
    element by element. `info` is the live tensor's.
    """

    def __init__(self, run: Taken, info: TensorInfo) -> None:
        self.label = run.plan.name
        self.tensors = {run.plan.name: info}
        self._start = run.start
        self._words = run.words
        if run.plan.kind == "delta" and run.start < run.plan.base_numel:
            self._words = np.zeros(run.length, run.words.dtype)
            self._words[run.plan.positions(run.start, run.length)] = run.words

    def read(self, name: str, start: int, count: int) -> Words:
        words = np.zeros(count, self._words.dtype)
        first = max(start, self._start)
        stop = min(start + count, self._start + self._words.size)
        if first < stop:
            words[first - start : stop - start] = self._words[first - self._start : stop - self._start]
        return words


def merged(base: Weights, run: Taken, updates: list[Update]) -> Words:
    """The words of a run with adapters merged into it: the kept ones of a delta, else all."""
    plan = run.plan
    info = TensorInfo(base.tensors[plan.name].dtype, plan.info.shape)
    words = merged_words(base, updates, info, plan.name, run.start, run.length, into=plan.at_hand)
    return cpu.take(words, plan.positions(run.start, run.length)) if plan.kind == "delta" else words


def encode_taken(base: Weights, run: Taken) -> Encoded:
    """A run of a package on the base."""
    base_words = run.plan.base_words(base, run.start, run.length)
    return encode(run.plan, run.start, base_words, run.words)


def received(base: Weights, run: Taken) -> Words:
    """All words of a run as a package on the base would give them."""
    plan, start = run.plan, run.start
    if plan.kind == "whole" or start >= plan.base_numel:
        return plan.in_result(run.words)
    words = np.array(base.read(plan.name, start, run.length))
    if plan.kind == "delta":
        positions = plan.positions(start, run.length)
        words[positions] = receiver_words(plan, start, words.size, positions, words[positions], run.words)
    return words


def link_plan(plan: TensorPlan) -> TensorPlan:
    """The plan of the same tensor in a package that continues another: values are exact, rescaled and
    landed already.
    """
    exact = replace(plan, in_base=True, values="exact", factor=1.0, landing=None)
    if plan.base_rows is None:
        return exact
    # Rows that are dropped and rows that are not: leave it to the bitmap of changes.
    return replace(exact, base_rows=None, mask=Mask(kind="all", key=plan.mask.key), p=0.0)


def encode_link(plan: TensorPlan, run: Taken, before: Words, after: Words) -> Encoded:
    """A run of a package that leads from the words `before` to those `after`."""
    if plan.kind != "delta":
        return encode(plan, run.start, before, after)
    positions = plan.positions(run.start, run.length)
    return encode(plan, run.start, before, after[positions], positions)
