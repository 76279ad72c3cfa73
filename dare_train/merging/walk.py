"""Walking over one tensor of the base, run by run on threads, with sums that do not depend on how many there
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import numpy as np

from ..dtypes import Words
from ..parallel.threads import ordered_map
from ..weights.protocol import SEGMENT, TensorInfo, Weights, runs

Result = TypeVar("Result")


def quiet() -> np.errstate:
    """No warnings of NaN and infinity: where a model diverged, the result shows it."""
    return np.errstate(over="ignore", invalid="ignore")


class Walk:
    """A tensor of the base and the runs it is cut into.

    Args:
        row: elements that stay together in a run.
        whole: one run is all of it.
    """

    def __init__(
        self, base: Weights, name: str, *, row: int = 1, whole: bool = False, threads: int = 1
    ) -> None:
        self._base = base
        self._threads = threads
        self.name = name
        self.row = row
        self.info: TensorInfo = base.tensors[name]
        length = self.info.numel if whole else max(1, SEGMENT // row) * row
        self.runs = list(runs(self.info.numel, max(length, 1)))

    def words(self, start: int, count: int) -> Words:
        """The base's."""
        return self._base.read(self.name, start, count)

    def each(self, function: Callable[[int, Words], Result]) -> Iterator[Result]:
        """Call a function with the start and the base's words of every run; results in order."""

        def called(run: tuple[int, int]) -> Result:
            with quiet():
                return function(run[0], self.words(*run))

        if len(self.runs) == 1:  # threads would take longer to start than it does
            yield called(self.runs[0])
            return
        with closing(ordered_map(called, self.runs, threads=self._threads)) as results:
            yield from results

    def total(self, function: Callable[[int, Words], Any]) -> Any:
        """The sum of what it gives for each run, in their order."""
        total: Any = 0.0
        for part in self.each(function):
            total = total + part
        return total
