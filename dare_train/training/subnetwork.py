"""Subnetworks: which elements of a delta matter, as masks that can be compared, combined, trained and
shipped.

A mask goes wherever masks are taken: `extract(..., masks=...)` stores it in a package, `sparse_tuning(...,
masks=...)` trains its elements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..config import check_drop_rate, check_seed, threshold_of
from ..dtypes import FloatArray, to_float
from ..errors import ConfigError, PackageError, TensorMismatch
from ..package.manifest import TensorRecord
from ..package.masks import Mask, generator_of, key_of, largest
from ..package.reader import DeltaPackage
from ..package.segments import Opened
from ..parallel.threads import physical_memory
from ..weights.alignment import align, cast_to
from ..weights.files.full_precision import check_full_precision
from ..weights.layer_names import layer_of, natural, within_layer
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.protocol import Weights

Bits = NDArray[np.bool_]
Scope = Literal["tensor", "model"]
"""Whether each tensor keeps the same share of its elements, or all of them together do."""


class Masks(Mapping[str, Bits]):
    """Masks by checkpoint name, bool in the tensors' shapes, 1 = kept. `&`, `|` and `-` combine two of the
    same tensors.

    Raises:
        ConfigError: when made, for arrays that are not bool.
        TensorMismatch: when combined with masks of other tensors.
    """

    def __init__(self, masks: Mapping[str, Bits]) -> None:
        for name, mask in masks.items():
            if np.asarray(mask).dtype != np.bool_:
                raise ConfigError(f"masks[{name!r}]", expected="bool", found=str(np.asarray(mask).dtype))
        self._masks = {name: np.asarray(mask) for name, mask in masks.items()}

    @classmethod
    def of_package(cls, package: str | os.PathLike[str] | DeltaPackage) -> Masks:
        """What a package keeps of the tensors that travel as deltas: of rows that the base lacks, all.

        Raises:
            PackageError: it is damaged, or the masks need more memory than there is.
        """
        opened = DeltaPackage.open(package)
        opened.check_integrity()
        deltas = [record for record in opened.manifest.tensors if record.kind == "delta"]
        needed, memory = sum(record.info.numel for record in deltas), physical_memory()
        if needed > memory:  # a manifest may claim any shape
            expected = f"masks of at most {memory:,} elements, a byte each, which this machine has"
            raise PackageError(opened.name, expected=expected, found=f"{needed:,}")
        return cls({record.name: _kept_of(opened, record) for record in deltas})

    def __getitem__(self, name: str) -> Bits:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __and__(self, other: Masks) -> Masks:
        return self._with(other, np.logical_and)

    def __or__(self, other: Masks) -> Masks:
        return self._with(other, np.logical_or)

    def __sub__(self, other: Masks) -> Masks:
        """What is kept here and not there."""
        return self._with(other, lambda here, there: here & ~there)

    @property
    def density(self) -> float:
        """Kept elements over all."""
        total = sum(mask.size for mask in self._masks.values())
        return sum(int(mask.sum()) for mask in self._masks.values()) / total if total else 0.0

    def by_layer(self) -> dict[str, Masks]:
        """Each layer's masks, in which the layer's number is `*`: of layers that are built alike they can be
        compared.

        Densities of a mask of the whole model (`scope="model"`) say which layers carry the delta.
        """
        layers: dict[str, dict[str, Bits]] = {}
        for name in sorted(self._masks, key=natural):
            layers.setdefault(layer_of(name), {})[within_layer(name)] = self._masks[name]
        return {layer: Masks(masks) for layer, masks in layers.items()}

    def overlap(self, other: Masks) -> Overlap:
        """How much two masks have in common, over all and by tensor."""
        self._check(other)
        counts = {name: _counts(mask, other[name]) for name, mask in self._masks.items()}
        return Overlap(counts=counts)

    def _with(self, other: Masks, combined: Callable[[Bits, Bits], Bits]) -> Masks:
        self._check(other)
        return Masks({name: combined(mask, other[name]) for name, mask in self._masks.items()})

    def _check(self, other: Masks) -> None:
        for name in sorted(self._masks.keys() ^ other.keys()):
            raise TensorMismatch(name, expected="in both masks", found="in one of them")
        for name, mask in self._masks.items():
            if mask.shape != other[name].shape:
                raise TensorMismatch(
                    name, expected=f"shape {list(mask.shape)}", found=str(list(other[name].shape))
                )


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two masks have in common."""

    counts: Mapping[str, tuple[int, int, int, int]]
    """By tensor: elements that both keep, that one keeps, that the other keeps, and all."""

    @property
    def iou(self) -> float:
        """|A ∩ B| / |A ∪ B| over all tensors; 1 where both keep nothing."""
        both, first, second = self._total
        return both / (first + second - both) if first + second else 1.0

    @property
    def chance(self) -> float:
        """What it would be on average if each tensor's kept elements lay anywhere in it, in both masks."""
        both = sum(
            kept_here * kept_there / size if size else 0.0
            for _, kept_here, kept_there, size in self.counts.values()
        )
        _, first, second = self._total
        return both / (first + second - both) if first + second else 1.0

    @property
    def times_chance(self) -> float:
        """How many times as large as by chance the IoU is; 1 where neither can have anything in common."""
        return self.iou / self.chance if self.chance else 1.0

    def by_layer(self) -> dict[str, Overlap]:
        """Of each layer's tensors together."""
        groups: dict[str, dict[str, tuple[int, int, int, int]]] = {}
        for name in sorted(self.counts, key=natural):
            groups.setdefault(layer_of(name), {})[name] = self.counts[name]
        return {layer: Overlap(counts=counts) for layer, counts in groups.items()}

    @property
    def _total(self) -> tuple[int, int, int]:
        both, first, second, _ = (
            (sum(column) for column in zip(*self.counts.values(), strict=True))
            if self.counts
            else (0, 0, 0, 0)
        )
        return both, first, second


def _counts(first: Bits, second: Bits) -> tuple[int, int, int, int]:
    return int((first & second).sum()), int(first.sum()), int(second.sum()), first.size


def by_size(base: WeightsLike, tuned: WeightsLike, *, density: float, scope: Scope = "tensor") -> Masks:
    """The elements whose |δ| is largest.

    Args:
        base, tuned: both ends of the delta. Only tensors that both have, floating-point and of one shape, get
            a mask.
        density: share of elements that is kept, in (0, 1].
        scope: see `Scope`. For a whole model all scores lie in memory together, 4 bytes each.

    Raises:
        ConfigError: density is out of range.
        CheckpointError, TensorMismatch: the weights cannot be read, or have nothing in common.
    """
    return _by_score(base, tuned, density, scope, lambda weight, delta: np.abs(delta))


def by_movement(base: WeightsLike, tuned: WeightsLike, *, density: float, scope: Scope = "tensor") -> Masks:
    """The elements that fine-tuning moved furthest away from zero: the largest w·δ, w the fine-tuned weight.

    The sign of movement pruning's score (Sanh et al., https://arxiv.org/abs/2005.07683, §3), summed over
    training, is that of w·δ.

    Args, raises: see `by_size`.
    """
    return _by_score(base, tuned, density, scope, lambda weight, delta: weight * delta)


def _kept_of(package: DeltaPackage, record: TensorRecord) -> Bits:
    """Shaped as the tensor. Nothing is kept outside of segments."""
    numel = record.info.numel
    flat = np.zeros(numel, np.bool_)
    for segment, frame in package.frames(record.name, 0, numel):
        if segment.start >= record.base_info.numel:
            flat[segment.start : segment.stop] = True
        else:
            opened = Opened.of(package.manifest, record, segment, frame)
            flat[segment.start + opened.positions()] = True
    return flat.reshape(record.info.shape)


def at_random(like: WeightsLike, *, density: float, seed: int = 0) -> Masks:
    """DARE's masks: those of a package of p = 1 - density and this seed."""
    rate = check_drop_rate(1 - density, name="1 - density")
    check_seed(seed)
    masks = {}
    for name, info in open_weights(like).tensors.items():
        if info.dtype.can_be_delta:
            flat = np.zeros(info.numel, np.bool_)
            flat[
                Mask(kind="seeded", key=key_of(seed, name), threshold=threshold_of(rate)).positions(
                    0, info.numel
                )
            ] = True
            masks[name] = flat.reshape(info.shape)
    return Masks(masks)


def shuffled(masks: Masks, *, seed: int = 0) -> Masks:
    """As many elements of each tensor as the masks keep there, anywhere in it."""
    check_seed(seed)
    return Masks(
        {
            name: generator_of(seed, name).permutation(mask.reshape(-1)).reshape(mask.shape)
            for name, mask in masks.items()
        }
    )


def _by_score(
    base: WeightsLike,
    tuned: WeightsLike,
    density: float,
    scope: Scope,
    score: Callable[[FloatArray, FloatArray], FloatArray],
) -> Masks:
    if not 0 < density <= 1 or scope not in ("tensor", "model"):
        raise ConfigError(
            "density and scope",
            expected="a share in (0, 1], and tensor or model",
            found=f"{density!r}, {scope!r}",
        )
    tuned_weights, opened_base = open_weights(tuned), open_weights(base)
    for weights in (opened_base, tuned_weights):
        check_full_precision(weights, purpose="of which elements can be left out", option=False)
    base_weights = cast_to(
        align(opened_base, tuned_weights.tensors.keys(), model=tuned_weights.label)[0],
        tuned_weights.tensors,
    )
    names = [
        name
        for name, info in tuned_weights.tensors.items()
        if base_weights.tensors.get(name) == info and info.dtype.can_be_delta
    ]
    scores = {name: _score(base_weights, tuned_weights, name, score) for name in names}
    if scope == "tensor":
        kept = {name: largest(values, density) for name, values in scores.items()}
    else:
        together = largest(np.concatenate(list(scores.values())), density)
        kept = dict(
            zip(names, np.split(together, np.cumsum([scores[name].size for name in names])[:-1]), strict=True)
        )
    return Masks({name: mask.reshape(tuned_weights.tensors[name].shape) for name, mask in kept.items()})


def _score(
    base: Weights, tuned: Weights, name: str, score: Callable[[FloatArray, FloatArray], FloatArray]
) -> NDArray[np.float32]:
    info = tuned.tensors[name]
    tuned_values, base_values = (
        to_float(weights.read(name, 0, info.numel), info.dtype).astype(info.dtype.compute)
        for weights in (tuned, base)
    )
    return score(tuned_values, tuned_values - base_values).astype(np.float32)
