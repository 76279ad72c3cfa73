"""Snapshots: a live model's delta taken in the blink that training waits, encoded and written behind it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..applying.chain import open_chain
from ..applying.resolver import Resolver
from ..config import DareConfig
from ..dtypes import Words
from ..errors import SnapshotError
from ..extracting.assembly import (
    Provenance,
    load_tallies,
    save_tallies,
    summed,
    work_of,
    write_manifest,
    write_parts,
)
from ..extracting.device_encoding import gathered, on_devices
from ..extracting.encoding import Encoded, Taken
from ..extracting.plan import TensorPlan, plan_tensors
from ..kernels import cpu
from ..package.companion_files import carry_files
from ..package.magnitudes import Magnitudes
from ..package.manifest import FileRecord
from ..package.reader import DeltaPackage
from ..parallel.ranks import Ranks, in_shares
from ..parallel.staged_folder import shared_staging
from ..parallel.threads import ordered_map, thread_count
from ..weights.live import Live, LiveWeights, Source
from ..weights.low_rank import LowRank
from ..weights.protocol import Weights
from .base_model import Origin, establish, recall
from .capture import (
    LastRead,
    cut_groups,
    encode,
    encode_link,
    largest_of,
    link_plan,
    merged,
    received,
    take_run,
)

POSITIONS_LIMIT = 128 << 20
"""Bytes that masks worked out ahead may take: four for each kept element."""


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


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A snapshot to be written behind training."""

    plans: list[TensorPlan]
    taken: list[Taken]
    updates: Mapping[str, list[LowRank]]
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
            yield run if updates is None else replace(run, words=merged(base, run, updates))


class Snapshotter:
    """Takes snapshots of one model relative to one origin. At most one is being written at a time.

    Where several ranks hold the model, each of them has its own `Snapshotter` and calls it at the same steps;
    each writes the part that it holds, and the first completes the package.

    Args:
        origin: what deltas are relative to.
        config: how they become packages.
        live: the model as training begins. All ranks pass it together. Its `kernels` gather kept weights.
        incremental: each package continues the one before: a chain whose every result has the bits that a
            package on the base would have given.
        source: what is read where an engine keeps fp32 masters: see `Source`.
    """

    def __init__(
        self,
        origin: Origin,
        config: DareConfig,
        live: LiveWeights,
        *,
        incremental: bool = False,
        source: Source = "weights",
    ) -> None:
        self.origin, self.config, self.incremental, self._source = origin, config, incremental, source
        self._kernels = live.kernels
        self.chain: list[Path] = []
        self.ranks = live.ranks
        self._line = self.ranks.another()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dare-train-writer")
        self._pending: Future[Snapshot] | None = None
        self._positions: dict[tuple[str, int], NDArray[np.int32]] = {}
        self._owned, self._held, self._planned_for = live.owned, live.held, live.tensors
        self._plans = plan_tensors(origin.weights, live, config, fresh=origin.fresh)
        self._prepared = self._writer.submit(self._prepare, on_devices(live))

    @classmethod
    def begin(
        cls,
        model: Live,
        folder: Path,
        config: DareConfig,
        *,
        base: str | os.PathLike[str] | None = None,
        resumed: Mapping[str, Any] | None = None,
        incremental: bool = False,
        source: Source = "weights",
        kernels: str | None = None,
    ) -> Snapshotter:
        """Get ready for snapshots in a training loop of one's own, before its first step. All ranks call it
        together.

        Args:
            model: as it is trained: prepared by accelerate, wrapped by DDP or FSDP, the engine's module of
                DeepSpeed.
            folder: where packages go, and `base`, when the base has to be kept.
            config: how deltas become packages.
            base: folder or Hub id that deltas are relative to; by default where the model was loaded from, if
                its weights are still the ones on disk, else the weights as they are now.
            resumed: in a run that goes on from a checkpoint, the `record` that was saved with it: the weights
                are no longer the base's then.
            incremental, source: see `Snapshotter`.
            kernels: which gather kept weights: see `apply_`.

        Raises:
            ConfigError: the model is laid out in a way that is not known.
            BaseMismatch: the base on record is gone, or no longer what it was.
        """
        live = LiveWeights(model, source=source, ranks=Ranks.joined(), kernels=kernels)
        origin = (
            recall(resumed, live)
            if resumed is not None
            else establish(live, model, folder / "base", base=base)
        )
        return cls(origin, config, live, incremental=incremental, source=source)

    @property
    def record(self) -> dict[str, Any]:
        """Plain data to save with a checkpoint, from which a resumed run finds the same base."""
        return self.origin.record()

    def _prepare(self, on_devices: Collection[str]) -> None:
        """Work out masks ahead of the first snapshot, behind training, as far as `POSITIONS_LIMIT` allows;
        devices make their own.
        """
        held = 0
        for plan, start, count in work_of(
            [plan for plan in self._plans if plan.name not in on_devices], self._owned
        ):
            if plan.kind == "delta" and start < plan.base_numel and held < POSITIONS_LIMIT:
                self._positions[plan.name, start] = positions = plan.positions(start, count).astype(np.int32)
                cpu.take(
                    np.empty(0, plan.info.dtype.word), positions[:0]
                )  # compiled by now, should this be the first run ever
                held += positions.nbytes

    def _plan(self, live: LiveWeights) -> list[TensorPlan]:
        """The plans made at the start, as long as names, dtypes and shapes decide them: whether an integer
        tensor changed does not show there."""
        if live.tensors != self._planned_for or live.held != self._held:
            remedy = "models that change their tensors while they train are not supported"
            raise SnapshotError(
                "model", expected="the tensors that it had when training began", found="others", remedy=remedy
            )
        if all(info.dtype.can_be_delta for info in live.tensors.values()):
            return self._plans
        return plan_tensors(self.origin.weights, live, self.config, fresh=self.origin.fresh)

    def take(
        self,
        model: Live,
        out: Path,
        *,
        step: int,
        files: Path | None = None,
        keep: tuple[int, Path] | None = None,
    ) -> Snapshot | None:
        """Copy what the package needs and let a worker thread write it to `out`.

        Args:
            model: the module or state dict as it is now.
            out: folder to create; replaced if it is there.
            step: recorded in the `Snapshot`.
            files: folder with the model's configuration and tokenizer; those that the base lacks go along.
            keep: (count, folder): afterwards only that many `step-*` packages stay in the folder.

        Returns:
            The snapshot before this one, if it had not been collected: it is waited for first, and that
            counts as waiting.

        Raises:
            SnapshotError: the snapshot before this one failed.
        """
        return take_together([Order(snapshotter=self, out=out, files=files, keep=keep)], model, step=step)[0]

    def _submit(self, job: _Job) -> None:
        self._pending = self._writer.submit(self._write, job)

    def finished(self) -> Snapshot | None:
        """The snapshot that was completed since the last call, if any: on all ranks at the same call.

        Raises:
            SnapshotError: it failed.
        """
        if self._pending is None or not all(self.ranks.gather(self._pending.done())):
            return None
        return self.wait()

    def wait(self) -> Snapshot | None:
        """Like `finished`, but waits for a snapshot that is being written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            return pending.result()
        except Exception as error:
            raise SnapshotError(
                f"snapshot: {error}", remedy="packages and checkpoints written before it are intact"
            ) from error

    def close(self) -> Snapshot | None:
        """Wait for whatever is still being done; its failure surfaces here at the latest. Returns the last
        snapshot, unless it was collected before."""
        self._writer.shutdown(wait=True)
        last = self.wait()
        self._prepared.result()
        return last

    def preview(self, live: LiveWeights) -> Iterator[tuple[str, int, Words]]:
        """(name, flat start, words) of the runs of deltas as a receiver gets them, as far as this process
        holds them.
        """
        plans, base = self._plan(live), self.origin.weights
        groups: dict[int, dict[int, float]] = {}
        if not live.whole:
            every = (take_run(live, *work, {}) for work in work_of(plans, live.held))
            groups = largest_of(self.ranks.together(lambda: cut_groups(base, every)))
        for plan, start, count in work_of([plan for plan in plans if plan.kind != "whole"], live.held):
            run = take_run(live, plan, start, count, {})
            yield (
                plan.name,
                start,
                received(base, replace(run, plan=replace(plan, cut_groups=groups.get(plan.index, {})))),
            )

    # On the worker thread.

    def _write(self, job: _Job) -> Snapshot:
        line = self._line
        magnitudes: dict[str, Magnitudes] = {}
        with shared_staging(job.order.out, line) as staging:
            groups = line.together(
                lambda: (
                    cut_groups(self.origin.weights, job.completed(self.origin.weights))
                    if line.world > 1
                    else []
                )
            )
            shares = line.together(lambda: self._write_part(staging, job, largest_of(groups)))
            line.together(
                lambda: magnitudes.update(self._complete(staging, job, shares)) if line.first else None
            )
        if self.incremental:
            self.chain.append(job.order.out)
        if job.order.keep is not None and line.first:
            _forget_old(*job.order.keep)
        waited = max(seconds for seconds, _ in shares)
        return Snapshot(
            package=DeltaPackage.open(job.order.out), step=job.step, waited=waited, magnitudes=magnitudes
        )

    def _write_part(
        self, staging: Path, job: _Job, groups: Mapping[int, Mapping[int, float]]
    ) -> tuple[float, list[dict[str, object]]]:
        """What this rank holds of the package. Returns the seconds it waited and records of the files that it
        wrote.
        """
        completed = job.completed(self.origin.weights)
        taken = (
            replace(run, plan=replace(run.plan, cut_groups=groups.get(run.plan.index, {})))
            for run in completed
        )
        encoded = (
            self._links(taken) if self._continues else (encode(self.origin.weights, run) for run in taken)
        )
        parts, tallies = write_parts(staging, encoded, rank=self._line.rank)
        save_tallies(_tallies_of(staging, self._line.rank), tallies)
        return job.waited, [vars(part) for part in parts]

    def _complete(
        self, staging: Path, job: _Job, shares: list[tuple[float, list[dict[str, Any]]]]
    ) -> dict[str, Magnitudes]:
        """Make one package of what the ranks wrote. Returns |δ| by tensor."""
        files = [_tallies_of(staging, rank) for rank in range(self._line.world)]
        tallies = summed(load_tallies(file) for file in files)
        for file in files:
            file.unlink()
        carried = carry_files(self.origin.checkpoint.folder, job.order.files, staging)
        plans = [link_plan(plan) for plan in job.plans] if self._continues else job.plans
        parts = [FileRecord(**record) for _, records in shares for record in records]
        return write_manifest(staging, plans, tallies, parts, self._provenance(job.plans), carried)

    @property
    def _continues(self) -> bool:
        return self.incremental and bool(self.chain)

    def _provenance(self, plans: list[TensorPlan]) -> Provenance:
        absent = tuple(sorted(self.origin.weights.tensors.keys() - {plan.name for plan in plans}))
        on_base = Provenance(
            base_model=self.origin.name, prefix=self.origin.prefix, base_only=absent, config=self.config
        )
        if not self._continues:
            return on_base
        return replace(on_base, prefix="", base_only=(), continues="package", rescale="carried")

    def _links(self, taken: Iterable[Taken]) -> Iterator[Encoded]:
        """Runs of a package that leads from the chain's last result to the one a package on the base would
        give.
        """
        resolver = Resolver(self.origin.checkpoint, open_chain(self.chain, None), cast_base=True)
        for run in taken:
            before = resolver.resolve(run.plan.name, run.start, run.length)
            yield encode_link(link_plan(run.plan), run, before, received(self.origin.weights, run))


@dataclass(frozen=True, kw_only=True)
class Order:
    """One of several snapshots that are taken together: see `Snapshotter.take`."""

    snapshotter: Snapshotter
    out: Path
    files: Path | None = None
    keep: tuple[int, Path] | None = None


def take_together(orders: Sequence[Order], model: Live, *, step: int) -> list[Snapshot | None]:
    """`Snapshotter.take` for several packages of one model in one pass over its weights.

    Returns:
        For each of them, the snapshot before this one, if it had not been collected. Each waited for its
        share of the time.

    Raises:
        SnapshotError: the snapshot before this one failed.
    """
    began = time.perf_counter()
    takers = [order.snapshotter for order in orders]
    before = [taker.wait() for taker in takers]
    plans = [taker._plans for taker in takers]
    taken: list[list[Taken]] = [[] for _ in takers]
    updates: dict[str, list[LowRank]] = {}
    failure: Exception | None = None
    try:
        live = LiveWeights(model, source=takers[0]._source, kernels=takers[0]._kernels)
        plans, updates = [taker._plan(live) for taker in takers], live.updates()
        taken = _copied(live, takers, plans, updates)
    except Exception as error:  # noqa: BLE001 - raised on all ranks, when they meet
        failure = error
    waited = (time.perf_counter() - began) / len(orders)
    for order, its_plans, runs in zip(orders, plans, taken, strict=True):
        job = _Job(
            plans=its_plans,
            taken=runs,
            updates=updates,
            failure=failure,
            order=order,
            step=step,
            waited=waited,
        )
        order.snapshotter._submit(job)
    return before


def _copied(
    live: LiveWeights, takers: list[Snapshotter], plans: list[list[TensorPlan]], later: Collection[str]
) -> list[list[Taken]]:
    """The runs of each. What a device holds is gathered there; of the rest, runs of the same place are copied
    one after another, while it is in the processor's cache."""
    everything = [
        (number, work) for number, taker in enumerate(takers) for work in work_of(plans[number], taker._owned)
    ]
    everything.sort(key=lambda item: (item[1][0].name, item[1][1]))
    found = gathered(live, [work for _, work in everything], later)
    rest = [place for place, run in enumerate(found) if run is None]

    def copy(share: list[int]) -> list[tuple[int, Taken]]:
        once = LastRead(live)
        return [
            (place, take_run(once, *everything[place][1], takers[everything[place][0]]._positions, later))
            for place in share
        ]

    for own in ordered_map(copy, in_shares(rest, thread_count(), size=lambda place: everything[place][1][2])):
        for place, copied_run in own:
            found[place] = copied_run
    copied: list[list[Taken]] = [[] for _ in takers]
    for (number, _), run in zip(everything, found, strict=True):
        assert run is not None
        copied[number].append(run)
    return copied


def _tallies_of(staging: Path, rank: int) -> Path:
    return staging / f".tallies-{rank}"


def _forget_old(count: int, folder: Path) -> None:
    packages = step_folders(folder)
    for path in packages[: max(0, len(packages) - count)]:
        shutil.rmtree(path)


def step_folders(folder: Path) -> list[Path]:
    """Packages `step-N` in a folder, by N."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))
