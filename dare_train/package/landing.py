"""The law by which finer weights land on the base's grid (docs/format.md §5.7).

    x = f64(base) + γ · (f64(tuned) - f64(base))

Then x goes to one of its two neighbours in the base's dtype: to the upper one with a probability of its
distance from the lower one (`stochastic`), or to the nearer (`nearest`). With `stochastic`, the expectation
of a kept element is x; an element is kept with probability 1 / γ; so that of the result is base + δ, on any
grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import Rounding
from ..dtypes import DType, FloatArray, Words, to_float
from ..kernels import cpu
from ..kernels.rounding import land
from .codec import Positions
from .masks import LANDING_DOMAINS


@dataclass(frozen=True, kw_only=True)
class Landing:
    """How the kept elements of one tensor land."""

    source: DType
    """Of the tuned words at hand."""
    factor: float
    """γ."""
    rounding: Rounding
    key: int
    """Of the tensor's draws."""

    def landed(self, base: Words, tuned: Words, dtype: DType, start: int, positions: Positions) -> Words:
        """Where kept elements land, as words of the base's `dtype`.

        Args:
            base: words of the base at the kept elements.
            tuned: the tuned words there, of `source`.
            start: flat index at which the run begins.
            positions: of the kept elements, ascending, relative to `start`.

        An element that lands on the base's value keeps the base's word: -0 stays -0.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            before = to_float(base, dtype).astype(np.float64)
            after = to_float(tuned, self.source).astype(np.float64)
            x = after if self.factor == 1 else before + self.factor * _difference(before, after)
        draws = None if self.rounding == "nearest" else drawn(self.key, start, positions)
        words = land(x, dtype, draws)
        return np.where(to_float(words, dtype) == before, base, words)

    def delta(self, base: Words, tuned: Words, dtype: DType) -> FloatArray:
        """δ at kept elements, float64: what is multiplied by γ."""
        with np.errstate(over="ignore", invalid="ignore"):
            return _difference(to_float(base, dtype), to_float(tuned, self.source).astype(np.float64))


def _difference(before: FloatArray, after: FloatArray) -> FloatArray:
    """Zero also between infinities that are equal."""
    return np.where(before == after, 0.0, after - before)


def drawn(key: int, start: int, positions: Positions) -> tuple[Words, Words]:
    """The upper and the lower half of the draws by which elements land; `positions` ascend, relative to flat
    index `start`.
    """
    count = int(positions[-1]) + 1 if positions.size else 0
    high, low = (cpu.take(cpu.draws(key, start, count, of), positions) for of in LANDING_DOMAINS)
    return high, low
