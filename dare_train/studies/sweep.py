"""How much can be dropped on this model? A metric against the drop rate, by several rules, over several
masks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..config import check_drop_rate, seeds_of
from ..errors import ConfigError, brief
from ..evaluation.linear_layers import batch_size
from ..evaluation.measurements import Evaluate, Journal, Key, Point, Progress, measured, samples
from ..evaluation.swapped_model import SwappedModel
from ..merging.statistics.fisher_and_gram import collect_gram
from ..merging.statistics.statistics_file import save_statistics
from ..parallel.scratch_folder import temporary_folder
from ..weights.files.full_precision import check_full_precision
from ..weights.fingerprint import weights_fingerprint
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import Weights
from .diagnosis import diagnose
from .variants import DROP_VARIANTS, base_weights_only, dropped_weights

if TYPE_CHECKING:
    import torch

SWEEP_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
TOLERANCE = 0.05
"""Share of what fine-tuning gained that may be lost where a drop rate is said to hold."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was measured, and of what."""

    base: str
    """Fingerprint of the base's weights (docs/format.md §3.3)."""
    tuned: str
    """Of the fine-tuned model's."""
    points: tuple[Point, ...]
    """The base and the fine-tuned model, then by variant, drop rate and seed."""
    predicted: float | None = None
    """The drop rate that `diagnose` calls safe; None for none."""
    delta: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """|δ|: the median, the 99th percentile, the largest."""
    setup: Mapping[str, Any] = field(default_factory=dict)
    """What else the measurements depend on."""

    def values(self, variant: str, p: float, metric: str) -> list[float]:
        """A metric at one place, of each seed."""
        return samples(self.points, variant, metric).get(p, [])

    @cached_property
    def metrics(self) -> list[str]:
        return list(self.points[0].metrics) if self.points else []

    @property
    def variants(self) -> list[str]:
        """Those measured, in the order of `DROP_VARIANTS`."""
        return [name for name in DROP_VARIANTS if any(point.variant == name for point in self.points)]

    def dense(self, metric: str) -> float:
        """Of the fine-tuned model as it is."""
        return self.values("dense", 0.0, metric)[0]

    def without(self, metric: str) -> float:
        """Of the model without its delta, with what the base has no counterpart of, such as a head."""
        return self.values("base", 1.0, metric)[0]

    def retained(self, variant: str, metric: str) -> dict[float, float]:
        """By drop rate, the share of what fine-tuning gained that is left, in the mean over masks: 1 is all,
        0 nothing.
        """
        gain = self.dense(metric) - self.without(metric)
        if not gain:
            return {}
        return {
            p: (fmean(values) - self.without(metric)) / gain
            for p, values in samples(self.points, variant, metric).items()
        }

    def holds_to(self, variant: str, metric: str, tolerance: float = TOLERANCE) -> float | None:
        """The largest drop rate up to which, at every rate measured, all but `tolerance` of the gain is left;
        None for none.
        """
        held = None
        for p, share in self.retained(variant, metric).items():
            if share < 1 - tolerance:
                break
            held = p
        return held

    def as_json(self) -> dict[str, Any]:
        """Everything, in an order that does not depend on how it was measured."""
        points = [point.as_json() for point in self.points]
        return {
            "base": self.base,
            "tuned": self.tuned,
            "predicted": self.predicted,
            "delta": list(self.delta),
            "points": points,
        }


def sweep(
    model: torch.nn.Module,
    base: WeightsLike,
    evaluate: Evaluate,
    *,
    out: str | os.PathLike[str],
    p: Sequence[float] = SWEEP_RATES,
    seeds: int = 5,
    first_seed: int = 0,
    variants: Sequence[str] = ("dare", "drop_only", "magnitude", "weights"),
    tuned: WeightsLike | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    setup: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Measure a fine-tuned model at each drop rate, by each variant, with each of several masks.

    At drop rate 0 every variant is the fine-tuned model itself, which is measured once, and so is the model
    without its delta.
    Masks are those of packages: `dare` with seed s has the weights that a package of `DareConfig(p=p,
        seed=s)` gives.

    Args:
        model: the fine-tuned model. Its weights are overwritten, and put back in the end, to the bit.
        base: what it was fine-tuned from; tensors that this lacks, such as a head, stay as they are.
        evaluate: see `Evaluate`. The same call on the same weights should give the same numbers.
        out: folder for what is measured, point by point. Points that are there already are not measured
            again; another model's are refused.
        p: drop rates, in [0, 1).
        seeds: masks at each rate, of seeds `first_seed` onwards, for variants that draw them.
        variants: names in `DROP_VARIANTS`.
        tuned: the same weights on disk, so that they need not be copied.
        batches: keyword arguments of the model, from whose layers' inputs the variant `q` works out its
            factors.
        setup: what else the figures depend on, such as the data's SHA-256: goes into the report, and points
            of another setup are refused.
        progress: called with (points done, points in all).

    Raises:
        ConfigError: a value is out of range, `evaluate` gives no finite numbers, or there are no batches for
            `q`.
        CheckpointError: `out` holds another model's or setup's points, or `tuned` is not what the model
            holds; and as `merge`.
    """
    wanted = planned(p, seeds, first_seed, variants)
    base_weights = open_weights(base)
    check_full_precision(base_weights, purpose="of which elements can be dropped", option=False)
    base_fingerprint = weights_fingerprint(base_weights)
    swapped = SwappedModel(model, tuned)
    journal = Journal(Path(out) / "sweep.jsonl", base_fingerprint, swapped.fingerprint, setup)
    with temporary_folder("dare-sweep") as folder:
        gram = (
            _gram(model, batches, folder)
            if any(DROP_VARIANTS[name].needs_gram for name in variants)
            else None
        )
        points = measured(
            swapped,
            wanted,
            lambda key: (_weights_at(base_weights, swapped.own_weights, key, gram), {}),
            evaluate,
            journal,
            progress,
        )
    diagnosis = diagnose(base_weights, swapped.own_weights, cast_base=True)
    full_setup = {
        **(setup or {}),
        "p": sorted({*p}),
        "seeds": seeds_of(seeds, first_seed),
        "variants": list(dict.fromkeys(variants)),
    }
    return Sweep(
        base=base_fingerprint, tuned=swapped.fingerprint, points=points,
        predicted=diagnosis.safe_drop_rate(), delta=diagnosis.magnitudes.summary(), setup=full_setup,
    )  # fmt: skip


def planned(p: Sequence[float], seeds: int, first_seed: int, variants: Sequence[str]) -> list[Key]:
    """Variant, drop rate and seed of each point of a sweep.

    Raises:
        ConfigError: a value is out of range.
    """
    numbers = seeds_of(seeds, first_seed)
    for name in variants:
        if name not in DROP_VARIANTS:
            raise ConfigError("variants", expected=f"one of {', '.join(DROP_VARIANTS)}", found=repr(name))
    rates = sorted({check_drop_rate(rate) for rate in p})
    if not any(rates):
        raise ConfigError("p", expected="a drop rate above 0", found=brief([*p]))
    if not variants:
        raise ConfigError("variants", expected="at least one", found="none")
    return [
        ("dense", 0.0, 0),
        ("base", 1.0, 0),
        *(
            (name, rate, number)
            for name in dict.fromkeys(variants)
            for rate in rates
            for number in (numbers if DROP_VARIANTS[name].seeded else numbers[:1])
            if rate > 0
        ),
    ]


def _weights_at(base: Weights, tuned: Weights, key: Key, gram: Path | None) -> Weights:
    name, p, seed = key
    if name == "dense":
        return tuned
    if name == "base":
        return base_weights_only(base, tuned)
    return dropped_weights(base, tuned, DROP_VARIANTS[name], p=p, seed=seed, gram=gram)


def _gram(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]] | None, folder: Path) -> Path:
    """Gram matrices of the fine-tuned model's layers, in a file."""
    if batches is None:
        raise ConfigError(
            "batches", expected="some, from which the variant q works out its factors", found="none"
        )
    kept = list(batches)
    examples = sum(batch_size(model, batch) for batch in kept)
    return save_statistics(folder / "gram.safetensors", "gram", collect_gram(model, kept), examples=examples)
