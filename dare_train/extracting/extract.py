"""`extract`: base and tuned weights in, a delta package out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DareConfig, Patterns, Rescale, Rounding, Target, Values
from ..dtypes import Words, to_float
from ..errors import ConfigError, NonFiniteDelta
from ..kernels import cpu
from ..kernels.backends import checked as check_kernels
from ..package.companion_files import carry_files, left_behind
from ..package.manifest import Manifest
from ..package.reader import DeltaPackage, read_back
from ..package.writer import PackageWriter
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging, storage_errors
from ..parallel.threads import ordered_map, thread_share
from ..weights.alignment import align, cast_to
from ..weights.files.config_file import config_beside
from ..weights.files.dequantise import Dequantised
from ..weights.files.module_folders import places_of
from ..weights.lora.lora_checkpoint import AdapterWeights, merge_adapter
from ..weights.lora.opening import WeightsLike, open_weights
from ..weights.lora.other_layouts import in_layout_of
from ..weights.lora.wrapped_files import without_wrapper
from ..weights.meeting import meet, renamed
from ..weights.protocol import InMemory, Weights
from .assembly import Provenance, Spool, Tallies, Work, summed, tallied, work_of, write_manifest
from .completeness import check_complete, notes_on_new_modules
from .encoding import Encoded, KeptWords, PackedRun, encode, encode_gathered
from .patterns import notes_on_patterns, notes_on_renaming
from .plan import TensorPlan, plan_tensors
from .quantised_units import check_one_scheme, parts_of_units

logger = logging.getLogger("dare_train")

_NO_WORDS = np.empty(0, np.uint8)
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
    rename: Mapping[str, str] | None = None,
    cast_base: bool = False,
    dequantize: bool = False,
    allow_nonfinite: bool = False,
    dtype: Target | None = None,
    rounding: Rounding = "stochastic",
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
            in float64, and rounded once: where elements land on the base's grid, after they were rescaled.
        out: folder to create.
        p, seed, rescale, values, include, exclude, whole, allow_nonfinite, dtype, rounding: see `DareConfig`.
        masks: hand-made masks, bool arrays shaped as their tensors (True = kept) by tensor name. They are
            stored in the package; `p` and `rescale` do not count for those tensors.
        rename: parts of tensor names to replace in the tuned model's names.
        cast_base: round the base to the tuned weights' dtypes first. The package is then relative to the
            rounded base.
        dequantize: read quantised checkpoints in full precision, where that is a formula. The package is then
            relative to the base so read, and `apply` needs the same.
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
        dtype=dtype,
        rounding=rounding,
    )
    if cast_base and dtype == "base":
        remedy = "the base is rounded, or the result is"
        raise ConfigError("cast_base", expected='False with dtype="base"', found="True", remedy=remedy)
    if cast_base:
        config = replace(config, dtype=dtype or "trained")
    ranks = ranks or Ranks()
    task = ranks.each(
        lambda: _task(
            base,
            tuned,
            config,
            masks=masks,
            rename=rename,
            cast_base=cast_base,
            dequantize=dequantize,
            base_model=base_model,
            kernels=kernels,
        )
    )
    for note in task.notes if ranks.first else ():
        logger.warning("%s", note)
    package = _written(task, Path(out), ranks, overwrite=overwrite, progress=progress)
    if ranks.first and not any(record.changes for record in package.manifest.tensors):
        covered = "" if all(config.rule(plan.name).covered for plan in task.plans) else "what it covers of "
        told = "%s: it changes nothing: %s%s equals %s"
        logger.warning(told, out, covered, task.tuned.label, task.base.label)
    return package


def extract_merged(
    base: Weights,
    merged: Weights,
    out: Path,
    *,
    allow_nonfinite: bool,
    base_model: str,
    cast_base: bool,
    overwrite: bool,
    progress: Progress | None,
    ranks: Ranks,
    check: Callable[[Manifest], object],
) -> DeltaPackage:
    """The lossless package of weights that are worked out as they are read. `check` may refuse it before it
    appears.

    Raises:
        As `extract`.
    """
    config = DareConfig(p=0.0, values="exact", allow_nonfinite=allow_nonfinite)
    if cast_base:
        config = replace(config, dtype="trained")
    task = ranks.each(
        lambda: _task(base, merged, config, cast_base=cast_base, base_model=base_model, checked=False)
    )
    return _written(task, out, ranks, overwrite=overwrite, progress=progress, check=check)


def _written(
    task: _Task,
    out: Path,
    ranks: Ranks,
    *,
    overwrite: bool,
    progress: Progress | None,
    check: Callable[[Manifest], object] | None = None,
) -> DeltaPackage:
    def complete() -> None:
        _complete(task, staging, writer, ranks, tallies)
        if check is not None:
            check(DeltaPackage.open(staging).manifest)

    with shared_staging(out, ranks, overwrite=overwrite, inputs=task.inputs, read_back=read_back) as staging:
        on_disk, writer = storage_errors(out), PackageWriter(staging)
        tallies = ranks.each(on_disk(lambda: _write_share(task, staging, writer, ranks, progress)))
        ranks.each(on_disk(lambda: complete() if ranks.first else None))
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
    dequantised: bool
    """Whether the tuned weights were quantised, and are read in full precision."""
    notes: Sequence[str] = ()
    """Sentences on what the user should know of them."""

    @property
    def inputs(self) -> list[Path]:
        folders = [folder for folder in (self.base_folder, self.tuned_folder) if folder is not None]
        return [place for folder in folders for place in places_of(folder)]


def _task(
    base: WeightsLike,
    tuned: WeightsLike,
    config: DareConfig,
    *,
    cast_base: bool,
    base_model: str | None,
    masks: Mapping[str, Any] | None = None,
    rename: Mapping[str, str] | None = None,
    dequantize: bool = False,
    kernels: str | None = None,
    checked: bool = True,
) -> _Task:
    """`checked`: look whether names meet; where the tuned weights were made of the base's, they do."""

    def decided(name: str) -> bool:
        return _is_decided(name, config)

    check_kernels(kernels, "kernels")
    tuned_weights = open_weights(tuned, kernels=kernels, dequantize=dequantize)
    plain_base = open_weights(base, kernels=kernels, dequantize=dequantize)
    tuned_folder, plain_tuned = _folder_of(tuned_weights), isinstance(tuned_weights, Dequantised)
    said = _quantisation(plain_base, tuned_weights)
    merged_weights = merge_adapter(tuned_weights, plain_base, unrounded=config.lands)
    tuned_weights = renamed(merged_weights, rename or {})
    check_one_scheme(plain_base, tuned_weights, said)
    notes = notes_on_renaming(rename or {}, merged_weights.tensors)
    if not checked or isinstance(tuned_weights, AdapterWeights):
        aligned, prefix = align(plain_base, tuned_weights.tensors.keys(), model=tuned_weights.label)
    else:
        tuned_weights = in_layout_of(plain_base, without_wrapper(plain_base, tuned_weights))
        aligned, prefix = meet(plain_base, tuned_weights, known=decided)
        notes += check_complete(tuned_folder, plain_base, aligned, tuned_weights, decided=decided)
    if isinstance(tuned_weights, AdapterWeights):
        notes += notes_on_new_modules(
            tuned_folder, aligned.tensors, tuned_weights.tensors, tuned_weights.label
        )
    as_found = aligned.tensors
    if cast_base:
        aligned = cast_to(aligned, tuned_weights.tensors)
    fresh = tuned_weights.whole if isinstance(tuned_weights, AdapterWeights) else ()
    together = parts_of_units(aligned, tuned_weights, config, said=said, masks=masks)
    plans = plan_tensors(aligned, tuned_weights, config, fresh=fresh, masks=masks, together=together)
    notes += left_behind(_folder_of(plain_base), tuned_folder)
    base_only = tuple(sorted(aligned.tensors.keys() - {plan.name for plan in plans}))
    notes += notes_on_patterns(config, plans, base_only, label=tuned_weights.label)
    source = Provenance(
        base_model=base_model or plain_base.label,
        prefix=prefix,
        base_only=base_only,
        config=config,
        landed=any(plan.landing is not None for plan in plans),
        cast_base=aligned.tensors != as_found,
    )
    return _Task(
        base=aligned, tuned=tuned_weights, plans=plans, source=source,
        base_folder=_folder_of(plain_base), tuned_folder=tuned_folder, dequantised=plain_tuned, notes=notes,
    )  # fmt: skip


def _is_decided(name: str, config: DareConfig) -> bool:
    """Whether the user has said that a tensor is new, or is to stay as in the base."""
    rule = config.rule(name)
    return rule.whole or not rule.covered


def _quantisation(*several: Weights) -> Mapping[str, Any]:
    """The first configuration beside weights that says how they are quantised."""
    configs = map(config_beside, several)
    return next((config for config in configs if config.get("quantization_config")), {})


def _folder_of(weights: Weights) -> Path | None:
    return getattr(weights, "folder", None)


def _write_share(
    task: _Task, staging: Path, writer: PackageWriter, ranks: Ranks, progress: Progress | None
) -> Tallies:
    """Encode this rank's share of the runs: the first rank for the package, the others for the first."""
    work = ranks.share(list(work_of(task.plans)), size=attrgetter("length"))
    with closing(_encoded(task, work, thread_share(ranks))) as encoded:
        reported = _reported(encoded, work, progress)
        return tallied(reported, writer.add) if ranks.first else Spool(staging, ranks.rank).write(reported)


def _complete(task: _Task, staging: Path, writer: PackageWriter, ranks: Ranks, tallies: Tallies) -> None:
    """Add what the other ranks encoded, in the order in which one process would have, and complete the
    package.
    """
    others = [Spool(staging, rank).move_to(writer) for rank in range(1, ranks.world)]
    files = carry_files(task.base_folder, task.tuned_folder, staging, dequantised=task.dequantised)
    write_manifest(staging, task.plans, summed([tallies, *others]), writer.close(), task.source, files)


def _reported(encoded: Iterable[Encoded], work: list[Work], progress: Progress | None) -> Iterator[Encoded]:
    """The same runs, telling `progress` of them."""
    everything = sum(run.nbytes for run in work)
    done = 0
    for encoded_run, run in zip(encoded, work, strict=True):
        done += run.nbytes
        if progress is not None:
            progress(done, everything)
        yield encoded_run


def _encoded(task: _Task, work: list[Work], threads: int) -> Generator[Encoded, None, None]:
    """The runs in order."""
    if isinstance(task.base, InMemory) and isinstance(task.tuned, InMemory):
        return _encoded_in_memory(task, task.base, task.tuned, work, threads)
    return ordered_map(lambda run: _encode(task, run), work, threads=threads)


def _encoded_in_memory(
    task: _Task, base: InMemory, tuned: InMemory, work: list[Work], threads: int
) -> Generator[Encoded, None, None]:
    """The same of models in memory: on a device kept words are gathered there, some runs ahead of those that
    are encoded.
    """
    from .device_encoding import gathered_ahead

    def encoded(item: tuple[Work, KeptWords | PackedRun | None]) -> Encoded:
        run, gathered = item
        return _encode(task, run) if gathered is None else encode_gathered(*run, gathered)

    batches = list(_in_batches(work))
    with closing(gathered_ahead(base, tuned, batches)) as ahead:
        for batch, gathered in zip(batches, ahead, strict=True):
            with closing(ordered_map(encoded, zip(batch, gathered, strict=True), threads=threads)) as done:
                yield from done


def _in_batches(work: list[Work]) -> Iterator[list[Work]]:
    batch: list[Work] = []
    elements = 0
    for run in work:
        batch.append(run)
        elements += run.length
        if elements >= _AT_ONCE:
            yield batch
            batch = []
            elements = 0
    if batch:
        yield batch


def _encode(task: _Task, run: Work) -> Encoded:
    plan, start, count = run
    base_words = plan.base_words(task.base, start, count)
    if plan.kind == "base":
        return encode(plan, start, base_words, _NO_WORDS)
    words = task.tuned.read(plan.name, start, count)
    dtype = plan.at_hand
    if not plan.allow_nonfinite and dtype.is_float and cpu.has_nonfinite(words, dtype.exponent_mask):
        _refuse_nonfinite(plan, start, words, base_words)
    if not run.is_delta:
        return encode(plan, start, base_words, words)
    positions = plan.positions(start, count)
    return encode(plan, start, base_words, cpu.take(words, positions), positions)


def _refuse_nonfinite(plan: TensorPlan, start: int, words: np.ndarray, base_words: Words | None) -> None:
    """But for infinities that the base has at the same places: bounds that bind nothing, masks."""
    dtype = plan.at_hand
    if dtype.code == "F8_E4M3":  # its largest exponent holds numbers; only all ones is NaN
        bad = (words & np.uint8(0x7F)) == np.uint8(0x7F)
    else:
        bad = (words & dtype.word.type(dtype.exponent_mask)) == dtype.word.type(dtype.exponent_mask)
    if base_words is not None and bad.any():
        bad &= to_float(words, dtype) != to_float(base_words, plan.info.dtype)
    if bad.any():
        first = start + int(np.argmax(bad))
        remedy = "did training diverge? allow_nonfinite=True (--allow-nonfinite) carries them as they are"
        raise NonFiniteDelta(
            plan.name,
            expected="finite weights",
            found=f"NaN or infinity at flat index {first}",
            remedy=remedy,
        )
