"""Merging without runs: tiny models, and what a method makes of whole tensors at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch_words import TORCH, words_of

from dare_train import merge
from dare_train.dtypes import DTYPES, DType, FloatArray, Words, from_float, to_float
from dare_train.merging.merge_report import MergeReport
from dare_train.merging.methods import dropping as drops
from dare_train.merging.methods import elementwise as elements
from dare_train.merging.methods.combinations import karcher, model_stock, multislerp, nuslerp, slerp
from dare_train.merging.methods.matrices import regmean
from dare_train.merging.methods.registry import MERGE_METHODS, Method
from dare_train.package.masks import Mask, key_of

RUN = 640
"""Elements of a run here, so that tiny tensors have many."""

State = dict[str, torch.Tensor]


def shrink(change: Callable[[object, str, int], None] = setattr) -> None:
    for module in ("walk", "merged_weights"):
        change(sys.modules[f"dare_train.merging.{module}"], "SEGMENT", RUN)


# Models.

SHAPES = {"weight": (29, 60), "bias": (1301,)}
"""Several runs each, whose ends fall into rows."""
MORE = {"stack": (3, 11, 24), "one": (1,), "scalar": (), "empty": (0, 3)}
"""Of one dtype are enough."""


def on_a_grid(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Numbers that 16 bits hold, whose differences are few, so that many magnitudes are equal."""
    return np.asarray(rng.integers(-64, 65, shape) / 64.0)


def base_state(*codes: str) -> State:
    rng = np.random.default_rng(0)
    shapes = {
        f"{code}.{name}": shape
        for code in codes or TORCH
        for name, shape in (SHAPES | MORE if code == "F32" else SHAPES).items()
    }
    wide = {name: on_a_grid(shape, rng) for name, shape in shapes.items()}
    return {name: torch.from_numpy(array).to(TORCH[name.split(".")[0]]) for name, array in wide.items()}


def tuned(base: State, seed: int) -> State:
    """About half of the elements moved: most by steps of a grid, some by anything, a few very far."""
    rng, state = np.random.default_rng(seed), {}
    for name, tensor in base.items():
        shape = tuple(tensor.shape)
        step = rng.integers(-4, 5, shape) / 128 * (rng.random(shape) < 0.6)
        step = np.where(rng.random(shape) < 0.1, rng.normal(0, 0.02, shape), step)
        step = np.where(rng.random(shape) < 0.01, rng.normal(0, 1000, shape), step)
        state[name] = (tensor.double() + torch.from_numpy(np.asarray(step))).to(tensor.dtype)
    return state


def tuned_from(base: State, count: int = 3) -> list[State]:
    return [tuned(base, seed + 1) for seed in range(count)]


def result(base: Any, models: Sequence[Any], out: Path, **options: Any) -> tuple[State, MergeReport]:
    report = merge(base, models, out, **{"overwrite": True, "allow_unchanged": True, **options})
    return load_file(out / "model.safetensors"), report


def check_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    other = [name for name in found if not np.array_equal(words_of(found[name]), words_of(expected[name]))]
    assert other == []


# The same without runs.


@dataclass
class Delta:
    """A model's delta of a whole tensor: `factor` times `raw`, where it `moves`."""

    raw: FloatArray
    moves: NDArray[np.bool_]
    factor: float = 1.0

    @property
    def row(self) -> FloatArray:
        dtype = self.raw.dtype.type
        with np.errstate(over="ignore", invalid="ignore"):
            return np.where(self.moves, dtype(self.factor) * self.raw, dtype(0))

    def keep(self, kept: NDArray[np.bool_], factor: float = 1.0) -> Delta:
        return Delta(self.raw, self.moves & kept, self.factor * factor)


def largest(sizes: FloatArray, count: int, *, last: bool = False) -> NDArray[np.bool_]:
    """The so many largest, of equals the first, or the last."""
    place = np.arange(sizes.size)
    chosen = np.zeros(sizes.size, np.bool_)
    chosen[np.lexsort((-place if last else place, -sizes.astype(np.float32)))[:count]] = True
    return chosen


@dataclass
class Dense:
    """One tensor of a merge, evaluated at once."""

    name: str
    base: Words
    shape: tuple[int, ...]
    dtype: DType
    models: list[Words]
    told: dict[str, Any]
    """What the merge is told, defaults included."""
    method: Method
    statistics: Sequence[Mapping[str, NDArray[np.float32]]] = ()

    def own(self, key: str, number: int) -> Any:
        value = self.told[key]
        return value[number] if isinstance(value, list) else value

    @property
    def weights(self) -> list[float]:
        return [
            float(self.own("weight", number)) if "weight" in self.told else 1.0
            for number in range(len(self.models))
        ]

    def deltas(self, *, dropped: bool = True) -> list[Delta]:
        wide = to_float(self.base, self.dtype)
        found = [Delta(to_float(one, self.dtype) - wide, one != self.base) for one in self.models]
        return [self.dropped(delta, number) for number, delta in enumerate(found)] if dropped else found

    def dropped(self, delta: Delta, number: int) -> Delta:
        key, p = key_of(self.told["seed"] + number, self.name), self.own("p", number)
        if p:
            threshold = round(p * 65536)
            kept = np.zeros(self.base.size, np.bool_)
            kept[Mask(kind="seeded", key=key, threshold=threshold).positions(0, self.base.size)] = True
            delta = delta.keep(kept, 65536 / (65536 - threshold) if self.method.rescale is None else 1.0)
        trims = self.method.drops != "none" and self.own("density", number) < 1
        return self.trimmed(delta, self.own("density", number), number, key) if trims else delta

    def trimmed(self, delta: Delta, density: float, number: int, key: int) -> Delta:
        numel, sizes = self.base.size, np.abs(delta.row)
        if self.method.drops == "magnitude":
            return delta.keep(largest(sizes, max(1, int(density * numel)) if density else 0))
        if self.method.drops == "outliers":
            outliers = min(int(self.own("gamma", number) * numel), numel - int(density * numel))
            middle = largest(sizes, int(density * numel) + outliers, last=True) & ~largest(
                sizes, outliers, last=True
            )
            return delta.keep(middle)
        row = (prod(self.shape[1:]) if len(self.shape) > 1 else numel) or 1
        kept, factors = drops.magprune(
            delta.row, row, key, 0, density=density, epsilon=self.own("epsilon", number)
        )
        raw = delta.row * factors
        return Delta(raw, kept & (raw != 0))

    # By the arithmetic law: sums in order, rounded once, and alone a tuned word is itself.

    def sum(
        self, deltas: Sequence[Delta], coefficients: Sequence[float], *, on_weights: bool = False
    ) -> Words:
        dtype = self.dtype.compute.type
        total, movers = to_float(self.base, self.dtype).astype(dtype), np.zeros(self.base.size, int)
        factors = [
            delta.factor * float(coefficient) for delta, coefficient in zip(deltas, coefficients, strict=True)
        ]
        terms = [
            (dtype(factor) * delta.raw, delta.moves) for factor, delta in zip(factors, deltas, strict=True)
        ]
        rest = float(np.sum(coefficients)) - 1
        if on_weights and abs(rest) > 1e-12:
            own = to_float(self.base, self.dtype)
            terms.append((dtype(rest) * own, own != 0))
        for added, moves in terms:
            total = np.where(moves, total + added, total)
            movers += moves
        words = np.where(movers > 0, from_float(total, self.dtype), self.base)
        magpruned = self.method.drops == "magprune"
        for factor, delta, tuned_words in zip(factors, deltas, self.models, strict=True):
            alone = delta.moves & (movers == 1) & (factor == 1) & (not magpruned)
            words = np.where(alone, tuned_words, words)
        return words

    def plus(self, delta: FloatArray) -> Words:
        delta = delta if self.scale == 1 else delta * delta.dtype.type(self.scale)
        with np.errstate(over="ignore"):
            moved = from_float(to_float(self.base, self.dtype) + delta, self.dtype)
        return np.where(delta == 0, self.base, moved)

    @property
    def scale(self) -> float:
        return float(self.told.get("lambda", 1.0))

    def mean(self) -> list[float]:
        return [self.scale * weight / sum(self.weights) for weight in self.weights]

    def result(self) -> Words:
        deltas = self.deltas()
        if self.method.function in ELEMENTS:
            rows = np.stack([delta.row for delta in deltas])
            return self.plus(ELEMENTS[self.method.function](self, rows, np.array(self.weights, rows.dtype)))
        return COMBINED[self.method.name](self, deltas)

    def vectors(self, deltas: Sequence[Delta], *, on_weights: bool) -> NDArray[np.float64]:
        rows = np.stack([delta.row for delta in deltas])
        return (rows + to_float(self.base, self.dtype) if on_weights else rows).astype(np.float64)

    def by_gram(
        self, deltas: Sequence[Delta], function: Callable[..., Any], *, on_weights: bool, **told: Any
    ) -> Words:
        if not self.base.size:
            return self.base
        vectors = self.vectors(deltas, on_weights=on_weights)
        return self.sum(
            deltas, function(vectors @ vectors.T, np.array(self.weights), **told), on_weights=on_weights
        )


def _fisher(one: Dense, rows: FloatArray, weights: FloatArray) -> FloatArray:
    fisher = np.stack([own[one.name].reshape(-1) for own in one.statistics])
    return elements.fisher(rows, weights, fisher=fisher, floor=one.told["floor"])


def _sce(one: Dense, rows: FloatArray, weights: FloatArray) -> FloatArray:
    variance = np.var(rows, axis=0).astype(np.float32)
    selected = (
        largest(variance, int(np.count_nonzero(variance) * one.told["select_topk"]))
        if one.told["select_topk"] < 1
        else variance >= 0
    )
    energies = np.square((rows * selected).astype(np.float64)).sum(axis=1) / max(one.base.size, 1)
    return elements.sce(rows, weights, selected=selected, energies=energies)


def _arcee_fusion(one: Dense, rows: FloatArray, weights: FloatArray) -> FloatArray:
    if not one.base.size:
        return rows[0]
    row = one.shape[-1] if one.shape else 1
    delta, base = rows[0].reshape(-1, row), to_float(one.base, one.dtype).reshape(-1, row)
    sizes = elements.importance(delta, elements.divergence(delta, base)).reshape(-1)
    first, median, third = (float(np.sort(sizes)[quarter * (sizes.size - 1) // 4]) for quarter in (1, 2, 3))
    return elements.arcee_fusion(rows, weights, important=sizes >= median + 1.5 * (third - first))


def _ramplus_tl(one: Dense, rows: FloatArray, weights: FloatArray) -> FloatArray:
    epsilon = one.told["epsilon"]
    overlaps = elements.ram_overlaps(rows, epsilon=epsilon)
    factors = elements.ram_factors(overlaps, r=one.told["r"], alpha=one.told["alpha"], epsilon=epsilon)
    return elements.ramplus_tl(rows, weights, epsilon=epsilon, factors=factors)


def _undropped(one: Dense) -> dict[str, Any]:
    rows = np.stack([delta.row for delta in one.deltas(dropped=False)])
    return {"undropped": rows, "mask_threshold": one.told["mask_threshold"], "agree": one.told["agree"]}


ELEMENTS: dict[Callable[..., Any], Callable[[Dense, FloatArray, FloatArray], FloatArray]] = {
    elements.ties: lambda one, rows, weights: elements.ties(rows, weights, normalize=one.told["normalize"]),
    elements.fisher: _fisher,
    elements.sce: _sce,
    elements.consensus_ta: lambda one, rows, weights: elements.consensus_ta(rows, weights, **_undropped(one)),
    elements.consensus_ties: lambda one, rows, weights: elements.consensus_ties(
        rows, weights, normalize=one.told["normalize"], **_undropped(one)
    ),
    elements.nearswap: lambda one, rows, weights: elements.nearswap(rows, weights, t=one.told["t"]),
    elements.ram: lambda one, rows, weights: elements.ram(rows, weights, epsilon=one.told["epsilon"]),
    elements.emr: lambda one, rows, weights: elements.emr(rows, weights, task=0, factor=1.0),
    elements.ramplus_tl: _ramplus_tl,
    elements.arcee_fusion: _arcee_fusion,
}


def _linear(one: Dense, deltas: Sequence[Delta]) -> Words:
    return one.sum(
        deltas, one.mean() if one.told["normalize"] else [one.scale * weight for weight in one.weights]
    )


def _average(one: Dense, deltas: Sequence[Delta]) -> Words:
    return one.sum(deltas, one.mean() if one.told["normalize"] else one.weights, on_weights=True)


def _regmean(one: Dense, deltas: Sequence[Delta]) -> Words:
    if one.name not in one.statistics[0]:
        return one.sum(deltas, one.mean())
    rows = np.stack([delta.row for delta in deltas]).reshape(len(deltas), *one.shape)
    grams = np.stack([own[one.name] for own in one.statistics])
    told = {key: one.told[key] for key in ("shrink", "ridge")}
    return one.plus(
        regmean(rows, np.array(one.weights, rows.dtype), grams=grams, transposed=False, **told).reshape(-1)
    )


COMBINED: dict[str, Callable[[Dense, Sequence[Delta]], Words]] = {
    **dict.fromkeys(
        ["task_arithmetic", "dare_linear", "drop_only", "magnitude", "breadcrumbs", "della_linear"], _linear
    ),
    "average": _average,
    "regmean": _regmean,
    "slerp": lambda one, deltas: one.by_gram(deltas, slerp, on_weights=True, t=one.told["t"]),
    "nuslerp": lambda one, deltas: one.by_gram(deltas, nuslerp, on_weights=one.told["of"] == "weights"),
    "multislerp": lambda one, deltas: one.by_gram(
        deltas,
        multislerp,
        on_weights=one.told["of"] == "weights",
        normalize_weights=one.told["normalize_weights"],
        eps=one.told["eps"],
    ),
    "model_stock": lambda one, deltas: one.by_gram(deltas, model_stock, on_weights=False),
    "karcher": lambda one, deltas: one.by_gram(
        deltas, karcher, on_weights=True, max_iter=one.told["max_iter"], tol=one.told["tol"]
    ),
}


def _by_matrices(function: Callable[..., FloatArray]) -> Callable[[Dense, Sequence[Delta]], Words]:
    def merged(one: Dense, deltas: Sequence[Delta]) -> Words:
        if len(one.shape) != 2 or not one.base.size:
            return one.sum(deltas, one.mean())
        rows = np.stack([delta.row for delta in deltas]).reshape(len(deltas), *one.shape)
        names = ("common_space_fraction", "steps", "learning_rate")
        told = {name: one.told[name] for name in names if name in one.told}
        return one.plus(function(rows, np.array(one.weights, rows.dtype), **told).reshape(-1))

    return merged


COMBINED |= {name: _by_matrices(MERGE_METHODS[name].function) for name in ("tsv", "iso_c", "iso_cts", "wudi")}


def expected(
    method: str,
    told: Mapping[str, Any],
    base: State,
    models: Sequence[State],
    seed: int,
    statistics: Sequence[Any],
) -> dict[str, Words]:
    every = {
        "p": 0.0,
        **{one.name: one.default for one in MERGE_METHODS[method].parameters},
        **told,
        "seed": seed,
    }
    return {
        name: Dense(
            name, words_of(tensor), tuple(tensor.shape), DTYPES[name.split(".")[0]],
            [words_of(one[name]) for one in models], every,
            MERGE_METHODS[method], statistics,
        ).result()
        for name, tensor in base.items()
    }  # fmt: skip
