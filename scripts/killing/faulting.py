"""A layer between a process and the system that fails, or kills, at one call: `faults.c`, in Python."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LAYER = "DARE_TRAIN_FAULTS"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens at which call that writes (or reads, with `reading`) below a folder."""

    what: str
    code: int
    """errno; 0 kills the process before the call, -1 after it."""
    lasting: bool = False
    reading: bool = False


FAULTS = {
    "killed before": Fault(what="killed before", code=0),
    "killed after": Fault(what="killed after", code=-1),
    "disk full": Fault(what="disk full", code=errno.ENOSPC, lasting=True),
    "disk fails once": Fault(what="disk fails once", code=errno.EIO),
    "read-only from then on": Fault(what="read-only from then on", code=errno.EROFS, lasting=True),
    "reading fails": Fault(what="reading fails", code=errno.EIO, reading=True),
}


def with_layer() -> None:
    """Begin this program again with the layer below it, compiled for this machine."""
    if _LAYER in os.environ:
        return
    library = Path(tempfile.mkdtemp(prefix="dare-faults-")) / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), _LAYER: str(library)}
    os.execve(sys.executable, [sys.executable, "-m", "killing", *sys.argv[1:]], environment)


def arm(below: Path, number: int, fault: Fault | None) -> None:
    """From now on, let call `number` below a folder have its fault; 0 only counts."""
    chosen = fault or Fault(what="none", code=0)
    layer = ctypes.CDLL(os.environ[_LAYER])
    layer.faults_arm(
        os.fsencode(below), ctypes.c_long(number), chosen.code, int(chosen.lasting), int(chosen.reading)
    )


def seen() -> int:
    """Calls since `arm`."""
    layer = ctypes.CDLL(os.environ[_LAYER])
    layer.faults_seen.restype = ctypes.c_long
    return int(layer.faults_seen())
