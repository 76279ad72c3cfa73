"""Snapshots: a live model's delta taken in the blink that training waits, encoded and written behind it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..applying.chain import open_chain
from ..applying.resolver import Resolver
from ..config import DareConfig, Source
from ..dtypes import DType, Words
from ..errors import SnapshotError
from ..extracting.assembly import (
    Provenance,
    Work,
    load_tallies,
    save_tallies,
    summed,
    work_of,
    write_manifest,
    write_parts,
)
from ..extracting.device_encoding import on_devices
from ..extracting.encoding import Encoded
from ..extracting.patterns import notes_on_patterns
from ..extracting.plan import TensorPlan, landings, plan_tensors
from ..kernels import cpu
from ..package.companion_files import carry_files
from ..package.magnitudes import Magnitudes
from ..package.manifest import FileRecord
from ..package.reader import DeltaPackage, read_back
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging
from ..weights.live.live import LiveWeights
from ..weights.live.live_lora import Merged
from ..weights.live.named_tensors import Live
from ..weights.lora.adapters_on_files import AdaptersOnFiles
from ..weights.protocol import Chosen, TensorInfo, Weights
from . import grids
from .base_model import Origin, establish, recall
from .capture import Taken, cut_groups, encode_link, encode_taken, largest_of, link_plan, received, take_run
from .comparing import adapted_apart
from .run_folder import RunFolder
from .shared_pass import Job, Order, Snapshot, take_together

logger = logging.getLogger("dare_train")

_QUANTISED = (
    "The adapter was trained on a quantised base; this is its update of the full-precision weights, which it "
    "did not see. Expect a result a little off what training measured."
)
POSITIONS_LIMIT = 128 << 20
"""Bytes that masks worked out ahead may take: four for each kept element."""


class Received(NamedTuple):
    """A run of a tensor as a receiver gets it."""

    name: str
    start: int
    words: Words
    dtype: DType


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
        run: what packages call the training that writes them.
    """

    def __init__(
        self,
        origin: Origin,
        config: DareConfig,
        live: LiveWeights,
        *,
        incremental: bool = False,
        source: Source = "weights",
        run: str = "",
    ) -> None:
        self.run = run
        self.origin = origin
        self.config = config
        self.incremental = incremental
        self.source = grids.reading_of(config, source)
        self.kernels = live.kernels
        self.chain: list[Path] = []
        self.ranks = live.ranks
        self._line = self.ranks.another()
        self._pending: Future[Snapshot] | None = None
        updates = live.updates()
        apart = adapted_apart(live, origin.weights, updates)
        self.live_bases: Mapping[str, TensorInfo] = {name: live.tensors[name] for name in sorted(apart)}
        self._packed = bool(live.packed)
        live = self.seen(live)
        self.positions: dict[tuple[str, int], NDArray[np.int32]] = {}
        self.owned = live.owned
        self._held = live.held
        self._planned_for = live.tensors
        self._merged_names = frozenset(updates)
        self.lands = bool(landings(origin.own, live, config, self._merged_names))
        self.base = origin.own if self.lands else origin.weights
        """Under the run's names, in the dtypes of the packages."""
        self._cast_base = self.base.tensors != origin.own.tensors
        if config.dtype is None and self.ranks.first:
            grids.tell(origin.own, live, self._merged_names, config, lands=self.lands)
        self._plans = self._plan(live)
        absent = self.base.tensors.keys() - live.tensors.keys()
        notes = notes_on_patterns(config, self._plans, absent, label=live.label)
        for note in notes if self.ranks.first else ():
            logger.warning("%s", note)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dare-train-writer")
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
        reading = grids.reading_of(config, source)
        live = LiveWeights(model, source=reading, ranks=Ranks.joined(), kernels=kernels, but_packed=True)
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
        on_host = [plan for plan in self._plans if plan.name not in on_devices]
        for run in work_of(on_host, self.owned):
            if run.is_delta and held < POSITIONS_LIMIT:
                positions = run.plan.positions(run.start, run.length).astype(np.int32)
                self.positions[run.plan.name, run.start] = positions
                # Compiled by now, should this be the first run ever.
                cpu.take(np.empty(0, run.plan.info.dtype.word), positions[:0])
                held += positions.nbytes

    @property
    def reading(self) -> tuple[object, ...]:
        """Equal for those that one pass over the weights can serve."""
        files = self.origin.fingerprint if self._packed else None
        return self.source, self.kernels, self.live_bases, files, self.lands

    def seen(self, live: LiveWeights) -> LiveWeights:
        """The weights as packages are to have them: over the base's files, where the base in memory is
        quantised.
        """
        if not live.packed:
            return live
        return AdaptersOnFiles(live, self.origin.weights, self.origin.fresh & live.tensors.keys())

    def plans_for(self, live: LiveWeights) -> list[TensorPlan]:
        """The plans made at the start, as long as names, dtypes and shapes decide them: whether an integer
        tensor changed does not show there."""
        if live.tensors != self._planned_for or live.held != self._held:
            remedy = "models that change their tensors while they train are not supported"
            raise SnapshotError(
                "model", expected="the tensors that it had when training began", found="others", remedy=remedy
            )
        if all(info.dtype.can_be_delta for info in live.tensors.values()):
            return self._plans
        return self._plan(live)

    def _plan(self, live: LiveWeights) -> list[TensorPlan]:
        return plan_tensors(self.base, live, self.config, fresh=self.origin.fresh, merged=self._merged_names)

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
        published = (
            None
            if keep is None
            else partial(RunFolder(keep[1], self.run).forget_old, keep[0], out, None, step=step)
        )
        order = Order(taker=self, out=out, files=files, published=published)
        return take_together([order], model, step=step)[0]

    def submit(self, job: Job) -> None:
        """Write a package behind training."""
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

    def preview(self, live: LiveWeights) -> Iterator[Received]:
        """The runs of deltas as a receiver gets them, as far as this process holds them. All ranks call it
        together; what comes out of it is each one's own.
        """
        plans = self.ranks.each(lambda: self.plans_for(live))
        weights = self._merged(live)
        groups: dict[int, dict[int, float]] = {}
        if not live.whole:
            every = (take_run(weights, run, {}) for run in work_of(plans, live.held))
            groups = largest_of(self.ranks.together(lambda: cut_groups(self.base, every)))
        return self._previews(weights, work_of([p for p in plans if p.kind != "whole"], live.held), groups)

    def _previews(
        self, weights: Weights, work: Iterable[Work], groups: Mapping[int, Mapping[int, float]]
    ) -> Iterator[Received]:
        for run in work:
            plan = replace(run.plan, cut_groups=groups.get(run.plan.index, {}))
            taken = replace(take_run(weights, run, {}), plan=plan)
            yield Received(plan.name, run.start, received(self.base, taken), plan.info.dtype)

    def _merged(self, live: LiveWeights) -> Weights:
        """The weights with what adapters add, as they are now."""
        updates = live.updates()
        if not updates:
            return live
        under = Chosen(live, dict.fromkeys(updates.keys() - self.live_bases.keys(), self.base))
        at_hand = {plan.name: TensorInfo(plan.at_hand, plan.info.shape) for plan in self._plans}
        return Merged(under, updates, {**live.tensors, **at_hand})

    # On the worker thread.

    def _write(self, job: Job) -> Snapshot:
        line = self._line
        inputs = [self.origin.checkpoint.folder, *self.chain]
        with shared_staging(
            job.order.out, line, inputs=inputs, within=job.order.within, read_back=read_back
        ) as staging:
            groups = largest_of(line.together(lambda: self._cut_groups(job)))
            shares = line.together(lambda: self._write_part(staging, job, groups))
            magnitudes = line.each(lambda: self._complete(staging, job, shares) if line.first else {})
        if self.incremental:
            self.chain.append(job.order.out)
        waited = max(seconds for seconds, _ in shares)
        package = line.each(lambda: DeltaPackage.open(job.order.out))
        published = job.order.published
        line.each(lambda: published() if published is not None and line.first else None)
        return Snapshot(package=package, step=job.step, waited=waited, magnitudes=magnitudes)

    def _cut_groups(self, job: Job) -> list[tuple[int, int, float]]:
        """Scale groups at the borders of what this rank holds; a rank alone has none."""
        if self._line.world == 1:
            return []
        return cut_groups(self.base, job.completed(self.base))

    def _write_part(
        self, staging: Path, job: Job, groups: Mapping[int, Mapping[int, float]]
    ) -> tuple[float, list[dict[str, object]]]:
        """What this rank holds of the package. Returns the seconds it waited and records of the files that it
        wrote.
        """
        base = self.base
        taken = (
            replace(run, plan=replace(run.plan, cut_groups=groups.get(run.plan.index, {})))
            for run in job.completed(base)
        )
        encoded = self._links(taken) if self._continues else (encode_taken(base, run) for run in taken)
        parts, tallies = write_parts(staging, encoded, rank=self._line.rank)
        save_tallies(_tallies_of(staging, self._line.rank), tallies)
        return job.waited, [vars(part) for part in parts]

    def _complete(
        self, staging: Path, job: Job, shares: list[tuple[float, list[dict[str, Any]]]]
    ) -> dict[str, Magnitudes]:
        """Make one package of what the ranks wrote. Returns |δ| by tensor."""
        files = [_tallies_of(staging, rank) for rank in range(self._line.world)]
        tallies = summed(load_tallies(file) for file in files)
        for file in files:
            file.unlink()
        carried = carry_files(self.origin.checkpoint.folder, job.order.files, staging)
        plans = [link_plan(plan) for plan in job.plans] if self._continues else job.plans
        parts = [FileRecord(**record) for _, records in shares for record in records]
        return write_manifest(staging, plans, tallies, parts, self._provenance(job), carried)

    @property
    def _continues(self) -> bool:
        return self.incremental and bool(self.chain)

    def _provenance(self, job: Job) -> Provenance:
        absent = tuple(sorted(self.base.tensors.keys() - {plan.name for plan in job.plans}))
        on_base = Provenance(
            base_model=self.origin.name,
            prefix=self.origin.prefix,
            base_only=absent,
            config=self.config,
            run=self.run,
            landed=any(plan.landing is not None for plan in job.plans),
            cast_base=self._cast_base,
            note=_QUANTISED if self._packed else "",
            measured=job.order.measured,
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
            yield encode_link(link_plan(run.plan), run, before, received(self.base, run))


def _tallies_of(staging: Path, rank: int) -> Path:
    return staging / f".tallies-{rank}"
