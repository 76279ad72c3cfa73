"""The factors of each linear layer's delta, and what they leave of it."""

from __future__ import annotations

import math

import numpy as np

from ..dtypes import DType, FloatArray, Words, from_float, to_float
from ..errors import CheckpointError, ConfigError
from ..merging.statistics.statistics_file import StatisticsFile
from ..package.masks import key_of
from ..weights.protocol import TensorInfo
from ..weights.singular_vectors import EXACT, Singular, largest_singular, singular_within


class Factors:
    """Factors, one linear layer after another, and what they leave out.

    Args:
        dtype: in which they are written.
        seed: of random combinations.
        gram: Gram matrices of layers' inputs, where there are some.

    Attributes:
        tensors: B and A of each layer.
        ranks, errors: see `ExtractedLora`.
        squares_left: ‖Δ − B A‖² over all layers.
    """

    def __init__(self, dtype: DType, seed: int, gram: StatisticsFile | None) -> None:
        self._dtype = dtype
        self._seed = seed
        self._gram = gram
        self._outputs = [0.0, 0.0]
        self.tensors: dict[str, tuple[TensorInfo, Words]] = {}
        self.ranks: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.squares_left = 0.0

    def add(self, module: str, matrix: FloatArray, *, rank: int | None, error: float | None) -> None:
        """Factors of one layer's delta [out, in], of a rank, or within an error.

        Raises:
            ConfigError: factors of this dtype cannot be as near as `error` asks for.
        """
        weight = f"{module}.weight"
        squares = float(np.square(matrix, dtype=np.float64).sum())
        wide = matrix.astype(np.float64) if min(matrix.shape) <= EXACT else matrix
        seed = key_of(self._seed, weight)
        if rank is not None:
            found = largest_singular(wide, rank, seed=seed)
            chosen = min(rank, found.rank)
        else:
            assert error is not None
            found = singular_within(wide, error, seed=seed)
            chosen = found.rank_for(error, squares) or found.rank
        factors, rest = self._rounded(found, chosen, wide)
        while error is not None and _norm(rest) > error * math.sqrt(squares):
            chosen += 1
            if chosen > found.rank:
                expected = f"an error that factors in {self._dtype.code} can have"
                remedy = "give a larger error or rank, or dtype F32"
                raise ConfigError(weight, expected=expected, found=f"{error}", remedy=remedy)
            factors, rest = self._rounded(found, chosen, wide)
        for side, factor in zip("BA", factors, strict=True):
            info = TensorInfo(self._dtype, factor.shape)
            words = from_float(np.ascontiguousarray(factor).reshape(-1), self._dtype)
            self.tensors[f"{module}.lora_{side}.weight"] = info, words
        self.ranks[module] = chosen
        left = _norm(rest) ** 2
        self.errors[module] = relative(left, squares)
        self.squares_left += left
        self._measure_outputs(weight, matrix, rest)

    def _rounded(
        self, found: Singular, rank: int, matrix: FloatArray
    ) -> tuple[tuple[FloatArray, FloatArray], FloatArray]:
        """B and A as they are written, and what their product leaves of the matrix."""
        left, right = found.factors(rank)
        b, a = (self._as_written(factor).astype(matrix.dtype) for factor in (left, right))
        return (b, a), np.asarray(matrix - b @ a)

    def _as_written(self, factor: FloatArray) -> FloatArray:
        words = from_float(np.ascontiguousarray(factor).reshape(-1), self._dtype)
        return to_float(words, self._dtype).reshape(factor.shape)

    def _measure_outputs(self, weight: str, matrix: FloatArray, rest: FloatArray) -> None:
        if self._gram is None or weight not in self._gram.tensors:
            return
        gram = self._gram.whole(weight).astype(np.float64)
        if gram.shape[0] != matrix.shape[1]:
            expected = f"a Gram matrix of {matrix.shape[1]} inputs"
            raise CheckpointError(
                f"{self._gram.path}: {weight}", expected=expected, found=str(list(gram.shape))
            )
        for place, part in enumerate((rest, matrix)):
            wide = part.astype(np.float64)
            self._outputs[place] += float(((wide @ gram) * wide).sum())

    @property
    def output_error(self) -> float | None:
        return relative(*self._outputs) if self._outputs[1] > 0 else None


def _norm(matrix: FloatArray) -> float:
    return math.sqrt(float(np.square(matrix, dtype=np.float64).sum()))


def relative(left: float, squares: float) -> float:
    """‖left‖ / ‖all‖, of squares."""
    return math.sqrt(left / squares) if squares > 0 else 0.0
