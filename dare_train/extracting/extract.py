"""`extract`: base and tuned weights in, a delta package out."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DareConfig, Patterns, Rescale, Values
from ..errors import NonFiniteDelta
from ..kernels import cpu
from ..package.companion_files import carry_files
from ..package.reader import DeltaPackage
from ..package.writer import PackageWriter
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging, storage_errors
from ..parallel.threads import ordered_map, thread_share
from ..weights.alignment import align, cast_to
from ..weights.fingerprint import Fingerprint
from ..weights.lora_checkpoint import AdapterWeights, merge_adapter
from ..weights.opening import WeightsLike, open_weights
from ..weights.protocol import Weights
from .assembly import Provenance, Spool, Tallies, Work, summed, tallied, work_of, write_manifest
from .encoding import Encoded, Packed, encode_delta, encode_kept, encode_packed, encode_whole
from .plan import TensorPlan, plan_tensors

_AT_ONCE = 1 << 26
"""Elements of which a device gathers the kept ones at a time."""

Progress = Callable[[int, int], object]
"""Called with the bytes of the tuned weights that have been read and with all that there are."""


def extract(
    base: WeightsLike,
    tuned: WeightsLike,
    out: str | os.PathLike[str],
    *,
    p: float | Mapping[str, float] = 0.9,
    seed: int = 0,
    rescale: Rescale = "paper",
    values: Values = "auto",
    include: Patterns = ("*",),
    exclude: Patterns = (),
    whole: Patterns = (),
    masks: Mapping[str, Any] | None = None,
    cast_base: bool = False,
    allow_nonfinite: bool = False,
    base_model: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    kernels: str | None = None,
) -> DeltaPackage:
    """Write the delta from `base` to `tuned` as a package at `out` (arXiv 2311.03099, eq. 1-2).

    Args:
        base, tuned: checkpoint folders or Hub ids (streamed, never loaded), modules, state dicts or numpy
            arrays by name. `tuned` may be a PEFT LoRA adapter's: it is merged into the base while it is read,
            in float64, rounded once.
        out: folder to create.
        p, seed, rescale, values, include, exclude, whole, allow_nonfinite: see `DareConfig`.
        masks: hand-made masks, bool arrays shaped as their tensors (True = kept) by tensor name. They are
            stored in the package; `p` and `rescale` do not count for those tensors.
        cast_base: round the base to the tuned weights' dtypes first. The package is then relative to the
            rounded base.
        base_model: what the package calls its base; by default the folder or Hub id given.
        overwrite: replace a folder that is already there.
        progress: called with (bytes read, bytes in all) of the tuned weights as work goes on: of this rank's
            share of them.
        ranks: the processes that share the work, such as `Ranks.joined()`; by default this one alone. All of
            them make the same call, on a file system that they share; the package is the same to the byte.
        kernels: for models in memory: "cpu", "cuda" (Triton, or an error) or "torch"; by default those of
            the devices that both models lie on. The package is the same.

    Raises:
        ConfigError, CheckpointError, TensorMismatch, DtypeMismatch, NonFiniteDelta, OutputExists,
        StorageError; RankError when it happened on another rank. Nothing is left at `out` then.
    """
    config = DareConfig(
        p=p,
        seed=seed,
        rescale=rescale,
        values=values,
        include=include,
        exclude=exclude,
        whole=whole,
        allow_nonfinite=allow_nonfinite,
    )
    ranks = ranks or Ranks()
    task = ranks.each(
        lambda: _task(
            base, tuned, config, masks=masks, cast_base=cast_base, base_model=base_model, kernels=kernels
        )
    )
    with shared_staging(Path(out), ranks, overwrite=overwrite, inputs=task.folders) as staging:
        on_disk, writer = storage_errors(Path(out)), PackageWriter(staging)
        tallies = ranks.each(on_disk(lambda: _write_share(task, staging, writer, ranks, progress)))
        ranks.each(on_disk(lambda: _complete(task, staging, writer, ranks, tallies) if ranks.first else None))
    return ranks.each(lambda: DeltaPackage.open(out))


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Weights under the result's names, and what becomes of each tensor."""

    base: Weights
    tuned: Weights
    plans: list[TensorPlan]
    source: Provenance
    base_folder: Path | None
    tuned_folder: Path | None

    @property
    def folders(self) -> list[Path]:
        return [folder for folder in (self.base_folder, self.tuned_folder) if folder is not None]


def _task(
    base: WeightsLike,
    tuned: WeightsLike,
    config: DareConfig,
    *,
    masks: Mapping[str, Any] | None,
    cast_base: bool,
    base_model: str | None,
    kernels: str | None,
) -> _Task:
    tuned_weights = open_weights(tuned, kernels=kernels)
    plain_base = open_weights(base, kernels=kernels)
    tuned_weights = merge_adapter(tuned_weights, plain_base)
    aligned, prefix = align(plain_base, tuned_weights.tensors.keys(), model=tuned_weights.label)
    if cast_base:
        aligned = cast_to(aligned, tuned_weights.tensors)
    fresh = tuned_weights.whole if isinstance(tuned_weights, AdapterWeights) else ()
    plans = plan_tensors(aligned, tuned_weights, config, fresh=fresh, masks=masks)
    base_only = tuple(sorted(aligned.tensors.keys() - {plan.name for plan in plans}))
    source = Provenance(
        base_model=base_model or plain_base.label, prefix=prefix, base_only=base_only, config=config
    )
    return _Task(
        base=aligned, tuned=tuned_weights, plans=plans, source=source,
        base_folder=_folder_of(plain_base), tuned_folder=_folder_of(tuned_weights),
    )  # fmt: skip


def _folder_of(weights: Weights) -> Path | None:
    return getattr(weights, "folder", None)


def _write_share(
    task: _Task, staging: Path, writer: PackageWriter, ranks: Ranks, progress: Progress | None
) -> Tallies:
    """Encode this rank's share of the runs: the first rank for the package, the others for the first."""
    work = ranks.share(list(work_of(task.plans)), size=itemgetter(2))
    with closing(_encoded(task, work, thread_share(ranks))) as encoded:
        reported = _reported(encoded, work, progress)
        return tallied(reported, writer.add) if ranks.first else Spool(staging, ranks.rank).write(reported)


def _complete(task: _Task, staging: Path, writer: PackageWriter, ranks: Ranks, tallies: Tallies) -> None:
    """Add what the other ranks encoded, in the order in which one process would have, and complete the
    package.
    """
    others = [Spool(staging, rank).move_to(writer) for rank in range(1, ranks.world)]
    files = carry_files(task.base_folder, task.tuned_folder, staging)
    write_manifest(staging, task.plans, summed([tallies, *others]), writer.close(), task.source, files)


def _reported(encoded: Iterable[Encoded], work: list[Work], progress: Progress | None) -> Iterator[Encoded]:
    """The same runs, telling `progress` of them."""
    done, everything = 0, sum(count * plan.info.dtype.itemsize for plan, _, count in work)
    for run, (plan, _, count) in zip(encoded, work, strict=True):
        done += count * plan.info.dtype.itemsize
        if progress is not None:
            progress(done, everything)
        yield run


def _encoded(task: _Task, work: list[Work], threads: int) -> Generator[Encoded, None, None]:
    """The runs in order. Of models on a device kept words are gathered there, some runs ahead of those that
    are encoded.
    """
    on_device = all(hasattr(weights, "lying") for weights in (task.base, task.tuned))
    batches = list(_in_batches(work)) if on_device else [work]
    with closing(_pairs(task, batches) if on_device else _no_pairs(batches)) as gathered:
        for batch, pairs in zip(batches, gathered, strict=True):
            with closing(
                ordered_map(
                    lambda run: _encode_pair(task, *run), zip(batch, pairs, strict=True), threads=threads
                )
            ) as encoded:
                yield from encoded


def _in_batches(work: list[Work]) -> Iterator[list[Work]]:
    batch, elements = list[Work](), 0
    for run in work:
        batch.append(run)
        elements += run[2]
        if elements >= _AT_ONCE:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def _pairs(task: _Task, batches: list[list[Work]]) -> Generator[list[Any], None, None]:
    from .device_encoding import pairs_ahead

    return pairs_ahead(task.base, task.tuned, batches)  # type: ignore[arg-type]


def _no_pairs(batches: list[list[Work]]) -> Generator[list[Any], None, None]:
    yield from ([None] * len(batch) for batch in batches)


def _encode_pair(task: _Task, work: Work, pair: Any) -> Encoded:
    if pair is None:
        return _encode(task.base, task.tuned, *work)
    plan, start, count = work
    if isinstance(pair, Packed):
        return encode_packed(plan, start, count, pair)
    return encode_kept(plan, start, count, plan.positions(start, count), pair.own, pair.tuned, pair.base)


def _encode(base: Weights, tuned: Weights, plan: TensorPlan, start: int, count: int) -> Encoded:
    words = base.read(plan.name, start, count) if plan.in_base and start < plan.base_numel else None
    if plan.kind == "base":
        assert words is not None
        print_ = Fingerprint.of(words, start)
        return Encoded(index=plan.index, base=print_, result=print_)
    new = tuned.read(plan.name, start, count)
    if (
        not plan.allow_nonfinite
        and plan.info.dtype.is_float
        and cpu.has_nonfinite(new, plan.info.dtype.exponent_mask)
    ):
        _refuse_nonfinite(plan, start, new)
    if plan.kind == "delta" and words is not None:
        positions = plan.positions(start, count)
        return encode_delta(plan, start, words, positions, cpu.take(new, positions))
    encoded = encode_whole(plan, start, new)
    return encoded if words is None else _with_base(encoded, Fingerprint.of(words, start))


def _refuse_nonfinite(plan: TensorPlan, start: int, words: np.ndarray) -> None:
    dtype = plan.info.dtype
    if dtype.code == "F8_E4M3":  # its largest exponent holds numbers; only all ones is NaN
        bad = (words & np.uint8(0x7F)) == np.uint8(0x7F)
    else:
        bad = (words & dtype.word.type(dtype.exponent_mask)) == dtype.word.type(dtype.exponent_mask)
    if bad.any():
        first = start + int(np.argmax(bad))
        remedy = "did training diverge? allow_nonfinite=True (--allow-nonfinite) carries them as they are"
        raise NonFiniteDelta(
            plan.name,
            expected="finite weights",
            found=f"NaN or infinity at flat index {first}",
            remedy=remedy,
        )


def _with_base(encoded: Encoded, base: Fingerprint) -> Encoded:
    return Encoded(**{**vars(encoded), "base": base})
