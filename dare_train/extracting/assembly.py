"""From encoded runs to a package on disk: parts, what their tensors add up to, and last of all the
manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save

from .._version import __version__
from ..config import DareConfig
from ..errors import StorageError
from ..package import manifest as manifests
from ..package import model_card as card
from ..package.magnitudes import Magnitudes, merged
from ..package.manifest import FileRecord, Manifest, TensorRecord
from ..package.segments import Segment
from ..package.writer import PackageWriter, number_parts
from ..weights.fingerprint import Fingerprint
from ..weights.protocol import SEGMENT, runs
from .encoding import Encoded
from .plan import TensorPlan


class Work(NamedTuple):
    """A run to encode: `length` elements of a tensor, from flat index `start` on."""

    plan: TensorPlan
    start: int
    length: int

    @property
    def nbytes(self) -> int:
        return self.length * self.plan.info.dtype.itemsize

    @property
    def is_delta(self) -> bool:
        """Whether it is a run of a delta, of which only kept words are needed."""
        return self.plan.kind == "delta" and self.start < self.plan.base_numel


def work_of(
    plans: Iterable[TensorPlan], owned: Mapping[str, tuple[tuple[int, int], ...]] | None = None
) -> Iterator[Work]:
    """The runs of all plans, or of what is `owned` of them, cut where those of one process would be cut."""
    for plan in plans:
        spans = ((0, plan.info.numel),) if owned is None else owned[plan.name]
        for begin, end in regions(plan):
            for offset, count in runs(end - begin, SEGMENT):
                for first, last in spans:
                    start, stop = max(begin + offset, first), min(begin + offset + count, last)
                    if start < stop:
                        yield Work(plan, start, stop - start)


def regions(plan: TensorPlan) -> list[tuple[int, int]]:
    """[start, stop) of what the base has and of what it has not, so that no segment lies across."""
    split = plan.base_numel if plan.base_rows is not None else plan.info.numel
    return [(start, stop) for start, stop in ((0, split), (split, plan.info.numel)) if start < stop]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a manifest says beside its tensors."""

    base_model: str
    prefix: str
    base_only: tuple[str, ...]
    config: DareConfig
    continues: Literal["base", "package"] = "base"
    rescale: Literal["paper", "none", "carried"] | None = None
    landed: bool = False
    """Whether elements landed on the base's grid, rescaled already."""
    run: str = ""
    cast_base: bool = False
    """Whether the base was rounded to other dtypes first."""
    note: str = ""
    """For the model card."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """For the model card: what an evaluation said of the weights."""


@dataclass
class Tally:
    """What the runs of one tensor add up to."""

    base: Fingerprint = field(default_factory=Fingerprint)
    result: Fingerprint = field(default_factory=Fingerprint)
    kept: int = 0
    changed: int = 0
    magnitudes: Magnitudes = field(default_factory=Magnitudes)

    def add(self, other: Encoded | Tally) -> None:
        self.base = self.base.plus(other.base)
        self.result = self.result.plus(other.result)
        self.kept += other.kept
        self.changed += other.changed
        self.magnitudes = self.magnitudes.plus(other.magnitudes)


Tallies = dict[int, Tally]
"""By index of the plan."""


def write_parts(
    staging: Path, encoded: Iterable[Encoded], *, rank: int = 0
) -> tuple[list[FileRecord], Tallies]:
    """Write what one process has encoded. Its parts have provisional names."""
    writer = PackageWriter(staging, stem=f"rank-{rank}", at_least_one=rank == 0)
    tallies = tallied(encoded, writer.add)
    return writer.close(), tallies


def tallied(encoded: Iterable[Encoded], add: Callable[[Segment, bytes], object]) -> Tallies:
    """Hand every segment and its frame to `add`. Returns what the runs add up to."""
    tallies: Tallies = {}
    for run in encoded:
        tallies.setdefault(run.index, Tally()).add(run)
        if run.segment is not None:
            add(run.segment, run.frame)
    return tallies


def write_manifest(
    staging: Path,
    plans: list[TensorPlan],
    tallies: Tallies,
    parts: list[FileRecord],
    source: Provenance,
    files: tuple[FileRecord, ...],
) -> dict[str, Magnitudes]:
    """Number the parts, and write the card and the manifest that complete a package. Returns |δ| by
    tensor.
    """
    complete = {plan.index: tallies.get(plan.index) or Tally() for plan in plans}
    magnitudes = {plan.name: complete[plan.index].magnitudes for plan in plans if plan.kind == "delta"}
    everything = merged(magnitudes.values())
    manifest = Manifest(
        base_model=source.base_model,
        continues=source.continues,
        prefix=source.prefix,
        base_only=source.base_only,
        seed=source.config.seed,
        rescale=source.rescale or ("carried" if source.landed else source.config.rescale),
        landed=(source.config.rounding, source.config.rescale) if source.landed else None,
        tensors=tuple(_record(plan, complete[plan.index]) for plan in plans),
        delta={
            name: float(f"{everything.percentile(q):.4g}")
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        },
        parts=number_parts(staging, parts),
        files=files,
        written_by=f"dare_train {__version__}",
        run=source.run,
    )
    (staging / "README.md").write_text(_card(manifest, source))
    (staging / manifests.MANIFEST).write_bytes(manifests.dump(manifest))
    return magnitudes


def _card(manifest: Manifest, source: Provenance) -> str:
    return card.text(manifest, source.note, measured=source.measured, cast_base=source.cast_base)


def _record(plan: TensorPlan, tally: Tally) -> TensorRecord:
    unchanged = not tally.changed and plan.base_rows is None and plan.mask.kind == "all"
    plain = TensorRecord(
        name=plan.name,
        info=plan.info,
        kind="base" if plan.kind == "delta" and unchanged else plan.kind,
        base=tally.base if plan.in_base else None,
        result=tally.result,
    )
    if plain.kind != "delta":
        return plain
    return replace(
        plain,
        base_rows=plan.base_rows,
        mask=plan.mask.kind,
        p=plan.p,
        threshold=plan.mask.threshold,
        values=plan.values,
        kept=tally.kept,
        changed=tally.changed,
        delta=tally.magnitudes.summary(),
    )


def save_tallies(path: Path, tallies: Tallies) -> None:
    """Keep one process's tallies in a file, for the one that writes the manifest."""
    rows = [
        (index, *tally.base, *tally.result, tally.kept, tally.changed) for index, tally in tallies.items()
    ]
    bins = [
        (row, place, int(tally.magnitudes.counts[place]))
        for row, tally in enumerate(tallies.values())
        for place in np.flatnonzero(tally.magnitudes.counts).tolist()
    ]
    largest = [tally.magnitudes.largest for tally in tallies.values()]
    arrays = {
        "rows": np.array(rows, np.uint64).reshape(-1, 7),
        "bins": np.array(bins, np.int64).reshape(-1, 3),
    }
    path.write_bytes(save({**arrays, "largest": np.array(largest, np.float64)}))


def load_tallies(path: Path) -> Tallies:
    """What `save_tallies` kept."""
    arrays = load_file(path)
    tallies: Tallies = {}
    for (index, *numbers), largest in zip(arrays["rows"].tolist(), arrays["largest"].tolist(), strict=True):
        base, result, (kept, changed) = Fingerprint(*numbers[:2]), Fingerprint(*numbers[2:4]), numbers[4:]
        tallies[index] = Tally(base, result, kept, changed, Magnitudes(largest=largest))
    ordered = list(tallies.values())
    for row, place, count in arrays["bins"].tolist():
        ordered[row].magnitudes.counts[place] = count
    return tallies


def summed(several: Iterable[Tallies]) -> Tallies:
    """The tallies of several processes together."""
    result: Tallies = {}
    for tallies in several:
        for index, tally in tallies.items():
            result.setdefault(index, Tally()).add(tally)
    return result


class Spool:
    """What one rank has encoded, kept in the folder that all of them see for the rank that writes the
    package.
    """

    def __init__(self, staging: Path, rank: int) -> None:
        self._frames, self._segments, self._tallies = (
            staging / f".{what}-{rank}" for what in ("frames", "segments", "tallies")
        )

    def write(self, encoded: Iterable[Encoded]) -> Tallies:
        """Keep frames in the order they come, without holding them in memory."""
        rows: list[tuple[int, ...]] = []
        with self._frames.open("wb") as file:

            def add(segment: Segment, frame: bytes) -> None:
                rows.append(segment.row)
                file.write(frame)

            tallies = tallied(encoded, add)
        self._segments.write_bytes(np.array(rows, np.int64).tobytes())
        save_tallies(self._tallies, tallies)
        return tallies

    def move_to(self, writer: PackageWriter) -> Tallies:
        """Hand the frames on, in the same order, and leave nothing behind.

        Raises:
            StorageError: a part of them is not there.
        """
        rows = np.frombuffer(self._segments.read_bytes(), np.int64).reshape(
            -1, len(Segment.__dataclass_fields__)
        )
        with self._frames.open("rb") as file:
            for segment in map(Segment.of, rows.tolist()):
                frame = file.read(segment.size)
                if len(frame) != segment.size:
                    remedy = "does the file system show all machines the same content?"
                    raise StorageError(
                        str(self._frames),
                        expected=f"{segment.size} bytes more",
                        found=str(len(frame)),
                        remedy=remedy,
                    )
                writer.add(segment, frame)
        tallies = load_tallies(self._tallies)
        for path in (self._frames, self._segments, self._tallies):
            path.unlink()
        return tallies
