"""What happens to each tensor: compared with its base by name, dtype and shape, before any value is
encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import DareConfig, TensorRule
from ..dtypes import DType, Words, to_float
from ..errors import CheckpointError, ConfigError, TensorMismatch
from ..kernels.rounding import land
from ..package.codec import Encoding, Positions
from ..package.landing import Landing
from ..package.manifest import Kind
from ..package.masks import Mask, MaskKind, key_of
from ..weights.alignment import dtype_mismatch
from ..weights.derived_buffers import is_derived
from ..weights.low_rank import finest
from ..weights.protocol import SEGMENT, Shared, TensorInfo, Weights, runs


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """What is going to happen to one tensor of the result."""

    index: int
    name: str
    info: TensorInfo
    kind: Kind
    """`base`: as it is there. `delta`: base plus delta. `whole`: carried as it is."""
    base_rows: int | None = None
    in_base: bool = True
    p: float = 0.0
    mask: Mask = field(default_factory=lambda: Mask(kind="all"))
    stored: NDArray[np.bool_] | None = None
    """Flat boolean mask of a `stored` tensor."""
    values: Encoding = "exact"
    factor: float = 1.0
    """The rescale γ."""
    landing: Landing | None = None
    """How finer weights than the result's become its; None where its own are at hand."""
    allow_nonfinite: bool = False
    cut_groups: Mapping[int, float] = field(default_factory=dict)
    """Largest |δ| of the scale groups that lie across the border between two ranks, by number."""

    @property
    def at_hand(self) -> DType:
        """Of the tuned words, before they land."""
        return self.info.dtype if self.landing is None else self.landing.source

    def in_result(self, words: Words) -> Words:
        """Tuned words that are carried whole, rounded to the result's dtype."""
        if self.at_hand == self.info.dtype:
            return words
        with np.errstate(invalid="ignore"):  # NaNs that signal
            return land(to_float(words, self.at_hand).astype(np.float64), self.info.dtype)

    @property
    def base_numel(self) -> int:
        """Leading elements that have a counterpart in the base."""
        if not self.in_base:
            return 0
        if self.base_rows is None:
            return self.info.numel
        return self.base_rows * (self.info.numel // self.info.shape[0])

    def base_words(self, base: Weights, start: int, length: int) -> Words | None:
        """All words of a run of the base; None where it has none."""
        return base.read(self.name, start, length) if start < self.base_numel else None

    def positions(self, start: int, length: int) -> Positions:
        """Kept elements of a run, relative to `start`."""
        if self.stored is not None:
            return np.flatnonzero(self.stored[start : start + length])
        return self.mask.positions(start, length)


def plan_tensors(
    base: Weights,
    tuned: Weights,
    config: DareConfig,
    *,
    fresh: Collection[str] = (),
    masks: Mapping[str, Any] | None = None,
    merged: Collection[str] = (),
    together: Mapping[str, bool] | None = None,
) -> list[TensorPlan]:
    """One plan for each tensor of `tuned`, sorted by name.

    Args:
        fresh: names of tensors known to have begun apart from the base.
        masks: see `extract`.
        merged: names of tensors that adapters will be merged into, without rounding if they are to land.
        together: tensors that mean nothing without one another: they travel bit for bit; and whether one is
            bits of a quantised weight, which are no numbers, whatever its dtype.

    Raises:
        CheckpointError: a tensor is quantised on one side.
        DtypeMismatch: a tensor has one dtype in the base and another in the tuned weights.
        TensorMismatch: shapes differ by more than added leading rows.
        ConfigError: a mask names no tensor or has the wrong shape; weights are to land that are coarser than
            the base's.
    """
    if masks is not None and not isinstance(masks, Mapping):
        raise ConfigError("masks", expected="a mapping from tensor names to bool arrays", found=repr(masks))
    unknown = sorted((masks or {}).keys() - tuned.tensors.keys())
    if unknown:
        raise ConfigError(
            f"masks[{unknown[0]!r}]", expected="the name of a tensor", found="none of that name"
        )
    landing = landings(base, tuned, config, merged)
    return [
        _together(index, name, base, tuned, config, is_bits=together[name])
        if together and name in together
        else _plan(
            index, name, base, tuned, config, name in fresh, (masks or {}).get(name), landing.get(name)
        )
        for index, name in enumerate(sorted(tuned.tensors))
    ]


def landings(
    base: Weights, tuned: Weights, config: DareConfig, merged: Collection[str] = ()
) -> dict[str, Landing]:
    """How tensors of both land on the base's grid: all of them, if one of them is finer than the base's; none
    by default if one is coarser.

    Args:
        base: in its own dtypes, under the names of `tuned`.
        merged: see `plan_tensors`.

    Raises:
        ConfigError: one is coarser, and they were to land.
    """
    at_hand = dtypes_at_hand(base, tuned, merged) if config.lands else {}
    grids = {name: base.tensors[name].dtype for name in at_hand}
    coarser = [name for name, dtype in at_hand.items() if dtype.mantissa_bits < grids[name].mantissa_bits]
    if coarser and config.dtype == "base":
        name = coarser[0]
        expected = "trained weights as fine as the base's"
        found = f"{at_hand[name].code} in {tuned.label}, {grids[name].code} in {base.label}"
        remedy = 'dtype="trained" (--dtype trained), on the base rounded to their dtype'
        raise ConfigError(f'dtype="base": {name}', expected=expected, found=found, remedy=remedy)
    if coarser or at_hand == grids:
        return {}
    return {
        name: Landing(source=dtype, factor=1.0, rounding=config.rounding, key=key_of(config.seed, name))
        for name, dtype in at_hand.items()
    }


def dtypes_at_hand(base: Weights, tuned: Weights, merged: Collection[str] = ()) -> dict[str, DType]:
    """Of the tuned tensors that are deltas of the base's, by name; of those that adapters are merged into,
    before rounding.
    """
    dtypes = {}
    for name in sorted(tuned.tensors.keys() & base.tensors.keys()):
        info, base_info = tuned.tensors[name], base.tensors[name]
        if info.dtype.can_be_delta and base_info.dtype.can_be_delta:
            dtypes[name] = finest(base_info).dtype if name in merged else info.dtype
    return dtypes


def _plan(
    index: int,
    name: str,
    base: Weights,
    tuned: Weights,
    config: DareConfig,
    fresh: bool,
    mask: Any,
    landing: Landing | None,
) -> TensorPlan:
    info = tuned.tensors[name]
    base_info = base.tensors.get(name)
    if landing is not None and base_info is not None:
        info = TensorInfo(base_info.dtype, info.shape)
    same_form = base_info == info
    rule = config.rule(name)
    _check_options(rule, info, mask)
    whole = TensorPlan(
        index=index,
        name=name,
        info=info,
        kind="whole",
        in_base=same_form,
        landing=landing,
        allow_nonfinite=config.allow_nonfinite,
    )
    if base_info is None or fresh or rule.whole:
        return whole
    if mask is None and is_derived(name, info.shape) and not isinstance(tuned, Shared):
        unmoved = same_form and (not rule.covered or _equal(name, base, tuned))
        return replace(whole, kind="base" if unmoved else "whole", in_base=unmoved)
    if base_info.dtype.can_be_delta != info.dtype.can_be_delta:
        found = f"{info} in {tuned.label}, {base_info} in {base.label}"
        remedy = "one is quantised: give that model in full precision; of QLoRA, the adapter by itself"
        raise CheckpointError(name, expected="the same precision in both", found=found, remedy=remedy)
    if base_info.dtype != info.dtype:
        remedy = "cast_base=True (--cast-base) rounds the base first"
        raise dtype_mismatch(name, expected=info, found=base_info, where=base.label, remedy=remedy)
    if not rule.covered and same_form:
        return replace(whole, kind="base")
    if not info.dtype.can_be_delta:
        unchanged = same_form and _equal(name, base, tuned)
        return replace(whole, kind="base") if unchanged else whole
    rows = None if base_info.shape == info.shape else _added_rows(name, base, tuned)
    delta = replace(whole, kind="delta", in_base=True, base_rows=rows)
    if not rule.covered:  # the base's rows stay as they are, and only those that were added travel
        nothing = np.broadcast_to(np.bool_(False), info.numel)
        return replace(delta, mask=Mask(kind="stored", key=key_of(config.seed, name)), stored=nothing)
    return _dropped(delta, rule, config.seed) if mask is None else _masked(delta, rule, config.seed, mask)


def _together(
    index: int, name: str, base: Weights, tuned: Weights, config: DareConfig, *, is_bits: bool
) -> TensorPlan:
    """As it is: a part of a quantised weight."""
    info = tuned.tensors[name]
    same_form = base.tensors.get(name) == info
    rule = config.rule(name)
    allowed = config.allow_nonfinite or is_bits
    is_number = info.dtype.can_be_delta and not is_bits
    whole = TensorPlan(
        index=index, name=name, info=info, kind="whole", in_base=same_form, allow_nonfinite=allowed
    )
    if rule.whole or not same_form:
        return whole
    if not rule.covered or (not is_number and _equal(name, base, tuned)):
        return replace(whole, kind="base")
    return replace(whole, kind="delta") if is_number else whole


def _check_options(rule: TensorRule, info: TensorInfo, mask: Any) -> None:
    """No option says something of a tensor that another one contradicts."""
    if rule.whole and not rule.covered:
        expected = "whole or exclude (include) to name it, not both"
        raise ConfigError(rule.tensor, expected=expected, found="both", remedy="give one of them")
    if mask is None:
        return
    where = f"masks[{rule.tensor!r}]"
    if rule.whole or not rule.covered:
        found = f"{'whole' if rule.whole else 'exclude'} names it too"
        raise ConfigError(where, expected="a tensor that travels as a delta", found=found)
    if not info.dtype.can_be_delta:
        expected = "a floating-point tensor of 16 bits or more"
        raise ConfigError(where, expected=expected, found=info.dtype.code)


def _dropped(plan: TensorPlan, rule: TensorRule, seed: int) -> TensorPlan:
    """A delta whose mask is drawn."""
    threshold = rule.threshold
    kind: MaskKind = "seeded" if threshold else "all"
    landing = plan.landing and replace(plan.landing, factor=rule.factor)
    return replace(
        plan,
        landing=landing,
        p=rule.p,
        mask=Mask(kind=kind, key=key_of(seed, plan.name), threshold=threshold),
        values=_encoding(rule, plan.info, dropping=threshold > 0),
        factor=rule.factor if landing is None else 1.0,
    )


def _masked(plan: TensorPlan, rule: TensorRule, seed: int, mask: Any) -> TensorPlan:
    """A delta whose mask is given."""
    return replace(
        plan,
        mask=Mask(kind="stored", key=key_of(seed, plan.name)),
        stored=_flat_mask(plan.name, mask, plan.info),
        values=_encoding(rule, plan.info, dropping=True),
    )


def _encoding(rule: TensorRule, info: TensorInfo, *, dropping: bool) -> Encoding:
    """How values are stored: as the rule says, or what `auto` means."""
    if rule.values != "auto":
        return rule.values
    return "exact" if info.dtype.bits == 16 or not dropping else "rounded"


def _flat_mask(name: str, mask: Any, info: TensorInfo) -> NDArray[np.bool_]:
    array = np.asarray(mask)
    if array.dtype != np.bool_ or array.shape != info.shape:
        found = f"{array.dtype} {list(array.shape)}"
        raise ConfigError(f"masks[{name!r}]", expected=f"bool {list(info.shape)}", found=found)
    return array.reshape(-1)


def _equal(name: str, base: Weights, tuned: Weights) -> bool:
    numel = tuned.tensors[name].numel
    return all(np.array_equal(base.read(name, s, n), tuned.read(name, s, n)) for s, n in runs(numel, SEGMENT))


def _added_rows(name: str, base: Weights, tuned: Weights) -> int:
    """How many leading rows the base has of a tensor that grew, such as an embedding after a resize.

    Rows that were initialised anew have little to do with the base's: their delta is as large as the rows
    themselves.
    """
    base_info = base.tensors[name]
    before = base_info.shape
    after = tuned.tensors[name].shape
    grew = before[1:] == after[1:] and bool(before) and before[0] < after[0]
    if not grew or _relative_distance(name, base, tuned, base_info.numel) > 0.5:
        expected = f"shape {list(before)}, as in {base.label}"
        remedy = f"if it was initialised anew, carry it whole: whole=[{name!r}] (--whole)"
        raise TensorMismatch(name, expected=expected, found=f"{list(after)}", remedy=remedy)
    return before[0]


def _relative_distance(name: str, base: Weights, tuned: Weights, numel: int) -> float:
    """||tuned - base|| / ||base|| over the first elements, on all ranks together."""
    moved = 0.0
    norm = 0.0
    for start, count in _own_runs(name, tuned, numel):
        before = to_float(base.read(name, start, count), base.tensors[name].dtype).astype(np.float64)
        after = to_float(tuned.read(name, start, count), tuned.tensors[name].dtype).astype(np.float64)
        moved += float(np.square(after - before).sum())
        norm += float(np.square(before).sum())
    if isinstance(tuned, Shared):
        moved, norm = (sum(shares) for shares in zip(*tuned.ranks.gather([moved, norm]), strict=True))
    return float(np.sqrt(moved / norm)) if norm else float(moved > 0)


def _own_runs(name: str, weights: Weights, numel: int) -> Iterator[tuple[int, int]]:
    """Runs of the first `numel` elements, or of what this process owns of them."""
    for begin, end in weights.owned[name] if isinstance(weights, Shared) else ((0, numel),):
        yield from ((begin + offset, count) for offset, count in runs(min(end, numel) - begin, SEGMENT))
