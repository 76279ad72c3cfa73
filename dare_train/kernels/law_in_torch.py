"""The arithmetic law on whole runs in a device's memory, in torch's operations: every element of every model,
kept or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import DType

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """What a model adds to the elements of a run: `tuned` words or a `delta`, times `factor`."""

    factor: float
    tuned: Tensor | None = None
    delta: Tensor | None = None
    """Of the compute dtype."""
    present: Tensor | None = None
    """bool: the elements that it is about; None stands for every element."""

    def exact(self, dtype: DType) -> bool:
        """Whether the words are the result where nothing else moves an element."""
        return self.tuned is not None and self._factor(dtype) == 1

    def addend(self, words: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
        """f32(w·γ)·δ for a run whose base words are `words`, and where δ is not zero; elsewhere it means
        nothing.
        """
        if self.tuned is not None:
            delta = widened(self.tuned, dtype) - widened(words, dtype)
            moves = self.tuned != words
        else:
            assert self.delta is not None
            delta = self.delta
            moves = self.delta != 0
        return self._factor(dtype) * delta, moves if self.present is None else moves & self.present

    def _factor(self, dtype: DType) -> float:
        return float(torch.tensor(self.factor, dtype=compute(dtype)))


def combined(words: Tensor, terms: Sequence[Dense], dtype: DType, out: DType) -> Tensor:
    """What models together make of a run's words, as words of `out` (docs/format.md §5).

    Where `out` is another dtype than theirs, every sum is rounded, whether or not anything moved the element.
    """
    total = widened(words, dtype)
    alone = words
    movers = torch.zeros_like(words, dtype=torch.int16)
    exact = torch.zeros_like(words, dtype=torch.int16)
    for term in terms:
        added, moves = term.addend(words, dtype)
        total = torch.where(moves, total + added, total)
        movers += moves
        if term.exact(dtype):
            assert term.tuned is not None
            alone = torch.where(moves, term.tuned, alone)
            exact += moves
    if out != dtype:
        return narrowed(total, out)
    moved = torch.where((movers == 1) & (exact == 1), alone, narrowed(total, dtype))
    return torch.where(movers > 0, moved, words)


def compute(dtype: DType) -> torch.dtype:
    """What its numbers are added up in."""
    return torch.float64 if dtype.code == "F64" else torch.float32


def widened(words: Tensor, dtype: DType) -> Tensor:
    """Words as numbers, exactly."""
    return words.view(FLOATS[dtype.code]).to(compute(dtype))


def narrowed(values: Tensor, dtype: DType) -> Tensor:
    """Numbers as words, rounded once, to nearest-even; every NaN the same."""
    narrow = values.to(FLOATS[dtype.code])
    return torch.where(narrow.isnan(), torch.full_like(narrow, torch.nan), narrow).view(
        _INTEGERS[dtype.itemsize]
    )


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
