"""What was learnt and forgotten, task after task.

    R[i][j]: the metric of task j after task i has been learnt; R[-1] of the base, before any.
    ACC = mean_j R[T-1][j]
    BWT = mean_{j<T-1} R[T-1][j] - R[j][j]
    FWT = mean_{j>0} R[j-1][j] - R[-1][j]

Lopez-Paz and Ranzato, "Gradient Episodic Memory", https://arxiv.org/abs/1706.08840, §3; forgetting as there,
or from the best that ever was (Chaudhry et al., https://arxiv.org/abs/1801.10112, §4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Continual:
    """What was learnt and forgotten."""

    strategy: str
    tasks: tuple[str, ...]
    metric: str
    before: tuple[float, ...]
    """R[-1]: of each task, before any was learnt."""
    after: tuple[tuple[float, ...], ...]
    """R: a row after each task."""
    own: tuple[float, ...]
    """Of each task, with the packages up to its own, at the end of it all."""
    bytes: tuple[int, ...]
    """Of each task's package."""
    states: tuple[str, ...]
    """Fingerprints of the model after each task."""
    seconds: tuple[float, ...] = ()
    """To switch a model in memory from the base to the state after each task."""
    joint: tuple[float, ...] = ()
    """Of each task, by a model that learnt all at once (`ContinualRun.joint`): a mark, where it was
    measured."""
    setup: Mapping[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        """ACC."""
        return fmean(self.after[-1])

    @property
    def backward_transfer(self) -> float:
        """BWT; 0 for one task. Forgetting, as a difference to what was right after a task, is its
        negative.
        """
        return fmean([self.after[-1][j] - self.after[j][j] for j in range(len(self.tasks) - 1)] or [0.0])

    @property
    def forward_transfer(self) -> float:
        """FWT, against the base; 0 for one task."""
        return fmean([self.after[j - 1][j] - self.before[j] for j in range(1, len(self.tasks))] or [0.0])

    @property
    def forgetting(self) -> float:
        """From the best that ever was, in the mean over all tasks but the last (arXiv 1801.10112)."""
        last = self.after[-1]
        return fmean(
            [max(row[j] for row in self.after[:-1]) - last[j] for j in range(len(self.tasks) - 1)] or [0.0]
        )

    @property
    def own_forgetting(self) -> float:
        """What is lost of each task when its own packages are applied, against right after it: 0 where states
        come back exactly.
        """
        return fmean(self.after[j][j] - self.own[j] for j in range(len(self.tasks)))

    def as_json(self) -> dict[str, Any]:
        measures = {
            name: getattr(self, name)
            for name in ("accuracy", "backward_transfer", "forward_transfer", "forgetting", "own_forgetting")
        }
        names = ("strategy", "tasks", "metric", "before", "after", "own", "bytes", "states", "joint")
        return {**{name: getattr(self, name) for name in names}, **measures}
