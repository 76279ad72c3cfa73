"""Models that have fewer tokens than the base: the base's rows stand for those that they lack."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

import numpy as np

from ...dtypes import Words, cast
from ...weights.protocol import TensorInfo, Weights
from .inputs import CheckpointInput


class _Padded:
    """Implements `Weights`: some tensors with the rows of the base behind their own."""

    def __init__(self, weights: Weights, base: Weights, names: Collection[str]) -> None:
        self._weights = weights
        self._base = base
        self.label = weights.label
        longer = {name: TensorInfo(weights.tensors[name].dtype, base.tensors[name].shape) for name in names}
        self.tensors = {**weights.tensors, **longer}

    def read(self, name: str, start: int, count: int) -> Words:
        info = self._weights.tensors[name]
        own = max(0, min(count, info.numel - start))
        if own == count:
            return self._weights.read(name, start, count)
        rest = self._base.read(name, start + own, count - own)
        behind = cast(rest, self._base.tensors[name].dtype, info.dtype)
        return np.concatenate([self._weights.read(name, start, own), behind]) if own else behind


def padded(model: CheckpointInput, base: Weights, names: Collection[str]) -> CheckpointInput:
    """A model whose tensors of these names have as many rows as the base's."""
    longer = copy(model)
    longer.weights = _Padded(model.weights, base, names)
    longer.tensors = longer.weights.tensors
    return longer
