"""The folder that a run writes its packages into, and which of those in it are its own."""

from __future__ import annotations

import atexit
import logging
import re
from contextlib import ExitStack
from pathlib import Path

from ..errors import DareError
from ..package.manifest import MANIFEST
from ..package.reader import DeltaPackage
from ..parallel.litter import remove_whole
from ..parallel.place_lock import locked, occupied

_log = logging.getLogger("dare_train")
BASE = "base"
FINAL = "final"
_STEP = "step-"
_claimed: dict[Path, ExitStack] = {}
"""Folders of trainings of this process, and their locks."""


class RunFolder:
    """Packages `step-N` and `final`, and `base` where the base had to be kept.

    Args:
        path: the folder.
        run: what packages of this run say in their manifests.
        private: for the base, and for packages that are not complete yet; by default `path`, too.
    """

    def __init__(self, path: Path, run: str, private: Path | None = None) -> None:
        self.path = path
        self.run = run
        self.private = path if private is None else private
        self._place: ExitStack | None = None

    def claim(self) -> None:
        """Let nobody else write in the folder's place, and no other process train into it, until `leave`, or
        until this process trains into it again: what came before was interrupted.

        Raises:
            OutputExists: somebody else is at work there; it says who.
            OSError: it cannot be written.
        """
        before = _claimed.pop(self.path.resolve(), None)
        if before is not None:
            before.close()
        place = ExitStack()
        place.enter_context(occupied(self.path, None if self.private == self.path else self.private))
        self._place = _claimed[self.path.resolve()] = place

    def leave(self) -> None:
        """The training is over."""
        path = self.path.resolve()
        if self._place is not None and _claimed.get(path) is self._place:
            _claimed.pop(path).close()

    @property
    def base(self) -> Path:
        """Where a base is kept that is nowhere else on disk."""
        return self.private / BASE

    def of_step(self, step: int) -> Path:
        return self.path / f"{_STEP}{step}"

    def own(self, up_to: int) -> list[Path]:
        """This run's packages of steps up to `up_to`, by step."""
        return [path for path in step_folders(self.path) if self._is_own(path) and step_of(path) <= up_to]

    def make_way(self, *, from_step: int, base_in_use: bool) -> None:
        """Move what an earlier run left beside the folder, and what this one wrote after the step that it
        goes on from: one folder, one run.
        """
        foreign = [
            path for path in step_folders(self.path) if not self._is_own(path) or step_of(path) > from_step
        ]
        final = self.path / FINAL
        if final.exists() and not self._is_own(final):
            foreign.append(final)
        if self.base.exists() and not base_in_use:
            foreign.append(self.base)
        if foreign:
            aside = self._unused_name()
            aside.mkdir()
            for path in foreign:
                path.rename(aside / path.name)
            names = ", ".join(path.name for path in foreign)
            _log.warning("%s: moved to %s, since it is not of this run so far: %s", self.path, aside, names)

    def forget_old(self, count: int, written: Path, best: Path | None, *, step: int) -> None:
        """Remove all but this run's `count` newest packages; never the one just written, nor the best.

        Those of steps after `step`, at which `written` was taken, are of an earlier attempt: they are not
        newer.
        """
        own = sorted(self.own(up_to=step), key=_age)
        for path in own[: max(0, len(own) - count)]:
            if path not in (written, best):
                with locked(path, self.private):
                    remove_whole(path, self.private)

    def _is_own(self, path: Path) -> bool:
        try:
            return DeltaPackage.open(path).manifest.run == self.run
        except DareError:
            return False

    def _unused_name(self) -> Path:
        number = 1
        while (aside := self.private.with_name(f"{self.private.name}-earlier-{number}")).exists():
            number += 1
        return aside


@atexit.register
def _leave_all() -> None:
    """Trainings that were interrupted are over at last."""
    while _claimed:
        _claimed.popitem()[1].close()


def step_folders(folder: Path) -> list[Path]:
    """Packages `step-N` in a folder, by N."""
    packages = [path for path in folder.glob(f"{_STEP}*") if re.fullmatch(f"{_STEP}[0-9]{{1,18}}", path.name)]
    return sorted(packages, key=step_of)


def _age(path: Path) -> tuple[int, int]:
    """When a package was written, which steps alone do not tell: an earlier run may have come further."""
    return (path / MANIFEST).stat().st_mtime_ns, step_of(path)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(_STEP))
