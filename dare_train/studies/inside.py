"""What happens inside a model whose delta is dropped: its embeddings, the outputs of its layers, and how they
are spread over masks.

    ĥ = Ŵx        E[ĥ] = Wx        E‖ĥ - Wx‖² = p/(1 - p) · Σᵢⱼ δᵢⱼ² xⱼ²        (arXiv 2311.03099, §3.1 and
    appendix)

for a linear layer with weights W = W_base + δ, of which DARE makes Ŵ = W_base + m∘δ/(1 - p), with m ~
Bernoulli(1 - p).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from ..config import check_count, check_drop_rate, seeds_of
from ..dtypes import to_float
from ..errors import ConfigError, brief
from ..evaluation.linear_layers import Batch, linear_layers, watch_inputs
from ..evaluation.measurements import Progress
from ..evaluation.swapped_model import SwappedModel
from ..merging.methods.dropping import DropRate
from ..weights.alignment import align, cast_to
from ..weights.files.full_precision import check_full_precision
from ..weights.fingerprint import weights_fingerprint
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import Weights
from .diagnosis import Diagnosis, diagnose
from .hidden_states import cosines_of, enough_of, hidden_states
from .variants import DROP_VARIANTS, dropped_weights

Floats = NDArray[np.float32]

SIMILAR = ("dare", "drop_only")
"""Variants whose embeddings are compared with the fine-tuned model's."""


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """One linear layer, on the inputs that the fine-tuned model gives it."""

    name: str
    calculated: Mapping[float, float]
    """By drop rate: sqrt(p/(1 - p) · Σ δ²x²) / ‖Wx‖."""
    measured: Mapping[float, tuple[float, ...]]
    """By drop rate: ‖(Ŵ - W)x‖ / ‖Wx‖ with each mask."""
    without_data: Mapping[float, float]
    """By drop rate: what `diagnose` says, which knows no x: sqrt(p/(1 - p)) · ‖δ‖ / ‖W‖."""

    def ratio(self, p: float) -> float:
        """The mean square that was measured, over the one that was calculated."""
        return fmean(error**2 for error in self.measured[p]) / self.calculated[p] ** 2


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What was measured, and of what."""

    base: str
    """Fingerprint of the base's weights (docs/format.md §3.3)."""
    tuned: str
    """Of the fine-tuned model's."""
    similarity: Mapping[str, Mapping[float, tuple[tuple[float, ...], ...]]]
    """Cosine of the angle to the fine-tuned model's embeddings, in the mean over tokens: by variant and drop
    rate, for each mask, of the first embeddings and after each layer."""
    layers: tuple[LayerErrors, ...]
    mean_error: Mapping[str, Mapping[int, float]]
    """‖mean over the first n masks of (ĥ - h)‖ / ‖h‖ over all layers, by variant and n, at drop rate
    `mean_p`."""
    mean_p: float
    expected_mean_error: Mapping[int, float]
    """What is calculated of it for DARE: the error of one mask over sqrt(n)."""
    diagnosis: Diagnosis
    setup: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        layers = [
            {
                "name": layer.name,
                "calculated": _keys(layer.calculated),
                "measured": _keys(layer.measured),
                "without_data": _keys(layer.without_data),
            }
            for layer in self.layers
        ]
        return {
            "base": self.base,
            "tuned": self.tuned,
            "similarity": {name: _keys(by_rate) for name, by_rate in self.similarity.items()},
            "layers": layers,
            "mean_error": {name: _keys(by_count) for name, by_count in self.mean_error.items()},
            "expected_mean_error": _keys(self.expected_mean_error),
            "mean_p": self.mean_p,
            "magnitudes": {layer.name: list(layer.magnitudes.summary()) for layer in self.diagnosis.layers},
        }


def inside(
    model: torch.nn.Module,
    base: WeightsLike,
    batches: Iterable[Batch],
    *,
    p: Sequence[float] = (0.5, 0.9, 0.99),
    seeds: int = 5,
    first_seed: int = 0,
    masks: int = 64,
    tokens: int = 2048,
    setup: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Inside:
    """Measure what dropping does to a fine-tuned model's embeddings and to its linear layers.

    Args:
        model: of transformers, so that it tells its hidden states. Its weights are overwritten, and put back
            to the bit.
        base: what it was fine-tuned from.
        batches: arguments of the model by name; labels are not needed. As many as hold `tokens` tokens are
            looked at.
        p: drop rates, in (0, 1). The last but one, or the only one, is the one of which means over many masks
            are taken.
        seeds: masks at each rate, of seeds `first_seed` onwards.
        masks: how many masks the mean error is taken over.
        tokens: how many the figures are about.
        setup: what else they depend on, such as the name of the data: goes into the report.
        progress: called with (steps done, steps in all).

    Raises:
        ConfigError: a value is out of range, there is no batch, or the model tells no hidden states.
        CheckpointError, TensorMismatch: the base cannot be read, or has nothing in common with the model.
    """
    rates = sorted({check_drop_rate(rate) for rate in p} - {0.0})
    if not rates:
        raise ConfigError("p", expected="a drop rate above 0", found=brief([*p]))
    numbers = seeds_of(seeds, first_seed)
    of_means = seeds_of(masks, first_seed, name="masks")
    check_count("tokens", tokens)
    base_weights = open_weights(base)
    check_full_precision(base_weights, purpose="of which elements can be dropped", option=False)
    swapped = SwappedModel(model)
    looked_at = enough_of(batches, tokens)
    diagnosis = diagnose(base_weights, swapped.own_weights, cast_base=True)
    steps = _Steps(len(SIMILAR) * len(rates) * seeds + len(diagnosis.layers), progress)
    aligned = cast_to(
        align(base_weights, swapped.own_weights.tensors.keys(), model=swapped.own_weights.label)[0],
        swapped.own_weights.tensors,
    )
    chosen = _Chosen(
        rates=rates,
        seeds=numbers,
        mean_p=rates[max(len(rates) - 2, 0)],
        masks=of_means,
    )
    similarity = _similarity(swapped, base_weights, looked_at, chosen, steps)
    layers, means = _layer_errors(
        model, aligned, swapped.own_weights, looked_at, tokens, diagnosis, chosen, steps
    )
    expected = {n: means.single / sqrt(n) for n in means.counts}
    return Inside(
        base=weights_fingerprint(base_weights), tuned=swapped.fingerprint,
        similarity=similarity, layers=tuple(layers),
        mean_error={name: means.of(name) for name in SIMILAR}, mean_p=chosen.mean_p,
        expected_mean_error=expected, diagnosis=diagnosis,
        setup={**(setup or {}), "p": rates, "seeds": numbers, "masks": masks, "tokens": tokens},
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    rates: Sequence[float]
    seeds: Sequence[int]
    mean_p: float
    masks: Sequence[int]


class _Steps:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _keys(by: Mapping[Any, Any]) -> dict[str, Any]:
    return {f"{key:g}": value for key, value in by.items()}


# Embeddings.


def _similarity(
    swapped: SwappedModel, base: Weights, batches: Sequence[Batch], chosen: _Chosen, steps: _Steps
) -> dict[str, dict[float, tuple[tuple[float, ...], ...]]]:
    dense = hidden_states(swapped.model, batches)
    cosines: dict[str, dict[float, tuple[tuple[float, ...], ...]]] = {}
    with swapped:
        for name in SIMILAR:
            cosines[name] = {}
            for p in chosen.rates:
                each = []
                for seed in chosen.seeds:
                    swapped.swap_in(
                        dropped_weights(base, swapped.own_weights, DROP_VARIANTS[name], p=p, seed=seed)
                    )
                    each.append(tuple(cosines_of(dense, hidden_states(swapped.model, batches))))
                    steps.step()
                cosines[name][p] = tuple(each)
    return cosines


# Outputs of layers.


class _Means:
    """The error of the mean over many masks, added up over layers."""

    def __init__(self, masks: int) -> None:
        self.counts = sorted({*(1 << bit for bit in range(masks.bit_length())), masks})
        self._squares = {name: dict.fromkeys(self.counts, 0.0) for name in SIMILAR}
        self._calculated = self._norm = 0.0

    def add(self, layer: _Layer, chosen: _Chosen) -> None:
        p = chosen.mean_p
        self._calculated += layer.calculated(p)
        self._norm += layer.norm
        seen = np.zeros(layer.delta.size, np.float32)
        for number, seed in enumerate(chosen.masks, start=1):
            seen += layer.kept(p, seed)
            if number in self.counts:
                mean = seen / np.float32(number)
                factors = {"dare": mean * layer.factor(p, seed), "drop_only": mean}
                for name, factor in factors.items():
                    self._squares[name][number] += layer.moved((factor - 1).reshape(layer.delta.shape))

    def of(self, name: str) -> dict[int, float]:
        return {n: sqrt(square / self._norm) for n, square in self._squares[name].items()}

    @property
    def single(self) -> float:
        return sqrt(self._calculated / self._norm)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    name: str
    delta: Floats
    """[out, in]."""
    inputs: Floats
    """x, [tokens, in]."""
    norm: float
    """‖Wx‖² over all tokens."""
    transposed: bool
    """Whether files hold [in, out]: masks go by the order there."""

    def rate(self, p: float, seed: int) -> DropRate:
        return DropRate.of(p, seed, self.name)

    def kept(self, p: float, seed: int) -> Floats:
        """m, flat, as [out, in]."""
        mask = np.zeros(self.delta.size, np.float32)
        mask[self.rate(p, seed).positions(0, self.delta.size)] = 1
        return (
            np.ascontiguousarray(mask.reshape(self.delta.shape[::-1]).T).reshape(-1)
            if self.transposed
            else mask
        )

    def factor(self, p: float, seed: int) -> np.float32:
        return np.float32(self.rate(p, seed).factor)

    def moved(self, change: Floats) -> float:
        """‖(change ∘ δ)x‖² over all tokens."""
        return float(np.square(self.inputs @ (change * self.delta).T, dtype=np.float64).sum())

    def calculated(self, p: float) -> float:
        """p/(1 - p) · Σ δ²x² over all tokens."""
        sizes = np.square(self.inputs, dtype=np.float64).sum(0)
        return p / (1 - p) * float((np.square(self.delta, dtype=np.float64) @ sizes).sum())

    def errors(self, chosen: _Chosen, without_data: Mapping[float, float]) -> LayerErrors:
        measured = {
            p: tuple(
                sqrt(
                    self.moved((self.kept(p, seed) * self.factor(p, seed) - 1).reshape(self.delta.shape))
                    / self.norm
                )
                for seed in chosen.seeds
            )
            for p in chosen.rates
        }
        calculated = {p: sqrt(self.calculated(p) / self.norm) for p in chosen.rates}
        return LayerErrors(
            name=self.name, calculated=calculated, measured=measured, without_data=without_data
        )


def _layer_errors(
    model: torch.nn.Module, base: Weights, tuned: Weights, batches: Sequence[Batch], tokens: int,
    diagnosis: Diagnosis, chosen: _Chosen,
    steps: _Steps,
) -> tuple[list[LayerErrors], _Means]:  # fmt: skip
    known = {layer_diagnosis.name: layer_diagnosis for layer_diagnosis in diagnosis.layers}
    places = [(name, layer) for name, layer in linear_layers(model) if name in known]
    if not places:
        raise ConfigError("model", expected="linear layers that fine-tuning changed", found="none")
    inputs = _inputs(model, batches, places, tokens)
    errors = []
    means = _Means(len(chosen.masks))
    for name, module in places:
        layer = _layer(name, isinstance(module, Conv1D), base, tuned, inputs.pop(name))
        errors.append(layer.errors(chosen, {p: known[name].error(p) for p in chosen.rates}))
        means.add(layer, chosen)
        steps.step()
    return errors, means


def _inputs(
    model: torch.nn.Module, batches: Sequence[Batch], places: Sequence[tuple[str, Any]], tokens: int
) -> dict[str, Floats]:
    """What goes into each layer of the fine-tuned model, of so many tokens."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name, _ in places}

    def see(name: str, rows: torch.Tensor) -> None:
        missing = tokens - sum(len(part) for part in parts[name])
        if missing > 0:
            parts[name].append(rows[:missing].float().cpu())

    watch_inputs(model, batches, places, see)
    return {name: torch.cat(rows).numpy() for name, rows in parts.items() if rows}


def _layer(
    name: str, transposed: bool, base_weights: Weights, tuned_weights: Weights, inputs: Floats
) -> _Layer:
    info = tuned_weights.tensors[name]
    tuned, start = (
        to_float(weights.read(name, 0, info.numel), info.dtype).astype(np.float32).reshape(info.shape)
        for weights in (tuned_weights, base_weights)
    )
    if transposed:
        tuned = np.ascontiguousarray(tuned.T)
        start = np.ascontiguousarray(start.T)
    norm = float(np.square(inputs @ tuned.T, dtype=np.float64).sum())
    return _Layer(name=name, delta=tuned - start, inputs=inputs, norm=norm, transposed=transposed)
