"""`apply`: a base and packages in, the fine-tuned checkpoint out, to the recorded bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from .checkpoint import SINGLE, Checkpoint, CheckpointWriter, Layout, companions
from .errors import PackageError
from .fingerprint import Fingerprint, model_fingerprint, total
from .kernels import cpu
from .package import DeltaPackage
from .parallel import ScratchWords, ordered_map, thread_count
from .plan import WeightsLike, open_weights
from .publish import staged_folder
from .resolve import Packages, Resolver, listed, open_chain
from .weights import TensorInfo

_NOT_THE_MODELS = {"README.md"}
Progress = Callable[[int, int], object]
"""Called with the bytes of the result that are done and of all that there are."""


def apply(
    base: str | os.PathLike[str],
    packages: Packages | str | os.PathLike[str] | DeltaPackage,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    cast_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write the checkpoint that packages make of a base, streaming, and prove that it arrived.

    Args:
        base: folder, file or Hub id of the base model.
        packages: one package or several: all on this base (their deltas add up), or a chain in order.
        out: folder to create; `from_pretrained` loads it.
        weights: factor w of each package, by default 1; only for packages side by side.
        cast_base: round the base to the packages' dtypes first.
        overwrite: replace a folder that is already there.
        progress: called with (bytes done, bytes in all) after each tensor.

    Returns:
        The fingerprint of the result. With weights of 1 it has been compared with the one on record.

    Raises:
        CheckpointError, PackageError, ChainError, TensorMismatch, DtypeMismatch, BaseMismatch, ResultMismatch,
        OutputExists, StorageError. Nothing is left at `out` then.
    """
    checkpoint = Checkpoint.open(base)
    links = open_chain(listed(packages), weights)
    resolver = Resolver(checkpoint, links, cast_base=cast_base)
    inputs = [checkpoint.folder, *(package.path for link in links for package in link.packages)]
    with staged_folder(Path(out), overwrite=overwrite, sync=False, inputs=inputs) as staging:
        with CheckpointWriter(staging, _layout(checkpoint, resolver)) as writer:
            prints = _write_all(resolver, writer, progress)
        _copy_companions(checkpoint.folder, staging)
        for link in links:
            for package in link.packages:
                _copy_carried(package, staging)
    return _named(resolver, prints)


def rehearse(base: WeightsLike, packages: Packages, *, weights: Sequence[float] | None = None, cast_base: bool = False) -> str:
    """Everything `apply` checks, with nothing written. Returns the result's fingerprint.

    Raises:
        As `apply`.
    """
    resolver = Resolver(open_weights(base), open_chain(packages, weights), cast_base=cast_base)
    return _named(resolver, _write_all(resolver, None, None))


def _named(resolver: Resolver, prints: dict[str, Fingerprint]) -> str:
    return model_fingerprint((name, record.info.dtype.code, record.info.shape, prints[name]) for name, record in resolver.tensors.items())


def _write_all(resolver: Resolver, writer: CheckpointWriter | None, progress: Progress | None) -> dict[str, Fingerprint]:
    """Resolve, check and write every run; each tensor is compared with the record as soon as its last run is done."""
    scratch = ScratchWords()

    def one(work: tuple[str, int, int]) -> _Done:
        name, start, count = work
        base = resolver.base_run(name, start, count)
        words = scratch.like(base)
        share = Fingerprint(*cpu.copy_with_fingerprint(base, start, words))
        before = share if start < resolver.base_numel(name) else Fingerprint()
        resolver.resolve(name, start, count, words)
        if writer is not None:
            writer.write(name, start, words)
        return _Done(before, Fingerprint.of(words, start), words.nbytes)

    work = [(name, start, count) for name in resolver.tensors for start, count in resolver.runs(name)]
    with closing(ordered_map(one, work, threads=thread_count() + 1)) as done:  # one of them is writing
        return _checked_prints(resolver, done, progress)


class _Done(NamedTuple):
    """A run that was written: fingerprint shares of base and result, and its bytes."""

    base: Fingerprint
    result: Fingerprint
    nbytes: int


def _checked_prints(resolver: Resolver, done: Iterator[_Done], progress: Progress | None) -> dict[str, Fingerprint]:
    prints, written, everything = {}, 0, sum(record.info.nbytes for record in resolver.tensors.values())
    for name in resolver.tensors:
        shares = [next(done) for _ in resolver.runs(name)]
        resolver.check_base_print(name, total(run.base for run in shares))
        prints[name] = total(run.result for run in shares)
        resolver.check_result_print(name, prints[name])
        written += sum(run.nbytes for run in shares)
        if progress is not None:
            progress(written, everything)
    return prints


def _layout(base: Checkpoint, resolver: Resolver) -> Layout:
    """The base's distribution of tensors over files; tensors it does not have go to the last file."""
    prefix = resolver.links[0].packages[0].manifest.prefix
    layout: dict[str, dict[str, TensorInfo]] = {file.path.name: {} for file in base.files.values()}
    if len(layout) == 1:
        layout = {SINGLE: {}}
    last = sorted(layout)[-1]
    for name, record in resolver.tensors.items():
        own = base.files.get(_base_name(name, prefix))
        file = own.path.name if own is not None and own.path.name in layout else last
        layout[file][name] = record.info
    return {file: tensors for file, tensors in layout.items() if tensors}


def _base_name(name: str, prefix: str) -> str:
    return f"{prefix[1:]}{name}" if prefix.startswith("-") else name.removeprefix(prefix)


def _copy_companions(folder: Path, staging: Path) -> None:
    for relative in companions(folder):
        if relative.name not in _NOT_THE_MODELS:
            _copy(folder / relative, staging / relative)


def _copy_carried(package: DeltaPackage, staging: Path) -> None:
    for record in package.manifest.files:
        target = staging / record.file
        if target.is_dir() or any(folder.is_file() for folder in target.parents):
            raise PackageError(
                package.name, expected="files that fit in beside the base's", found=record.file, remedy="do not trust this package"
            )
        _copy(package.path / record.file, target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
