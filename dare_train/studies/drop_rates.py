"""How much there is to drop: the largest drop rate that keeps a metric, one for all layers or one for each.

found = largest_rates(model, base, evaluate, out="rates")
extract(base, model, "package", p=found.by_tensor)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from ..config import DRAW_RANGE, check_count, check_drop_rate, seeds_of
from ..errors import ConfigError, brief
from ..evaluation.measurements import Evaluate, Journal, Key, Point, Progress, measured, samples
from ..evaluation.swapped_model import SwappedModel
from ..merging.methods.parameters import Case
from ..weights.files.full_precision import check_full_precision
from ..weights.fingerprint import weights_fingerprint
from ..weights.layer_names import layer_of
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import Weights, only
from .sweep import TOLERANCE
from .variants import DROP_VARIANTS, base_weights_only, dropped_weights

if TYPE_CHECKING:
    import torch

SPARSEST = 16.0
"""log2 of the smallest density there is, without its sign."""


class Dropping(NamedTuple):
    """What one measurement drops from. The kind is a tag, so that a layer may be called anything: `dense`,
    `base` or what digests look like.
    """

    kind: Literal["dense", "base", "dare", "layer", "rates"]
    """Nothing is dropped; everything is; DARE drops from all layers at one rate; from one layer; or from each
    at a rate of its own."""
    name: str = ""
    """Of the layer, or of the rates; other kinds need none."""

    @property
    def variant(self) -> str:
        """Its name in journals. No layer's name holds a dot, so that no two have the same."""
        return f"{self.kind}.{self.name}" if self.name else self.kind

    @classmethod
    def of(cls, variant: str) -> Dropping:
        kind, _, name = variant.partition(".")
        return cls(cast("Any", kind), name)

    def key(self, p: float, seed: int) -> Key:
        return self.variant, p, seed


_DENSE = Dropping("dense")
_BASE = Dropping("base")
_DARE = Dropping("dare")


@dataclass(frozen=True, kw_only=True)
class FoundRate:
    """The largest drop rate that holds, and what was measured on the way."""

    p: float
    """Of all elements together; 0 if none holds."""
    retained: Mapping[float, float]
    """By drop rate, the share of what fine-tuning gained that is left, in the mean over masks."""
    by_layer: Mapping[str, float] = field(default_factory=dict)
    """Each layer's own rate, where layers have one."""
    by_tensor: Mapping[str, float] = field(default_factory=dict)
    """The same, as `extract` takes it for `p`; of tensors that are not among them nothing is dropped."""
    setup: Mapping[str, Any] = field(default_factory=dict)
    """Of what this was found, and with which options."""

    def as_json(self) -> dict[str, Any]:
        retained = {str(p): self.retained[p] for p in sorted(self.retained)}
        return {"p": self.p, "retained": retained, "by_layer": dict(self.by_layer)}


def largest_rate(
    model: torch.nn.Module,
    base: WeightsLike,
    evaluate: Evaluate,
    *,
    out: str | os.PathLike[str],
    metric: str | None = None,
    tolerance: float = TOLERANCE,
    seeds: int = 3,
    steps: int = 8,
    setup: Mapping[str, Any] | None = None,
) -> FoundRate:
    """Bisect for the largest p at which DARE keeps all but `tolerance` of what fine-tuning gained, in the
    mean over masks.

    The bisection is over log(1 - p): each step halves the range of densities from 1 to 2⁻¹⁶. It finds one
    border; where the metric is not monotonous in p there may be others.

    Args:
        model, base, evaluate, out: see `sweep`. What is measured is kept in `out`, and not measured again.
        metric: which of those that `evaluate` gives; the first, by default.
        tolerance: share of the gain, in (0, 1).
        seeds: masks at each rate.
        steps: of the bisection.
        setup: what else the metric depends on, such as the data's SHA-256: goes into the report, and
            measurements of another setup are refused.

    Raises:
        ConfigError: a value is out of range, or fine-tuning gained nothing.
        CheckpointError: `out` holds another model's or setup's measurements.
    """
    _check(tolerance, seeds, steps)
    bench = _Bench(model, base, evaluate, Path(out) / "largest_rate.jsonl", setup)
    retained = _bisected(
        bench, metric, tolerance, steps, lambda p: [_DARE.key(p, seed) for seed in range(seeds)]
    )
    full_setup = bench.setup(metric=metric, tolerance=tolerance, seeds=seeds, steps=steps)
    return FoundRate(p=_held(retained, tolerance), retained=retained, setup=full_setup)


def largest_rates(
    model: torch.nn.Module,
    base: WeightsLike,
    evaluate: Evaluate,
    *,
    out: str | os.PathLike[str],
    metric: str | None = None,
    tolerance: float = TOLERANCE,
    seeds: int = 3,
    steps: int = 8,
    at: float = 0.9,
    setup: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> FoundRate:
    """As `largest_rate`, with a drop rate for each layer: low ones where the metric is sensitive to dropping.

    What is lost by dropping a share p of layer l alone is measured at one rate, and taken to be c_l · p/(1 -
    p), as the variance of its outputs is (arXiv 2311.03099, §3.1). For a sum of losses, the fewest elements
    are kept where layer l has a density in proportion to sqrt(c_l / n_l), n_l its elements. So densities are
    one family, whose overall density is bisected for. A layer whose loss is less than a hundredth of the
    largest counts as having that.

    Args:
        at: the drop rate at which layers are compared, in (0, 1).
        progress: called with (layers' measurements done, all there are).
        The others: see `largest_rate`.

    Raises:
        As `largest_rate`.
    """
    _check(tolerance, seeds, steps)
    metrics = sensitivity(
        model, base, evaluate, out=out, p=at, metric=metric, seeds=seeds, setup=setup, progress=progress
    )
    bench = _Bench(model, base, evaluate, Path(out) / "largest_rates.jsonl", setup)
    dense, gain = bench.gain(metric)
    lost = {layer: (dense - left) / gain for layer, left in metrics.items()}
    least = max(max(lost.values()) / 100, 1e-9)
    sizes = bench.sizes()
    weights = {layer: (max(loss, least) / sizes[layer]) ** 0.5 for layer, loss in lost.items()}
    digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()
    family = Dropping("rates", digest[:12])
    bench.by_layer[family] = lambda p: {
        layer: 1 - density for layer, density in spread(weights, sizes, 1 - p).items()
    }
    retained = _bisected(
        bench, metric, tolerance, steps, lambda p: [family.key(p, seed) for seed in range(seeds)]
    )
    p = _held(retained, tolerance)
    layers = bench.by_layer[family](p)
    by_tensor = {name: layers[layer_of(name)] for name in bench.names}
    full_setup = bench.setup(metric=metric, tolerance=tolerance, seeds=seeds, steps=steps, at=at)
    return FoundRate(
        p=p, retained=retained, by_layer=layers, by_tensor={**by_tensor, "*": 0.0}, setup=full_setup
    )


def sensitivity(
    model: torch.nn.Module,
    base: WeightsLike,
    evaluate: Evaluate,
    *,
    out: str | os.PathLike[str],
    p: float = 0.9,
    metric: str | None = None,
    seeds: int = 3,
    setup: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The metric, in the mean over masks, when DARE drops a share p of one layer's delta and leaves the
    others whole: by layer.

    Args, raises: see `largest_rate`.
    """
    check_drop_rate(p)
    bench = _Bench(model, base, evaluate, Path(out) / "sensitivity.jsonl", setup)
    keys = {
        layer: [Dropping("layer", layer).key(p, seed) for seed in range(seeds)] for layer in bench.sizes()
    }
    bench.measure([key for keys_of_layer in keys.values() for key in keys_of_layer], progress)
    return {layer: bench.mean(keys_of_layer, metric) for layer, keys_of_layer in keys.items()}


def spread(weights: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Densities in proportion to weights, none above 1, that make this density of all elements together."""
    whole: set[str] = set()
    while True:
        left = density * sum(sizes.values()) - sum(sizes[layer] for layer in whole)
        factor = left / (
            sum(sizes[layer] * weight for layer, weight in weights.items() if layer not in whole) or 1.0
        )
        over = {layer for layer, weight in weights.items() if layer not in whole and factor * weight > 1}
        if not over:
            return {
                layer: 1.0 if layer in whole else max(factor * weight, 2.0**-SPARSEST)
                for layer, weight in weights.items()
            }
        whole |= over


def _check(tolerance: float, seeds: int, steps: int) -> None:
    if not 0 < tolerance < 1:
        raise ConfigError("tolerance", expected="a share in (0, 1)", found=brief(tolerance))
    seeds_of(seeds)
    check_count("steps", steps)


def _bisected(
    bench: _Bench, metric: str | None, tolerance: float, steps: int, keys_at: Callable[[float], Sequence[Key]]
) -> dict[float, float]:
    """By drop rate, the share of the gain that is left there."""
    dense, gain = bench.gain(metric)
    retained: dict[float, float] = {}
    low = 0.0
    high = SPARSEST
    for _ in range(steps):
        middle = (low + high) / 2
        p = min(round((1 - 2.0**-middle) * DRAW_RANGE), DRAW_RANGE - 1) / DRAW_RANGE
        retained[p] = 1 + (bench.mean(keys_at(p), metric) - dense) / gain
        low, high = (middle, high) if retained[p] >= 1 - tolerance else (low, middle)
    return retained


def _held(retained: Mapping[float, float], tolerance: float) -> float:
    return max((p for p, share in retained.items() if share >= 1 - tolerance), default=0.0)


class _Bench:
    """A model that is measured with other weights, and what was measured so far."""

    def __init__(
        self,
        model: torch.nn.Module,
        base: WeightsLike,
        evaluate: Evaluate,
        journal: Path,
        setup: Mapping[str, Any] | None,
    ) -> None:
        self._base = open_weights(base)
        check_full_precision(self._base, purpose="of which elements can be dropped", option=False)
        self._swapped = SwappedModel(model)
        self._evaluate = evaluate
        base_print = weights_fingerprint(self._base)
        self._journal = Journal(journal, base_print, self._swapped.fingerprint, setup)
        self._setup = {"base": base_print, "tuned": self._swapped.fingerprint, **(setup or {})}
        self.names = [
            name
            for name in base_weights_only(self._base, self._swapped.own_weights).tensors
            if name in self._swapped.own_weights.tensors
        ]
        self.by_layer: dict[Dropping, Callable[[float], Mapping[str, float]]] = {}
        """Rates of all layers at an overall rate."""

    def setup(self, **options: Any) -> dict[str, Any]:
        """What a report says of a search."""
        return {**self._setup, **options}

    def sizes(self) -> dict[str, int]:
        """Elements of each layer's delta."""
        elements: dict[str, int] = {}
        for name in self.names:
            elements[layer_of(name)] = (
                elements.get(layer_of(name), 0) + self._swapped.own_weights.tensors[name].numel
            )
        return elements

    def measure(self, keys: Sequence[Key], progress: Progress | None = None) -> tuple[Point, ...]:
        return measured(
            self._swapped, keys, lambda key: (self._weights(key), {}), self._evaluate, self._journal, progress
        )

    def mean(self, keys: Sequence[Key], metric: str | None) -> float:
        points = self.measure(keys)
        name = metric if metric is not None else next(iter(points[0].metrics))
        if name not in points[0].metrics:
            raise ConfigError("metric", expected=f"one of {', '.join(points[0].metrics)}", found=name)
        return fmean(value for values in samples(points, keys[0][0], name).values() for value in values)

    def gain(self, metric: str | None) -> tuple[float, float]:
        """The metric of the fine-tuned model, and how much of it is the delta's."""
        dense, without = (self.mean([key], metric) for key in (_DENSE.key(0.0, 0), _BASE.key(1.0, 0)))
        if dense == without:
            raise ConfigError(
                "evaluate",
                expected="a metric that fine-tuning moved",
                found=f"{dense} with the delta and without",
            )
        return dense, dense - without

    def _weights(self, key: Key) -> Weights:
        variant, p, seed = key
        dropping = Dropping.of(variant)
        if dropping == _DENSE:
            return self._swapped.own_weights
        if dropping == _BASE:
            return base_weights_only(self._base, self._swapped.own_weights)
        if dropping.kind == "rates":
            return self._dropped(self._cases(self.by_layer[dropping](p)), seed)
        everywhere = self._dropped(p, seed)
        if dropping == _DARE:
            return everywhere
        return only(everywhere, [name for name in self.names if layer_of(name) == dropping.name])

    def _dropped(self, p: float | tuple[Case, ...], seed: int) -> Weights:
        return dropped_weights(self._base, self._swapped.own_weights, DROP_VARIANTS["dare"], p=p, seed=seed)

    def _cases(self, rates: Mapping[str, float]) -> tuple[Case, ...]:
        """A rate for each tensor: longer names first, since a case holds for whatever contains its name."""
        return tuple(
            Case(value=rates[layer_of(name)], filter=name)
            for name in sorted(self.names, key=len, reverse=True)
        )
