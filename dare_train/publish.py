"""Folders that appear complete or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputExists, StorageError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """A hidden sibling of `out` to write into; it takes the place of `out` when the block ends without an exception.

    What a killed process left behind is removed first. With `overwrite`, the old folder stays valid until the rename.

    Raises:
        OutputExists: `out` exists, is not an empty folder, and `overwrite` is false.
        StorageError: the disk is full.
    """
    staging, replaced = partial_name(out), out.with_name(f".{out.name}.replaced")
    sweep(out)
    if not overwrite and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExists(
            str(out), expected="a path that does not exist yet", remedy="choose another, or pass overwrite=True (--overwrite)"
        )
    staging.mkdir(parents=True)
    try:
        with storage_errors(out):
            yield staging
            if sync:
                _sync_tree(staging)
        if out.exists():
            out.rename(replaced)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(out.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def partial_name(out: Path) -> Path:
    """Where `out` is written before it is complete."""
    return out.with_name(f".{out.name}.partial")


def sweep(out: Path) -> None:
    """Remove what a killed process left beside `out`, and put back an old folder whose successor never came."""
    shutil.rmtree(partial_name(out), ignore_errors=True)
    replaced = out.with_name(f".{out.name}.replaced")
    if replaced.exists() and not out.exists():
        replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def sweep_folder(folder: Path) -> None:
    """`sweep` for everything that was being written into `folder`, with the files that were waiting to go along."""
    for leftover in sorted(folder.glob(".*")):
        name, _, kind = leftover.name.removeprefix(".").partition(".")
        if kind in ("partial", "replaced"):
            sweep(folder / name)
        elif kind.startswith("files."):
            shutil.rmtree(leftover)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's refusal of a write into a `StorageError` that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        free = shutil.disk_usage(where.parent).free
        raise StorageError(
            str(where),
            found=f"{os.strerror(error.errno)} ({free:,} bytes free)",
            remedy="nothing was left behind; free some space and run again",
        ) from error


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
