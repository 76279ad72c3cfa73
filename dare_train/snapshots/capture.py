"""Runs copied out of a live model, and what becomes of them: in a package on the base, or in the next link of
a chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words, to_float
from ..extracting.encoding import Encoded, Taken, encode_delta, encode_whole, receiver_words
from ..extracting.plan import TensorPlan
from ..kernels import cpu
from ..package.codec import group_length
from ..package.masks import Mask
from ..weights.fingerprint import Fingerprint
from ..weights.low_rank import LowRank, Readable, merged_words
from ..weights.protocol import Weights


def cut_groups(base: Weights, taken: Iterable[Taken]) -> list[tuple[int, int, float]]:
    """(plan, number, largest |δ| here) of each scale group at the border of what this rank holds."""
    found = []
    for run in taken:
        plan, start = run.plan, run.start
        if plan.kind != "delta" or plan.values in ("exact", "rounded") or start >= plan.base_numel:
            continue
        size = group_length(plan.mask.threshold)
        cut = {edge // size for edge in (start, start + run.length) if edge % size}
        if cut:
            positions = plan.positions(start, run.length)
            own = cpu.take(base.read(plan.name, start, run.length), positions)
            delta = np.abs(to_float(run.words, plan.info.dtype) - to_float(own, plan.info.dtype)).astype(
                np.float32
            )
            numbers = (start + positions) // size
            found += [
                (plan.index, number, float(delta[numbers == number].max(initial=0.0)))
                for number in sorted(cut)
            ]
    return found


def largest_of(groups: list[list[tuple[int, int, float]]]) -> dict[int, dict[int, float]]:
    """The largest |δ| by plan and number, of what all ranks found."""
    sizes: dict[int, dict[int, float]] = {}
    for index, number, size in (group for told in groups for group in told):
        known = sizes.setdefault(index, {})
        known[number] = max(size, known.get(number, 0.0))
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
    plan: TensorPlan,
    start: int,
    count: int,
    known: Mapping[tuple[str, int], NDArray[np.int32]],
    later: Collection[str] = (),
) -> Taken:
    """Copy of a run what its package will need. `known` are positions of kept elements that were worked out
    before; tensors in `later` have adapters merged into them when they are encoded."""
    if plan.kind == "base" or plan.name in later:
        return Taken(plan, start, count, np.empty(0, plan.info.dtype.word))
    words = live.read(plan.name, start, count)
    if plan.kind != "delta" or start >= plan.base_numel:
        return Taken(plan, start, count, words.copy())
    positions = known.get((plan.name, start))
    return Taken(
        plan, start, count, cpu.take(words, plan.positions(start, count) if positions is None else positions)
    )


def merged(base: Weights, run: Taken, updates: list[LowRank]) -> Words:
    """The words of a run with adapters merged into it: the kept ones of a delta, else all."""
    plan = run.plan
    words = merged_words(base, updates, plan.info, plan.name, run.start, run.length)
    return cpu.take(words, plan.positions(run.start, run.length)) if plan.kind == "delta" else words


def encode(base: Weights, run: Taken) -> Encoded:
    """A run of a package on the base."""
    plan, start = run.plan, run.start
    words = base.read(plan.name, start, run.length) if plan.in_base and start < plan.base_numel else None
    if words is not None and plan.kind == "delta":
        return encode_delta(plan, start, words, plan.positions(start, run.length), run.words)
    print_ = Fingerprint.of(words, start) if words is not None else Fingerprint()
    if plan.kind == "base":
        return Encoded(index=plan.index, base=print_, result=print_)
    return replace(encode_whole(plan, start, run.words), base=print_)


def received(base: Weights, run: Taken) -> Words:
    """All words of a run as a package on the base would give them."""
    plan, start = run.plan, run.start
    if plan.kind == "whole" or start >= plan.base_numel:
        return run.words
    words = np.array(base.read(plan.name, start, run.length))
    if plan.kind == "delta":
        positions = plan.positions(start, run.length)
        words[positions] = receiver_words(plan, start, words.size, positions, words[positions], run.words)
    return words


def link_plan(plan: TensorPlan) -> TensorPlan:
    """The plan of the same tensor in a package that continues another: values are exact and rescaled
    already.
    """
    if (
        plan.base_rows is not None
    ):  # rows that are dropped and rows that are not: leave it to the bitmap of changes
        return replace(
            plan, base_rows=None, mask=Mask(kind="all", key=plan.mask.key), p=0.0, values="exact", factor=1.0
        )
    return replace(plan, in_base=True, values="exact", factor=1.0)


def encode_link(plan: TensorPlan, run: Taken, before: Words, after: Words) -> Encoded:
    """A run of a package that leads from the words `before` to those `after`."""
    if plan.kind == "delta":
        positions = plan.positions(run.start, run.length)
        return encode_delta(plan, run.start, before, positions, after[positions])
    print_ = Fingerprint.of(before, run.start)
    if plan.kind == "base":
        return Encoded(index=plan.index, base=print_, result=print_)
    return replace(encode_whole(plan, run.start, after), base=print_)
