"""Names of what is not complete yet, and what killed processes left under them.

Beside `out`, or in another folder, lie while somebody writes: `.out.OWNER.partial`, the new one; where the
system cannot exchange names, `.out.OWNER.replaced`, the old one for the moment between two renames; and
`.out.OWNER.removed`, what nobody is to see any more. An owner is a process: no two write to the same name.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["partial", "replaced", "removed"]

_log = logging.getLogger("dare_train")
_NAME = re.compile(
    r"\.(?P<name>.+?)(?:\.(?P<machine>[0-9a-f]{8})-(?P<process>[0-9]{1,9})-[0-9a-f]{8})?"
    r"\.(?P<kind>partial|replaced|removed)",
    re.DOTALL,
)
_mine: set[str] = set()
"""Names that this process is using."""


class Leftover(NamedTuple):
    """What lies under such a name."""

    path: Path
    name: str
    """Of what it was to be, or was."""
    kind: Kind
    machine: str | None
    process: int | None

    @property
    def dead(self) -> bool:
        """Whether its owner is known not to be at work any more, of processes of this machine."""
        if self.machine is None or self.process is None:
            return True  # named by an earlier version, which told no owner
        if self.machine != machine():
            return False
        if self.process == os.getpid():
            return self.path.name not in _mine
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's: it is there
            return False
        return False


def hidden_name(out: Path, kind: Kind, within: Path | None = None) -> Path:
    """A name that nobody else uses."""
    name = f".{out.name}.{machine()}-{os.getpid()}-{os.urandom(4).hex()}.{kind}"
    _mine.add(name)
    return (within or out.parent) / name


def leftovers(folder: Path) -> Iterator[Leftover]:
    """Everything in a folder that lies under such a name."""
    for path in sorted(folder.iterdir()):
        if found := _NAME.fullmatch(path.name):
            process = int(found["process"]) if found["process"] else None
            kind: Kind = found["kind"]  # type: ignore[assignment]
            yield Leftover(path, found["name"], kind, found["machine"], process)


def clear(out: Path, within: Path | None = None, *, alone: bool, but: Path | None = None) -> None:
    """Remove what killed processes left of `out`, except `but`, and put back an old one whose successor never
    came.

    alone: whether this process holds the lock of `out`. Then all of it is theirs; else what processes of this
        machine left that are dead.
    """
    for left in leftovers(within or out.parent):
        if left.name != out.name or left.path == but or not (alone or left.dead):
            continue
        if left.kind == "replaced" and not out.exists():
            left.path.rename(out)
        else:
            remove(left.path)


def remove(path: Path) -> None:
    """Remove a file or a folder that lies under a hidden name; what cannot be is left to the next writer,
    with a warning.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("%s: it is not needed any more, and could not be removed: %s", path, error.strerror)


def remove_whole(path: Path, within: Path | None = None) -> None:
    """Remove a folder that somebody may be reading: at once by its name, and then its content."""
    hidden = hidden_name(path, "removed", within)
    path.rename(hidden)
    remove(hidden)


@functools.lru_cache(1)
def machine() -> str:
    """What processes that can see one another by number have in common, until the machine starts anew."""
    facts = [os.uname().nodename]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            facts.append(str(Path(place).readlink()) if Path(place).is_symlink() else Path(place).read_text())
        except OSError:
            facts.append("")  # not Linux, or hidden in a container: the name has to do
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:8]
