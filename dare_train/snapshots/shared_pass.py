"""Snapshots that are taken together: several packages of one model in one pass over its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Words
from ..extracting.assembly import Work, work_of
from ..extracting.device_encoding import gathered
from ..extracting.plan import TensorPlan
from ..package.magnitudes import Magnitudes
from ..package.reader import DeltaPackage
from ..parallel.ranks import in_shares
from ..parallel.threads import ordered_map, thread_count
from ..weights.live.live import LiveWeights, Reading
from ..weights.live.live_lora import Merged
from ..weights.live.named_tensors import Live
from ..weights.live.ownership import Spans
from ..weights.low_rank import Update
from ..weights.protocol import TensorInfo, Weights
from .capture import LastRead, Spread, Taken, merged, take_run


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A package that was written during training, and what it cost."""

    package: DeltaPackage
    step: int
    waited: float
    """Seconds for which training stood still: on the rank that took longest. While a package is being
    written, `finished` asks the other ranks at each step, which takes milliseconds more that are not counted
    here."""
    magnitudes: dict[str, Magnitudes]
    """|δ| by tensor; on the first rank only."""


class Taker(Protocol):
    """Who takes a snapshot in a pass: what the pass asks of it."""

    source: Reading
    kernels: str | None
    owned: Spans
    """What this process speaks for."""
    positions: dict[tuple[str, int], NDArray[np.int32]]
    """Kept elements of some runs, by tensor and start, worked out before."""
    live_bases: Mapping[str, TensorInfo]
    """Tensors under adapters whose base is the one in memory, not that in the files, and what they are
    there."""

    def seen(self, live: LiveWeights) -> LiveWeights:
        """The weights as packages are to have them."""

    def plans_for(self, live: LiveWeights) -> list[TensorPlan]: ...

    def wait(self) -> Snapshot | None:
        """The snapshot before this one, if it had not been collected."""

    def submit(self, job: Job) -> None:
        """Let a package be written behind training."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One of several snapshots that are taken together: see `Snapshotter.take`."""

    taker: Taker
    out: Path
    files: Path | None = None
    within: Path | None = None
    """Where it is written before it is complete: beside `out`, by default."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """What an evaluation said of the weights, by name: for the model card."""
    published: Callable[[], object] | None = None
    """Called on the first rank when the package is in its place."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A snapshot to be written behind training."""

    plans: list[TensorPlan]
    taken: list[Taken]
    updates: Mapping[str, list[Update]]
    """What adapters did to the base, by tensor."""
    failure: Exception | None
    """What went wrong while copying; the ranks hear of it when they meet."""
    order: Order
    step: int
    waited: float

    def completed(self, base: Weights) -> Iterator[Taken]:
        """The runs with all their words: adapters are merged into the base now, behind training.

        Raises:
            Whatever failed when they were copied.
        """
        if self.failure is not None:
            raise self.failure
        for run in self.taken:
            updates = self.updates.get(run.plan.name) if run.plan.kind != "base" else None
            if updates is None:
                yield run
            else:
                live_base = self.order.taker.live_bases.get(run.plan.name)
                of = base if live_base is None else Spread(run, live_base)
                yield replace(run, words=merged(of, run, updates))


def take_together(orders: Sequence[Order], model: Live, *, step: int) -> list[Snapshot | None]:
    """`Snapshotter.take` for several packages of one model in one pass over its weights.

    Returns:
        For each of them, the snapshot before this one, if it had not been collected. Each waited for its
        share of the time.

    Raises:
        SnapshotError: the snapshot before this one failed.
    """
    began = time.perf_counter()
    takers = [order.taker for order in orders]
    before = [taker.wait() for taker in takers]
    nothing = _Pass(plans=[[] for _ in takers], taken=[[] for _ in takers], updates={})
    copied = nothing
    failure: Exception | None = None
    try:
        first = takers[0]
        live = LiveWeights(model, source=first.source, kernels=first.kernels, but_packed=True)
        copied = _copied(first.seen(live), takers)
    except Exception as error:  # noqa: BLE001 - raised on all ranks, when they meet
        failure = error
    waited = (time.perf_counter() - began) / len(orders)
    for order, plans, taken in zip(orders, copied.plans, copied.taken, strict=True):
        order.taker.submit(
            Job(
                plans=plans,
                taken=taken,
                updates=copied.updates,
                failure=failure,
                order=order,
                step=step,
                waited=waited,
            )
        )
    return before


class _Pass(NamedTuple):
    """What one pass over the weights brought, for each taker."""

    plans: list[list[TensorPlan]]
    taken: list[list[Taken]]
    updates: Mapping[str, list[Update]]


class _Run(NamedTuple):
    """A run that one of the takers wants."""

    taker: int
    work: Work


def _copied(live: LiveWeights, takers: Sequence[Taker]) -> _Pass:
    """The runs of each. What a device holds is gathered there; of the rest, runs of the same place are copied
    one after another, while it is in the processor's cache."""
    plans = [taker.plans_for(live) for taker in takers]
    updates = live.updates()
    runs = [
        _Run(number, work)
        for number, taker in enumerate(takers)
        for work in work_of(plans[number], taker.owned)
    ]
    runs.sort(key=lambda run: (run.work.plan.name, run.work.start))
    at_once = {name for name in takers[0].live_bases if any(update.by_rows for update in updates[name])}
    later = updates.keys() - takers[0].live_bases.keys()
    on_device = gathered(live, [run.work for run in runs], later | at_once)
    weights = Merged(live, {name: updates[name] for name in at_once}, _at_hand(live, plans[0], at_once))
    taken: list[list[Taken]] = [[] for _ in takers]
    for run, copied in zip(runs, _taken(weights, takers, runs, on_device, later), strict=True):
        taken[run.taker].append(copied)
    merging = {name: of for name, of in updates.items() if name not in at_once}
    return _Pass(plans=plans, taken=taken, updates=merging)


def _at_hand(
    live: LiveWeights, plans: Sequence[TensorPlan], merging: Collection[str]
) -> dict[str, TensorInfo]:
    """The live tensors, those that are merged at once as the plans want them."""
    merged = {p.name: TensorInfo(p.at_hand, p.info.shape) for p in plans if p.name in merging}
    return {**live.tensors, **merged}


def _taken(
    weights: Weights,
    takers: Sequence[Taker],
    runs: Sequence[_Run],
    on_device: Sequence[Words | None],
    later: Collection[str],
) -> list[Taken]:
    """Each run's words: those gathered on a device, or copied here, on threads."""

    def copy(places: list[int]) -> list[Taken]:
        reader = LastRead(weights)
        wanted = [runs[place] for place in places]
        return [take_run(reader, run.work, takers[run.taker].positions, later) for run in wanted]

    rest = [place for place, words in enumerate(on_device) if words is None]
    shares = in_shares(rest, thread_count(), size=lambda place: runs[place].work.length)
    here = iter([taken for share in ordered_map(copy, shares) for taken in share])
    return [
        next(here) if words is None else Taken(*run.work, words)
        for run, words in zip(runs, on_device, strict=True)
    ]
