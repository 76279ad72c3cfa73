"""What happens to each tensor: compared with its base by name, dtype and shape, before any value is encoded."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Union, cast

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .codec import SEGMENT, Encoding
from .config import DareConfig, threshold_of
from .dtypes import to_float
from .errors import ConfigError, DtypeMismatch, TensorMismatch
from .masks import Mask, key_of
from .segments import TensorPlan
from .weights import ArrayWeights, Cast, Shared, TensorInfo, Weights, runs, under

if TYPE_CHECKING:
    from .shards import Live

WeightsLike = Union[str, "os.PathLike[str]", "Live", Mapping[str, np.ndarray], Weights]
"""A checkpoint folder, file or Hub id; a module or state dict; a mapping of numpy arrays; or anything that is `Weights`."""


def open_weights(what: WeightsLike, *, kernels: str | None = None) -> Weights:
    """Look at any holder of weights as `Weights`; see `LiveWeights` for `kernels`, which are for models in memory.

    Raises:
        CheckpointError: it cannot be read.
    """
    if isinstance(what, (str, os.PathLike)):
        return Checkpoint.open(what)
    if hasattr(what, "read") and hasattr(what, "tensors"):
        return what  # type: ignore[return-value]
    if isinstance(what, Mapping) and all(isinstance(value, np.ndarray) for value in what.values()):
        return ArrayWeights(cast("Mapping[str, np.ndarray]", what))
    if not isinstance(what, Mapping) and not hasattr(what, "state_dict"):
        expected = "a folder, a Hub id, a module, a state dict or a mapping of arrays"
        raise ConfigError("weights", expected=expected, found=f"a {type(what).__name__}")
    from . import lora
    from .shards import LiveWeights

    live = LiveWeights(cast("Live", what), kernels=kernels)
    return lora.Merged(live, live.updates(), live.tensors) if live.adapted else live


def align(base: Weights, names: Collection[str], *, model: str) -> tuple[Weights, str]:
    """The base under the names of the result, and the prefix that makes one of the other.

    A prefix is what a task model puts before its encoder's names ("bert."); it counts when it matches more tensors than
    the names as they are. A base that has the prefix itself, where the result has not, gives a prefix that begins with "-".

    Raises:
        TensorMismatch: not one name in common.
    """
    best, best_count = "", len(base.tensors.keys() & set(names))
    tops = {f"{name.split('.')[0]}." for name in (*names, *base.tensors) if "." in name}
    for top in sorted(tops):
        added = sum(f"{top}{name}" in names for name in base.tensors)
        removed = sum(f"{top}{name}" in base.tensors for name in names)
        for prefix, count in ((top, added), (f"-{top}", removed)):
            if count > best_count:
                best, best_count = prefix, count
    if not best_count:
        raise TensorMismatch(
            base.label, expected=f"tensors of {model}", found="not one of them", remedy="is this the base it was tuned from?"
        )
    return with_prefix(base, best), best


def with_prefix(base: Weights, prefix: str) -> Weights:
    """The base under the names that `align` found."""
    if not prefix:
        return base
    top = prefix.removeprefix("-")
    if top != prefix:
        names = {name.removeprefix(top): name for name in base.tensors if name.startswith(top)}
    else:
        names = {f"{prefix}{name}": name for name in base.tensors}
    return under(base, names)


def without_prefix(name: str, prefix: str) -> str:
    """The base's name of a tensor, given the result's and the prefix that `align` found."""
    return f"{prefix[1:]}{name}" if prefix.startswith("-") else name.removeprefix(prefix)


def cast_to(base: Weights, tuned: Mapping[str, TensorInfo]) -> Weights:
    """The base rounded to the dtypes of the tuned tensors of the same names."""
    dtypes = {name: info.dtype for name, info in tuned.items() if name in base.tensors and base.tensors[name].dtype != info.dtype}
    return Cast(base, dtypes) if dtypes else base


def plan_tensors(
    base: Weights, tuned: Weights, config: DareConfig, *, fresh: Collection[str] = (), masks: Mapping[str, Any] | None = None
) -> list[TensorPlan]:
    """One plan for each tensor of `tuned`, sorted by name. `fresh` names tensors known to have begun apart from the base.

    Raises:
        DtypeMismatch: a tensor has one dtype in the base and another in the tuned weights.
        TensorMismatch: shapes differ by more than added leading rows.
        ConfigError: a mask names no tensor or has the wrong shape.
    """
    if masks is not None and not isinstance(masks, Mapping):
        raise ConfigError("masks", expected="a mapping from tensor names to bool arrays", found=repr(masks))
    unknown = sorted((masks or {}).keys() - tuned.tensors.keys())
    if unknown:
        raise ConfigError(f"masks[{unknown[0]!r}]", expected="the name of a tensor", found="none of that name")
    return [
        _plan(index, name, base, tuned, config, name in fresh, (masks or {}).get(name)) for index, name in enumerate(sorted(tuned.tensors))
    ]


def _plan(index: int, name: str, base: Weights, tuned: Weights, config: DareConfig, fresh: bool, mask: Any) -> TensorPlan:
    info, own = tuned.tensors[name], base.tensors.get(name)
    _check_options(name, info, config, mask)
    common: dict[str, Any] = dict(index=index, name=name, info=info, allow_nonfinite=config.allow_nonfinite)
    if own is None or fresh or config.carries_whole(name):
        return TensorPlan(kind="whole", in_base=own == info, **common)
    if own.dtype != info.dtype:
        raise dtype_mismatch(name, expected=info, found=own, where=base.label, remedy="cast_base=True (--cast-base) rounds the base first")
    if not config.covers(name) and own == info:
        return TensorPlan(kind="base", **common)
    if not info.dtype.can_be_delta:
        return TensorPlan(kind="base" if own == info and _equal(name, base, tuned) else "whole", in_base=own == info, **common)
    rows = None if own.shape == info.shape else _added_rows(name, base, tuned)
    return TensorPlan(kind="delta", base_rows=rows, **common, **_delta_fields(name, info, config, mask))


def _check_options(name: str, info: TensorInfo, config: DareConfig, mask: Any) -> None:
    """No option says something of a tensor that another one contradicts."""
    covered, whole = config.covers(name), config.carries_whole(name)
    if whole and not covered:
        raise ConfigError(name, expected="whole or exclude (include) to name it, not both", found="both", remedy="give one of them")
    if mask is not None and (whole or not covered):
        raise ConfigError(
            f"masks[{name!r}]", expected="a tensor that travels as a delta", found=f"{'whole' if whole else 'exclude'} names it too"
        )
    if mask is not None and not info.dtype.can_be_delta:
        raise ConfigError(f"masks[{name!r}]", expected="a floating-point tensor of 16 bits or more", found=info.dtype.code)


def _delta_fields(name: str, info: TensorInfo, config: DareConfig, mask: Any) -> dict[str, Any]:
    p = config.drop_rate(name)
    threshold = threshold_of(p)
    if mask is not None:
        values = _encoding(config, info, dropping=True)
        return dict(mask=Mask(kind="stored", key=key_of(config.seed, name)), stored=_flat_mask(name, mask, info), values=values)
    kind: Any = "seeded" if threshold else "all"
    values = _encoding(config, info, dropping=threshold > 0)
    return dict(
        p=p, mask=Mask(kind=kind, key=key_of(config.seed, name), threshold=threshold), values=values, factor=config.factor(threshold)
    )


def _encoding(config: DareConfig, info: TensorInfo, *, dropping: bool) -> Encoding:
    if config.values != "auto":
        return config.values
    return "exact" if info.dtype.bits == 16 or not dropping else "rounded"


def _flat_mask(name: str, mask: Any, info: TensorInfo) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != info.shape:
        raise ConfigError(f"masks[{name!r}]", expected=f"bool {list(info.shape)}", found=f"{array.dtype} {list(array.shape)}")
    return array.reshape(-1)


def _equal(name: str, base: Weights, tuned: Weights) -> bool:
    numel = tuned.tensors[name].numel
    return all(np.array_equal(base.read(name, s, n), tuned.read(name, s, n)) for s, n in runs(numel, SEGMENT))


def _added_rows(name: str, base: Weights, tuned: Weights) -> int:
    """How many leading rows the base has of a tensor that grew, such as an embedding after a resize.

    Rows that were initialised anew have little to do with the base's: their delta is as large as the rows themselves.
    """
    own, info = base.tensors[name], tuned.tensors[name]
    grew = own.shape[1:] == info.shape[1:] and bool(own.shape) and own.shape[0] < info.shape[0]
    if not grew or _relative_distance(name, base, tuned, own.numel) > 0.5:
        remedy = f"if it was initialised anew, carry it whole: whole=[{name!r}] (--whole)"
        raise TensorMismatch(name, expected=f"shape {list(own.shape)}, as in {base.label}", found=f"{list(info.shape)}", remedy=remedy)
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


def dtype_mismatch(name: str, *, expected: TensorInfo, found: TensorInfo, where: str, remedy: str) -> DtypeMismatch:
    return DtypeMismatch(name, expected=expected.dtype.code, found=f"{found.dtype.code} in {where}", remedy=remedy)
