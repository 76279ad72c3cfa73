"""Rows that models added to the base's embeddings: where each comes from, and what the result has there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...dtypes import DType, Words, cast, from_float, to_float
from ...weights.protocol import TensorInfo, Weights
from .inputs import Input


@dataclass(frozen=True, kw_only=True, eq=False)
class AddedRows:
    """Rows of the result that are no delta of the base's: of added tokens, and of the base's whose place a
    model gave away.
    """

    rows: NDArray[np.int64]
    """Of the result, ascending."""
    sources: NDArray[np.int64]
    """[models, rows]: each model's own row, or -1 where it has none."""

    def fill(
        self,
        words: Words,
        name: str,
        start: int,
        info: TensorInfo,
        base: Weights,
        inputs: Sequence[Input],
        weights: Sequence[float],
    ) -> None:
        """Write those that meet a run of the result into its words: a model's own, or the weighted mean of
        several models'; the base's where no model has one."""
        width = info.numel // info.shape[0]
        first = start // width
        last = -(-(start + words.size) // width)
        for place in range(int(np.searchsorted(self.rows, first)), int(np.searchsorted(self.rows, last))):
            row = int(self.rows[place])
            begin = max(start, row * width)
            end = min(start + words.size, (row + 1) * width)
            shares = [
                (model, weight, int(source) * width + begin - row * width)
                for model, weight, source in zip(inputs, weights, self.sources[:, place], strict=True)
                if source >= 0
            ]
            if shares:
                words[begin - start : end - start] = _mean(name, shares, end - begin, info.dtype)
            else:
                words[begin - start : end - start] = cast(
                    base.read(name, begin, end - begin), base.tensors[name].dtype, info.dtype
                )


def _mean(name: str, shares: Sequence[tuple[Input, float, int]], count: int, out: DType) -> Words:
    """Of some elements of models, each with its weight and where the elements begin there."""
    if len(shares) == 1:
        ((model, _, start),) = shares
        return cast(model.words(name, start, count), model.tensors[name].dtype, out)
    everything = sum(weight for _, weight, _ in shares)
    weighted = abs(everything) >= 1e-8  # otherwise there is no weighted mean: the plain one
    total = np.zeros(count, out.compute)
    for model, weight, start in shares:
        factor = total.dtype.type(weight if weighted else 1)
        row = to_float(model.words(name, start, count), model.tensors[name].dtype)
        total += factor * row.astype(total.dtype)
    return from_float(total / total.dtype.type(everything if weighted else len(shares)), out)
