"""Folders that appear complete or not at all: written under a hidden name, synced, read back, and only then
given their own.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import ConfigError, DareError, OutputExists, RankError, StorageError
from .exchange import exchange
from .inputs_of import check_apart
from .litter import clear, hidden_name, leftovers, remove
from .place_lock import lock_names, locked, remove_locks
from .ranks import Ranks
from .synced import sync, sync_tree
from .waiting_folder import clear_waiting

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OCCUPIED = {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}
_LONGEST_NAME = 210
"""Bytes that leave room for what hidden names say beside it."""

_ATTEMPTS = 100
"""At a folder that others make and remove. In some, such as `/proc/self`, nothing can ever be made."""

ReadBack = Callable[[Path], object]
"""Called with what is about to be published; raises for what its readers would refuse."""


@contextmanager
def staged_folder(
    out: Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    resume: Callable[[Path], bool] | None = None,
    within: Path | None = None,
    read_back: ReadBack | None = None,
) -> Iterator[Path]:
    """A hidden sibling of `out` to write into, or a folder in `within`, on the same file system; it takes the
    place of `out` when the block ends without an exception, after it has been synced and read back.

    One process at a time writes to a place, where the file system has locks. What killed ones left behind is
    removed first, unless `resume`, called with it, says that it can be gone on with; then an interrupt
    (Ctrl-C) leaves it, too. With `overwrite`, the old folder stays valid until the new one takes its place.

    Raises:
        ConfigError: `out` cannot be a folder's name, or is, or holds, one of the `inputs`.
        OutputExists: `out` exists, is not an empty folder, and `overwrite` is false; or is not a folder at
            all; or somebody else is writing there.
        StorageError: the disk is full.
    """
    out = _nameable(out)
    check_apart(out, inputs)
    above = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        with storage_errors(out), _place(out, within, overwrite) as alone:
            staging = _begun(out, within, overwrite, alone, resume)
            try:
                yield staging
                if read_back is not None:
                    with _named_as(out, staging):
                        read_back(staging)
                remove_locks(staging)
                sync_tree(staging)
                replaced = _publish(staging, out, within, overwrite)
            except BaseException as error:
                if resume is None or not isinstance(error, KeyboardInterrupt):
                    remove(staging)
                raise
            for folder in {out.parent, staging.parent, *(folder.parent for folder in above)}:
                sync(folder)
            if replaced is not None:
                remove(replaced)
    except BaseException:
        for folder in above:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _place(out: Path, within: Path | None, overwrite: bool) -> Iterator[bool]:
    """The folder that `out` will lie in, and its lock; yields whether nobody else can be at work there."""
    with ExitStack() as stack:
        for attempt in reversed(range(_ATTEMPTS)):
            for folder in (out.parent, within or out.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                alone = stack.enter_context(locked(out, within))
                break
            except FileNotFoundError:  # somebody who failed has removed the new folder again
                if not attempt:
                    raise
            except OSError as error:
                if isinstance(error, DareError):
                    raise
                check_free(out, overwrite)
                raise
        yield alone


def _begun(
    out: Path, within: Path | None, overwrite: bool, alone: bool, resume: Callable[[Path], bool] | None
) -> Path:
    """The folder to write into: empty, or what a killed process has begun."""
    staging = hidden_name(out, "partial", within)
    begun = None
    if resume is not None:
        begun = next((path for path in _begun_before(out, within, alone) if resume(path)), None)
    clear(out, within, alone=alone, but=begun)
    check_free(out, overwrite)
    if begun is None:
        staging.mkdir()
    else:
        begun.rename(staging)
    return staging


def _begun_before(out: Path, within: Path | None, alone: bool) -> list[Path]:
    return [
        left.path
        for left in leftovers(within or out.parent)
        if left.name == out.name and left.kind == "partial" and (alone or left.dead) and left.path.is_dir()
    ]


def check_free(out: Path, overwrite: bool) -> None:
    """
    Raises:
        OutputExists: `out` is there already, and may not be replaced.
    """
    taken = out.is_symlink() or (out.exists() and not out.is_dir())
    if taken or (not overwrite and out.exists() and any(out.iterdir())):
        raise _exists(out)


def _exists(out: Path) -> OutputExists:
    remedy = "choose another, or pass overwrite=True (--overwrite)"
    return OutputExists(str(out), expected="a path that does not exist yet", remedy=remedy)


def _publish(staging: Path, out: Path, within: Path | None, overwrite: bool) -> Path | None:
    """Give what is complete its name. Returns where the old one lies now, which nobody needs any more."""
    if not (overwrite and out.exists()):
        try:
            staging.rename(out)
        except OSError as error:
            if error.errno in _OCCUPIED:
                raise _exists(out) from error
            raise
        return None
    if exchange(staging, out):
        return staging
    replaced = hidden_name(out, "replaced", within)
    try:
        out.rename(replaced)
        staging.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise
    removed = hidden_name(out, "removed", within)
    replaced.rename(removed)
    return removed


@contextmanager
def _named_as(out: Path, staging: Path) -> Iterator[None]:
    """Errors about what is not published yet speak of where it was to be."""
    try:
        yield
    except DareError as error:
        error.name = error.name.replace(str(staging), str(out))
        error.args = (str(error),)
        raise


@contextmanager
def shared_staging(
    out: Path,
    ranks: Ranks,
    *,
    overwrite: bool = True,
    inputs: Iterable[Path] = (),
    resume: Callable[[Path], bool] | None = None,
    within: Path | None = None,
    read_back: ReadBack | None = None,
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
            out, overwrite=overwrite, inputs=inputs, resume=resume, within=within, read_back=read_back
        )
        made = ranks.together(lambda: _entered(stack, staged) if ranks.first else "")
        staging = (within or out.parent) / made[0]
        ranks.together(lambda: check_visible(staging))
        yield staging
        ranks.together(stack.close)


def _entered(stack: ExitStack, context: AbstractContextManager[Path]) -> str:
    """The name of the folder: where it lies, ranks may see under different paths."""
    return stack.enter_context(context).name


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


def sweep_folder(folder: Path, within: Path | None = None) -> None:
    """Remove what killed processes left of everything that they were writing into `folder`, there or in
    `within`, with the files that were waiting to go along. What somebody is at work on stays.
    """
    place = within or folder
    if not place.is_dir():
        return
    for name in sorted({left.name for left in leftovers(place)} | lock_names(place)):
        try:
            with locked(folder / name, place) as alone:
                clear(folder / name, place, alone=alone)
        except OutputExists:  # its writer lives
            continue
    clear_waiting(place)


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
    try:
        whole = out.absolute()
    except FileNotFoundError as error:
        found, remedy = f"{out} in one that was removed", "go to another, or give the whole path"
        expected = "a working folder that is there"
        raise ConfigError("out", expected=expected, found=found, remedy=remedy) from error
    if "\0" in str(out) or not whole.name or len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise ConfigError(
            "out " + repr(str(out)), expected="a path that a folder can have", remedy="choose another"
        )
    return out if out.name else whole
