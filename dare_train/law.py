"""The one arithmetic law that every backend obeys to the last bit (docs/format.md §5).

    out = round_to_dtype( f32(base) + f32(w·γ) · (f32(tuned) - f32(base)) )      each operation rounded to float32

An element whose delta is zero in every package keeps the base's bits, and with one package and w·γ = 1 an
`exact` value comes back as it was. float64 tensors use float64 where others use float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .dtypes import DType, FloatArray, Words, from_float, to_float
from .kernels import cpu


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one package adds to a run of a tensor: at `positions`, either `tuned` words or a `delta`, times `factor`."""

    positions: NDArray[np.int64]
    factor: float
    tuned: Words | None = None
    delta: FloatArray | None = None

    def result(self, base: Words, dtype: DType) -> Words:
        """The words that replace `base` (the words at `positions`) when this is the only package."""
        if self.tuned is not None and self.factor == 1.0:
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
                delta, touched = to_float(self.tuned, dtype) - to_float(base, dtype), self.tuned != base
            else:
                delta = np.asarray(self.delta, dtype.compute)
                touched = delta != 0
            return dtype.compute.type(self.factor) * delta, touched


def combine(words: Words, terms: Sequence[Term], dtype: DType) -> None:
    """Apply the law to a run of base words in place.

    Where several terms move an element they add up in the order given and are rounded once; where one alone does, it
    gives what it would give without the others.
    """
    if len(terms) == 1:
        positions = terms[0].positions
        cpu.put(words, positions, terms[0].result(cpu.take(words, positions), dtype))
        return
    total = to_float(words, dtype).astype(dtype.compute)
    movers = np.zeros(words.size, np.int32)
    moved_by = []
    for term in terms:
        added, moved = term.addend(words[term.positions], dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            total[term.positions] = np.where(moved, total[term.positions] + added, total[term.positions])
        movers[term.positions] += moved
        moved_by.append(moved)
    touched = np.flatnonzero(movers)
    words[touched] = from_float(total[touched], dtype)
    for term, moved in zip(terms, moved_by, strict=True):
        if term.tuned is not None and term.factor == 1.0:
            alone = moved & (movers[term.positions] == 1)
            words[term.positions[alone]] = term.tuned[alone]
