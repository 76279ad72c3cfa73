"""`merge`: a base and models in, one model or one package out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from .._version import __version__
from ..config import Patterns, Rounding
from ..package.manifest import Manifest
from ..parallel.inputs_of import check_apart
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging, storage_errors
from ..parallel.threads import ordered_map, thread_share
from ..weights.alignment import without_prefix
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.checkpoint_writer import CheckpointWriter, layout_like
from ..weights.files.module_folders import module_folders
from ..weights.fingerprint import Fingerprint, model_fingerprint, total
from ..weights.lora.opening import WeightsLike
from . import output_files
from .checked_runs import Allowed, check_changed, check_finite, check_something_merged, differs
from .config.task import MergeTask, rounding_of, task_of
from .merge_notes import notes_of
from .merge_report import MergeReport
from .merged_weights import Merged
from .methods.matrices import one_thread
from .models.naming import ModelLike
from .prepared_merge import DeviceLike, PreparedMerge, check_for_package, prepared
from .recorded_bases import check_base, check_bases, recorded_bases
from .resuming import Journal, resumable

logger = logging.getLogger("dare_train")

Progress = Callable[[int, int], object]
"""Called with the bytes of the result that are done and of all that there are."""


def merge(
    base: WeightsLike,
    models: Sequence[ModelLike],
    out: str | os.PathLike[str],
    *,
    method: str = "task_arithmetic",
    weights: Sequence[float] | None = None,
    p: float | Sequence[float] | None = None,
    seed: int = 0,
    rescale: str = "paper",
    out_dtype: str | None = None,
    dtype: Literal["base"] | None = None,
    rounding: Rounding | None = None,
    tokenizer: str | None = None,
    exclude: Patterns = (),
    take: Mapping[str, int | str] | None = None,
    rename: Mapping[str, str] | None = None,
    fisher: Sequence[str | os.PathLike[str]] | None = None,
    gram: Sequence[str | os.PathLike[str]] | None = None,
    package: bool = False,
    cast_base: bool = False,
    dequantize: bool = False,
    allow_nonfinite: bool = False,
    allow_unchanged: bool = False,
    overwrite: bool = False,
    device: DeviceLike | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    **parameters: Any,
) -> MergeReport:
    """Merge packages and fine-tuned models of one base, streaming, into a checkpoint or a package
    (docs/merging.md).

    Deltas are worked out and combined in float32 (float64 for float64 tensors) and rounded once. The result
    is the same to the byte for any number of threads or ranks.

    Args:
        base: folder, file or Hub id of the base model; a module, a state dict, or arrays by name.
        models: packages on that base, and fine-tuned models as `base`; also PEFT adapters' folders.
        out: folder to create. After a kill, the same call goes on where the last one was.
        method: a name in `MERGE_METHODS`, built in or registered.
        weights: w of each model, by default 1.
        p: drop rate, one or one for each model: DARE before the method, on every delta of which nothing was
            dropped yet.
        seed: selects the masks: model i has those of a package made with seed + i.
        rescale: what multiplies the elements that random dropping leaves. `paper`: 1/(1 - p) (for MAGPRUNE
            1/(1 - pᵢ), element by element). `norm`: what keeps the L1 norm, as mergekit does, for every rule
            of dropping. `q`: DAREx-q, from each layer's Gram matrix, or 1/q for a given parameter `q`.
            `none`: 1. Packages keep the rescale that they were made with.
        out_dtype: such as "BF16"; by default each tensor keeps the base's, on whose grid what is merged of
            finer models and of adapters lands.
        dtype: "base": the same as no `out_dtype`, with `stochastic` rounding.
        rounding: to the `nearest` number of the result's dtype (default); or `stochastic`, to either of two
            neighbours, so that small deltas are right on average instead of vanishing (docs/format.md §5.7).
        tokenizer: whose tokens the result has: "base", "union", or a model's, by which rows are told; None
            for a union if that is safe.
        exclude: name patterns of tensors that stay as in the base.
        take: by name pattern, the model (its number or label) from which tensors are taken as they are.
        rename: parts of tensor names to replace in the models' names.
        fisher, gram: statistics files of the models, in order; by default those beside each
            (`statistics_file.beside`).
        package: write a delta package on the base instead of a checkpoint. One that was killed begins anew.
        cast_base: round the base to the models' dtypes first.
        dequantize: read quantised checkpoints in full precision, where that is a formula; else they are
            refused.
        allow_nonfinite: write NaN and infinity, which models have or sums become, instead of refusing them.
        allow_unchanged: write a result of which nothing, or nearly nothing, was merged.
        overwrite: replace a folder that is already there.
        device: where to work it out, such as "cuda" or "cpu", as far as the method can (docs/gpu.md); by
            default where the base's tensors lie, of files on the CPU. The result is the same.
        progress: called with (bytes done, bytes in all) of this rank's share.
        ranks: the processes that share the work, such as `Ranks.joined()`. They make the same call, on one
            file system.
        parameters: of the method, such as `density=0.2` or `t=0.3`; a list gives each model its own, where
            the parameter is of each model. `lambda_` stands for lambda.

    Raises:
        ConfigError, CheckpointError, PackageError, ChainError, TensorMismatch, DtypeMismatch, BaseMismatch,
        NonFiniteDelta, OutputExists, StorageError, DeviceMemoryError; RankError when it happened on another
        rank.
    """
    rounding = rounding_of(dtype, out_dtype, rounding)
    task = task_of(
        base, models, method=method, weights=weights, p=p, seed=seed, rescale=rescale, out_dtype=out_dtype,
        rounding=rounding,
        tokenizer=tokenizer,
        exclude=exclude, take=take, rename=rename, fisher=fisher, gram=gram, cast_base=cast_base,
        dequantize=dequantize,
        **parameters,
    )  # fmt: skip
    return run(
        task, out, package=package, allow_nonfinite=allow_nonfinite, allow_unchanged=allow_unchanged,
        overwrite=overwrite, device=device, progress=progress, ranks=ranks,
    )  # fmt: skip


def run(
    task: MergeTask,
    out: str | os.PathLike[str],
    *,
    notes: Sequence[str] = (),
    package: bool = False,
    allow_nonfinite: bool = False,
    allow_unchanged: bool = False,
    overwrite: bool = False,
    device: DeviceLike | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> MergeReport:
    """Carry out a merge; see `merge`. `notes` go into the report."""
    ranks = ranks or Ranks()
    out = Path(out)
    ready = ranks.each(lambda: prepared(task, ranks, device))
    for note in ready.notes if ranks.first else ():
        logger.warning("%s", note)
    if package:
        check_for_package(task, ready)
    allow_unchanged |= ready.numbers is not None  # layers in other places are a change
    if not allow_unchanged:
        ranks.each(lambda: check_something_merged(ready.merged))
    allowed = Allowed(nonfinite=allow_nonfinite, unchanged=allow_unchanged)
    write = _write_package if package else _write_checkpoint
    by_matrices = ready.merged.method.reach == "matrix" or task.recipe.rescale == "q"
    with one_thread() if by_matrices else nullcontext():
        return write(ready, task, out, tuple(notes), allowed, overwrite, progress, ranks)


def merged_weights(task: MergeTask) -> Merged:
    """The result of a merge as weights that are worked out when they are read, with nothing written.

    Raises:
        As `merge`.
    """
    return prepared(task, Ranks(), None).merged


# Into a checkpoint


def _write_checkpoint(
    ready: PreparedMerge,
    task: MergeTask,
    out: Path,
    notes: tuple[str, ...],
    allowed: Allowed,
    overwrite: bool,
    progress: Progress | None,
    ranks: Ranks,
) -> MergeReport:
    merged = ready.merged
    identity = _identity(task, ready)
    layout = layout_like(
        ready.base if isinstance(ready.base, Checkpoint) and ready.numbers is None else None,
        merged.tensors,
        lambda name: without_prefix(name, ready.prefix),
        output_files.modules_of(merged, ready.base_folder, prefixed=bool(ready.prefix)),
    )
    # What lies in memory may change.
    on_disk_only = all(isinstance(given, (str, os.PathLike)) for given in (task.base, *task.models))
    going_on = partial(resumable, identity=identity) if on_disk_only else None
    with shared_staging(
        out, ranks, overwrite=overwrite, inputs=ready.inputs, resume=going_on, read_back=layout.read_back
    ) as staging:
        on_disk = storage_errors(out)
        journal = Journal(staging, identity, ranks.rank)
        before = ranks.each(
            lambda: journal.finished_before(merged.tensors) if going_on and journal.begun() else {}
        )
        first_writer = ranks.each(
            on_disk(lambda: CheckpointWriter(staging, layout, join=journal.begun()) if ranks.first else None)
        )
        if ranks.first:
            journal.begin()

        def write() -> _Share:
            with first_writer or CheckpointWriter(staging, layout, join=True) as writer:
                return _write_share(merged, writer, journal, before, allowed, progress, ranks)

        shares = ranks.together(on_disk(write))
        prints = before | {
            name: Fingerprint(*lanes) for share in shares for name, (lanes, _) in share.items()
        }
        changed = {name for share in shares for name, (_, moved) in share.items() if moved}
        changed |= {name for name in before if merged.fates[name].how != "copied"}
        if not allowed.unchanged:
            ranks.each(lambda: check_changed(merged, changed))
        report = replace(_report(ready, out, notes, prints), changed=frozenset(changed))
        return ranks.each(
            on_disk(lambda: _finish(ready, report, journal, staging) if ranks.first else report)
        )


def _identity(task: MergeTask, ready: PreparedMerge) -> str:
    """What must be the same for a merge to go on with what another process began."""
    merged = ready.merged
    inside = {
        path
        for folder in ready.folders
        for place in (folder, *(folder / name for name in module_folders(folder)))
        for path in (place.iterdir() if place.is_dir() else [place])
        if path.is_file()
    }
    files = sorted(inside.union(statistics.file.path for statistics in (*merged.fisher, *merged.gram)))
    seen = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([task.recipe.digest(), __version__, seen]).encode()).hexdigest()


_Share = dict[str, tuple[list[int], bool]]
"""By tensor, its fingerprint, and whether it differs from the base's."""


def _write_share(
    merged: Merged,
    writer: CheckpointWriter,
    journal: Journal,
    before: Mapping[str, Fingerprint],
    allowed: Allowed,
    progress: Progress | None,
    ranks: Ranks,
) -> _Share:
    """Work out and write this rank's tensors, except those that were finished before."""
    mine = ranks.share(
        [name for name in merged.tensors if name not in before],
        size=lambda name: max(merged.tensors[name].numel, 1),
    )
    everything = sum(merged.tensors[name].nbytes for name in mine)
    checked = recorded_bases(merged)

    def write_run(run: tuple[str, int, int]) -> tuple[str, Fingerprint, Fingerprint]:
        name, start, count = run
        words = merged.run(name, start, count)
        if not allowed.nonfinite:
            check_finite(merged, name, start, words)
        if name not in moved and differs(merged, name, start, words):
            moved.add(name)
        writer.write(name, start, words)
        compared = name in checked and start < merged.base_numel(name)
        base_words = merged.base.read(name, start, count) if compared else None
        return (
            name,
            Fingerprint.of(words, start),
            Fingerprint.of(base_words, start) if base_words is not None else Fingerprint(),
        )

    moved: set[str] = set()
    prints: dict[str, Fingerprint] = {}
    done = 0
    threads = thread_share(ranks) + 1  # one of them is writing
    with closing(ordered_map(write_run, _work(merged, mine), threads=threads)) as results:
        for name, several in groupby(results, key=itemgetter(0)):
            runs = list(several)
            check_base(merged, name, checked.get(name, ()), total(base for _, _, base in runs))
            prints[name] = total(result for _, result, _ in runs)
            journal.finished(name, prints[name])
            done += merged.tensors[name].nbytes
            if progress is not None:
                progress(done, everything)
    return {name: ([*prints.get(name, Fingerprint())], name in moved) for name in mine}


def _work(merged: Merged, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    for name in names:
        yield from ((name, start, count) for start, count in merged.runs(name))


def _finish(ready: PreparedMerge, report: MergeReport, journal: Journal, staging: Path) -> MergeReport:
    """Put what belongs to the result beside its weights. Returns the report with what there was to say."""
    journal.remove()
    notes = output_files.write(
        ready.merged, ready.base_folder, ready.growth.vocabulary, staging, prefixed=bool(ready.prefix),
        chosen=ready.chosen, numbers=ready.numbers,
    )  # fmt: skip
    for note in notes:
        logger.warning("%s", note)
    report = replace(report, notes=(*report.notes, *notes))
    output_files.write_record(report, staging)
    return report


def _report(
    ready: PreparedMerge, out: Path, notes: tuple[str, ...], prints: Mapping[str, Fingerprint] | None
) -> MergeReport:
    merged = ready.merged
    records = (
        [(name, info.dtype.code, info.shape, prints[name]) for name, info in merged.tensors.items()]
        if prints
        else []
    )
    return MergeReport(
        out=str(out), recipe=merged.recipe, notes=(*notes, *notes_of(ready)),
        tensors=tuple(merged.fates.values()),
        labels=tuple(model.label for model in merged.inputs),
        fingerprint=model_fingerprint(records) if records else "",
    )  # fmt: skip


# Into a package


def _write_package(
    ready: PreparedMerge,
    task: MergeTask,
    out: Path,
    notes: tuple[str, ...],
    allowed: Allowed,
    overwrite: bool,
    progress: Progress | None,
    ranks: Ranks,
) -> MergeReport:
    from ..extracting.extract import extract_merged

    def check(manifest: Manifest) -> None:
        if not allowed.unchanged:
            check_changed(merged, _moved(manifest))

    merged = ready.merged
    check_apart(out, ready.inputs)
    ranks.each(lambda: check_bases(merged, ranks))
    with (
        storage_errors(out),
        output_files.folder(
            merged, ready.base_folder, ready.growth.vocabulary, prefixed=bool(ready.prefix)
        ) as (folder, said),
    ):
        view = merged.beside(folder)
        report = _report(ready, out, (*notes, *said), None)
        output_files.write_record(report, folder)
        package = extract_merged(
            ready.base, view, out, allow_nonfinite=allowed.nonfinite, base_model=task.recipe.base,
            cast_base=task.recipe.cast_base, overwrite=overwrite, progress=progress, ranks=ranks, check=check,
        )  # fmt: skip
    manifest = package.manifest
    return replace(report, fingerprint=manifest.result, changed=frozenset(_moved(manifest)))


def _moved(manifest: Manifest) -> set[str]:
    """Names of tensors that a package changes."""
    return {record.name for record in manifest.tensors if record.kind != "base"}
