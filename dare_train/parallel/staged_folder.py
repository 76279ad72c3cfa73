"""Folders that appear complete or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError, DareError, OutputExists, RankError, StorageError
from .ranks import Ranks

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged_folder(
    out: Path,
    *,
    overwrite: bool = False,
    sync: bool = True,
    inputs: Iterable[Path] = (),
    resume: Callable[[Path], bool] | None = None,
    within: Path | None = None,
) -> Iterator[Path]:
    """A hidden sibling of `out` to write into, or a folder in `within`, on the same file system; it takes the
    place of `out` when the block ends without an exception.

    What a killed process left behind is removed first, unless `resume`, called with it, says that it can be
    gone on with; then an interrupt (Ctrl-C) leaves it, too. With `overwrite`, the old folder stays valid
    until the rename.

    Raises:
        ConfigError: `out` cannot be a folder's name, or is one of the folders in `inputs`.
        OutputExists: `out` exists, is not an empty folder, and `overwrite` is false; or is not a folder at
            all.
        StorageError: the disk is full.
    """
    out = _nameable(out)
    if out.exists() and any(out.resolve() == folder.resolve() for folder in inputs):
        raise ConfigError("out", expected="another folder than those that are read", found=str(out))
    staging, replaced = partial_name(out, within), replaced_name(out, within)
    going_on = resume is not None and staging.is_dir() and resume(staging)
    if not going_on:
        sweep(out, within)
    taken = out.is_symlink() or (out.exists() and not out.is_dir())
    if taken or (not overwrite and out.exists() and any(out.iterdir())):
        raise OutputExists(
            str(out),
            expected="a path that does not exist yet",
            remedy="choose another, or pass overwrite=True (--overwrite)",
        )
    above = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        with storage_errors(out):
            staging.mkdir(parents=True, exist_ok=going_on)
            out.parent.mkdir(parents=True, exist_ok=True)
            yield staging
            if sync:
                _sync_tree(staging)
            if out.exists():
                out.rename(replaced)
            staging.rename(out)
    except BaseException as error:
        if resume is not None and isinstance(error, KeyboardInterrupt):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        for folder in above:
            with suppress(OSError):
                folder.rmdir()
        raise
    _sync(out.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def shared_staging(
    out: Path,
    ranks: Ranks,
    *,
    overwrite: bool = True,
    sync: bool = True,
    inputs: Iterable[Path] = (),
    resume: Callable[[Path], bool] | None = None,
    within: Path | None = None,
) -> Iterator[Path]:
    """`staged_folder` that several ranks write into; the first of them makes and publishes it.

    In the block, whatever may fail on one rank goes through `ranks.together`, so that all of them leave it
    the same way.

    Raises:
        As `staged_folder` on the first rank; RankError on the others, or where a rank does not see the
        folder.
    """
    out = _nameable(out)
    with ExitStack() as stack:
        staged = staged_folder(
            out, overwrite=overwrite, sync=sync, inputs=inputs, resume=resume, within=within
        )
        ranks.together(lambda: _enter(stack, staged) if ranks.first else None)
        ranks.together(lambda: check_visible(partial_name(out, within)))
        yield partial_name(out, within)
        ranks.together(stack.close)


def _enter(stack: ExitStack, context: AbstractContextManager[Path]) -> None:
    stack.enter_context(context)


def check_visible(staging: Path) -> None:
    """
    Raises:
        RankError: this rank does not see a folder that the first one made.
    """
    if not staging.is_dir():
        remedy = "put the output folder on a file system that all nodes share"
        raise RankError(
            str(staging), expected="the folder that rank 0 made", found="nothing there", remedy=remedy
        )


def partial_name(out: Path, within: Path | None = None) -> Path:
    """Where `out` is written before it is complete: beside it, or in another folder."""
    return (within or out.parent) / f".{out.name}.partial"


def replaced_name(out: Path, within: Path | None = None) -> Path:
    """Where an old `out` is until the new one is in its place."""
    return (within or out.parent) / f".{out.name}.replaced"


def sweep(out: Path, within: Path | None = None) -> None:
    """Remove what a killed process left of `out`, and put back an old folder whose successor never came."""
    shutil.rmtree(partial_name(out, within), ignore_errors=True)
    replaced = replaced_name(out, within)
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


COMPANIONS = ".companions-"
"""How folders begin that hold configuration and tokenizer for packages to come."""


def sweep_folder(folder: Path, within: Path | None = None) -> None:
    """`sweep` for everything that was being written into `folder`, there or in `within`, with the files that
    were waiting to go along.
    """
    for leftover in sorted((within or folder).glob(".*")):
        name, _, kind = leftover.name.removeprefix(".").partition(".")
        if kind in ("partial", "replaced"):
            sweep(folder / name, within)
        elif leftover.name.startswith(COMPANIONS):
            shutil.rmtree(leftover)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's refusal of a write into a `StorageError` that names the place."""
    try:
        yield
    except OSError as error:
        if isinstance(error, DareError):
            raise
        above = next(folder for folder in where.absolute().parents if folder.is_dir())
        full = error.errno in _NO_SPACE
        remedy = "free some space and run again" if full else "check the path and the disk"
        free = f" ({shutil.disk_usage(above).free:,} bytes free)" if full else ""
        raise StorageError(
            str(where),
            found=f"{os.strerror(error.errno or errno.EIO)}{free}",
            remedy=f"nothing was left behind; {remedy}",
        ) from error


def _nameable(out: Path) -> Path:
    if "\0" in str(out) or not out.absolute().name or len(os.fsencode(out.name)) > 240:
        raise ConfigError(
            "out " + repr(str(out)), expected="a path that a folder can have", remedy="choose another"
        )
    return out if out.name else out.absolute()


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
