"""The one arithmetic law that every backend obeys to the last bit (docs/format.md §5).

    out = round_to_dtype( f32(base) + f32(w·γ) · (f32(tuned) - f32(base)) )

with each operation rounded to float32. float64 tensors use float64 where others use float32.

An element whose delta is zero in every package keeps the base's bits, and with one package and f32(w·γ) = 1
an `exact` value comes back as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DType, FloatArray, Words, from_float, to_float
from ..kernels import cpu, sums


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one package adds to a run of a tensor at `positions`: `tuned` words or a `delta`, and a factor."""

    positions: NDArray[np.int64] | None
    """Ascending, relative to the run; None stands for every element."""
    factor: float
    """w·γ, by which the delta is multiplied."""
    tuned: Words | None = None
    delta: FloatArray | None = None
    base: Words | None = None
    """The base's words at the positions, where they are at hand."""

    def own(self, words: Words) -> Words:
        """Those of a run's base words that the term is about."""
        if self.base is not None:
            return self.base
        return words if self.positions is None else cpu.take(words, self.positions)

    def exact(self, dtype: DType) -> bool:
        """Whether the term's words are the result where it is alone."""
        return self.tuned is not None and bool(dtype.compute.type(self.factor) == 1)

    def result(self, base: Words, dtype: DType) -> Words:
        """The words that replace `base` (the words at `positions`) when this is the only package."""
        if self.tuned is not None and self.exact(dtype):
            return self.tuned
        if self.tuned is not None and dtype.code == "BF16":
            return cpu.law_bf16(base, self.tuned, self.factor)
        added, touched = self.addend(base, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = from_float(to_float(base, dtype) + added, dtype)
        return np.where(touched, moved, base)

    def addend(self, base: Words, dtype: DType) -> tuple[FloatArray, NDArray[np.bool_]]:
        """f32(w·γ)·δ at the positions, and where δ is not zero."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self.tuned is not None:
                delta = to_float(self.tuned, dtype) - to_float(base, dtype)
                touched = self.tuned != base
            else:
                delta = np.asarray(self.delta, dtype.compute)
                touched = delta != 0
            return dtype.compute.type(self.factor) * delta, touched


def combine(words: Words, terms: Sequence[Term], dtype: DType) -> None:
    """Apply the law to a run of base words in place.

    Where several terms move an element they add up in the order given and are rounded once; where one alone
    does, it gives what it would give without the others.
    """
    if len(terms) == 1:
        (term,) = terms
        result = term.result(term.own(words), dtype)
        if term.positions is None:
            words[:] = result
        else:
            cpu.put(words, term.positions, result)
        return
    some_exact = any(term.exact(dtype) for term in terms)
    # A term may be about all of the words, and they are about to change.
    before = words.copy() if some_exact else words
    bases = [term.own(before) for term in terms]
    total, touched = _added_up(words, terms, bases, dtype)
    if touched is None:
        sums.round_moved_bf16(words, total)
    else:
        words[touched] = from_float(total[touched], dtype)
    if some_exact:
        _put_alone(words, terms, bases, dtype)


def unrounded(words: Words, terms: Sequence[Term], dtype: DType) -> FloatArray:
    """The sums that `combine` rounds, in `dtype.compute`, for a result of another dtype."""
    total, _ = _added_up(words, terms, [term.own(words) for term in terms], dtype)
    return total


def _added_up(
    words: Words, terms: Sequence[Term], bases: Sequence[Words], dtype: DType
) -> tuple[FloatArray, NDArray[np.int64] | None]:
    """Base plus deltas, in order, and which elements moved; None where the sums tell that themselves."""
    if dtype.code == "BF16" and all(term.tuned is not None for term in terms):
        total = sums.widened_bf16(words)
        for term, base in zip(terms, bases, strict=True):
            assert term.tuned is not None
            sums.add_at_bf16(base, term.tuned, term.positions, term.factor, total)
        return total, None
    wide = to_float(words, dtype)
    total = wide.astype(dtype.compute) if np.shares_memory(wide, words) else wide
    touched = np.zeros(words.size, np.bool_)
    for term, base in zip(terms, bases, strict=True):
        where = slice(None) if term.positions is None else term.positions
        added, moved = term.addend(base, dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            total[where] = np.where(moved, total[where] + added, total[where])
        touched[where] |= moved
    return total, np.flatnonzero(touched)


def _put_alone(words: Words, terms: Sequence[Term], bases: Sequence[Words], dtype: DType) -> None:
    """Where one term alone moves an element, and is exact: its word."""
    movers = np.zeros(words.size, np.uint16)
    places = [np.arange(words.size) if term.positions is None else term.positions for term in terms]
    for term, base, where in zip(terms, bases, places, strict=True):
        if term.tuned is not None:
            sums.count_movers(base, term.tuned, where, movers)
        else:
            movers[where] += np.asarray(term.delta) != 0
    for term, base, where in zip(terms, bases, places, strict=True):
        if term.tuned is not None and term.exact(dtype):
            sums.put_alone(words, where, base, term.tuned, movers)
