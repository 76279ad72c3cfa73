"""Models whose layers have other places in the result: moved, repeated, left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...dtypes import Words
from ...errors import ConfigError
from ...weights.protocol import Weights
from .layers import comes_before_layers, layer_of, stack_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """Layers of the result, from `first`, that are those of a model from `origin`."""

    first: int
    count: int
    weights: Weights
    origin: int


class Relayered:
    """Implements `Placed`.

    Args:
        runs: which layers are whose.
        before, after: whose tensors outside of layers stand there.

    Raises:
        ConfigError: a model has no such layers, or calls them otherwise than another.
    """

    def __init__(
        self, runs: Sequence[Run], before: Weights, after: Weights, *, folder: Path | None, label: str
    ) -> None:
        self.folder = folder
        self.label = label
        self._parts: dict[str, tuple[Weights, str]] = {}
        prefix, _ = stack_of(before)
        for run in runs:
            self._put(run, prefix)
        for weights, wanted in ((before, True), (after, False)):
            for name in weights.tensors:
                if layer_of(name) is None and comes_before_layers(name) == wanted:
                    self._parts[name] = (weights, name)
        self.tensors = {name: weights.tensors[own] for name, (weights, own) in self._parts.items()}

    def _put(self, run: Run, prefix: str) -> None:
        own, count = stack_of(run.weights)
        if own != prefix:
            raise ConfigError(run.weights.label, expected=f"layers called {prefix}, as others", found=own)
        if run.origin + run.count > count:
            raise ConfigError(
                f"layer_range of {run.weights.label}",
                expected=f"at most {count}, as many layers as it has",
                found=f"[{run.origin}, {run.origin + run.count}]",
            )
        for name in run.weights.tensors:
            layer = layer_of(name)
            if layer is None or not run.origin <= layer[1] < run.origin + run.count:
                continue
            within = name.removeprefix(f"{prefix}.{layer[1]}.")
            result = f"{prefix}.{layer[1] - run.origin + run.first}.{within}"
            self._parts[result] = (run.weights, name)

    def read(self, name: str, start: int, count: int) -> Words:
        weights, own = self._parts[name]
        return weights.read(own, start, count)
