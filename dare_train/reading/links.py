"""Links in a model's folder: those that lead to other files of this machine bring them along when the model's
files are copied, and with them whatever a stranger wanted to have of yours.
"""

from __future__ import annotations

import logging
from pathlib import Path

from ..errors import printable

_log = logging.getLogger("dare_train")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a file in a folder is a link, or lies behind one, to what is not a model's: neither in that
    folder, nor beside weights in another, nor among the files that the Hub's cache keeps for its snapshots.
    """
    target = path.resolve()
    beside = target.parent
    if target.is_relative_to(folder.resolve()):
        return False
    of_the_cache = beside.name == "blobs" and beside.parent.name.startswith("models--")
    return not of_the_cache and not any(file.is_file() for file in beside.glob("*.safetensors"))


def staying_inside(paths: list[Path], folder: Path) -> list[Path]:
    """Those of the files in a folder that do not lead out of it; the others are named, once a process."""
    out = {path for path in paths if leads_out(path, folder)}
    for path in sorted(out - _told):
        _told.add(path)
        told = "%s: left out, since it is a link to %s; copy the file there if it is the model's"
        target = printable(str(path.resolve()), 200)
        _log.warning(told, printable(str(path), 200), target)
    return [path for path in paths if path not in out]


_told: set[Path] = set()
