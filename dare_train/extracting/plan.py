"""What happens to each tensor: compared with its base by name, dtype and shape, before any value is
encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import DareConfig, threshold_of
from ..dtypes import to_float
from ..errors import ConfigError, TensorMismatch
from ..package.codec import Encoding, Positions
from ..package.masks import Mask, key_of
from ..weights.alignment import dtype_mismatch
from ..weights.protocol import SEGMENT, Shared, TensorInfo, Weights, runs

if TYPE_CHECKING:
    pass


def plan_tensors(
    base: Weights,
    tuned: Weights,
    config: DareConfig,
    *,
    fresh: Collection[str] = (),
    masks: Mapping[str, Any] | None = None,
) -> list[TensorPlan]:
    """One plan for each tensor of `tuned`, sorted by name. `fresh` names tensors known to have begun apart
    from the base.

    Raises:
        DtypeMismatch: a tensor has one dtype in the base and another in the tuned weights.
        TensorMismatch: shapes differ by more than added leading rows.
        ConfigError: a mask names no tensor or has the wrong shape.
    """
    if masks is not None and not isinstance(masks, Mapping):
        raise ConfigError("masks", expected="a mapping from tensor names to bool arrays", found=repr(masks))
    unknown = sorted((masks or {}).keys() - tuned.tensors.keys())
    if unknown:
        raise ConfigError(
            f"masks[{unknown[0]!r}]", expected="the name of a tensor", found="none of that name"
        )
    return [
        _plan(index, name, base, tuned, config, name in fresh, (masks or {}).get(name))
        for index, name in enumerate(sorted(tuned.tensors))
    ]


def _plan(
    index: int, name: str, base: Weights, tuned: Weights, config: DareConfig, fresh: bool, mask: Any
) -> TensorPlan:
    info, own = tuned.tensors[name], base.tensors.get(name)
    _check_options(name, info, config, mask)
    common: dict[str, Any] = dict(index=index, name=name, info=info, allow_nonfinite=config.allow_nonfinite)
    if own is None or fresh or config.carries_whole(name):
        return TensorPlan(kind="whole", in_base=own == info, **common)
    if own.dtype != info.dtype:
        raise dtype_mismatch(
            name,
            expected=info,
            found=own,
            where=base.label,
            remedy="cast_base=True (--cast-base) rounds the base first",
        )
    if not config.covers(name) and own == info:
        return TensorPlan(kind="base", **common)
    if not info.dtype.can_be_delta:
        return TensorPlan(
            kind="base" if own == info and _equal(name, base, tuned) else "whole",
            in_base=own == info,
            **common,
        )
    rows = None if own.shape == info.shape else _added_rows(name, base, tuned)
    return TensorPlan(kind="delta", base_rows=rows, **common, **_delta_fields(name, info, config, mask))


def _check_options(name: str, info: TensorInfo, config: DareConfig, mask: Any) -> None:
    """No option says something of a tensor that another one contradicts."""
    covered, whole = config.covers(name), config.carries_whole(name)
    if whole and not covered:
        raise ConfigError(
            name,
            expected="whole or exclude (include) to name it, not both",
            found="both",
            remedy="give one of them",
        )
    if mask is not None and (whole or not covered):
        raise ConfigError(
            f"masks[{name!r}]",
            expected="a tensor that travels as a delta",
            found=f"{'whole' if whole else 'exclude'} names it too",
        )
    if mask is not None and not info.dtype.can_be_delta:
        raise ConfigError(
            f"masks[{name!r}]", expected="a floating-point tensor of 16 bits or more", found=info.dtype.code
        )


def _delta_fields(name: str, info: TensorInfo, config: DareConfig, mask: Any) -> dict[str, Any]:
    p = config.drop_rate(name)
    threshold = threshold_of(p)
    if mask is not None:
        values = _encoding(config, info, dropping=True)
        return dict(
            mask=Mask(kind="stored", key=key_of(config.seed, name)),
            stored=_flat_mask(name, mask, info),
            values=values,
        )
    kind: Any = "seeded" if threshold else "all"
    values = _encoding(config, info, dropping=threshold > 0)
    return dict(
        p=p,
        mask=Mask(kind=kind, key=key_of(config.seed, name), threshold=threshold),
        values=values,
        factor=config.factor(threshold),
    )


def _encoding(config: DareConfig, info: TensorInfo, *, dropping: bool) -> Encoding:
    if config.values != "auto":
        return config.values
    return "exact" if info.dtype.bits == 16 or not dropping else "rounded"


def _flat_mask(name: str, mask: Any, info: TensorInfo) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != info.shape:
        raise ConfigError(
            f"masks[{name!r}]",
            expected=f"bool {list(info.shape)}",
            found=f"{array.dtype} {list(array.shape)}",
        )
    return array.reshape(-1)


def _equal(name: str, base: Weights, tuned: Weights) -> bool:
    numel = tuned.tensors[name].numel
    return all(np.array_equal(base.read(name, s, n), tuned.read(name, s, n)) for s, n in runs(numel, SEGMENT))


def _added_rows(name: str, base: Weights, tuned: Weights) -> int:
    """How many leading rows the base has of a tensor that grew, such as an embedding after a resize.

    Rows that were initialised anew have little to do with the base's: their delta is as large as the rows
    themselves.
    """
    own, info = base.tensors[name], tuned.tensors[name]
    grew = own.shape[1:] == info.shape[1:] and bool(own.shape) and own.shape[0] < info.shape[0]
    if not grew or _relative_distance(name, base, tuned, own.numel) > 0.5:
        remedy = f"if it was initialised anew, carry it whole: whole=[{name!r}] (--whole)"
        raise TensorMismatch(
            name,
            expected=f"shape {list(own.shape)}, as in {base.label}",
            found=f"{list(info.shape)}",
            remedy=remedy,
        )
    return own.shape[0]


def _relative_distance(name: str, base: Weights, tuned: Weights, numel: int) -> float:
    moved = norm = 0.0
    for start, count in _own_runs(name, tuned, numel):
        before = to_float(base.read(name, start, count), base.tensors[name].dtype).astype(np.float64)
        after = to_float(tuned.read(name, start, count), tuned.tensors[name].dtype).astype(np.float64)
        moved, norm = moved + float(np.square(after - before).sum()), norm + float(np.square(before).sum())
    if isinstance(tuned, Shared):
        moved, norm = (sum(shares) for shares in zip(*tuned.ranks.gather([moved, norm]), strict=True))
    return float(np.sqrt(moved / norm)) if norm else float(moved > 0)


def _own_runs(name: str, weights: Weights, numel: int) -> Iterator[tuple[int, int]]:
    """Runs of the first `numel` elements, or of what this process owns of them."""
    for begin, end in weights.owned[name] if isinstance(weights, Shared) else ((0, numel),):
        yield from ((begin + offset, count) for offset, count in runs(min(end, numel) - begin, SEGMENT))


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What is going to happen to one tensor of the result."""

    index: int
    name: str
    info: TensorInfo
    kind: str
    """`base`, `delta` or `whole`."""
    base_rows: int | None = None
    in_base: bool = True
    p: float = 0.0
    mask: Mask = field(default_factory=lambda: Mask(kind="all"))
    stored: NDArray[np.bool_] | None = None
    """Flat boolean mask of a `stored` tensor."""
    values: Encoding = "exact"
    factor: float = 1.0
    """The rescale γ."""
    allow_nonfinite: bool = False
    cut_groups: Mapping[int, float] = field(default_factory=dict)
    """Largest |δ| of the scale groups that lie across the border between two ranks, by number."""

    @property
    def base_numel(self) -> int:
        """Leading elements that have a counterpart in the base."""
        if not self.in_base:
            return 0
        return (
            self.info.numel
            if self.base_rows is None
            else self.base_rows * (self.info.numel // self.info.shape[0])
        )

    def positions(self, start: int, length: int) -> Positions:
        """Kept elements of a run, relative to `start`."""
        if self.stored is not None:
            return np.flatnonzero(self.stored[start : start + length])
        return self.mask.positions(start, length)
