"""What methods that work element by element want to know of a whole tensor before the first of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, Union

import numpy as np
from numpy.typing import NDArray

from ..dtypes import FloatArray, Words, to_float
from .methods import elementwise as elements
from .methods.parameters import Scalar
from .methods.registry import Method
from .methods.top_k import EVERY, Largest, Sizes, largest, of_rank, sizes_of
from .walk import Walk

Rows = Callable[[int, Words], FloatArray]
"""Every model's delta of a run after dropping, by its start and the base's words."""

Places = Union[NDArray[np.int64], slice]


class TensorPass(Protocol):
    """What was found out of a tensor, for the method's function."""

    def given(self, deltas: FloatArray, start: int, words: Words, at: Places) -> dict[str, Any]:
        """Arguments for some elements of a run, `at`, whose deltas these are."""
        ...


def pass_over(method: Method, walk: Walk, rows: Rows, settings: Mapping[str, Scalar]) -> TensorPass | None:
    """What the method wants to be found out; None where that is nothing."""
    if method.needs == "variance":
        return _Variance(walk, rows, float(settings["select_topk"]))
    if method.needs == "importance":
        return _Importance(walk, rows)
    if method.needs == "overlap":
        return _Overlap(walk, rows, *(float(settings[name]) for name in ("r", "alpha", "epsilon")))
    return None


class _Variance:
    """SCE's choice of elements, and the mean squares of what each model has of it."""

    def __init__(self, walk: Walk, rows: Rows, share: float) -> None:
        self._walk = walk
        self._rows = rows
        self._selected = self._most_varying(share)
        squares: NDArray[np.float64] = walk.total(self._squares)
        self._energies = squares / max(walk.info.numel, 1)

    def given(self, deltas: FloatArray, start: int, words: Words, at: Places) -> dict[str, Any]:
        return {"selected": self._is_selected(deltas, start), "energies": self._energies}

    def _most_varying(self, share: float) -> Largest:
        if share >= 1:
            return EVERY
        moving = self._walk.total(lambda start, words: np.count_nonzero(_variance(self._rows(start, words))))
        return largest(
            lambda function: self._walk.each(
                lambda start, words: function(start, _variance(self._rows(start, words)))
            ),
            int(int(moving) * share),
        )

    def _squares(self, start: int, words: Words) -> NDArray[np.float64]:
        rows = self._rows(start, words)
        return np.asarray(np.square((rows * self._is_selected(rows, start)).astype(np.float64)).sum(axis=1))

    def _is_selected(self, deltas: FloatArray, start: int) -> NDArray[np.bool_]:
        return (
            np.ones(deltas.shape[1], np.bool_)
            if self._selected is EVERY
            else self._selected.among(_variance(deltas), start)
        )


def _variance(deltas: FloatArray) -> Sizes:
    """Over the models, in their order, in float32; of a NaN without the sign that hardware may give it."""
    count = deltas.dtype.type(len(deltas))
    mean = elements.summed(deltas) / count
    variance = elements.summed(np.square(row - mean) for row in deltas) / count
    return sizes_of(variance)


class _Importance:
    """Arcee Fusion's threshold, and how far each row's distribution moved."""

    def __init__(self, walk: Walk, rows: Rows) -> None:
        self._walk = walk
        self._rows = rows
        starts = [start for start, _ in walk.runs]
        self._divergences = dict(zip(starts, walk.each(self._divergence), strict=True))
        last = walk.info.numel - 1
        first, median, third = (self._of_rank(last * quarter // 4) for quarter in (1, 2, 3))
        self._threshold = median + 1.5 * (third - first)

    def given(self, deltas: FloatArray, start: int, words: Words, at: Places) -> dict[str, Any]:
        return {"important": self._importance(start, words)[at] >= self._threshold}

    def _divergence(self, start: int, words: Words) -> NDArray[np.float64]:
        (delta,) = self._rows(start, words)
        base = to_float(words, self._walk.info.dtype)
        return elements.divergence(delta.reshape(-1, self._walk.row), base.reshape(-1, self._walk.row))

    def _importance(self, start: int, words: Words) -> Sizes:
        (delta,) = self._rows(start, words)
        found = elements.importance(delta.reshape(-1, self._walk.row), self._divergences[start])
        return sizes_of(found.reshape(-1))

    def _of_rank(self, rank: int) -> float:
        if not self._walk.runs:
            return 0.0
        return of_rank(
            lambda function: self._walk.each(
                lambda start, words: function(start, self._importance(start, words))
            ),
            self._walk.info.numel,
            rank,
        )


class _Overlap:
    """RAM+'s factors."""

    def __init__(self, walk: Walk, rows: Rows, r: float, alpha: float, epsilon: float) -> None:
        overlaps = walk.total(lambda start, words: elements.ram_overlaps(rows(start, words), epsilon=epsilon))
        self._factors = (
            elements.ram_factors(overlaps, r=r, alpha=alpha, epsilon=epsilon) if walk.runs else np.zeros(0)
        )

    def given(self, deltas: FloatArray, start: int, words: Words, at: Places) -> dict[str, Any]:
        return {"factors": self._factors}
