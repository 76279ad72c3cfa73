"""Snapshots: a live model's delta taken in the blink that training waits, encoded and written behind it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .codec import SEGMENT
from .config import DareConfig
from .dtypes import Words
from .errors import SnapshotError
from .extract import Provenance, carry_files, regions, write_package
from .fingerprint import Fingerprint
from .kernels import cpu
from .masks import Mask
from .origin import Origin
from .package import DeltaPackage
from .parallel import ordered_map, thread_count
from .plan import plan_tensors
from .publish import staged_folder
from .resolve import Resolver, open_chain
from .segments import Encoded, TensorPlan, encode_delta, encode_whole, receiver_words
from .shards import Live, LiveWeights
from .stats import Magnitudes
from .weights import TensorInfo, Weights, runs

POSITIONS_LIMIT = 128 << 20
"""Bytes that masks worked out ahead may take: four for each kept element."""

_Work = tuple[TensorPlan, int, int]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A package that was written during training, and what it cost."""

    package: DeltaPackage
    step: int
    waited: float
    """Seconds for which training stood still."""
    magnitudes: dict[str, Magnitudes]
    """|δ| by tensor."""


@dataclass(frozen=True)
class _Taken:
    """Kept words of one run, copied out of the live model."""

    plan: TensorPlan
    start: int
    length: int
    words: Words


class Snapshotter:
    """Takes snapshots of one model relative to one origin. At most one is being written at a time.

    Args:
        origin: what deltas are relative to.
        config: how they become packages.
        incremental: each package continues the one before: a chain whose every result has the bits that a package on
            the base would have given.
    """

    def __init__(self, origin: Origin, config: DareConfig, *, incremental: bool = False) -> None:
        self.origin, self.config, self.incremental = origin, config, incremental
        self.chain: list[Path] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="dare-train-writer")
        self._pending: Future[Snapshot] | None = None
        self._positions: dict[tuple[str, int], NDArray[np.int32]] = {}
        self._prepared: Future[None] | None = None
        self._plans: list[TensorPlan] = []
        self._planned_for: Mapping[str, TensorInfo] = {}

    def prepare(self, live: LiveWeights) -> None:
        """Work out masks ahead of the first snapshot, behind training, as far as `POSITIONS_LIMIT` allows."""
        self._prepared = self._writer.submit(self._prepare, self._plan(live))

    def _plan(self, live: LiveWeights) -> list[TensorPlan]:
        """The plans of the last snapshot, as long as names, dtypes and shapes decide them: whether an integer tensor
        changed does not show there."""
        settled = all(info.dtype.can_be_delta for info in live.tensors.values())
        if not settled or self._planned_for != live.tensors:
            self._plans = plan_tensors(self.origin.weights, live, self.config, fresh=self.origin.fresh)
            self._planned_for = live.tensors
        return self._plans

    def _prepare(self, plans: list[TensorPlan]) -> None:
        held = 0
        for plan, start, count in _work(plans):
            if plan.kind == "delta" and start < plan.base_numel and held < POSITIONS_LIMIT:
                self._positions[plan.name, start] = positions = plan.positions(start, count).astype(np.int32)
                cpu.take(np.empty(0, plan.info.dtype.word), positions[:0])  # compiled by now, should this be the first run ever
                held += positions.nbytes

    def take(
        self, model: Live, out: Path, *, step: int, files: Path | None = None, keep: tuple[int, Path] | None = None
    ) -> Snapshot | None:
        """Copy what the package needs and let a worker thread write it to `out`.

        Args:
            model: the module or state dict as it is now.
            out: folder to create; replaced if it is there.
            step: recorded in the `Snapshot`.
            files: folder with the model's configuration and tokenizer; those that the base lacks go along.
            keep: (count, folder): afterwards only that many `step-*` packages stay in the folder.

        Returns:
            The snapshot before this one, if it had not been collected: it is waited for first, and that counts as waiting.

        Raises:
            SnapshotError: the snapshot before this one failed.
        """
        began = time.perf_counter()
        before = self.wait()
        live = LiveWeights(model)
        plans = self._plan(live)
        batches = _batches(list(_work(plans)), thread_count())
        taken = [
            run for batch in ordered_map(lambda batch: [_take(live, *work, self._positions) for work in batch], batches) for run in batch
        ]
        waited = time.perf_counter() - began
        self._pending = self._writer.submit(self._write, plans, taken, out, step, waited, files, keep)
        return before

    def finished(self) -> Snapshot | None:
        """The snapshot that was completed since the last call, if any.

        Raises:
            SnapshotError: it failed.
        """
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Snapshot | None:
        """Like `finished`, but waits for a snapshot that is being written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            return pending.result()
        except Exception as error:
            raise SnapshotError(f"snapshot: {error}", remedy="packages and checkpoints written before it are intact") from error

    def close(self) -> None:
        """Wait for whatever is still being done; its failure surfaces here at the latest."""
        self._writer.shutdown(wait=True)
        self.wait()
        if self._prepared is not None:
            self._prepared.result()

    def _write(
        self,
        plans: list[TensorPlan],
        taken: list[_Taken],
        out: Path,
        step: int,
        waited: float,
        files: Path | None,
        keep: tuple[int, Path] | None,
    ) -> Snapshot:
        continues = self.incremental and bool(self.chain)
        with staged_folder(out, overwrite=True) as staging:
            carried = carry_files(self.origin.checkpoint.folder, files, staging)
            encoded = self._links(plans, taken) if continues else (_encode(self.origin.weights, run) for run in taken)
            source = self._provenance(plans, continues)
            written = [_link_plan(plan) for plan in plans] if continues else plans
            magnitudes = write_package(staging, written, encoded, source, carried)
        if self.incremental:
            self.chain.append(out)
        if keep is not None:
            _forget_old(*keep)
        return Snapshot(package=DeltaPackage.open(out), step=step, waited=waited, magnitudes=magnitudes)

    def _provenance(self, plans: list[TensorPlan], continues: bool) -> Provenance:
        absent = tuple(sorted(self.origin.weights.tensors.keys() - {plan.name for plan in plans}))
        common = dict(base_model=self.origin.name, prefix=self.origin.prefix, config=self.config)
        if continues:
            return Provenance(**{**common, "prefix": ""}, base_only=(), continues="package", rescale="carried")  # type: ignore[arg-type]
        return Provenance(**common, base_only=absent)  # type: ignore[arg-type]

    def _links(self, plans: list[TensorPlan], taken: list[_Taken]) -> Iterator[Encoded]:
        """Runs of a package that leads from the chain's last result to the one a package on the base would give."""
        resolver = Resolver(self.origin.checkpoint, open_chain(self.chain, None), cast_base=True)
        for run in taken:
            before = resolver.resolve(run.plan.name, run.start, run.length)
            yield _encode_link(_link_plan(run.plan), run, before, _received(self.origin.weights, run))


def _work(plans: list[TensorPlan]) -> Iterator[_Work]:
    for plan in plans:
        for start, stop in regions(plan):
            yield from ((plan, start + offset, count) for offset, count in runs(stop - start, SEGMENT))


def _batches(work: list[_Work], count: int) -> list[list[_Work]]:
    """The same work in `count` lists of about as many elements."""
    batches: list[list[_Work]] = [[] for _ in range(count)]
    total, filled = sum(size for _, _, size in work), 0
    for item in work:
        batches[min(filled * count // max(total, 1), count - 1)].append(item)
        filled += item[2]
    return batches


def _take(live: Weights, plan: TensorPlan, start: int, count: int, known: Mapping[tuple[str, int], NDArray[np.int32]]) -> _Taken:
    if plan.kind == "base":
        return _Taken(plan, start, count, np.empty(0, plan.info.dtype.word))
    words = live.read(plan.name, start, count)
    if plan.kind != "delta" or start >= plan.base_numel:
        return _Taken(plan, start, count, words.copy())
    positions = known.get((plan.name, start))
    return _Taken(plan, start, count, cpu.take(words, plan.positions(start, count) if positions is None else positions))


def _encode(base: Weights, run: _Taken) -> Encoded:
    plan, start = run.plan, run.start
    words = base.read(plan.name, start, run.length) if plan.in_base and start < plan.base_numel else None
    if words is not None and plan.kind == "delta":
        return encode_delta(plan, start, words, plan.positions(start, run.length), run.words)
    print_ = Fingerprint.of(words, start) if words is not None else Fingerprint()
    if plan.kind == "base":
        return Encoded(index=plan.index, base=print_, result=print_)
    return replace(encode_whole(plan, start, run.words), base=print_)


def _received(base: Weights, run: _Taken) -> Words:
    """All words of a run as a package on the base would give them."""
    plan, start = run.plan, run.start
    if plan.kind == "whole" or start >= plan.base_numel:
        return run.words
    words = np.array(base.read(plan.name, start, run.length))
    if plan.kind == "delta":
        positions = plan.positions(start, run.length)
        words[positions] = receiver_words(plan, start, words.size, positions, words[positions], run.words)
    return words


def _link_plan(plan: TensorPlan) -> TensorPlan:
    """The plan of the same tensor in a package that continues another: values are exact and rescaled already."""
    if plan.base_rows is not None:  # rows that are dropped and rows that are not: leave it to the bitmap of changes
        return replace(plan, base_rows=None, mask=Mask(kind="all", key=plan.mask.key), p=0.0, values="exact", factor=1.0)
    return replace(plan, in_base=True, values="exact", factor=1.0)


def _encode_link(plan: TensorPlan, run: _Taken, before: Words, after: Words) -> Encoded:
    if plan.kind == "delta":
        positions = plan.positions(run.start, run.length)
        return encode_delta(plan, run.start, before, positions, after[positions])
    print_ = Fingerprint.of(before, run.start)
    if plan.kind == "base":
        return Encoded(index=plan.index, base=print_, result=print_)
    return replace(encode_whole(plan, run.start, after), base=print_)


def _forget_old(count: int, folder: Path) -> None:
    packages = step_folders(folder)
    for path in packages[: max(0, len(packages) - count)]:
        shutil.rmtree(path)


def step_folders(folder: Path) -> list[Path]:
    """Packages `step-N` in a folder, by N."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def preview(live: LiveWeights, origin: Origin, config: DareConfig) -> Iterator[tuple[str, Words]]:
    """(name, words) of each tensor that a receiver would get otherwise than it is in the live model now."""
    for plan in plan_tensors(origin.weights, live, config, fresh=origin.fresh):
        runs_of = [_received(origin.weights, _take(live, plan, start, count, {})) for plan, start, count in _work([plan])]
        if runs_of and plan.kind != "whole":
            yield plan.name, np.concatenate(runs_of)
