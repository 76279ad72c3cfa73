"""Folders for what is needed for a while: gone with the block, and after a kill with the next of their
kind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .litter import clear, hidden_name, leftovers, remove
from .place_lock import locked


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """On the file system of `out`, for what is as large. One process at a time has one for the same `out`.

    Raises:
        OutputExists: another process has; it says which.
    """
    trial = out.with_name(f"{out.name}.trial")
    trial.parent.mkdir(parents=True, exist_ok=True)
    with locked(trial) as alone:
        clear(trial, alone=alone)
        with _made(hidden_name(trial, "partial")) as folder:
            yield folder


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """Where this machine keeps temporary files."""
    place = Path(tempfile.gettempdir())
    for left in leftovers(place):
        if left.name == what and left.machine and left.dead and left.path.lstat().st_uid == os.getuid():
            remove(left.path)
    with _made(hidden_name(place / what, "partial")) as folder:
        yield folder


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        remove(folder)
