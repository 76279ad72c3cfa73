"""What a delta is worth in bytes: DARE's packages against other ways to make one small, at equal sizes.

Every contender stands for the same tensors, those that the base has too; what the base lacks, such as a head,
stays as it is.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import check_count, check_drop_rate, seeds_of
from ..dtypes import DTYPES, FloatArray, from_float, to_float
from ..evaluation.measurements import Evaluate, Journal, Key, Point, Progress, measured, samples
from ..evaluation.swapped_model import SwappedModel
from ..extracting.extract import extract
from ..merging.config.task import task_of
from ..merging.merge import merged_weights
from ..package.masks import largest
from ..package.reader import DeltaPackage
from ..parallel.scratch_folder import temporary_folder
from ..weights.alignment import align, cast_to
from ..weights.files.checkpoint import ADAPTER_CONFIG
from ..weights.files.full_precision import check_full_precision
from ..weights.fingerprint import weights_fingerprint
from ..weights.lora.lora_checkpoint import merge_adapter
from ..weights.lora.lora_config import AdapterConfig
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import HeldWords, Mapped, Weights
from ..weights.singular_vectors import largest_singular
from .variants import base_weights_only

if TYPE_CHECKING:
    import torch

RATES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
RANKS = (1, 2, 4, 8, 16, 32)
"""Of truncated singular value decompositions."""
_LARGEST_RANK = 1 << 20

CONTENDERS = {
    "dense": "all of it, lossless package",
    "dare": "DARE, exact values",
    "dare_int4": "DARE, 4-bit values",
    "dare_sign": "DARE, 1-bit values",
    "magnitude": "magnitude pruning, no rescale",
    "svd": "truncated SVD",
    "one_bit": "1 bit and a scale per row",
    "lora": "LoRA, trained",
}
"""Contenders, for legends."""
_PRINT = "@"
"""In keys, between `lora` and what tells an adapter from others."""
_VALUES = {"dare": "exact", "dare_int4": "int4", "dare_sign": "sign"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured, and of what."""

    base: str
    """Fingerprint of the base's weights (docs/format.md §3.3)."""
    tuned: str
    """Of the fine-tuned model's."""
    parameters: int
    """Elements of the tensors that every contender stands for."""
    points: tuple[Point, ...]
    """By contender; `p` is the drop rate, or the rank; adapters of one rank have seeds 0, 1, … Besides the
    metrics there is `bits`, per parameter."""
    setup: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contenders(self) -> list[str]:
        return [name for name in CONTENDERS if any(point.variant == name for point in self.points)]

    @property
    def metrics(self) -> list[str]:
        return [name for name in self.points[0].metrics if name != "bits"]

    def better(self, metric: str) -> int:
        """1 where more of the metric is better, -1 where less is: which way fine-tuning moved it."""
        dense, base = (self.curve(name, metric) for name in ("dense", "base"))
        return 1 if next(iter(dense.values())) > next(iter(base.values())) else -1

    def curve(self, name: str, metric: str) -> dict[float, list[float]]:
        """The metric by bits per parameter, ascending: of each seed."""
        sizes = {p: values[0] for p, values in samples(self.points, name, "bits").items()}
        by_size = {sizes[p]: values for p, values in samples(self.points, name, metric).items()}
        return dict(sorted(by_size.items()))

    def as_json(self) -> dict[str, Any]:
        points = [point.as_json() for point in self.points]
        return {"base": self.base, "tuned": self.tuned, "parameters": self.parameters, "points": points}


def compare(
    model: torch.nn.Module,
    base: WeightsLike,
    tuned: WeightsLike,
    evaluate: Evaluate,
    *,
    out: str | os.PathLike[str],
    p: Sequence[float] = RATES,
    ranks: Sequence[int] = RANKS,
    seeds: int = 5,
    first_seed: int = 0,
    adapters: Sequence[str | os.PathLike[str]] = (),
    setup: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate a fine-tuned model whose delta is stored in fewer and fewer bytes, by several methods.

    Packages are written, and weighed, whole. A truncated SVD keeps r singular vectors of each matrix's delta,
    U√S and V√S, as the dtype of the weights; what is no matrix it keeps whole. The 1-bit delta is sign(δ)
    times the mean of |δ| of each row, in 16 bits (BitDelta, arXiv 2402.10193, has one scale for a matrix). An
    adapter's size is that of its factors in 16 bits.

    Args:
        model: the fine-tuned model, in whatever dtype it is to be evaluated in. Its weights are overwritten,
            and put back to the bit.
        base, tuned: the weights whose delta is stored, in the dtype in which they would be shipped.
        evaluate: see `Evaluate`.
        out: folder for what is measured, point by point, as in `sweep`.
        p: drop rates of DARE and of magnitude pruning, in (0, 1).
        ranks: of truncated SVDs.
        seeds: masks at each rate, of seeds `first_seed` onwards.
        adapters: folders of LoRA adapters of the base, trained for the same task.
        setup: what else the figures depend on, such as the data's SHA-256: goes into the report, and points
            of another setup are refused.
        progress: called with (points done, points in all).

    Raises:
        ConfigError: a value is out of range, or `evaluate` gives no finite numbers.
        CheckpointError: `out` holds another model's or setup's points; and as `extract`.
    """
    rates = sorted({check_drop_rate(rate) for rate in p} - {0.0})
    numbers = seeds_of(seeds, first_seed)
    for rank in ranks:
        check_count("ranks", rank, at_most=_LARGEST_RANK)
    opened, opened_base = open_weights(tuned), open_weights(base)
    for weights in (opened_base, opened):
        check_full_precision(weights, purpose="of which less and less is kept", option=False)
    contest = _Contest(opened_base, opened, adapters)
    wanted = [*_planned(rates, ranks, numbers), *contest.adapters]
    swapped = SwappedModel(model)
    journal = Journal(
        Path(out) / "compare.jsonl",
        weights_fingerprint(opened_base),
        weights_fingerprint(opened),
        setup,
    )
    with temporary_folder("dare-compare") as folder:
        points = measured(
            swapped, wanted, lambda key: contest.entry(key, folder), evaluate, journal, progress
        )
    full_setup = {
        **(setup or {}),
        "p": rates,
        "ranks": list(ranks),
        "seeds": numbers,
    }
    return Comparison(
        base=weights_fingerprint(opened_base), tuned=weights_fingerprint(opened),
        parameters=contest.parameters, points=_numbered(points),
        setup=full_setup | {"adapters": [os.fspath(adapter) for adapter in adapters]},
    )  # fmt: skip


def _planned(rates: Sequence[float], ranks: Sequence[int], seeds: Sequence[int]) -> Iterator[Key]:
    yield "dense", 0.0, 0
    yield "base", 1.0, 0
    for name in _VALUES:
        yield from ((name, p, seed) for p in rates for seed in seeds)
    yield from (("magnitude", p, 0) for p in rates)
    yield from (("svd", float(rank), 0) for rank in sorted({*ranks}))
    yield "one_bit", 1.0, 0


class _Contest:
    """The two ends of a delta, and what each contender makes of it."""

    def __init__(self, base: Weights, tuned: Weights, adapters: Sequence[str | os.PathLike[str]]) -> None:
        self._original = base
        self.adapters = {_adapter_key(adapter): adapter for adapter in adapters}
        aligned = cast_to(align(base, tuned.tensors.keys(), model=tuned.label)[0], tuned.tensors)
        names = [
            name
            for name, info in tuned.tensors.items()
            if aligned.tensors.get(name) == info and info.dtype.can_be_delta
        ]
        self._base = Mapped(aligned, {name: name for name in names})
        self._tuned = Mapped(tuned, {name: name for name in names})
        self.parameters = sum(info.numel for info in self._tuned.tensors.values())

    def entry(self, key: Key, folder: Path) -> tuple[Weights, dict[str, float]]:
        """Weights, and their size in bits per parameter."""
        variant, p, seed = key
        name = variant.partition(_PRINT)[0]
        make: dict[str, Callable[[], tuple[Weights, float]]] = {
            "dense": lambda: self._package(folder, p=0.0, values="exact"),
            "base": lambda: (base_weights_only(self._base, self._tuned), 0.0),
            "magnitude": lambda: self._package(folder, values="exact", masks=self._largest(p)),
            "svd": lambda: self._rebuilt(lambda delta: _truncated(delta, int(p))),
            "one_bit": lambda: self._rebuilt(_one_bit),
            "lora": lambda: self._adapted(self.adapters[key]),
        }
        weights, size = (
            make[name]() if name in make else self._package(folder, p=p, seed=seed, values=_VALUES[name])
        )
        return weights, {"bits": 8 * size / self.parameters}

    def _package(self, folder: Path, **options: Any) -> tuple[Weights, float]:
        package = extract(self._base, self._tuned, folder / "package", overwrite=True, **options)
        received = merged_weights(task_of(self._base, [DeltaPackage.open(package.path)]))
        return received.merged_only(), package.stats["bytes"]

    def _largest(self, p: float) -> dict[str, NDArray[np.bool_]]:
        """By tensor, the 1 - p largest elements of the delta."""
        return {
            name: largest(np.abs(self._delta(name)), 1 - p).reshape(info.shape)
            for name, info in self._tuned.tensors.items()
        }

    def _delta(self, name: str) -> FloatArray:
        info = self._tuned.tensors[name]
        tuned, start = (
            to_float(weights.read(name, 0, info.numel), info.dtype) for weights in (self._tuned, self._base)
        )
        return np.asarray(tuned.astype(info.dtype.compute) - start.astype(info.dtype.compute))

    def _rebuilt(
        self, approximate: Callable[[FloatArray], tuple[FloatArray, int] | None]
    ) -> tuple[Weights, float]:
        """Weights whose matrices' deltas are approximated, in how many bits; all others are kept whole."""
        arrays = {}
        bits = 0
        for name, info in self._tuned.tensors.items():
            delta = self._delta(name)
            approximation = approximate(delta.reshape(info.shape)) if len(info.shape) == 2 else None
            start = to_float(self._base.read(name, 0, info.numel), info.dtype)
            words = (
                self._tuned.read(name, 0, info.numel)
                if approximation is None
                else from_float(start + approximation[0].reshape(-1), info.dtype)
            )
            bits += info.numel * info.dtype.bits if approximation is None else approximation[1]
            arrays[name] = words
        return HeldWords(self._tuned.label, self._tuned.tensors, arrays), bits / 8

    def _adapted(self, adapter: str | os.PathLike[str]) -> tuple[Weights, float]:
        opened = open_weights(adapter)
        factors = sum(info.numel for name, info in opened.tensors.items() if "lora_" in name)
        return cast_to(merge_adapter(opened, self._original), self._tuned.tensors), 2 * factors


def _adapter_key(adapter: str | os.PathLike[str]) -> Key:
    """By its rank, and by what it is, so that measurements of one are not taken for those of another."""
    config = Path(adapter) / ADAPTER_CONFIG
    rank = AdapterConfig.read(config).rank
    content = hashlib.sha256(
        config.read_bytes() + weights_fingerprint(open_weights(adapter)).encode()
    ).hexdigest()
    return f"lora{_PRINT}{content[:16]}", float(rank), 0


def _numbered(points: Sequence[Point]) -> tuple[Point, ...]:
    """Adapters of one rank are numbered, as masks of one rate are."""
    numbered: list[Point] = []
    for point in points:
        variant, mark, _ = point.variant.partition(_PRINT)
        number = (
            sum((earlier.variant, earlier.p) == (variant, point.p) for earlier in numbered)
            if mark
            else point.seed
        )
        numbered.append(replace(point, variant=variant, seed=number))
    return tuple(numbered)


def _truncated(delta: FloatArray, rank: int) -> tuple[FloatArray, int] | None:
    """The best approximation of that rank, its factors rounded to bfloat16; None where they would take more
    than the delta.
    """
    rows, columns = delta.shape
    if rank * (rows + columns) >= rows * columns:
        return None
    left, right = largest_singular(delta.astype(np.float32), rank, seed=0).factors(rank)
    return _rounded(left) @ _rounded(right), 16 * rank * (rows + columns)


def _rounded(values: FloatArray) -> FloatArray:
    return to_float(
        from_float(np.ascontiguousarray(values, np.float32).reshape(-1), DTYPES["BF16"]), DTYPES["BF16"]
    ).reshape(values.shape)


def _one_bit(delta: FloatArray) -> tuple[FloatArray, int]:
    scale = _rounded(np.abs(delta).mean(1, keepdims=True, dtype=np.float32))
    return np.where(delta < 0, -scale, scale), delta.size + 16 * len(delta)
