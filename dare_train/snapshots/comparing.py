"""How far a live model is from files: which tensors have other bits, and how far apart they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..dtypes import Words, to_float
from ..errors import ConfigError
from ..parallel.threads import ordered_map
from ..weights.live.live import LiveWeights
from ..weights.live.live_lora import MERGE
from ..weights.live.ownership import Spans
from ..weights.low_rank import Update
from ..weights.protocol import SEGMENT, Weights, runs

_MAJORITY = 0.5


def differing(live: LiveWeights, base: Weights, names: Collection[str] | None = None) -> set[str]:
    """Tensors of both (or of those named) that do not hold the base's bits, up to rows added at the end. All
    ranks call it together.
    """
    told = live.ranks.together(lambda: differing_here(live, base, live.owned, names))
    return set[str]().union(*told)


def most(live: LiveWeights, base: Weights, names: Collection[str], *, besides: Collection[str]) -> bool:
    """Whether some tensors are more than half of what live model and base share, not counting others."""
    shared = [name for name in live.tensors if name in base.tensors and name not in besides]
    return sum(live.tensors[name].numel for name in names) > _MAJORITY * sum(
        live.tensors[name].numel for name in shared
    )


def adapted_apart(
    live: LiveWeights, base: Weights, updates: Mapping[str, Sequence[Update]]
) -> frozenset[str]:
    """Tensors under an adapter that are not what the base's files have, or can change while the adapter is
    trained: they are read in memory. All ranks call it together.

    Args:
        updates: what adapters do to the base, as `live.updates` gives it.

    Raises:
        ConfigError: there are such under DoRA, which takes norms of whole rows, and they lie on several
            ranks.
    """
    if live.packed or not updates:
        return frozenset()
    apart = differing(live, base, [name for name in updates if name in base.tensors])
    apart |= (updates.keys() & live.trained) | (updates.keys() - base.tensors.keys())
    for name in sorted(apart):
        whole = live.held[name] == ((0, live.tensors[name].numel),)
        if not whole and any(update.by_rows for update in updates[name]):
            expected = "a base as in its files, under DoRA on several ranks"
            raise ConfigError(name, expected=expected, found="another in memory", remedy=MERGE)
    return frozenset(apart)


class ZeroFilled:
    """Live weights with zeros where this process holds nothing: enough for what is added element by
    element.
    """

    def __init__(self, live: LiveWeights) -> None:
        self.label = live.label
        self.tensors = live.tensors
        self._live = live

    def read(self, name: str, start: int, count: int) -> Words:
        words = np.zeros(count, self.tensors[name].dtype.word)
        for begin, end in self._live.held[name]:
            first, stop = max(begin, start), min(end, start + count)
            if first < stop:
                words[first - start : stop - start] = self._live.read(name, first, stop - first)
        return words


def relative_distances(
    weights: Weights, live: LiveWeights, base: Weights, names: Collection[str]
) -> dict[str, float]:
    """||w - base|| / ||base|| of tensors as `weights` reads them, of what lies where `live` says. All ranks
    call it together.
    """
    names = sorted(names)

    def of_this_rank() -> list[tuple[float, float]]:
        return [_squares(weights, live, base, name) for name in names]

    per_rank = live.ranks.together(of_this_rank)
    distances = {}
    for number, name in enumerate(names):
        moved, norm = (sum(squares) for squares in zip(*(rank[number] for rank in per_rank), strict=True))
        distances[name] = float(np.sqrt(moved / norm)) if norm else float(moved > 0)
    return distances


def _squares(weights: Weights, live: LiveWeights, base: Weights, name: str) -> tuple[float, float]:
    """||w - base||² and ||base||² of what this rank speaks for."""
    moved = norm = 0.0
    for begin, end in live.owned[name]:
        for offset, count in runs(min(end, base.tensors[name].numel) - begin, SEGMENT):
            before, after = (
                to_float(of.read(name, begin + offset, count), of.tensors[name].dtype).astype(np.float64)
                for of in (base, weights)
            )
            moved += float(np.square(after - before).sum())
            norm += float(np.square(before).sum())
    return moved, norm


def differing_here(
    live: LiveWeights, base: Weights, spans: Spans, names: Collection[str] | None = None
) -> list[str]:
    """`differing`, by what lies in some spans of this process's."""

    def same(name: str) -> bool:
        info = live.tensors[name]
        base_info = base.tensors[name]
        before = base_info.shape
        after = info.shape
        grown = bool(after) and after[1:] == before[1:] and after[0] >= before[0]
        if info.dtype != base_info.dtype or not (after == before or grown):
            return False
        shared = [(begin, min(end, base_info.numel)) for begin, end in spans[name]]
        work = [(begin + s, n) for begin, end in shared for s, n in runs(end - begin, SEGMENT)]
        return all(np.array_equal(live.read(name, s, n), base.read(name, s, n)) for s, n in work)

    shared = [name for name in live.tensors if name in base.tensors] if names is None else list(names)
    return [name for name, equal in zip(shared, ordered_map(same, shared), strict=True) if not equal]
