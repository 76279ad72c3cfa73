"""`apply`, `apply_` and `applied`: a base and packages in, the fine-tuned weights out, to the recorded bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .checkpoint import SINGLE, Checkpoint, CheckpointWriter, Layout, companions
from .dtypes import Words
from .errors import BaseMismatch, PackageError
from .fingerprint import Fingerprint, model_fingerprint, total
from .kernels import cpu
from .manifest import TensorRecord
from .package import DeltaPackage
from .parallel import ScratchWords, ordered_map, thread_count
from .plan import WeightsLike, open_weights
from .publish import staged_folder
from .resolve import Packages, Resolver, check_base, open_chain
from .weights import TensorInfo

if TYPE_CHECKING:
    from .shards import Live, LiveWeights

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
    links = open_chain(_listed(packages), weights)
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


def _listed(packages: Packages | str | os.PathLike[str] | DeltaPackage) -> Packages:
    return [packages] if isinstance(packages, (str, os.PathLike, DeltaPackage)) else packages


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


@dataclass
class Undo:
    """What `apply_` overwrote. `revert()` puts it back, exactly; the log holds changed elements only."""

    _live: LiveWeights
    _log: list[tuple[str, NDArray[np.int64], Words]]
    _applied: dict[str, Fingerprint]
    reverted: bool = False

    @property
    def nbytes(self) -> int:
        """Memory that the log takes."""
        return sum(positions.nbytes + words.nbytes for _, positions, words in self._log)

    def revert(self) -> None:
        """Restore the weights as they were before `apply_`.

        Raises:
            BaseMismatch: they have changed since, so that what is on record would not fit; nothing is touched then.
        """
        if self.reverted:
            return
        for name, expected in self._applied.items():
            if Fingerprint.of(self._live.words(name)) != expected:
                remedy = "revert before training on, or load the base again"
                raise BaseMismatch(name, expected="the weights that apply_ left", found="others", remedy=remedy)
        self._restore()

    def _restore(self) -> None:
        for name, positions, words in self._log:
            content = self._live.words(name)
            content[positions] = words
            self._live.store(name, content)
        self._log.clear()
        self.reverted = True


def apply_(model: Live, packages: Packages | str | os.PathLike[str] | DeltaPackage, *, weights: Sequence[float] | None = None) -> Undo:
    """Apply packages to a live model (or state dict of torch tensors) in place.

    The weights are compared with the packages' base before the first of them is touched, and with the recorded result
    after the last. If anything fails in between, what was changed is put back before the error surfaces.

    Returns:
        An `Undo` whose `revert()` restores the exact bits.

    Raises:
        PackageError, ChainError, TensorMismatch, DtypeMismatch, BaseMismatch, ResultMismatch, ConfigError.
    """
    from .shards import LiveWeights

    links = open_chain(_listed(packages), weights)
    live = LiveWeights(model)
    resolver = Resolver(_AsBase(live, links[0].packages[0]), links, live=True)
    _check_fits(live, resolver)
    check_base(resolver)
    undo = Undo(live, [], {})
    try:
        for name in resolver.tensors:
            _apply_tensor(name, live, resolver, undo)
    except BaseException:
        undo._restore()
        raise
    return undo


@contextmanager
def applied(
    model: Live, packages: Packages | str | os.PathLike[str] | DeltaPackage, *, weights: Sequence[float] | None = None
) -> Iterator[Live]:
    """`apply_` for the length of a `with` block: the model has its own weights back afterwards.

    Raises:
        As `apply_`.
    """
    undo = apply_(model, packages, weights=weights)
    try:
        yield model
    finally:
        undo.revert()


class _AsBase:
    """A live model as the base of a package: built for the result, so that only its leading rows are the base's where rows were added."""

    def __init__(self, live: LiveWeights, package: DeltaPackage) -> None:
        self.label, self._live = live.label, live
        self.tensors = {name: _base_part(info, package.records.get(name)) for name, info in live.tensors.items()}

    def read(self, name: str, start: int, count: int) -> Words:
        return self._live.read(name, start, count)


def _base_part(info: TensorInfo, record: TensorRecord | None) -> TensorInfo:
    if record is None or record.base_rows is None or info.shape != record.info.shape:
        return info
    return TensorInfo(info.dtype, record.base_info.shape)


def _check_fits(live: LiveWeights, resolver: Resolver) -> None:
    """Every tensor of the result has a place of its shape and dtype in the model: it was built for the tuned checkpoint."""
    from .shards import check_same_tensors

    expected = {name: record.info for name, record in resolver.tensors.items()}
    remedy = "build the model as for the fine-tuned checkpoint (same head, same vocabulary), then apply"
    check_same_tensors({name: live.tensors[name] for name in live.tensors if name in expected}, expected, what="the model", remedy=remedy)


def _apply_tensor(name: str, live: LiveWeights, resolver: Resolver, undo: Undo) -> None:
    content = live.words(name)
    before = len(undo._log)
    with closing(ordered_map(lambda run: _apply_run(name, content, resolver, undo, *run), resolver.runs(name))) as done:
        for _ in done:
            pass
    touched = len(undo._log) > before
    if touched:
        live.store(name, content)
        undo._applied[name] = Fingerprint.of(content)
    resolver.check_result_print(name, undo._applied[name] if touched else Fingerprint.of(content))


def _apply_run(name: str, content: Words, resolver: Resolver, undo: Undo, start: int, count: int) -> None:
    """Resolve one run into `content`. The log knows of a change before it is made: an error elsewhere may come at any time."""
    view = content[start : start + count]
    new = resolver.resolve(name, start, count)
    changed = np.flatnonzero(new != view)
    if changed.size:
        undo._log.append((name, changed + start, view[changed].copy()))
        view[changed] = new[changed]
