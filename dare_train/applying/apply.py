"""`apply`: a base and packages in, the fine-tuned checkpoint out, to the recorded bits."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..dtypes import Words
from ..errors import NonFiniteDelta
from ..kernels import cpu
from ..package.reader import DeltaPackage
from ..parallel.ranks import Ranks
from ..parallel.staged_folder import shared_staging, storage_errors
from ..parallel.threads import ScratchWords, ordered_map, thread_share
from ..weights.alignment import without_prefix
from ..weights.files.checkpoint import Checkpoint
from ..weights.files.checkpoint_writer import CheckpointWriter, Layout, layout_like
from ..weights.files.module_folders import MODULES, module_folders, places_of
from ..weights.fingerprint import Fingerprint, model_fingerprint, total
from ..weights.lora.opening import WeightsLike, open_checkpoint, open_weights
from .chain import Link, Packages, listed, open_chain
from .resolver import Resolver
from .result_files import write_files

logger = logging.getLogger("dare_train")

Progress = Callable[[int, int], object]
"""Called with the bytes of the result that are done and of all that there are."""


def apply(
    base: str | os.PathLike[str],
    packages: Packages | str | os.PathLike[str] | DeltaPackage,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    cast_base: bool | None = None,
    dequantize: bool = False,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> str:
    """Write the checkpoint that packages make of a base, streaming, and prove that it arrived.

    Args:
        base: folder, file or Hub id of the base model.
        packages: one package or several: all on this base (their deltas add up), or a chain in order.
        out: folder to create, with the base's file names: what loads the base loads it.
        weights: factor w of each package, by default 1; only for packages side by side.
        cast_base: round the base to the packages' dtypes first. By default that is done where they differ,
            and a line of the log says so; the fingerprint shows whether it is the right base then. False
            refuses.
        dequantize: read a quantised base in full precision, as `extract` did.
        allow_nonfinite: write NaN and infinity that sums of packages become, instead of refusing them.
        overwrite: replace a folder that is already there.
        progress: called with (bytes done, bytes in all) after each tensor: of this rank's share of them.
        ranks: the processes that share the work, such as `Ranks.joined()`; by default this one alone. All of
            them make the same call, on a file system that they share; the checkpoint is the same to the byte.

    Returns:
        The fingerprint of the result. With weights of 1 it has been compared with the one on record.

    Raises:
        CheckpointError, PackageError, ChainError, TensorMismatch, DtypeMismatch, BaseMismatch,
        NonFiniteDelta, ResultMismatch, OutputExists, StorageError; RankError when it happened on another
        rank. Nothing is left at `out` then.
    """
    ranks = ranks or Ranks()
    out = Path(out)
    checkpoint, resolver = ranks.each(
        lambda: _opened(base, packages, weights, cast_base=cast_base, dequantize=dequantize)
    )
    packages_read = [package for link in resolver.links for package in link.packages]
    inputs = [*places_of(checkpoint.folder), *(path for package in packages_read for path in package.paths)]
    layout = ranks.each(lambda: _layout(checkpoint, resolver))
    with shared_staging(
        out, ranks, overwrite=overwrite, inputs=inputs, read_back=layout.read_back
    ) as staging:
        on_disk = storage_errors(out)

        def create() -> CheckpointWriter | None:
            return CheckpointWriter(staging, layout) if ranks.first else None

        def write() -> dict[str, _Lanes]:
            with created or CheckpointWriter(staging, layout, join=True) as writer:
                return _write_share(resolver, writer, ranks, progress, finite=not allow_nonfinite)

        def copy_files() -> None:
            if ranks.first:
                write_files(checkpoint, resolver, prints, staging)

        created = ranks.each(on_disk(create))
        prints = _checked_prints(resolver, ranks.together(on_disk(write)))
        ranks.each(on_disk(copy_files))
    if cast_base is None and ranks.first:
        _say_rounding(resolver)
    return _named(resolver, prints)


def _opened(
    base: str | os.PathLike[str],
    packages: Packages | str | os.PathLike[str] | DeltaPackage,
    weights: Sequence[float] | None,
    *,
    cast_base: bool | None,
    dequantize: bool,
) -> tuple[Checkpoint, Resolver]:
    checkpoint = open_checkpoint(base, dequantize=dequantize)
    return checkpoint, Resolver(checkpoint, open_chain(listed(packages), weights), cast_base=cast_base)


def verify(
    package: DeltaPackage | str | os.PathLike[str],
    base: WeightsLike | None = None,
    *,
    cast_base: bool | None = None,
    dequantize: bool = False,
) -> None:
    """Check every byte of a package; with `base`, also that it is the right one and that applying arrives.

    Args:
        package: an opened package, its folder or its Hub id.
        base: what the package is for: a folder, a Hub id, a module, a state dict or arrays by name.
        cast_base, dequantize: see `apply`.

    Raises:
        PackageError: a file is damaged.
        BaseMismatch, TensorMismatch, DtypeMismatch, ResultMismatch: with `base`, see `apply`.
    """
    opened = DeltaPackage.open(package)
    opened.check_integrity()
    if base is not None:
        rehearse(base, [opened], cast_base=cast_base, dequantize=dequantize)


def rehearse(
    base: WeightsLike,
    packages: Packages,
    *,
    weights: Sequence[float] | None = None,
    cast_base: bool | None = None,
    dequantize: bool = False,
) -> str:
    """Everything `apply` checks, with nothing written. Returns the result's fingerprint.

    Raises:
        As `apply`.
    """
    opened = open_weights(base, dequantize=dequantize)
    resolver = Resolver(opened, open_chain(packages, weights), cast_base=cast_base)
    prints = _checked_prints(resolver, [_write_share(resolver, None, Ranks(), None)])
    if cast_base is None:
        _say_rounding(resolver)
    return _named(resolver, prints)


def _say_rounding(resolver: Resolver) -> None:
    """Tell whoever did not ask for it that the base was rounded: once all of it has proved right."""
    ways = sorted(Counter(resolver.rounded.values()).items())
    if ways:
        each = ", ".join(f"{way} ({count} tensor{'s' * (count != 1)})" for way, count in ways)
        logger.warning("%s: rounded %s, as the package needs it", resolver.base.label, each)


def _named(resolver: Resolver, prints: dict[str, Fingerprint]) -> str:
    return model_fingerprint(
        (name, record.info.dtype.code, record.info.shape, prints[name])
        for name, record in resolver.tensors.items()
    )


_Run = tuple[str, int, int]
"""Tensor, flat start, count."""
_Lanes = tuple[int, int, int, int]
"""Fingerprint shares of a tensor's base and result."""


def _write_share(
    resolver: Resolver,
    writer: CheckpointWriter | None,
    ranks: Ranks,
    progress: Progress | None,
    *,
    finite: bool = False,
) -> dict[str, _Lanes]:
    """Resolve and write this rank's share of the runs. Returns what they add up to, by tensor.

    `finite`: refuse what is not, unless it is on record.
    """
    scratch = ScratchWords()

    def write(run: _Run) -> _Done:
        name, start, count = run
        base_words = resolver.base_run(name, start, count)
        words = base_words if base_words.flags.owndata else scratch.like(base_words)
        if words is base_words:
            base_share = Fingerprint.of(words, start)
        else:
            base_share = Fingerprint(*cpu.copy_with_fingerprint(base_words, start, words))
        if start >= resolver.base_numel(name):
            base_share = Fingerprint()
        resolver.resolve(name, start, count, words)
        if finite and not resolver.expected:
            _check_finite(resolver, name, start, words)
        if writer is not None:
            writer.write(name, start, words)
        return _Done(base_share, Fingerprint.of(words, start), words.nbytes)

    everything = [(name, start, count) for name in resolver.tensors for start, count in resolver.runs(name)]
    work = ranks.share(everything, size=itemgetter(2))
    threads = thread_share(ranks) + 1  # one of them is writing
    with closing(ordered_map(write, work, threads=threads)) as done:
        return _added_up(resolver, work, done, progress)


def _check_finite(resolver: Resolver, name: str, start: int, words: Words) -> None:
    dtype = resolver.tensors[name].info.dtype
    if not dtype.can_be_delta or not cpu.has_nonfinite(words, dtype.exponent_mask):
        return
    mask = dtype.word.type(dtype.exponent_mask)
    first = start + int(np.argmax((words & mask) == mask))
    remedy = "smaller weights; allow_nonfinite=True (--allow-nonfinite) writes it"
    found = f"NaN or infinity at flat index {first}"
    raise NonFiniteDelta(name, expected=f"finite sums in {dtype.code}", found=found, remedy=remedy)


class _Done(NamedTuple):
    """A run that was written: fingerprint shares of base and result, and its bytes."""

    base: Fingerprint
    result: Fingerprint
    nbytes: int


def _added_up(
    resolver: Resolver, work: list[_Run], done: Iterator[_Done], progress: Progress | None
) -> dict[str, _Lanes]:
    """Shares by tensor. One that lies here completely is compared with the record after its last run."""
    lanes: dict[str, _Lanes] = {}
    written = 0
    everything = sum(count * resolver.tensors[name].info.dtype.itemsize for name, _, count in work)
    for name, several in groupby(work, key=itemgetter(0)):
        counts = [count for _, _, count in several]
        shares = [next(done) for _ in counts]
        base = total(run.base for run in shares)
        result = total(run.result for run in shares)
        if sum(counts) == resolver.tensors[name].info.numel:
            _check(resolver, name, base, result)
        lanes[name] = (*base, *result)
        written += sum(run.nbytes for run in shares)
        if progress is not None:
            progress(written, everything)
    return lanes


def _check(resolver: Resolver, name: str, base: Fingerprint, result: Fingerprint) -> None:
    resolver.check_base_print(name, base)
    resolver.check_result_print(name, result)


def _checked_prints(resolver: Resolver, shares: Sequence[Mapping[str, _Lanes]]) -> dict[str, Fingerprint]:
    """The result's fingerprints, from all ranks: tensors that several of them share are complete only now."""
    prints = {}
    for name in resolver.tensors:
        lanes = [share[name] for share in shares if name in share]
        base = total((first, second) for first, second, _, _ in lanes)
        prints[name] = total((first, second) for _, _, first, second in lanes)
        _check(resolver, name, base, prints[name])
    return prints


def _layout(base: Checkpoint, resolver: Resolver) -> Layout:
    prefix = resolver.links[0].packages[0].manifest.prefix
    infos = {name: record.info for name, record in resolver.tensors.items()}
    modules = _modules(base.folder, resolver.links)
    return layout_like(base, infos, lambda name: without_prefix(name, prefix), modules)


def _modules(base: Path, links: Sequence[Link]) -> dict[str, str]:
    """The modules of the result, by the list that comes to lie in its folder."""
    packages = [package for link in links for package in link.packages]
    carrying = [
        package.path
        for package in packages
        if any(record.file == MODULES for record in package.manifest.files)
    ]
    return module_folders([base, *carrying][-1])
